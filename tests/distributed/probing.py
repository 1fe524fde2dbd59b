"""Shared by the probes, which run in separate processes and record facts that only those processes know."""

import json
import os
import signal
import threading
import time
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


def kill_all_at_file(folder: Path, files: int) -> None:
    """Kill this process, its siblings and the launcher when a folder has a number of files."""
    while not folder.exists() or sum(path.is_file() for path in folder.rglob("*")) < files:
        time.sleep(0.0002)
    siblings = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    for pid in (*(int(pid) for pid in siblings if int(pid) != os.getpid()), os.getpid()):
        os.kill(pid, signal.SIGKILL)


def heed_environment(trainer: Trainer) -> None:
    """
    `PROBE_KILL_AT_STEP`: the process kills itself with SIGKILL after this optimizer step.
    `PROBE_KILL_AT_FILE=STEP,FILES`: all processes are killed when the checkpoint of this step has this number of files.
    `PROBE_NAN_AT_STEP`: on the last rank, the loss of this optimizer step is NaN.
    """
    if "PROBE_KILL_AT_FILE" in os.environ and trainer.is_world_process_zero():
        step, files = os.environ["PROBE_KILL_AT_FILE"].split(",")
        folder = Path(trainer.args.output_dir, f"checkpoint-{step}")
        threading.Thread(target=kill_all_at_file, args=(folder, int(files)), daemon=True).start()
    if "PROBE_NAN_AT_STEP" in os.environ and trainer.accelerator.is_last_process:
        step, compute = int(os.environ["PROBE_NAN_AT_STEP"]), trainer.compute_loss

        def compute_loss(*args, **kwargs):
            loss = compute(*args, **kwargs)
            return loss * float("nan") if trainer.state.global_step + 1 == step else loss

        trainer.compute_loss = compute_loss
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
