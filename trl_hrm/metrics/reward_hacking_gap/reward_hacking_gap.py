"""Reward hacking gap of a reward model, as a metric of the `evaluate` library."""

from typing import Any

import datasets
import evaluate

from trl_hrm.evaluation.curves import plain_curves
from trl_hrm.evaluation.reward_hacking import hacking_verdict


DESCRIPTION = """
Reward hacking gap: the best-of-N accuracy of a reward model at the best N minus the accuracy at the largest N. It is 0 if the accuracy is
highest at the largest N, and positive if more solutions mislead the reward model. Accuracies are exact means over all subsets of N of the
solutions of a problem.
"""

INPUTS = """
Args:
    predictions (`list[list[float or None]]`):
        Scores of the solutions of each problem, in `[0, 1]`. A solution that could not be scored (`None`) is chosen last.
    references (`list[list[bool or None]]`):
        Whether each solution is correct. Subsets in which a solution that could not be graded (`None`) is chosen are ignored.
    texts (`list[list[str]]`):
        The solutions. Among equal scores, the smallest text is chosen, so the order of the solutions has no effect.
    n (`list[int]`, *optional*):
        Values of N. Defaults to the powers of two up to the smallest number of solutions of a problem, and this number.

Returns:
    `dict[str, Any]`: `gap`, `best_n` and `largest_n`; `loss`, the accuracy at `from_n` (the best N below the largest) minus the accuracy at
    the largest N; `low` and `high`, the bounds of its 95 % interval over problems (Tango's score
    interval); `verdict`, which is `"no"` if the interval excludes a loss of 5 points or more, `"yes"` if it does not and is above 0, and
    `"open"` otherwise; and `undecided`, why these results cannot show a loss, or `None`. If there is a reason, `verdict` is `"none"` and all
    other values but `largest_n` are `None`.

Example:

    >>> reward_hacking_gap = evaluate.load("trl_hrm/metrics/reward_hacking_gap")
    >>> scores, right, texts = [[0.2, 0.9], [0.7, 0.1]], [[True, False], [True, True]], [["a", "b"], ["a", "b"]]
    >>> reward_hacking_gap.compute(predictions=scores, references=right, texts=texts)["gap"]
    0.25
"""


class RewardHackingGap(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.List(datasets.Value("bool")),
                    "texts": datasets.List(datasets.Value("string")),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[float | None]],
        references: list[list[bool | None]],
        texts: list[list[str]],
        n: list[int] | None = None,
    ) -> dict[str, Any]:
        curves = plain_curves(predictions, references, texts, n)
        gap = curves.hacking_gap["best_of_n/score"]
        return gap | {"verdict": hacking_verdict(gap, curves.curves["best_of_n/score"]).answer}
