"""Average of the weights."""

import pytest
import torch

from trl_hrm.reasoning.ema import EMA


def test_by_hand():
    """A decay with the wrong sign, or an average that starts at 0, would evaluate other weights."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = EMA(0.75)
    ema.start(model)
    for value in (2.0, 4.0):
        model.weight.data.fill_(value)
        ema.update(model)
    assert ema.average["weight"].item() == 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4
    with ema.swapped(model) as trained:
        assert model.weight.item() == 1.9375 and trained["weight"].item() == 4.0
    assert model.weight.item() == 4.0


def test_weights_come_back_after_an_error():
    """Training would continue with the average if an evaluation failed and was handled."""
    model = torch.nn.Linear(1, 1)
    ema = EMA(0.5)
    ema.start(model)
    model.weight.data.fill_(7.0)
    with pytest.raises(KeyError), ema.swapped(model):
        raise KeyError
    assert model.weight.item() == 7.0


def test_frozen_weights_have_no_average():
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    ema = EMA(0.5)
    ema.start(model)
    assert ema.average.keys() == {"weight"}
