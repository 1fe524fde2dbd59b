"""What all trainers share: complete checkpoints, resuming, stopping at divergence, model cards, pushes to the Hub."""
