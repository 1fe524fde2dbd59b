"""
Train a policy with GRPO and process rewards: the steps of each completion are scored by a step reward model.

    accelerate launch recipes/grpo.py --config recipes/tiny/grpo.yaml

Command-line options override the YAML file, for example `--step_credit progress`.
"""

from trl_hrm.scripts.grpo import main, make_parser
from trl_hrm.scripts.training import run_script


if __name__ == "__main__":
    run_script(main, make_parser())
