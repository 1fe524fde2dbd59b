"""Accuracy of the best of N solutions by a reward model's scores, as a module of the `evaluate` library."""

import datasets
import evaluate

from trl_hrm.evaluation.curves import plain_curves


DESCRIPTION = """
Accuracy of the solution that a reward model scores highest among the first N of each problem, for one N or several, with 95 %
intervals over problems.
"""

INPUTS = """
Args:
    predictions (`list[list[float or None]]`):
        For each problem the scores of its solutions, in `[0, 1]`. `None` for one that could not be scored: it is chosen last.
    references (`list[list[bool or None]]`):
        Whether each solution is right. `None` for one that could not be graded: where it is chosen, the problem does not count.
    texts (`list[list[str]]`):
        The solutions. Of equal scores the smallest text wins, so that the order of the solutions decides nothing.
    n (`list[int]`, *optional*):
        How many solutions are chosen from. By default the powers of two up to the number that every problem has, and that.
    num_draws (`int`, *optional*):
        Choose among so many random sets of N solutions in place of the first N, for less variance.
    seed (`int`, *optional*, defaults to `42`):
        Seed of the draws.

Returns:
    `dict[str, list]`: `n`, and for each of them `accuracy`, and `low` and `high` of its 95 % interval over problems (Wilson's score
    interval).

Example:

    >>> best_of_n_accuracy = evaluate.load("trl_hrm/metrics/best_of_n_accuracy")
    >>> scores, right, texts = [[0.2, 0.9], [0.7, 0.1]], [[False, True], [False, True]], [["a", "b"], ["a", "b"]]
    >>> best_of_n_accuracy.compute(predictions=scores, references=right, texts=texts, n=[1, 2])["accuracy"]
    [0.0, 0.5]
"""


class BestOfNAccuracy(evaluate.Metric):
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
        num_draws: int | None = None,
        seed: int = 42,
    ) -> dict[str, list]:
        curve = plain_curves(predictions, references, texts, n, num_draws, seed).curves["best_of_n/score"]
        return {name: [point[name] for point in curve] for name in ("n", "accuracy", "low", "high")}
