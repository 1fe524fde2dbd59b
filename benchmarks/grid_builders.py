"""
Speed of the builders of grid puzzles: boards per CPU second, for making a board and for finding its canonical form.

```bash
python benchmarks/grid_builders.py
```
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import time

from trl_hrm.reasoning.data.build import BoardMaker


# Name, goal in boards per CPU second, options
BUILDERS = [
    ("Sudoku 4x4, minimal", None, {"family": "sudoku", "size": 4}),
    ("Sudoku 6x6, minimal", 100, {"family": "sudoku", "size": 6}),
    ("Sudoku 6x6, 12 clues", None, {"family": "sudoku", "size": 6, "clues": 12}),
    ("Sudoku 9x9, minimal", 12, {"family": "sudoku", "size": 9}),
    ("Sudoku 9x9, 36 clues", None, {"family": "sudoku", "size": 9, "clues": 36}),
    ("maze 9x9", 1000, {"family": "maze", "size": 9}),
    ("maze 9x9, loops 0.1", None, {"family": "maze", "size": 9, "loops": 0.1}),
    ("maze 29x29, far", None, {"family": "maze", "size": 29, "endpoints": "far"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds per builder and round (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    args = parser.parse_args()

    print(
        f"python {platform.python_version()}, numpy {importlib.metadata.version('numpy')}, {os.cpu_count()} cores, 1 used; boards per CPU second"
    )
    print(
        f"{'builder':<24}{'boards/s (median)':>18}{'all rounds':>26}{'goal':>7}{'dropped':>9}{'rating':>8}{'clues':>7}"
    )
    rates = {name: [] for name, *_ in BUILDERS}
    boards = {name: [] for name in rates}
    for first in range(args.rounds):
        for name, _, options in BUILDERS:
            maker = BoardMaker(seed=0, **options)
            maker.make(-1)  # the first board prepares tables
            start = time.process_time()
            made = []
            while time.process_time() - start < args.seconds:
                made.append(maker.make(first * 1_000_000 + len(made)))
            rates[name].append(len(made) / (time.process_time() - start))
            boards[name] += made
    for name, goal, options in BUILDERS:
        kept = [board for board in boards[name] if not isinstance(board, str)]
        clues = ""
        if options["family"] == "sudoku":
            clues = f"{statistics.mean(len(board.puzzle) - board.puzzle.count(1) for board in kept):.1f}"
        rounds = ", ".join(f"{rate:,.0f}" for rate in rates[name])
        print(
            f"{name:<24}{statistics.median(rates[name]):>18,.0f}{rounds:>26}{goal or '':>7}{1 - len(kept) / len(boards[name]):>9.1%}"
            f"{statistics.mean(board.rating for board in kept):>8.1f}{clues:>7}"
        )


if __name__ == "__main__":
    main()
