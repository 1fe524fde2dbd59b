"""
Train an implicit process reward model: step rewards from solutions that are only labelled right or wrong.

    accelerate launch recipes/implicit_prm.py --config recipes/tiny/implicit_prm.yaml --dataset_name data/outcomes

Command-line options override the YAML file, for example `--beta 0.1`.
"""

from trl_hrm.scripts.implicit_prm import main, make_parser
from trl_hrm.scripts.training import run_script


if __name__ == "__main__":
    run_script(main, make_parser())
