"""Loss and score of every head against hand-computed values."""

import math

import pytest
import torch
import torch.nn.functional as F

from trl_hrm.losses import step_loss, step_score

from .helpers import HEADS


SOFTMAX_HEADS = [HEADS["classification"], HEADS["lm"]]


class TestClassification:
    @pytest.mark.parametrize("step_format", SOFTMAX_HEADS)
    def test_by_hand(self, step_format):
        """Logits (0, ln 3): p₁ = 3/4. Swapped classes would give ln 4 for the first label."""
        logits = torch.tensor([[0.0, math.log(3)]]).repeat(3, 1)
        expected = [math.log(4 / 3), math.log(4), 0.9 * math.log(4 / 3) + 0.1 * math.log(4)]
        assert step_loss(logits, torch.tensor([1.0, 0.0, 0.9]), step_format).tolist() == pytest.approx(expected)
        assert step_score(logits, step_format).tolist() == pytest.approx([0.75] * 3)

    @pytest.mark.parametrize("step_format", SOFTMAX_HEADS)
    def test_hard_labels_equal_cross_entropy(self, step_format):
        logits, labels = torch.randn(4, 5, 2), torch.randint(2, (4, 5))
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(4, 5)
        torch.testing.assert_close(step_loss(logits, labels.float(), step_format), expected)
        torch.testing.assert_close(step_loss(logits, labels.bool(), step_format), expected)

    def test_gradient_of_a_soft_label(self):
        """dℓ/dlogits = softmax − (1 − y, y): a label cast to int would pull 0.9 towards 0."""
        logits = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
        step_loss(logits, labels, HEADS["classification"]).sum().backward()
        expected = logits.detach().softmax(-1) - torch.stack([1 - labels, labels], -1)
        torch.testing.assert_close(logits.grad, expected)

    def test_extreme_logits_stay_finite(self):
        logits = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
        loss = step_loss(logits, torch.tensor([1.0]), HEADS["classification"])
        loss.sum().backward()
        assert loss.item() == 2000 and torch.isfinite(logits.grad).all()


class TestRegression:
    def test_mse_by_hand(self):
        logits = torch.tensor([[0.5], [1.5], [-2.0]])
        loss = step_loss(logits, torch.tensor([0.9, 1.0, 0.0]), HEADS["regression"])
        assert loss.tolist() == pytest.approx([0.16, 0.25, 4.0])
        assert step_score(logits, HEADS["regression"]).tolist() == [0.5, 1.0, 0.0]

    def test_bce_by_hand(self):
        """Logit ln 3: σ = 3/4."""
        logits = torch.full((2, 1), math.log(3))
        expected = [math.log(4 / 3), 0.9 * math.log(4 / 3) + 0.1 * math.log(4)]
        assert step_loss(logits, torch.tensor([1.0, 0.9]), HEADS["regression-bce"]).tolist() == pytest.approx(expected)
        assert step_score(logits, HEADS["regression-bce"]).tolist() == pytest.approx([0.75, 0.75])

    def test_one_output_does_not_broadcast(self):
        """(N, 1) − (N,) would broadcast to an N × N loss with a plausible value."""
        for head in ("regression", "regression-bce"):
            assert step_loss(torch.zeros(3, 1), torch.zeros(3), HEADS[head]).shape == (3,)
            assert step_loss(torch.zeros(1, 1), torch.zeros(1), HEADS[head]).shape == (1,)


@pytest.mark.parametrize("head", HEADS)
class TestPrecision:
    def test_half_precision_is_raised_to_float32(self, head):
        """In bf16 a probability has 3 significant digits, so 0.9 becomes 0.8984."""
        logits = torch.randn(16, 1 if "regression" in head else 2).bfloat16()
        labels = torch.full((16,), 0.9)
        loss = step_loss(logits, labels, HEADS[head])
        assert loss.dtype == step_score(logits, HEADS[head]).dtype == torch.float32
        torch.testing.assert_close(loss, step_loss(logits.float(), labels, HEADS[head]), rtol=0, atol=0)

    def test_double_precision_is_kept(self, head):
        logits = torch.randn(16, 1 if "regression" in head else 2, dtype=torch.float64)
        loss = step_loss(logits, torch.full((16,), 0.9, dtype=torch.float64), HEADS[head])
        assert loss.dtype == step_score(logits, HEADS[head]).dtype == torch.float64

    def test_no_step(self, head):
        logits = torch.zeros(0, 1 if "regression" in head else 2)
        assert step_loss(logits, torch.zeros(0), HEADS[head]).shape == step_score(logits, HEADS[head]).shape == (0,)
