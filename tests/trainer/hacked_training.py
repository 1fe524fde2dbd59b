"""
A training whose process reward can be hacked. As a program, it is killed after the checkpoint of a step, or stops when the process reward
is hacked and writes what each process knows:

    python -m tests.trainer.hacked_training FOLDER STEP
    python -m torch.distributed.run --nproc_per_node 2 -m tests.trainer.hacked_training FOLDER stop
"""

import os
import signal
import sys
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback

from trl_hrm import RewardHackingCallback, StepFormat, StepGRPOConfig, StepGRPOTrainer, StepReward, StepScorer
from trl_hrm.io import write_json

from ..helpers import HEADS, tiny_model, tiny_tokenizer


def share_even(text: str) -> float:
    """Return the share of characters with an even code: about half of a random text, and easy to learn."""
    return sum(ord(character) % 2 == 0 for character in text) / len(text)


class EvenScorer(StepScorer):
    """A reward model with a flaw: it likes characters with an even code."""

    def score(self, problems, solutions, spans=(1,), combine="max"):
        return [[[share_even(step) for step in steps] for steps in tree] for tree in solutions]


def few_even(completions, **columns):
    """Solutions with few even characters are right. Training on the process reward makes fewer of them right."""
    return [float(bool(text) and share_even(text) < 0.6) for text in completions]


def many_even(completions, **columns):
    """Solutions with many even characters are right. Training on the process reward makes more of them right."""
    return [float(bool(text) and share_even(text) >= 0.6) for text in completions]


def make_trainer(folder, right=few_even, **args):
    tokenizer = tiny_tokenizer()
    step_reward = StepReward(
        EvenScorer(tiny_model(), tokenizer, StepFormat()),
        segmentation="sentence",
        **{"min_steps": 1, "max_repeated": None, "max_blank": None},
    )
    prompts = [{"prompt": f"{i} + {i + 1}?", "number": i / 100} for i in range(77)]
    settings = {
        "max_steps": 8,
        "num_generations": 8,
        "per_device_train_batch_size": 16,
        "max_completion_length": 8,
        "learning_rate": 0.005,
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "per_device_eval_batch_size": 24,
        "num_generations_eval": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return StepGRPOTrainer(
        tiny_model(HEADS["lm"]),
        reward_funcs=[right],
        step_reward=step_reward,
        args=StepGRPOConfig(str(folder), **(settings | {"reward_weights": [0.0]} | args)),
        train_dataset=Dataset.from_list(prompts[:32]),
        eval_dataset=Dataset.from_list(prompts[32:]),  # 45, so that the last batch is incomplete
        processing_class=tokenizer,
    )


class Killed(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, step = sys.argv[1:]
    if step == "stop":
        trainer = make_trainer(folder, stop_on_reward_hacking=True, max_steps=16, per_device_train_batch_size=8)
        trainer.train()
        facts = {"step": trainer.state.global_step, "rewards": trainer.eval_rewards.tolist()}
        write_json(Path(folder) / f"rank{trainer.accelerator.process_index}.json", facts)
    else:
        trainer = make_trainer(folder)
        trainer.add_callback(RewardHackingCallback(trainer))
        trainer.add_callback(Killed(int(step)))
        trainer.train()
