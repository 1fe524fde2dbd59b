"""Adam-atan2 by hand, and sign descent on the rows of a batch."""

import math

import pytest
import torch

from trl_hrm.reasoning.optim import AdamAtan2, AdamW, sign_step_


def steps(gradients: list[float], **options) -> list[float]:
    """Return the weight after each step, starting at 0, with one gradient per step."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdamAtan2([p], **({"lr": 1.0} | options))
    found = []
    for gradient in gradients:
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
        found.append(p.item())
    return found


def test_constant_gradient():
    """The bias of the first moment is corrected outside of atan2. Inside of it, the first step is π/4 instead of 0.996687."""
    found = [-(b - a) for a, b in zip([0.0, *steps([1.0] * 3)], steps([1.0] * 3), strict=False)]
    assert found == pytest.approx([0.996687, 0.988221, 0.976545], abs=1e-6)
    late = steps([1.0] * 400)
    assert late[-2] - late[-1] == pytest.approx(math.pi / 4, abs=1e-6)


def test_the_drop_in_replacement_steps_further():
    """`adam-atan2-pytorch`, which is named as a replacement of the kernel, has steps of 0.997456 from the first one on."""
    found = steps([1.0] * 3, bias_correction="inside", scale=1.27)
    assert [-(b - a) for a, b in zip([0.0, *found], found, strict=False)] == pytest.approx([0.997456] * 3, abs=1e-6)


@pytest.mark.parametrize("correction", ["outside", "inside"])
def test_against_the_formula(correction):
    """The batched operations change the order of the formula, and could lose a factor or share state between weights."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in ((3, 2), (4,))
    ]
    expected = [p.detach().clone() for p in weights]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    optimizer = AdamAtan2(
        [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.02}],
        lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, bias_correction=correction, scale=1.1,
    )  # fmt: skip
    for t in range(1, 6):
        for i, (p, lr) in enumerate(zip(weights, (0.1, 0.02), strict=True)):
            g = p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            m, v = moments[i] = (0.8 * moments[i][0] + 0.2 * g, 0.9 * moments[i][1] + 0.1 * g * g)
            m_hat, v_hat = m / (1 - 0.8**t), v / (1 - 0.9**t)
            update = (
                torch.atan2(m_hat, v_hat.sqrt())
                if correction == "inside"
                else torch.atan2(m, v_hat.sqrt()) / (1 - 0.8**t)
            )
            expected[i] = expected[i] * (1 - lr * 0.3) - 1.1 * lr * update
        optimizer.step()
    for p, q in zip(weights, expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-12)


def test_zero_gradient_and_scale():
    """An epsilon in the denominator would make small gradients smaller steps. 0/0 would be NaN."""
    assert steps([0.0, 0.0]) == [0.0, 0.0]
    assert steps([1.0, -0.5, 2.0]) == pytest.approx(steps([1000.0, -500.0, 2000.0]), abs=1e-6)
    assert steps([1e-12, -5e-13]) == pytest.approx(steps([1.0, -0.5]), abs=1e-6)


def test_decay_is_decoupled_and_exact():
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamAtan2([p], lr=0.5, weight_decay=0.25)
    p.grad = torch.zeros(1)
    optimizer.step()
    assert p.item() == 2.0 * (1 - 0.5 * 0.25)


def test_state_is_resumed():
    """A step count that is not saved would correct the bias again."""

    def run(interrupted: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(4))
        optimizer = AdamAtan2([p], lr=0.1)
        for step in range(6):
            if interrupted and step == 3:
                state = optimizer.state_dict()
                p = torch.nn.Parameter(p.detach().clone())
                optimizer = AdamAtan2([p], lr=0.1)
                optimizer.load_state_dict(state)
            p.grad = torch.randn(4, generator=generator)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(False), run(True))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"betas": (1.0, 0.9)},
        {"weight_decay": -0.1},
        {"bias_correction": "no"},
        {"scale": 0},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AdamAtan2([torch.nn.Parameter(torch.zeros(1))], **options)


def test_sign_step_sums_duplicates_first():
    """Summing the signs of +3 and -1 gives 0. Rows outside of the batch must not even decay."""
    table = torch.ones(4, 2)
    sign_step_(
        table, torch.tensor([1, 1, 3]), torch.tensor([[3.0, 0.0], [-1.0, 0.0], [-2.0, 5.0]]), lr=0.1, weight_decay=0.5
    )
    expected = torch.tensor([[1, 1], [0.95 - 0.1, 0.95], [1, 1], [0.95 + 0.1, 0.95 - 0.1]])
    torch.testing.assert_close(table, expected)


def test_sign_step_never_changes_the_blank_id():
    """The blank id would learn something about all puzzles, and so would no longer be blank."""
    table = torch.zeros(3, 2)
    sign_step_(table, torch.tensor([0, 2, 0]), torch.ones(3, 2), lr=0.1, frozen_id=0)
    torch.testing.assert_close(table, torch.tensor([[0.0, 0.0], [0.0, 0.0], [-0.1, -0.1]]))


@pytest.mark.parametrize("optimizer_class", [AdamAtan2, AdamW])
def test_groups_with_rows(optimizer_class):
    """The table must only change by sign descent, with its own learning rate, and its rows must not be used twice."""
    weight, table = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    group = {"params": [table], "lr": 0.5, "weight_decay": 0.0, "sign_rows": True, "frozen_id": None}
    optimizer = optimizer_class([{"params": [weight]}, group], lr=0.1, weight_decay=0.0)
    optimizer.set_row_gradients(torch.tensor([2]), torch.tensor([[1e-9, -7.0]]))
    weight.grad = torch.ones(2)
    optimizer.step()
    assert table.tolist() == [[0, 0], [0, 0], [-0.5, 0.5]]
    assert (weight < 1).all()
    optimizer.step()  # without rows
    assert table.tolist() == [[0, 0], [0, 0], [-0.5, 0.5]]
