"""Identity of checkpoints by content."""

import json

import pytest
from huggingface_hub import constants

from trl_hrm.identity import changed_settings, checkpoint_identity


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "step_format.json", "optimizer.pt"):
        (folder / name).write_text(f'{{"of": "{name}"}}')
    return folder


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("model.safetensors", "weights"),
        ("model-00002-of-00002.safetensors", "weights"),
        ("config.json", "config"),
        ("tokenizer.json", "tokenizer"),
        ("tokenizer_config.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
        ("special_tokens_map.json", "tokenizer"),
        ("step_format.json", "step_format"),
        ("modeling_own.py", "config"),
        ("optimizer.pt", None),
        ("README.md", None),
        ("training_args.bin", None),
    ],
)
def test_a_changed_file_changes_its_part(checkpoint, name, changed):
    before = checkpoint_identity(str(checkpoint))
    assert set(before) == {"weights", "config", "tokenizer", "step_format"}
    (checkpoint / name).write_text("{}")
    after = checkpoint_identity(str(checkpoint))
    assert {part for part in before if before[part] != after[part]} == ({changed} if changed else set())


def test_a_copy_is_the_same(checkpoint, tmp_path):
    (tmp_path / "copy").mkdir()
    for path in sorted(checkpoint.iterdir(), reverse=True):
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    assert checkpoint_identity(str(checkpoint)) == checkpoint_identity(str(tmp_path / "copy"))


def test_an_adapter_includes_its_base_model(checkpoint, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(checkpoint)}))
    (adapter / "adapter_model.safetensors").write_text("lora")
    before = checkpoint_identity(str(adapter))
    assert before["base_model"] == checkpoint_identity(str(checkpoint))
    (checkpoint / "model.safetensors").write_text("other")
    assert checkpoint_identity(str(adapter))["base_model"]["weights"] != before["base_model"]["weights"]


def test_a_branch_of_a_repository_is_resolved_to_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--me--policy"
    for commit in ("1" * 40, "2" * 40):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    for commit in ("1" * 40, "2" * 40):
        (repo / "refs" / "main").write_text(commit)
        assert checkpoint_identity("me/policy") == {"commit": commit}
    assert checkpoint_identity("me/policy", "1" * 40) == {"commit": "1" * 40}


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(OSError):
        checkpoint_identity(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        ([-1.0, -2.0], []),
        ([-1.1, -2.1], []),
        ([-0.85, -2.15], ["prompt_logprobs was [-1.0, -2.0] and is [-0.85, -2.15]"]),
        ([-1.0], ["prompt_logprobs was [-1.0, -2.0] and is [-1.0]"]),
        (None, []),
    ],
)
def test_measurements_may_differ_by_rounding(now, changed):
    """The log-probabilities that identify a model on a server depend on the hardware, and not every server returns them."""
    assert changed_settings({"prompt_logprobs": [-1.0, -2.0]}, {"prompt_logprobs": now}) == changed
    assert changed_settings({"seed": [-1.0]}, {"seed": [-1.1]}) == ["seed was [-1.0] and is [-1.1]"]
