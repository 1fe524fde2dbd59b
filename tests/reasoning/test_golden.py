"""Parity with the code of the HRM paper, on numbers computed with it (`tests/fixtures/reasoning_golden.json`)."""

import json
import math
from pathlib import Path

import pytest
import torch

from trl_hrm.reasoning import HrmGridConfig, HrmGridForSolving
from trl_hrm.reasoning.halting import continue_target, halt
from trl_hrm.reasoning.losses import act_loss


GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "reasoning_golden.json").read_text())
NAMES = {
    "inner.H_init": "z_H_init",
    "inner.L_init": "z_L_init",
    "inner.embed_tokens.embedding_weight": "embed_tokens.weight",
    "inner.lm_head.weight": "lm_head.weight",
    "inner.puzzle_emb.weights": "puzzle_emb.weight",
    "inner.q_head.bias": "q_head.bias",
    "inner.q_head.weight": "q_head.weight",
}


def our_name(name: str) -> str:
    return NAMES.get(name) or name.removeprefix("inner.").replace("_level", "_module")


@pytest.fixture
def model() -> HrmGridForSolving:
    """The model of the golden numbers, with weights computed by their formula."""
    config = HrmGridConfig(
        height=1, width=6, vocab_size=7, hidden_size=32, num_attention_heads=2, H_layers=1, L_layers=1, halt_max_steps=3,
        num_puzzle_ids=4, attn_implementation="sdpa",
    )  # fmt: skip
    model = HrmGridForSolving(config)
    weights = {}
    for k, name, shape in GOLDEN["names"]:
        angles = 1 + 0.37 * k + 0.61 * torch.arange(math.prod(shape), dtype=torch.float64)
        scale = 1.0 if name.endswith("_init") else 0.1
        weights[our_name(name)] = (scale * angles.sin()).float().view(shape)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_segments(model, mode):
    """Four segments agree with the original: logits, Q logits, losses, targets, halts and steps."""
    inputs, labels = torch.tensor(GOLDEN["inputs"]), torch.tensor(GOLDEN["labels"])
    puzzle_ids = torch.tensor(GOLDEN["puzzle_identifiers"])
    halted, steps = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    z_H, z_L = model.initial_state(3)
    for expected in (segment for segment in GOLDEN["segments"] if segment["mode"] == mode):
        initial_H, initial_L = model.initial_state(3)
        z_H = torch.where(halted[:, None, None], initial_H, z_H)
        z_L = torch.where(halted[:, None, None], initial_L, z_L)
        steps = torch.where(halted, 0, steps) + 1
        model.zero_grad()
        output = model(inputs, puzzle_ids, z_H, z_L)
        z_H, z_L = output.z_H, output.z_L
        target = None
        if mode == "train":
            halted = halt(steps, output.q_halt_logits, output.q_continue_logits, 3)
            following = model(inputs, puzzle_ids, z_H, z_L)
            target = continue_target(steps, following.q_halt_logits, following.q_continue_logits, 3)
            torch.testing.assert_close(target, torch.tensor(expected["target"]), rtol=0, atol=1e-5)
        else:
            halted = steps >= 3
        losses = act_loss(output.logits, labels, output.q_halt_logits, output.q_continue_logits, target)
        for name, ours in [
            ("loss", losses.loss.sum()),
            ("lm_loss", losses.lm_loss.sum()),
            ("q_halt_loss", losses.q_halt_loss.sum()),
            ("q_continue_loss", losses.q_continue_loss.sum()),
            ("q_halt", output.q_halt_logits),
            ("q_continue", output.q_continue_logits),
            ("logits_row0", output.logits[0, : len(expected["logits_row0"])]),
        ]:
            torch.testing.assert_close(
                ours, torch.tensor(expected[name]), rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert steps.tolist() == expected["steps"]
        assert halted.tolist() == expected["halted"]
        if "grad_norm" in expected:
            losses.loss.sum().backward()
            parameters = dict(model.named_parameters())
            norms = {name: parameters[our_name(name)].grad.norm().item() for name in expected["grad_norm"]}
            assert norms == pytest.approx(expected["grad_norm"], abs=1e-4)
            assert model.puzzle_emb.weight.grad.norm().item() == pytest.approx(expected["puzzle_grad_norm"], abs=1e-4)
