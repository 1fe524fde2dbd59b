"""ProcessBench's F1, as a module of the `evaluate` library."""

import datasets
import evaluate
import numpy as np

from trl_hrm.evaluation.benchmarks.process_bench import predict_first_error, process_bench_f1, tally_first_error


DESCRIPTION = """
ProcessBench's F1: the harmonic mean of two accuracies at finding the first wrong step, the one on solutions with an error
and the one on solutions without. The first step that scores below the threshold is judged to be the first wrong one.
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
        For each solution the scores of its steps, in `[0, 1]`.
    references (`list[int]`):
        For each solution the index of its first wrong step, -1 if there is none.
    threshold (`float`, *optional*, defaults to `0.5`):
        A step is judged wrong if its score is below it.

Returns:
    `dict[str, float or None]`: `f1`, `error_accuracy`, `correct_accuracy`, `accuracy` over all solutions, and the numbers
    `num_with_error` and `num_without`. `None` where not defined: F1 needs solutions of both kinds.

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
            raise ValueError("there is no solution, expected one at least.")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}, expected a number from 0 to 1, as scores are.")
        for i, (scores, first_error) in enumerate(zip(predictions, references, strict=True)):
            if not scores or not all(score is not None and 0 <= score <= 1 for score in scores):
                raise ValueError(
                    f"solution {i}: the scores are {scores}, expected a number from 0 to 1 for each step."
                )
            if first_error not in range(-1, len(scores)):
                raise ValueError(
                    f"solution {i}: the first wrong step is {first_error}, expected an index of {len(scores)} steps, or -1."
                )
        found = [predict_first_error(scores, threshold) for scores in predictions]
        tallies = [tally_first_error(*pair) for pair in zip(found, references, strict=True)]
        metrics = process_bench_f1(np.sum(tallies, axis=0))
        return {name: None if np.isnan(value) else float(value) for name, value in metrics.items()}
