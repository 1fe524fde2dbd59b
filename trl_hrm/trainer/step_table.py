"""Show completions with their steps coloured by reward: in TRL's table of completions, and as a page."""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..data.problems import content_text
from ..io import replacing
from ..pages.page import render
from ..rewards import ScoredCompletion
from ..terminal import one_line


# Blue, white and orange are distinguishable for colour-blind readers, on light and on dark pages
SQUARES = ((2 / 3, "🟦"), (1 / 3, "⬜"), (-math.inf, "🟧"))
REJECTED = "⬛"
MAX_CHARACTERS = 200  # of a step in the table


def coloured_steps(scored: ScoredCompletion, advantages: Sequence[float] | None = None) -> str:
    """
    Return the steps of a completion for a cell of a table: one line per step, with a coloured square, the step reward and the
    advantage. The first line has the squares of all steps, because trackio shows only the beginning of long cells.

    A square is blue for rewards from 2/3, orange for rewards below 1/3, and otherwise white. Long steps are shortened, since the
    table also has the whole completion.

    Args:
        scored ([`~rewards.ScoredCompletion`]):
            Completion with S step rewards, or with one reward and the guards that rejected it, or without a reward.
        advantages (`Sequence[float]`, *optional*):
            Advantages of the step rewards: S values, or one if a guard rejected the completion.

    Example:

    ```python
    >>> scored = ScoredCompletion(["1 + 1 = 2.\n\n2 + 2 = 5."], [[(0, 10), (12, 22)]], [0.9, 0.1], 0.1, [])
    >>> print(coloured_steps(scored, [0.4, -0.4]))
    🟦🟧
    🟦 0.90 (+0.40) 1 + 1 = 2.
    🟧 0.10 (-0.40) 2 + 2 = 5.
    ```
    """
    if scored.step_rewards is None:
        return "no process reward"
    values = _values(scored.step_rewards, advantages)
    if scored.scores is None:
        return f"{REJECTED} {values[0]} rejected: {', '.join(scored.guards)}"
    squares = [next(square for least, square in SQUARES if score >= least) for score in scored.scores]
    lines = [
        f"{square} {value} {one_line(step, MAX_CHARACTERS)}"
        for square, value, step in zip(squares, values, scored.steps, strict=True)
    ]
    return "\n".join(["".join(squares), *lines])
