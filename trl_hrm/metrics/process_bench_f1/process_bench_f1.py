"""F1 of ProcessBench, as a metric of the `evaluate` library."""

import datasets
import evaluate
import numpy as np

from trl_hrm.evaluation.benchmarks.process_bench import predict_first_error, process_bench_f1, tally_first_error


DESCRIPTION = """
F1 of ProcessBench: the harmonic mean of the accuracies of finding the first wrong step on solutions with and without an error. The
first step with a score below the threshold is predicted to be the first wrong step.
"""

CITATION = """
@article{zheng2024processbench,
  title   = {{ProcessBench}: Identifying Process Errors in Mathematical Reasoning},
  author  = {Zheng, Chujie and Zhang, Zhenru and Zhang, Beichen and Lin, Runji and Lu, Keming and Yu, Bowen and Liu, Dayiheng and Zhou, Jingren and Lin, Junyang},
  journal = {arXiv preprint arXiv:2412.06559},
  year    = {2024}
}
"""

INPUTS = """
Args:
    predictions (`list[list[float]]`):
        Scores of the steps of each solution, in `[0, 1]`.
    references (`list[int]`):
        Index of the first wrong step of each solution, or -1 if all steps are correct.
    threshold (`float`, *optional*, defaults to `0.5`):
        A step with a score below this value counts as wrong.

Returns:
    `dict[str, float or None]`: `f1`, `error_accuracy`, `correct_accuracy`, `accuracy` over all solutions, and the numbers of solutions
    `num_with_error` and `num_without`. A value that is not defined is `None`: F1 needs solutions with and without an error.

Example:

    >>> process_bench_f1 = evaluate.load("trl_hrm/metrics/process_bench_f1")
    >>> process_bench_f1.compute(predictions=[[0.9, 0.2], [0.9, 0.8], [0.1]], references=[1, -1, -1])["f1"]
    0.6666666666666666
"""


class ProcessBenchF1(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[int], threshold: float = 0.5
    ) -> dict[str, float | None]:
        if not predictions:
            raise ValueError("`predictions` is empty. It must contain at least one solution.")
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` is {threshold}. It must be a number from 0 to 1.")
        for i, (scores, first_error) in enumerate(zip(predictions, references, strict=True)):
            if not scores or not all(score is not None and 0 <= score <= 1 for score in scores):
                raise ValueError(f"solution {i}: the scores are {scores}. Each step must have a score from 0 to 1.")
            if first_error not in range(-1, len(scores)):
                raise ValueError(
                    f"solution {i}: the first wrong step is {first_error}. It must be the index of one of {len(scores)} steps, or "
                    "-1."
                )
        found = [predict_first_error(scores, threshold) for scores in predictions]
        tallies = [tally_first_error(*pair) for pair in zip(found, references, strict=True)]
        metrics = process_bench_f1(np.sum(tallies, axis=0))
        return {name: None if np.isnan(value) else float(value) for name, value in metrics.items()}
