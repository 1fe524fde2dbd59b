"""
Choose among N solutions with a reward model, with the settings of a YAML file: `trl-hrm best-of-n` on one or several processes.

    accelerate launch recipes/best_of_n.py --config recipes/tiny/best_of_n.yaml

Each process samples and scores a part of the problems, and the first one makes one result of all parts. Every setting of the
YAML can be overridden on the command line, for example `--n 1 4 16`.
"""

import sys

from trl_hrm.cli import main


if __name__ == "__main__":
    sys.exit(main(["best-of-n", *sys.argv[1:]]))
