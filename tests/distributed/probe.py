"""
The recipe `recipes/hrm_reward.py`, run as it is, with what only its own processes can tell written beside its results.

    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml tests/distributed/probe.py ARGUMENTS OF THE RECIPE

Each process writes `probe-RANK.json` into the output folder after training. Two environment variables change the run:

- `PROBE_KILL_AT_STEP`: the process kills itself by SIGKILL after this optimizer step.
- `PROBE_FSDP_ON_CPU`: lets accelerate choose FSDP without an accelerator.
"""

import json
import os
import runpy
import signal
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import trl_hrm
from trl_hrm import HRMRewardTrainer


class KillAtStep(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def local_size(parameter: torch.Tensor) -> int:
    """Numbers of a parameter that this process holds."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()


class ProbedTrainer(HRMRewardTrainer):
    def train(self, *args, **kwargs):
        if "PROBE_KILL_AT_STEP" in os.environ:
            self.add_callback(KillAtStep(int(os.environ["PROBE_KILL_AT_STEP"])))
        output = super().train(*args, **kwargs)
        for module in self.model_wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the last layers stay whole after a forward pass, by design
        parameters = list(self.model_wrapped.parameters())
        facts = {
            "num_processes": self.accelerator.num_processes,
            "distributed_type": self.accelerator.distributed_type.value,
            "zero_stage": getattr(self.model_wrapped, "zero_optimization_stage", lambda: None)(),
            "wrapper": type(self.model_wrapped).__name__,
            "held": sum(map(local_size, parameters)),
            "in_all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
            "log_history": self.state.log_history,
        }
        path = Path(self.args.output_dir, f"probe-{self.accelerator.process_index}.json")
        path.write_text(json.dumps(facts), encoding="utf-8")
        return output


if "PROBE_FSDP_ON_CPU" in os.environ:
    # accelerate takes a run without an accelerator for plain data parallelism and ignores the FSDP settings
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

trl_hrm.HRMRewardTrainer = ProbedTrainer  # where the recipe takes it from
recipe = Path(__file__).resolve().parents[2] / "recipes" / "hrm_reward.py"
runpy.run_path(str(recipe), run_name="__main__")
