"""How well step scores agree with step labels, as a module of the `evaluate` library."""

import datasets
import evaluate
import numpy as np

from trl_hrm.step_metrics import step_metrics


DESCRIPTION = """
How well the scores that a step reward model gives to the steps of solutions agree with their labels: accuracy, balanced
accuracy, F1 of the wrong steps, AUROC and expected calibration error. A step counts as correct from 0.5 on.
"""

INPUTS = """
Args:
    predictions (`list[list[float]]`):
        For each solution the scores of its steps, in `[0, 1]`.
    references (`list[list[float or None]]`):
        For each solution the labels of its steps: the probability that the step is correct, or a bool. `None` for steps
        that were not judged; they are left out.

Returns:
    `dict[str, float]`: `num_steps`, `accuracy`, `ece`, `error_f1`, `balanced_accuracy` and `auroc`. What is not defined on these
    labels is left out.

Example:

    >>> step_accuracy = evaluate.load("trl_hrm/metrics/step_accuracy")
    >>> step_accuracy.compute(predictions=[[0.9, 0.2], [0.6, 0.7]], references=[[1, 0], [0, None]])["accuracy"]
    0.6666666666666666
"""


class StepAccuracy(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.List(datasets.Value("float64")),
                }
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float | None]]) -> dict[str, float]:
        judged = []
        for i, (scores, labels) in enumerate(zip(predictions, references, strict=True)):
            if len(scores) != len(labels):
                raise ValueError(
                    f"solution {i}: got {len(scores)} scores and {len(labels)} labels, expected one of each per step."
                )
            judged += [pair for pair in zip(scores, labels, strict=True) if pair[1] is not None]
        pairs = np.array(judged, dtype=float).reshape(-1, 2)
        if not ((pairs >= 0) & (pairs <= 1)).all():
            raise ValueError("scores and labels must be numbers from 0 to 1; found others, or NaN.")
        return step_metrics(pairs[:, 0], pairs[:, 1])
