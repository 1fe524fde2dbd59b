"""
Train a policy on its best trajectories, with a log-scaled KL penalty towards a reference model (KL self-training). With
`kl_coef: 0`, this is supervised fine-tuning, the last step of RAFT.

    accelerate launch recipes/kl_self.py --config recipes/tiny/kl_self.yaml

Command-line options override the YAML file, for example `--kl_coef 0.01`.
"""

from trl_hrm.scripts.kl_self import main, make_parser
from trl_hrm.scripts.training import run_script


if __name__ == "__main__":
    run_script(main, make_parser())
