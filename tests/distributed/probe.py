"""
Run the recipe `recipes/hrm_reward.py`, or the one that `PROBE_RECIPE` names, unchanged. Each process also writes facts that only it knows next to the results.

    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml tests/distributed/probe.py ARGUMENTS OF THE RECIPE

Each process writes `probe-RANK.json` into the output folder after training. Two environment variables change the run, see
`probing.py`.
"""

import os
import runpy
from pathlib import Path

from probing import allow_fsdp_on_cpu, heed_environment, write_facts

import trl_hrm


RECIPE = os.environ.get("PROBE_RECIPE", "hrm_reward")
TRAINER = {"hrm_reward": "HRMRewardTrainer", "implicit_prm": "ImplicitPRMTrainer"}[RECIPE]


class ProbedTrainer(getattr(trl_hrm, TRAINER)):
    def train(self, *args, **kwargs):
        heed_environment(self)
        output = super().train(*args, **kwargs)
        write_facts(self)
        return output


allow_fsdp_on_cpu()
setattr(trl_hrm, TRAINER, ProbedTrainer)  # the recipe imports it from here
recipe = Path(__file__).resolve().parents[2] / "recipes" / f"{RECIPE}.py"
runpy.run_path(str(recipe), run_name="__main__")
