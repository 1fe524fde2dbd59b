"""Checkpoints of the original code are read by name, and everything else is refused."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch

from trl_hrm.reasoning import HrmGridConfig, HrmGridForSolving
from trl_hrm.reasoning.convert import convert_original


GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "reasoning_golden.json").read_text())
CONFIG = dict(
    height=1, width=6, vocab_size=7, hidden_size=32, num_attention_heads=2, H_layers=1, L_layers=1, num_puzzle_ids=4
)


def original_weights() -> dict[str, torch.Tensor]:
    weights = {}
    for k, name, shape in GOLDEN["names"]:
        values = (1 + 0.37 * k + 0.61 * torch.arange(math.prod(shape), dtype=torch.float64)).sin()
        weights[name] = ((1.0 if name.endswith("_init") else 0.1) * values).float().view(shape)
    return weights


@pytest.mark.parametrize("prefix", ["", "_orig_mod.model.", "model."])
def test_hrm(tmp_path, prefix):
    """A wrong name or prefix, or a tensor that is not copied, changes the numbers of the original."""
    torch.save({prefix + name: tensor for name, tensor in original_weights().items()}, tmp_path / "step_1")
    model = convert_original(tmp_path / "step_1", HrmGridConfig(**CONFIG), ["<blank>", "a", "b", "c"])
    output = model(torch.tensor(GOLDEN["inputs"]), torch.tensor(GOLDEN["puzzle_identifiers"]))
    expected = GOLDEN["segments"][0]
    torch.testing.assert_close(output.q_halt_logits, torch.tensor(expected["q_halt"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.logits[0, :2], torch.tensor(expected["logits_row0"]), rtol=0, atol=1e-5)
    assert model.puzzle_index == {"a": 1, "b": 2, "c": 3}


def test_trm(tmp_path):
    """The token mixer, the learned positions and bf16 states of TRM have other names and types."""
    config = HrmGridConfig.preset(
        "trm", mixer="mlp", position="learned", height=2, width=3, vocab_size=7, hidden_size=32, num_prefix_tokens=2
    )
    ours = HrmGridForSolving(config)
    state = {}
    for name, tensor in ours.state_dict().items():
        name = (
            name.replace("L_module", "L_level").replace(".mixer.", ".mlp_t.").replace("embed_positions.", "embed_pos.")
        )
        name = name.replace("z_H_init", "H_init").replace("z_L_init", "L_init")
        if name.startswith("embed"):
            name = name.replace(".weight", ".embedding_weight")
        name = name.replace("puzzle_emb.weight", "puzzle_emb.weights")
        state[f"_orig_mod.model.inner.{name}"] = tensor.bfloat16() if name.endswith("init") else tensor
    assert not any("module" in name for name in state)
    torch.save(state, tmp_path / "step_1")
    model = convert_original(tmp_path / "step_1", config)
    ours.z_H_init.copy_(ours.z_H_init.bfloat16())
    ours.z_L_init.copy_(ours.z_L_init.bfloat16())
    inputs = torch.arange(6)[None]
    assert torch.equal(model(inputs).logits, ours(inputs).logits)
    assert model.z_H_init.dtype == torch.float32


class NotATensor:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NotATensor(), "only holds tensors"),
        ({"step": 3}, "other values than tensors"),
        ([torch.zeros(1)], "holds list"),
        ({"weight": torch.zeros(1)}, "lacks the tensors H_module"),
        ({**original_weights(), "inner.embed_pos.embedding_weight": torch.zeros(7, 32)}, "unknown tensors embed_positions"),
        ({**original_weights(), "inner.lm_head.weight": torch.zeros(8, 32)}, r"lm_head.weight has shape \(8, 32\)"),
    ],
    ids=["object", "numbers", "list", "other model", "positions", "vocabulary"],
)  # fmt: skip
def test_refused(tmp_path, content, message):
    """A checkpoint that does not fit is refused with the reason, and no pickled object is created."""
    torch.save(content, tmp_path / "step_1")
    with pytest.raises(ValueError, match=message):
        convert_original(tmp_path / "step_1", HrmGridConfig(**CONFIG))


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "text").write_text("weights")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "pickle", "empty"):
        with pytest.raises(ValueError, match="not a PyTorch checkpoint|other values than tensors"):
            convert_original(tmp_path / name, HrmGridConfig(**CONFIG))


def test_puzzle_ids_outside_the_table(tmp_path):
    torch.save(original_weights(), tmp_path / "step_1")
    with pytest.raises(ValueError, match="numbers from 1 to 3"):
        convert_original(tmp_path / "step_1", HrmGridConfig(**CONFIG), {"a": 4})
