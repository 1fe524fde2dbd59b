"""What the probes share: they run in processes of their own, and tell what only those can know."""

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
    """SIGKILL after an optimizer step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def heed_environment(trainer: Trainer) -> None:
    """`PROBE_KILL_AT_STEP`: the process kills itself by SIGKILL after this optimizer step."""
    if "PROBE_KILL_AT_STEP" in os.environ:
        trainer.add_callback(KillAtStep(int(os.environ["PROBE_KILL_AT_STEP"])))


def allow_fsdp_on_cpu() -> None:
    """`PROBE_FSDP_ON_CPU`: lets accelerate choose FSDP without an accelerator. Before anything else is done."""
    if "PROBE_FSDP_ON_CPU" in os.environ:
        # accelerate takes a run without an accelerator for plain data parallelism and ignores the FSDP settings
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def local_size(parameter: torch.Tensor) -> int:
    """Numbers of a parameter that this process holds."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()


def sizes(model: torch.nn.Module) -> dict[str, int]:
    """Numbers that this process holds of a model, and all there are."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the last layers stay whole after a forward pass, by design
    parameters = list(model.parameters())
    return {
        "held": sum(map(local_size, parameters)),
        "in_all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
    }


def write_facts(trainer: Trainer, **more: Any) -> None:
    """What ran, as `probe-RANK.json` in the output folder."""
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
