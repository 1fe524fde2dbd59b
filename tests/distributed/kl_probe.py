"""
`KLSelfTrainer` as a recipe runs it. Each process also writes facts that only it knows next to the results.

    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml tests/distributed/kl_probe.py SCENARIO.json ...

Each file holds the arguments of `train`. The scenarios run one after another, and each process writes
`probe-RANK.json` into their output folders. Two environment variables change the run, see `probing.py`.
"""

import gc
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import LoraConfig
from probing import allow_fsdp_on_cpu, heed_environment, sizes, write_facts
from torch.distributed.tensor import DTensor
from transformers import set_seed

from trl_hrm import KLSelfConfig, KLSelfTrainer


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
    "train_sampling_strategy": "sequential",
    "max_length": None,
    "per_device_train_batch_size": 1,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # it would log a NaN loss as 0
    "save_strategy": "no",
}


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter, gathered from all ranks if it is sharded."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter):
            return parameter.detach().clone()
    return parameter.detach()


def digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a hash of names and exact values."""
    result = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(weights):
        result.update(name.removeprefix("module.").encode())
        result.update(whole(weight).cpu().contiguous().view(torch.uint8).numpy())
    return result.hexdigest()


class ProbedTrainer(KLSelfTrainer):
    def reference_facts(self) -> dict[str, Any]:
        """Return facts about the frozen copy, or about the weights that an adapter leaves frozen in the policy."""
        model = self.model if is_peft_model(self.model) else getattr(self.reference, "model", None)
        if model is None:
            return {}
        frozen = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
        return sizes(model) | {
            "num_frozen": len(frozen),
            "digest": digest(frozen),
            "in_training_mode": any(module.training for module in self.accelerator.unwrap_model(model).modules()),
            "has_gradient": any(weight.grad is not None for _, weight in frozen),
        }

    def train(self, *args, **kwargs):
        heed_environment(self)
        before = self.reference_facts()
        output = super().train(*args, **kwargs)
        write_facts(self, reference={"before": before, "after": self.reference_facts()})
        return output


def train(
    output_dir: str,
    model: str,
    rows: str,
    args: dict[str, Any],
    lora: dict[str, Any] | None = None,
    resume_from_checkpoint: str | None = None,
    evaluate_first: bool = False,
) -> None:
    """
    Train the model of a folder on the rows of a file, in their order, and save it.

    Args:
        output_dir (`str`): Folder for all files.
        model (`str`): Folder of the model.
        rows (`str`): JSON lines: prompts and completions.
        args (`dict[str, Any]`): Arguments of `KLSelfConfig` that replace or extend `DEFAULTS`.
        lora (`dict[str, Any]`, *optional*): Arguments of `LoraConfig`.
        resume_from_checkpoint (`str`, *optional*): Folder of the checkpoint to resume.
        evaluate_first (`bool`, *optional*): Evaluate before the training.
    """
    lines = Path(rows).read_text(encoding="utf-8").splitlines()
    set_seed(0)  # the adapter is drawn before the trainer sets its seed
    trainer = ProbedTrainer(
        model=model,
        args=KLSelfConfig(output_dir, **(DEFAULTS | args)),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        peft_config=None if lora is None else LoraConfig(task_type="CAUSAL_LM", **lora),
    )
    if evaluate_first:
        trainer.evaluate(trainer.train_dataset)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    trainer.save_model(output_dir)


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    gc.freeze()  # each training ends with a garbage collection, which would otherwise scan every imported module
    for path in sys.argv[1:]:
        train(**json.loads(Path(path).read_text(encoding="utf-8")))
    PartialState().wait_for_everyone()  # see `end_together` of the recipes
    PartialState().destroy_process_group()
