"""Saving, loading and pushing, with and without the package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from trl_hrm.reasoning import HrmGridConfig, HrmGridForSolving, sudoku_vocab


PRESETS = {
    "hrm": {},
    "hrm grid": {"position": "grid"},
    "trm": {"num_prefix_tokens": 3},
    "trm_mlp": {"num_prefix_tokens": 3, "position": "learned"},
    "loop": {},
    "one_pass_deep": {},
}


def make_model(preset: str = "hrm", **overrides) -> HrmGridForSolving:
    torch.manual_seed(0)
    config = HrmGridConfig.preset(
        preset.split()[0], vocab=sudoku_vocab(4), height=4, width=4, hidden_size=16, num_attention_heads=2, H_layers=1,
        L_layers=1, **overrides,
    )  # fmt: skip
    return HrmGridForSolving(config)


INPUTS = torch.randint(1, 6, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(tmp_path, preset):
    """Weights, initial states and configuration come back with the same bytes, by the class and by the auto classes."""
    model = make_model(preset, **PRESETS[preset])
    with torch.no_grad():
        expected = model(INPUTS)
    model.save_pretrained(tmp_path)
    for load in (HrmGridForSolving, AutoModel):
        torch.manual_seed(1)
        loaded, info = load.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is HrmGridForSolving and not any(info[key] for key in ("missing_keys", "unexpected_keys"))
        with torch.no_grad():
            output = loaded(INPUTS)
        for name in ("logits", "q_halt_logits", "z_H", "z_L"):
            assert torch.equal(output[name], expected[name]), name
        assert all(torch.equal(a, b) for a, b in zip(loaded.initial_state(2), model.initial_state(2), strict=True))
    config = AutoConfig.from_pretrained(tmp_path)
    own = HrmGridConfig.__annotations__
    assert type(config) is HrmGridConfig
    assert {name: getattr(config, name) for name in own} == {name: getattr(model.config, name) for name in own}


def test_derived_values_are_saved(tmp_path):
    """A width that equals the default of another size would be left out of config.json and derived anew."""
    config = HrmGridConfig(hidden_size=64, num_attention_heads=2, intermediate_size=1536, puzzle_emb_dim=32)
    config.save_pretrained(tmp_path)
    loaded = HrmGridConfig.from_pretrained(tmp_path)
    assert loaded.intermediate_size == 1536 and loaded.puzzle_emb_dim == 32


def test_missing_tensors_are_initialised(tmp_path):
    """Buffers of the root module are filled when they are missing, instead of left as uninitialised memory."""
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {"z_H_init", "z_L_init"} <= tensors.keys() and "rope" not in tensors
    del tensors["z_H_init"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = HrmGridForSolving.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"z_H_init"}
    assert 0.5 < loaded.z_H_init.std() < 1.5 and loaded.z_H_init.abs().max() < 2.3
    assert torch.equal(loaded.rope, make_model().rope)


def test_puzzle_ids(tmp_path):
    """The index of puzzle ids travels with the weights, and a damaged one is refused."""
    model = make_model(num_puzzle_ids=4)
    model.puzzle_index = {"a": 1, "bé": 3}
    model.save_pretrained(tmp_path)
    assert HrmGridForSolving.from_pretrained(tmp_path).puzzle_index == {"a": 1, "bé": 3}
    assert AutoModel.from_pretrained(tmp_path, output_loading_info=True)[0].puzzle_index == {"a": 1, "bé": 3}
    for index in ({"a": 4}, {"a": 0}, {"a": 1, "b": 1}, ["a"], {"a": "1"}, {"a": True}):
        (tmp_path / "puzzle_ids.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="numbers from 1 to 3"):
            HrmGridForSolving.from_pretrained(tmp_path)
    (tmp_path / "puzzle_ids.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match="puzzle_ids.json is not valid JSON"):
        HrmGridForSolving.from_pretrained(tmp_path)
    (tmp_path / "puzzle_ids.json").unlink()
    with pytest.raises(OSError, match="puzzle_ids.json"):
        HrmGridForSolving.from_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path / "no ids")
    assert not (tmp_path / "no ids" / "puzzle_ids.json").exists()


def test_push(tmp_path, monkeypatch):
    """A push holds the code, the weights and the ids."""
    pushed = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    monkeypatch.setattr(HfApi, "create_commit", lambda self, operations, **kwargs: pushed.extend(operations))
    model = make_model(num_puzzle_ids=4)
    model.puzzle_index = {"a": 1}
    model.save_pretrained(tmp_path / "grid", push_to_hub=True, repo_id="me/grid")
    names = {operation.path_in_repo for operation in pushed}
    assert names >= {
        "config.json", "configuration_hrm_grid.py", "grid_solving.py", "halting.py", "losses.py", "model.safetensors",
        "modeling_hrm_grid.py", "puzzle_ids.json", "vocab.py",
    }  # fmt: skip


PROGRAM = """
import sys
sys.modules["trl_hrm"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
inputs = torch.load("inputs.pt", weights_only=True)
with torch.no_grad():
    output = model(inputs, torch.tensor([1, 1]))
solution = model.solve("1..4\\n..1.\\n.3..\\n4..1", votes=3, puzzle_id="a")
torch.save({"logits": output.logits, "z_H": output.z_H, "q_halt": torch.tensor(solution.q_halt)}, "outputs.pt")
"""


def test_loads_without_the_package(tmp_path):
    """A pushed folder loads by remote code where trl_hrm cannot be imported, and solves with the same bytes."""
    model = make_model("trm", num_puzzle_ids=2)
    model.puzzle_index = {"a": 1}
    model.save_pretrained(tmp_path / "grid")
    torch.save(INPUTS, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "grid")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = torch.load(tmp_path / "outputs.pt", weights_only=True)
    with torch.no_grad():
        expected = model(INPUTS, torch.tensor([1, 1]))
    assert torch.equal(found["logits"], expected.logits) and torch.equal(found["z_H"], expected.z_H)
    solution = model.solve("1..4\n..1.\n.3..\n4..1", votes=3, puzzle_id="a")
    assert torch.equal(found["q_halt"], torch.tensor(solution.q_halt))
