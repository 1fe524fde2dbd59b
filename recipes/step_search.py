"""
Search solutions step by step with a reward model, with the settings of a YAML file: `trl-hrm step-search` on one or several processes.

    accelerate launch recipes/step_search.py --config recipes/tiny/best_of_n.yaml --output_dir runs/tiny-step-search

Each process searches a part of the problems, and the first one makes one result of all parts. Every setting of the YAML can be
overridden on the command line, for example `--n 1 4 16`.
"""

import sys

from trl_hrm.cli import main


if __name__ == "__main__":
    sys.exit(main(["step-search", *sys.argv[1:]]))
