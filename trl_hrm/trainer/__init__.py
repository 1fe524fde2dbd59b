"""The trainers and their configs: HRM rewards, implicit PRM, KL self-training, GRPO with step rewards."""
