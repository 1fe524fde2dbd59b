"""
Choose among N solutions with a reward model. Same as `trl-hrm best-of-n`, as a script for `accelerate launch`.

    accelerate launch recipes/best_of_n.py --config recipes/tiny/best_of_n.yaml

Each process samples and scores a part of the problems, and the first one merges the results. Command-line options override the
YAML file, for example `--n 1 4 16`.
"""

import sys

from trl_hrm.cli import main


if __name__ == "__main__":
    sys.exit(main(["best-of-n", *sys.argv[1:]]))
