"""Accuracy of step scores, as a metric of the `evaluate` library."""

import datasets
import evaluate
import numpy as np

from trl_hrm.step_metrics import step_metrics


DESCRIPTION = """
Agreement of the scores of a step reward model with the labels of the steps: accuracy, balanced accuracy, F1 of the wrong steps, AUROC
and expected calibration error. A step with a score or label of at least 0.5 counts as correct.
"""

INPUTS = """
Args:
    predictions (`list[list[float]]`):
        Scores of the steps of each solution, in `[0, 1]`.
    references (`list[list[float or None]]`):
        Labels of the steps of each solution: bools, or probabilities that the step is correct. Steps with the label `None` are
        ignored.

Returns:
    `dict[str, float]`: `num_steps`, `accuracy`, `ece`, `error_f1`, `balanced_accuracy` and `auroc`. Values that are not defined on
    these labels are omitted.

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
                    f"solution {i}: got {len(scores)} scores and {len(labels)} labels. Each step must have one score and one "
                    "label."
                )
            judged += [pair for pair in zip(scores, labels, strict=True) if pair[1] is not None]
        pairs = np.array(judged, dtype=float).reshape(-1, 2)
        if not ((pairs >= 0) & (pairs <= 1)).all():
            raise ValueError(
                "A score or label is NaN or outside of [0, 1]. Scores and labels must be numbers from 0 to 1."
            )
        return step_metrics(pairs[:, 0], pairs[:, 1])
