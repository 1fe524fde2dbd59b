"""The benchmark of the reasoning models: the arithmetic of the original code against golden values of ours, and the tables by hand."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from trl_hrm.reasoning import HrmGridConfig, HrmGridForSolving
from trl_hrm.reasoning.losses import act_loss


@pytest.fixture(scope="module")
def speed():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("reasoning_speed")
    sys.path.pop(0)


def copy_weights(original, model, tied: bool) -> None:
    """Give our model the weights of the reference."""
    pairs = [(original.L, model.L_module)] + ([] if tied else [(original.H, model.H_module)])
    with torch.no_grad():
        for source, target in pairs:
            for one, layer in zip(source.layers, target.layers, strict=True):
                layer.self_attn.qkv_proj.weight.copy_(one.qkv.weight)
                layer.self_attn.o_proj.weight.copy_(one.out.weight)
                layer.mlp.gate_up_proj.weight.copy_(one.gate_up.weight)
                layer.mlp.down_proj.weight.copy_(one.down.weight)
        model.embed_tokens.weight.copy_(original.embedding)
        model.lm_head.weight.copy_(original.lm_head.weight)
        model.q_head.weight.copy_(original.q_head.weight)
        model.q_head.bias.copy_(original.q_head.bias)
        model.z_H_init.copy_(original.start[0])
        model.z_L_init.copy_(original.start[1])


@pytest.mark.parametrize("tied", [False, True], ids=["HRM", "TRM"])
def test_original_computes_the_same(speed, tied):
    """The speed of a reference that computes something else, or less, says nothing."""
    torch.manual_seed(2)
    original = speed.OriginalModel(size=3, vocab_size=5, hidden_size=32, heads=2, layers=2, tied=tied)
    config = HrmGridConfig.preset(
        "trm" if tied else "hrm",
        vocab_size=5,
        height=3,
        width=3,
        hidden_size=32,
        num_attention_heads=2,
        H_layers=2,
        L_layers=2,
    )
    model = HrmGridForSolving(config)
    copy_weights(original, model, tied)
    x, labels = torch.randint(1, 5, (2, 4, 9))
    z_H, z_L = model.initial_state(4)
    out = model(x, z_H=z_H, z_L=z_L)
    found = original.inner(z_H, z_L, x)
    for one, other in zip(
        found, (out.z_H, out.z_L, out.logits, out.q_halt_logits, out.q_continue_logits), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    carry = {
        "z_H": z_H,
        "z_L": z_L,
        "steps": torch.zeros(4, dtype=torch.int32),
        "halted": torch.ones(4, dtype=torch.bool),
    }
    loss, _ = original({**carry, "x": x, "labels": labels}, x, labels)
    target = None
    if not tied:
        following = model(x, z_H=out.z_H, z_L=out.z_L)
        target = torch.maximum(following.q_halt_logits, following.q_continue_logits).sigmoid()
    own = act_loss(out.logits, labels, out.q_halt_logits, out.q_continue_logits, target).loss.sum()
    torch.testing.assert_close(loss.float(), own, rtol=1e-4, atol=1e-5)

    loss.backward()
    own.backward()
    torch.testing.assert_close(
        original.L.layers[0].gate_up.weight.grad,
        model.L_module.layers[0].mlp.gate_up_proj.weight.grad,
        rtol=1e-3,
        atol=1e-5,
    )


def test_original_has_as_many_parameters(speed):
    with torch.device("meta"):
        hrm = speed.OriginalModel(9, 11, 512, 8, 4)
        trm = speed.OriginalModel(9, 11, 512, 8, 2, tied=True)
    assert [sum(p.numel() for p in one.parameters()) for one in (hrm, trm)] == [27_275_266, 6_828_034]


@pytest.mark.parametrize("system", ["hrm", "hrm_continue", "trm", "loop", "one_pass", "one_pass_deep"])
def test_steps_of_every_system(speed, system):
    """A step takes new rows exactly for the halted slots."""
    torch.manual_seed(2)
    shape = {"size": 2, "vocab_size": 4, "hidden_size": 16, "heads": 2, "layers": 1, "batch": 3}
    training = speed.OwnTraining(shape, system, False, "cpu")
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    halting = training.config.halt_max_steps
    for _ in range(halting):
        training.step()
    assert training.num_halted == 3 * (
        halting if system.startswith("one_pass") else 1
    )  # q starts at -5: nothing halts early
    assert training.steps.tolist() == [0, 0, 0]
    assert any(not torch.equal(before[name], p) for name, p in training.model.named_parameters())


def test_report(speed):
    results = [
        {"shape": "9x9, d 128", "system": system, "compiled": compiled, "seconds_per_step": seconds, "memory": 1234.0}
        for system, compiled, seconds in (
            ("HRM original", False, [0.5, 0.25, 9.0]),
            ("hrm_continue", False, [0.25, 0.25, 0.125]),
            ("HRM original", True, [0.5]),
            ("hrm_continue", True, [0.125]),
        )
    ]
    text = speed.report(results, {"steps": 100, "slots": 4, "halted": 100}, "versions")
    assert "| HRM original | 2.00 | 2.00 | 1,234 |  |  |" in text
    assert "| hrm_continue | 4.00 | 8.00 | 1,234 | 2.00× | 4.00× |" in text
    assert (
        "original 0.25 (100 of 400 rows)" in text and "4.0 segments on average" in text and text.endswith("versions")
    )
