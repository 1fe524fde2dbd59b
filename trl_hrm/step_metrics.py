"""Metrics of scores against labels (accuracy, AUROC, calibration), and the interval of a proportion."""

import math
from collections.abc import Sequence

import numpy as np


METRICS = ("num_steps", "accuracy", "ece", "error_f1", "balanced_accuracy", "auroc")


def step_metrics(scores: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """
    Compute metrics of step scores against labels. Labels of at least 0.5 count as correct.

    Args:
        scores (`np.ndarray`):
            Step scores in `[0, 1]`, shape `(N,)`.
        labels (`np.ndarray`):
            Probability that each step is correct, shape `(N,)`.
        threshold (`float`, *optional*, defaults to `0.5`):
            Scores of at least the threshold count as correct. `auroc` and `ece` do not depend on it.

    Returns:
        `dict[str, float]`: `accuracy`; `balanced_accuracy` (mean recall of the two classes); `error_f1` (F1 of the
        wrong steps); `auroc`; `ece` (see [`expected_calibration_error`]); `num_steps`. Undefined metrics are omitted:
        `balanced_accuracy` and `auroc` require both classes, `error_f1` requires a wrong step in labels or
        predictions.
    """
    metrics = {"num_steps": len(labels)}
    if not len(labels):
        return metrics
    correct, predicted = labels >= 0.5, scores >= threshold
    metrics["accuracy"] = float((predicted == correct).mean())
    metrics["ece"] = expected_calibration_error(scores, labels)
    hits, errors, alarms = (~predicted & ~correct).sum(), (~correct).sum(), (~predicted).sum()
    if errors + alarms:
        metrics["error_f1"] = float(2 * hits / (errors + alarms))
    if correct.any() and not correct.all():
        metrics["balanced_accuracy"] = float((predicted[correct].mean() + (~predicted)[~correct].mean()) / 2)
        metrics["auroc"] = auroc(scores, correct)
    return metrics


def auroc(scores: np.ndarray, correct: np.ndarray) -> float:
    """
    Return the probability that a correct step scores higher than a wrong step, with ties counted as 0.5
    (Mann-Whitney). Both classes must occur.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_correct, num_wrong = correct.sum(), (~correct).sum()
    return float((ranks[correct].sum() - num_correct * (num_correct + 1) / 2) / (num_correct * num_wrong))


def expected_calibration_error(scores: np.ndarray, labels: np.ndarray, num_bins: int = 10) -> float:
    """Return the mean of |mean score − mean label| over `num_bins` equal bins of `[0, 1]`, weighted by steps."""
    bins = np.minimum((scores * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, scores - labels, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(scores))


def calibration_bins(pairs: Sequence[tuple[float, float]], num_bins: int = 10) -> list[dict[str, float]]:
    """
    Compare scores with labels in equal bins from 0 to 1.

    Args:
        pairs (`Sequence[tuple[float, float]]`):
            Scores and labels (1 correct, 0 wrong). Scores below 0 or above 1 fall into the first or last bin.
        num_bins (`int`, *optional*, defaults to `10`):
            Number of bins.

    Returns:
        `list[dict[str, float]]`: `low`, `high`, `count`, `mean_score` and `share_right` of each bin that is not empty.
    """
    bins: list[list[tuple[float, float]]] = [[] for _ in range(num_bins)]
    for score, label in pairs:
        bins[min(int(min(max(score, 0.0), 1.0) * num_bins), num_bins - 1)].append((score, label))
    return [
        {
            "low": place / num_bins,
            "high": (place + 1) / num_bins,
            "count": len(members),
            "mean_score": math.fsum(score for score, _ in members) / len(members),
            "share_right": sum(label for _, label in members) / len(members),
        }
        for place, members in enumerate(bins)
        if members
    ]


def binned_calibration_error(bins: Sequence[dict[str, float]]) -> float | None:
    """Return the [`expected_calibration_error`] computed from [`calibration_bins`], or `None` if all bins are empty."""
    total = sum(one["count"] for one in bins)
    if not total:
        return None
    return sum(one["count"] * abs(one["mean_score"] - one["share_right"]) for one in bins if one["count"]) / total


def judged_steps(logits: np.ndarray, label_ids: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """
    Return the labelled steps of an evaluation, without padding.

    Args:
        logits (`np.ndarray`):
            Outputs at the step tokens, shape `(rows, S, C)`.
        label_ids (`tuple[np.ndarray, ...]`):
            `labels`, `label_weights` and `num_merged`, shape `(rows, S)` each. Padded steps have a negative label.

    Returns:
        `tuple[np.ndarray, ...]`: Logits, shape `(N, C)`, and the three arrays, shape `(N,)` each.
    """
    judged = label_ids[0] >= 0
    return logits[judged], *(values[judged] for values in label_ids)
