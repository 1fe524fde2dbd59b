r"""
ProcessBench: find the first wrong step of a solution, or predict that all steps are correct
([Zheng et al., 2024](https://huggingface.co/papers/2412.06559)).

```json
{"id": "gsm8k-7", "generator": "a policy", "problem": "What is 1 + 2 + 3?", "steps": ["1 + 2 = 3.", "3 + 3 = 7."], "final_answer_correct": false, "label": 1}
```

`label` is the index of the first wrong step, from 0, or -1 if no step is wrong. The four subsets `gsm8k`, `math`,
`olympiadbench` and `omnimath` are splits or files with these names, or values of a column `subset`. For rows without
an `id`, the index of the row in the file is used.

Rows of MR-GSM8K ([Zeng et al., 2023](https://huggingface.co/papers/2312.17080)) and of ReasonEval's MR-MATH
([Xia et al., 2024](https://huggingface.co/papers/2404.05692)) are supported too:

```json
{"uuid": "1", "question": "What is 1 + 2 + 3?", "model_output_steps": ["1 + 2 = 3.", "3 + 3 = 7."], "model_output_solution_correctness": "wrong", "model_output_solution_first_error_step": 2}
```

Their first wrong step is counted from 1, or is `"N/A"` if no step is wrong. Solutions that are labelled wrong but have
no wrong step are dropped, as in ReasonEval's script.

The predicted step is the first step with a score *below* the threshold. If no score is, the solution is predicted to
have no error. For each subset, with accuracy as the share of rows that are predicted exactly,

    F1 = 2 · accuracy on rows with an error · accuracy on rows without / (sum of the two)

F1 is 0 if both accuracies are 0, and undefined if a subset has only rows with or only rows without an error. The paper
uses the unweighted mean over subsets. TRL's evaluation of its models weighted subsets by rows. The results contain
both.

Checked against the authors' scripts: the columns, the -1, the first wrong step, F1 from the two accuracies, and the
mean over subsets. Their scripts use the more probable class at each step, and the wrong class for ties, so only scores
of exactly 0.5 differ. For models with arbitrary scores they tune the threshold on the F1 of `gsm8k`; here see `tuned`
in the results. Not checked: the original rows, which were not available.
"""

from collections.abc import Sequence

import numpy as np

from ...data.benchmark_rows import PROCESS_BENCH_COLUMNS, Solution, adapt, parse_process_bench
from .suite import Suite


def predict_first_error(scores: Sequence[float], threshold: float) -> int:
    """
    Return the index of the first step that is classified as wrong.

    Args:
        scores (`Sequence[float]`):
            Scores of the S steps of a solution, in `[0, 1]`.
        threshold (`float`):
            Steps with a score below the threshold are classified as wrong.

    Returns:
        `int`: Index of the step, or -1 if no step is classified as wrong.

    Example:

    ```python
    >>> predict_first_error([0.9, 0.5, 0.2], 0.5)
    2
    ```
    """
    return next((i for i, score in enumerate(scores) if score < threshold), -1)


OUTCOMES = (((1, 1, 0, 0), (0, 1, 0, 0)), ((0, 0, 1, 1), (0, 0, 0, 1)))  # see `tally_first_error`


def tally_first_error(found: int, first_error: int) -> tuple[int, int, int, int]:
    """Count for one solution: errors found, solutions with an error, correct solutions recognised, correct solutions."""
    hit = int(found == first_error)
    return (hit, 1, 0, 0) if first_error >= 0 else (0, 0, hit, 1)


def tally(solution: Solution, scores: Sequence[float], threshold: float) -> tuple[int, int, int, int]:
    """Tally a solution by its predicted first error. See [`tally_first_error`]."""
    return tally_first_error(predict_first_error(scores, threshold), solution.first_error)


def process_bench_f1(sums: np.ndarray) -> dict[str, np.ndarray]:
    """
    Compute the metrics of a subset.

    Args:
        sums (`np.ndarray`):
            Sums of [`tally_first_error`]. Shape `(..., 4)`.

    Returns:
        `dict[str, np.ndarray]`: `f1`, `error_accuracy`, `correct_accuracy`, and `accuracy` over all rows (NaN if
        undefined), `num_with_error` and `num_without`. Shape `(...)`.
    """
    errors_found, num_errors, correct_found, num_correct = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        error_accuracy, correct_accuracy = errors_found / num_errors, correct_found / num_correct
        total = error_accuracy + correct_accuracy
        f1 = np.where(total == 0, 0.0, 2 * error_accuracy * correct_accuracy / total)
        accuracy = (errors_found + correct_found) / (num_errors + num_correct)
    return {
        "f1": f1,
        "error_accuracy": error_accuracy,
        "correct_accuracy": correct_accuracy,
        "accuracy": accuracy,
        "num_with_error": num_errors,
        "num_without": num_correct,
    }


def summarize(sums: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Compute the metrics of each subset, and the mean F1 over the subsets where it is defined. See [`Suite`]."""
    subsets = {name: process_bench_f1(values) for name, values in sums.items()}
    f1 = np.stack([values["f1"] for values in subsets.values()])
    rows = np.stack([values["num_with_error"] + values["num_without"] for values in subsets.values()])
    return {
        "subsets": subsets,
        "averages": {
            "unweighted": {"f1": _mean(f1, np.ones_like(f1))},
            "weighted by rows": {"f1": _mean(f1, rows)},
        },
    }


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean over the first axis, ignoring NaN."""
    weights = np.where(np.isnan(values), 0, weights)
    with np.errstate(invalid="ignore"):
        return (np.nan_to_num(values) * weights).sum(axis=0) / weights.sum(axis=0)


PROCESS_BENCH = Suite(
    name="processbench",
    columns=PROCESS_BENCH_COLUMNS,
    parse=parse_process_bench,
    tally=tally,
    outcomes=OUTCOMES,
    summarize=summarize,
    metric="f1",
    main="unweighted",
    adapt=adapt,
)
