"""
Train a Hierarchical Reasoning Model (HRM), TRM or one of their controls on grid puzzles.

    trl-hrm build-grid sudoku --train_csv train.csv --test_csv test.csv --output_dir data/sudoku-extreme-1k
    accelerate launch recipes/reasoning.py --config recipes/reasoning/sudoku_extreme.yaml

Command-line options override the YAML file, for example `--system trm`.
"""

from trl_hrm.scripts.train_grid import main, make_parser
from trl_hrm.scripts.training import run_script


if __name__ == "__main__":
    run_script(main, make_parser())
