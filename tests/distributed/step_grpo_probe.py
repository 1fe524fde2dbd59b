"""
`StepGRPOTrainer` as a script runs it. Each process also writes facts that only it knows next to the results.

    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml tests/distributed/step_grpo_probe.py SCENARIO.json ...

Each file holds the arguments of `train`. The scenarios run one after another, and each process writes `probe-RANK.json` into
their output folders. `PROBE_FSDP_ON_CPU` changes the run, see `probing.py`.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from probing import allow_fsdp_on_cpu, write_facts
from transformers import AutoTokenizer, set_seed

from trl_hrm import StepGRPOConfig, StepGRPOTrainer, StepReward


DEFAULTS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "ddp_find_unused_parameters": False,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "num_train_epochs": 1,
    "max_completion_length": 24,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # it would log a NaN loss as 0
    "save_strategy": "no",
}


def is_right(completions: list[str], **_) -> list[float]:
    """An outcome reward."""
    return [float("= 3" in completion) for completion in completions]


class Planted:
    """Rollout function that returns given completions, the same ones wherever a group's completions are spread over the ranks."""

    def __init__(self, completions: dict[str, list[str]], tokenizer):
        self.completions = completions
        self.tokenizer = tokenizer

    def __call__(self, prompts: list[str], trainer: StepGRPOTrainer) -> dict[str, list]:
        first = trainer.accelerator.process_index * len(prompts)
        texts = [self.completions[prompt][(first + i) % trainer.num_generations] for i, prompt in enumerate(prompts)]
        ids = self.tokenizer(texts)["input_ids"]
        return {
            "prompt_ids": self.tokenizer(prompts)["input_ids"],
            "completion_ids": [[*one, self.tokenizer.eos_token_id] for one in ids],
            "logprobs": None,
        }


def train(
    output_dir: str,
    model: str,
    reward_model: str,
    rows: list[dict[str, Any]],
    args: dict[str, Any],
    reward: dict[str, Any],
    outcome: bool = True,
    completions: dict[str, list[str]] | None = None,
    lora: dict[str, Any] | None = None,
) -> None:
    """
    Train the model of a folder on rows with prompts, and save it.

    Args:
        output_dir (`str`): Folder for all files.
        model, reward_model (`str`): Folders of the policy and of the reward model.
        rows (`list[dict[str, Any]]`): The dataset.
        args (`dict[str, Any]`): Arguments of `StepGRPOConfig` that replace or extend `DEFAULTS`.
        reward (`dict[str, Any]`): Arguments of `StepReward`.
        outcome (`bool`, *optional*): Whether to add the outcome reward.
        completions (`dict[str, list[str]]`, *optional*): Completions of each prompt. By default, the policy samples them.
        lora (`dict[str, Any]`, *optional*): Arguments of `LoraConfig`.
    """
    step_reward = StepReward(reward_model, **reward)  # before the config, which would make ZeRO-3 shard it
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = StepGRPOTrainer(
        model=model,
        reward_funcs=[is_right] if outcome else None,
        step_reward=step_reward,
        args=StepGRPOConfig(output_dir, **(DEFAULTS | args)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        rollout_func=None if completions is None else Planted(completions, tokenizer),
        peft_config=None if lora is None else LoraConfig(task_type="CAUSAL_LM", **lora),
    )
    shapes, compute_loss = [], trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        shapes.append([list(inputs["advantages"].shape), list(inputs["completion_ids"].shape)])
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    trainer.train()
    in_reward_model = sum(parameter.numel() for parameter in step_reward.scorer.model.parameters())
    write_facts(trainer, shapes=shapes, in_reward_model=in_reward_model)
    trainer.save_model(output_dir)


allow_fsdp_on_cpu()
gc.freeze()  # each training ends with a garbage collection, which would otherwise scan every imported module
for path in sys.argv[1:]:
    train(**json.loads(Path(path).read_text(encoding="utf-8")))
