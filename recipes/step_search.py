"""
Search for solutions step by step with a reward model. Same as `trl-hrm step-search`, as a script for `accelerate launch`.

    accelerate launch recipes/step_search.py --config recipes/tiny/best_of_n.yaml --output_dir runs/tiny-step-search

Each process searches a part of the problems, and the last one to finish merges the results. Command-line options override the YAML
file, for example `--n 1 4 16`.
"""

import sys

from trl_hrm.cli import main


if __name__ == "__main__":
    sys.exit(main(["step-search", *sys.argv[1:]]))
