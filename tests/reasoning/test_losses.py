"""Stablemax and the loss of a segment."""

import math

import pytest
import torch
import torch.nn.functional as F

from trl_hrm.reasoning.losses import act_loss, softmax_cross_entropy, stablemax_cross_entropy


def plain_stablemax(logits: list[float], label: int) -> float:
    s = [x + 1 if x >= 0 else 1 / (1 - x) for x in logits]
    return -math.log(s[label] / sum(s))


def test_stablemax_by_hand():
    """s(2) = 3, s(0) = 1, s(-1) = 1/2, so the probabilities are 3, 1 and 1/2 of 4.5."""
    losses = stablemax_cross_entropy(torch.tensor([[2.0, 0.0, -1.0]] * 3), torch.arange(3))
    torch.testing.assert_close(losses, torch.tensor([0.405465, 1.504077, 2.197225]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stablemax_is_finite(dtype):
    """A quotient of s(x) under- or overflows in bf16; the logarithm does not."""
    logits = torch.tensor([[1e4, -1e4, 0.0]] * 3, dtype=dtype, requires_grad=True)
    losses = stablemax_cross_entropy(logits, torch.arange(3))
    losses.sum().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all()
    assert losses.tolist() == pytest.approx(
        [plain_stablemax(logits[0].tolist(), label) for label in range(3)], abs=1e-5
    )


def test_stablemax_gradient():
    """The gradient of s is 1 at x = 0, where sign(x) ln(1 + |x|) would lose it."""
    logits = torch.tensor([[0.0, 0.5, -2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    stablemax_cross_entropy(logits, torch.tensor([0])).sum().backward()
    eps = 1e-6
    for place in range(4):
        shifted = [[x + sign * eps * (i == place) for i, x in enumerate(logits[0].tolist())] for sign in (1, -1)]
        expected = (plain_stablemax(shifted[0], 0) - plain_stablemax(shifted[1], 0)) / (2 * eps)
        assert logits.grad[0, place].item() == pytest.approx(expected, abs=1e-5)


def test_ignored_cells():
    """Cells without label have loss 0 and no gradient, in both losses."""
    for cross_entropy in (stablemax_cross_entropy, softmax_cross_entropy):
        logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        labels = torch.tensor([[0, -100, 4], [-100, -100, -100]])
        losses = cross_entropy(logits, labels)
        losses.sum().backward()
        assert (losses[labels == -100] == 0).all() and (losses[labels != -100] > 0).all()
        assert (logits.grad[labels == -100] == 0).all()


def test_softmax():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2], [3, 4, 0]])
    expected = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(softmax_cross_entropy(logits, labels), expected)


def test_act_loss_by_hand():
    """Three boards: one right, one with a wrong cell, one with an ignored cell; with known Q losses."""
    labels = torch.tensor([[0, 1], [0, 1], [1, -100]])
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [2.0, 0.0]], [[0.0, 2.0], [9.0, 9.0]]])
    q_halt, q_continue = torch.tensor([0.2, -0.4, -0.1]), torch.tensor([-0.1, 0.3, 0.5])
    target = torch.tensor([0.731059, 0.880797, 0.5])
    losses = act_loss(logits, labels, q_halt, q_continue, target)
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    assert losses.lm_loss.tolist() == pytest.approx([right, (right + wrong) / 2, right])
    assert losses.q_halt_loss.tolist() == pytest.approx([0.598139, 0.513015, 0.744397], abs=1e-6)
    assert losses.q_continue_loss.tolist() == pytest.approx([0.717503, 0.590116, 0.724077], abs=1e-6)
    assert losses.exact.tolist() == [True, False, True]
    assert losses.right_cells.tolist() == [2, 1, 1] and losses.labelled_cells.tolist() == [2, 2, 1]
    assert (losses.loss - losses.lm_loss).sum().item() == pytest.approx(1.943623, abs=1e-6)


def test_padding_rows_weigh_nothing():
    """A row without labels would count as right in the original: here it adds no loss, no gradient and no exact row."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator).requires_grad_()
    q_halt, q_continue = torch.randn(2, 2, generator=generator).requires_grad_().unbind(0)
    losses = act_loss(logits, torch.tensor([[1, 2, 3], [-100] * 3]), q_halt, q_continue, torch.tensor([0.3, 0.3]))
    losses.loss.sum().backward()
    assert [value[1].item() for value in losses] == [0] * 7
    assert losses.loss[0] > 0 and (logits.grad[1] == 0).all()


def test_loss_type_is_used():
    logits, labels = torch.tensor([[[2.0, 0.0, -1.0]]]), torch.tensor([[0]])
    q_halt = torch.zeros(1)
    assert act_loss(logits, labels, q_halt, loss_type="softmax").lm_loss.item() == pytest.approx(
        F.cross_entropy(logits[0], labels[0]).item()
    )
    with pytest.raises(KeyError):
        act_loss(logits, labels, q_halt, loss_type="mean")
