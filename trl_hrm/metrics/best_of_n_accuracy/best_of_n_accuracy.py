"""Best-of-N accuracy of a reward model, as a metric of the `evaluate` library."""

import datasets
import evaluate

from trl_hrm.evaluation.curves import plain_curves


DESCRIPTION = """
Accuracy of the solution with the highest score of a reward model among N solutions of each problem, for one or several N, with 95 %
intervals over problems. It is the exact mean over all subsets of N of the solutions, so that N = 1 gives pass@1.
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
    `dict[str, list]`: `n`, and for each N the `accuracy` and the bounds `low` and `high` of its 95 % interval over problems (Wilson's
    score interval).

Example:

    >>> best_of_n_accuracy = evaluate.load("trl_hrm/metrics/best_of_n_accuracy")
    >>> scores, right, texts = [[0.2, 0.9], [0.7, 0.1]], [[False, True], [True, True]], [["a", "b"], ["a", "b"]]
    >>> best_of_n_accuracy.compute(predictions=scores, references=right, texts=texts, n=[1, 2])["accuracy"]
    [0.75, 1.0]
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
    ) -> dict[str, list]:
        curve = plain_curves(predictions, references, texts, n).curves["best_of_n/score"]
        return {name: [point[name] for point in curve] for name in ("n", "accuracy", "low", "high")}
