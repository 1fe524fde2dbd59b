r"""
PRMBench: classify steps as correct or wrong, for nine kinds of errors
([Song et al., 2025](https://huggingface.co/papers/2501.03124)).

```json
{"idx": "prm_test_p1_7", "classification": "confidence", "original_question": "What is 1 + 2 + 3?", "modified_question": "What is 1 + 2 + 3?", "original_process": ["1 + 2 = 3.", "3 + 3 = 6."], "modified_process": ["1 + 2 = 3.", "3 + 3 = 7."], "modified_steps": [2], "error_steps": [2], "reason": "..."}
```

The steps of `modified_process` are scored as a solution to `modified_question`. `error_steps` are the numbers of the
wrong steps, from 1. All other steps are correct, even after a wrong step. A step is classified as wrong if its score
is *below* the threshold. Correct steps are the positive class, and the steps of all rows of a class are counted
together:

    F1     = 2 TP / (2 TP + FP + FN)      TP: correct, predicted correct; FP: wrong, predicted correct
    F1_neg = 2 TN / (2 TN + FP + FN)      TN: wrong, predicted wrong; FN: correct, predicted wrong
    PRM-Score = 0.5 · F1 + 0.5 · F1_neg

`multi_solutions` has alternative correct solutions without a wrong step, so its PRM-Score is F1. The overall score is
computed over the steps of all nine classes. Simplicity, soundness and sensitivity are unweighted means over their
classes. `correct` has the original solutions to `original_question` from the rows of `redundency` (spelled as in the
data). It shows how many correct steps are classified as wrong, and only counts in the metrics over all steps (AUROC,
calibration).

Checked against the authors' code for the task and for the table. Their code differs in four ways. Of several rows of a
class with one `idx`, it counts only the first; here all count, with a warning. A step is correct *above* the
threshold, so scores equal to the threshold differ. An undefined F1 enters a mean as -1; here the mean is undefined. An
F1 with precision and recall of 0 is treated as undefined too; here it is 0. Models with a separate redundancy score
use it on `redundency` and `circular`; a step reward model has only one score. Their similarity and first-error
accuracy are not implemented. The weights of 0.5 come from the code. A user could not reproduce the paper's table with
them (issue 7 of ssmisya/PRMBench, unanswered), possibly because of thresholds per model.

Checked on 394 of their rows: 11 rows name error steps after the end of the process. Like the authors' code, this
module ignores these numbers. The results count them.
"""

from collections.abc import Sequence

import numpy as np

from ...data.benchmark_rows import CATEGORIES, CLASSES, PRM_BENCH_COLUMNS, Solution, parse_prm_bench
from .suite import Suite


WITHOUT_ERRORS = ("multi_solutions", "correct")
OUTCOMES = (((0, 0, 1, 0), (0, 1, 0, 0)), ((1, 0, 0, 0), (0, 0, 0, 1)))  # see `tally`


def tally(solution: Solution, scores: Sequence[float], threshold: float) -> tuple[int, int, int, int]:
    """Count the steps of one solution: TP, FP, TN, FN, with correct steps as the positive class."""
    right, judged = np.asarray(solution.labels, dtype=bool), np.asarray(scores) >= threshold
    return (
        int((right & judged).sum()),
        int((~right & judged).sum()),
        int((~right & ~judged).sum()),
        int((right & ~judged).sum()),
    )


def prm_score(sums: np.ndarray, without_errors: bool = False) -> dict[str, np.ndarray]:
    """
    Compute the metrics of a class.

    Args:
        sums (`np.ndarray`):
            Sums of [`tally`]. Shape `(..., 4)`.
        without_errors (`bool`, *optional*, defaults to `False`):
            Whether the class has no wrong steps by design. Its PRM-Score is then F1.

    Returns:
        `dict[str, np.ndarray]`: `prm_score`, `f1`, `negative_f1` and `accuracy` (NaN if undefined), `num_right_steps`
        and `num_wrong_steps`. Shape `(...)`.
    """
    tp, fp, tn, fn = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    with np.errstate(invalid="ignore"):
        f1, negative_f1 = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fp + fn)
        accuracy = (tp + tn) / (tp + fp + tn + fn)
    return {
        "prm_score": f1 if without_errors else (f1 + negative_f1) / 2,
        "f1": f1,
        "negative_f1": np.full_like(f1, np.nan) if without_errors else negative_f1,
        "accuracy": accuracy,
        "num_right_steps": tp + fn,
        "num_wrong_steps": fp + tn,
    }


def summarize(sums: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Compute the metrics of each class, of each category whose classes are all present, and overall. See [`Suite`]."""
    names = [name for name in (*CLASSES, "correct") if name in sums]
    classes = {name: prm_score(sums[name], name in WITHOUT_ERRORS) for name in names}
    averages = {
        category: {"prm_score": np.mean([classes[name]["prm_score"] for name in members], axis=0)}
        for category, members in CATEGORIES.items()
        if all(name in classes for name in members)
    }
    total = sum((sums[name] for name in names if name != "correct"), np.zeros(4))
    return {"subsets": classes, "averages": averages | {"overall": prm_score(total)}}


PRM_BENCH = Suite(
    name="prmbench",
    columns=PRM_BENCH_COLUMNS,
    parse=parse_prm_bench,
    tally=tally,
    outcomes=OUTCOMES,
    summarize=summarize,
    metric="prm_score",
    main="overall",
)
