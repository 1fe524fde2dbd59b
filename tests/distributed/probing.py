"""Shared by the probes, which run in separate processes and record facts that only those processes know."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback


class KillAtStep(TrainerCallback):
    """Kill the process with SIGKILL after an optimizer step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def heed_environment(trainer: Trainer) -> None:
    """`PROBE_KILL_AT_STEP`: the process kills itself with SIGKILL after this optimizer step."""
    if "PROBE_KILL_AT_STEP" in os.environ:
        trainer.add_callback(KillAtStep(int(os.environ["PROBE_KILL_AT_STEP"])))


def allow_fsdp_on_cpu() -> None:
    """`PROBE_FSDP_ON_CPU`: let accelerate choose FSDP without an accelerator. Call it before anything else."""
    if "PROBE_FSDP_ON_CPU" in os.environ:
        # without an accelerator, accelerate assumes plain data parallelism and ignores the FSDP settings
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def local_size(parameter: torch.Tensor) -> int:
    """Return how many elements of a parameter this process holds."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()


def sizes(model: torch.nn.Module) -> dict[str, int]:
    """Return how many elements of a model this process holds, and how many there are in total."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # by design, the last layers stay gathered after a forward pass
    parameters = list(model.parameters())
    return {
        "held": sum(map(local_size, parameters)),
        "in_all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
    }


def write_facts(trainer: Trainer, **more: Any) -> None:
    """Write what ran to `probe-RANK.json` in the output folder."""
    facts = {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "zero_stage": getattr(trainer.model_wrapped, "zero_optimization_stage", lambda: None)(),
        "wrapper": type(trainer.model_wrapped).__name__,
        **sizes(trainer.model_wrapped),
        "log_history": trainer.state.log_history,
        **more,
    }
    path = Path(trainer.args.output_dir, f"probe-{trainer.accelerator.process_index}.json")
    path.write_text(json.dumps(facts), encoding="utf-8")
