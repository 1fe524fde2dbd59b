"""Step metrics compared with scikit-learn and with hand-computed values."""

import numpy as np
import pytest

from trl_hrm.step_metrics import (
    auroc,
    binned_calibration_error,
    calibration_bins,
    expected_calibration_error,
    step_metrics,
)


@pytest.mark.parametrize("decimals", [1, 6])
@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed, decimals):
    """With one decimal most scores are tied, and some equal the threshold."""
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    labels = (rng.random(200) < 0.7).astype(np.float32)
    scores = np.round(np.clip(0.3 * labels + rng.random(200) * 0.7, 0, 1), decimals)
    predicted = scores >= 0.5
    assert step_metrics(scores, labels) == pytest.approx(
        {
            "num_steps": 200,
            "accuracy": sklearn_metrics.accuracy_score(labels, predicted),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, predicted),
            "error_f1": sklearn_metrics.f1_score(labels, predicted, pos_label=0),
            "auroc": sklearn_metrics.roc_auc_score(labels, scores),
            "ece": expected_calibration_error(scores, labels),
        }
    )


def test_by_hand():
    """Two hits, one miss, and one false alarm for wrong steps."""
    scores = np.array([0.1, 0.2, 0.8, 0.3, 0.9, 0.7])
    labels = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    metrics = step_metrics(scores, labels)
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["error_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert metrics["auroc"] == pytest.approx(7 / 9)  # 0.8 is above 0.3 and 0.7


def test_auroc_of_equal_scores_is_half():
    """If ties were broken by position, a model with equal scores would have an AUROC of 1 or 0."""
    assert auroc(np.full(5, 0.3), np.array([True, False, True, False, False])) == 0.5


class TestCalibration:
    def test_by_hand(self):
        """Bins [0, 0.1), [0.8, 0.9), [0.9, 1]: gaps 0.05·1, |0.83 − 0.5|·2 and 0, over 5 steps."""
        scores = np.array([0.05, 0.81, 0.85, 0.95, 1.0])
        labels = np.array([0.0, 1.0, 0.0, 0.95, 1.0])
        assert expected_calibration_error(scores, labels) == pytest.approx((0.05 + 0.66) / 5)

    def test_errors_within_a_bin_cancel_and_across_bins_do_not(self):
        assert expected_calibration_error(np.array([0.52, 0.58]), np.array([0.58, 0.52])) == pytest.approx(0)
        assert expected_calibration_error(np.array([0.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(1)

    def test_soft_labels_that_are_predicted_are_calibrated(self):
        labels = np.random.default_rng(0).random(50)
        assert expected_calibration_error(labels, labels) == pytest.approx(0)

    def test_bins_give_the_same_error(self):
        """The report stores the scores of a run only as bins."""
        rng = np.random.default_rng(0)
        scores, labels = rng.random(200), (rng.random(200) < 0.3).astype(float)
        bins = calibration_bins(list(zip(scores.tolist(), labels.tolist(), strict=True)))
        assert sum(one["count"] for one in bins) == 200
        assert binned_calibration_error(bins) == pytest.approx(expected_calibration_error(scores, labels))

    def test_bins_by_hand(self):
        bins = [
            {"count": 30, "mean_score": 0.25, "share_right": 0.5},
            {"count": 10, "mean_score": 0.9, "share_right": 0.6},
            {"count": 0, "mean_score": None, "share_right": None},
        ]
        assert binned_calibration_error(bins) == pytest.approx((30 * 0.25 + 10 * 0.3) / 40)
        assert binned_calibration_error([]) is None


class TestUndefined:
    """A metric that is undefined for these labels is omitted, because 0 or NaN would look like a result."""

    def test_no_step(self):
        assert step_metrics(np.zeros(0), np.zeros(0)) == {"num_steps": 0}

    def test_only_correct_steps(self):
        metrics = step_metrics(np.array([0.9, 0.8]), np.ones(2))
        assert metrics == pytest.approx({"num_steps": 2, "accuracy": 1.0, "ece": 0.15})
        assert step_metrics(np.array([0.9, 0.1]), np.ones(2))["error_f1"] == 0

    def test_only_wrong_steps(self):
        metrics = step_metrics(np.array([0.1, 0.9]), np.zeros(2))
        assert metrics == pytest.approx({"num_steps": 2, "accuracy": 0.5, "ece": 0.5, "error_f1": 2 / 3})

    def test_soft_labels_count_as_correct_from_half(self):
        metrics = step_metrics(np.array([0.6, 0.4]), np.array([0.5, 0.49]))
        assert metrics["accuracy"] == metrics["balanced_accuracy"] == metrics["auroc"] == 1
