"""A reward model with a different head is rejected wherever one is loaded. The error names its weights, and nothing is written."""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from trl_hrm import StepReward, StepScorer
from trl_hrm.cli import main
from trl_hrm.scoring.http_scorer import ServerScorer

from ..checkpoints import drop, edit, save, two_layer_head
from ..evaluation.benchmark_rows import process_row
from ..fakes import write_rows
from ..helpers import HEADS, make_trainer, random_tree, save_checkpoint, tiny_model, tiny_tokenizer
from ..search.policies import KNOWN


WEIGHTS = "missing `score.bias`, `score.weight`; unexpected `score.0.bias`, `score.0.weight`, `score.2.bias`"
POLICY = "--engine transformers --prompt question --prompt_style plain --segmentation step_header".split()
STRATEGIES = {
    "best_of_n": ["best-of-n", "--n", "1", "2", "--max_solution_tokens", "60", "--final_stops", "# END!"],
    "beam_search": ["step-search", "--strategy", "beam_search", "--n", "4"],
}


@pytest.fixture
def qwen(tmp_path) -> str:
    """A tiny model with the layout of Qwen2.5-Math-PRM, and a `step_format.json` that claims a classifier."""
    folder = save(tmp_path / "qwen", tiny_model())
    edit(folder, two_layer_head)
    return str(folder)


@pytest.fixture
def base(tmp_path) -> str:
    """A base model with a classifier's step format, which would also get a random head."""
    folder = save(tmp_path / "base", tiny_model(HEADS["lm"]))
    HEADS["classification"].save(folder)
    return str(folder)


def commands(tmp_path: Path, model: str, out: Path) -> dict[str, list[str]]:
    solutions = write_rows(tmp_path / "solutions.jsonl", [{"prompt": "1+2?", "completions": ["= 3", "so x"]}])
    candidates = write_rows(
        tmp_path / "candidates.jsonl",
        [{"prompt": "1+2?", "answer": "3", "candidates": ["# Step 1: x\n# Answer: 3\n"] * 2}],
    )
    raft = write_rows(tmp_path / "raft.jsonl", [{"prompt": "p?", "completion": "add x\n\nsum = 3"}])
    judged = write_rows(tmp_path / "judged.jsonl", [process_row(i, i % 4 - 1) for i in range(8)])
    return {
        "score": ["score", solutions, "--reward_model", model, "--output", str(out)],
        "best-of-n": ["best-of-n", "--candidates", candidates, "--reward_model", model, "--output_dir", str(out), "--n", "1", "2"],
        "select-raft": [
            *("select-raft", "--candidates", raft, "--reward_model", model, "--output_dir", str(out)),
            *("--segmentation", "blank_line", "--test_size", "0"),
        ],
        "benchmark": ["benchmark", judged, "--suite", "processbench", "--reward_model", model, "--output_dir", str(out)],
    }  # fmt: skip


COMMANDS = ("score", "best-of-n", "select-raft", "benchmark")


@pytest.mark.parametrize("name", COMMANDS)
class TestCommands:
    def test_refused(self, tmp_path, qwen, capfd, name):
        out = tmp_path / "out"
        before = sorted(tmp_path.iterdir())
        words = commands(tmp_path, qwen, out)[name]
        assert main(words) == 1
        error = capfd.readouterr().err
        assert WEIGHTS in error and f"error: {qwen}: " in error and "Set `head` of the step format to 'mlp'" in error
        assert "newly initialized" not in error
        inputs = {tmp_path / f"{file}.jsonl" for file in ("solutions", "candidates", "raft", "judged")}
        assert set(tmp_path.iterdir()) == {*before, *inputs}  # no output, not even a partial one

    def test_a_base_model(self, tmp_path, base, capfd, name):
        assert main(commands(tmp_path, base, tmp_path / "out")[name]) == 1
        assert "missing `score.bias`, `score.weight`; unexpected `lm_head.weight`" in capfd.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_matching_head(self, tmp_path, name):
        """The commands above must fail only because of the weights."""
        model = save_checkpoint(tmp_path / "model")
        assert main(commands(tmp_path, model, tmp_path / "out")[name]) == 0
        assert (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_before_anything_is_sampled(tmp_path, policy, qwen, capfd, strategy):
    problems = write_rows(tmp_path / "problems.jsonl", KNOWN)
    words = [
        "--problems",
        problems,
        "--policy",
        policy,
        "--reward_model",
        qwen,
        *POLICY,
    ]
    assert main([*STRATEGIES[strategy], *words, "--output_dir", str(tmp_path / "out")]) == 1
    assert WEIGHTS in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


class TestPython:
    def test_step_scorer(self, qwen):
        with pytest.raises(ValueError, match=WEIGHTS):
            StepScorer.from_pretrained(qwen)
        with pytest.raises(ValueError, match=WEIGHTS):
            StepScorer.from_pretrained(qwen, step_format=HEADS["classification"])

    def test_step_reward(self, qwen):
        with pytest.raises(ValueError, match=WEIGHTS):
            StepReward(qwen)

    def test_trainer(self, tmp_path, qwen):
        """Without this `step_format.json`, the head would be recognised: see tests/trainer/test_published_models.py."""
        with pytest.raises(ValueError, match=WEIGHTS):
            make_trainer(tmp_path / "out", [random_tree(random.Random(0))], qwen)
        assert not (tmp_path / "out").exists()

    def test_server_scorer(self, qwen, base):
        """The error must come before the request, which would fail without a server."""
        with pytest.raises(ValueError, match=WEIGHTS):
            ServerScorer.from_pretrained(qwen, "http://127.0.0.1:1", max_retries=0)
        with pytest.raises(ValueError, match=r"architectures \['Qwen2ForCausalLM'\]"):
            ServerScorer.from_pretrained(base, "http://127.0.0.1:1", max_retries=0)

    def test_a_server_scorer_without_weights_warns(self, tmp_path, caplog):
        """A client may have only the tokenizer and the step format."""
        tiny_tokenizer().save_pretrained(tmp_path)
        HEADS["classification"].save(tmp_path)
        with pytest.raises(OSError, match="http://127.0.0.1:1"):
            ServerScorer.from_pretrained(str(tmp_path), "http://127.0.0.1:1", max_retries=0)
        assert (
            "has no readable safetensors files, so it could not be checked whether its weights include the head"
            in caplog.text
        )

    def test_vllm_scorer(self, qwen, tmp_path, monkeypatch):
        """The error must come before the engine starts."""
        vllm = fake_vllm(monkeypatch)
        with pytest.raises(ValueError, match=WEIGHTS):
            vllm.from_pretrained(qwen)
        folder = save(tmp_path / "part", tiny_model())
        edit(folder, drop("score.bias"))
        with pytest.raises(ValueError, match="missing `score.bias`"):
            vllm.from_pretrained(str(folder))
        assert vllm.started == []
        with pytest.raises(RuntimeError, match="started"):
            vllm.from_pretrained(save_checkpoint(tmp_path / "model"))
        assert vllm.started == [str(tmp_path / "model")]

    def test_pytorch_files_in_vllm(self, tmp_path, monkeypatch, caplog):
        vllm = fake_vllm(monkeypatch)
        folder = Path(save_checkpoint(tmp_path))
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(RuntimeError, match="started"):
            vllm.from_pretrained(str(folder))
        assert "it could not be checked whether its weights include the head 'classification'" in caplog.text


def fake_vllm(monkeypatch):
    """Return `VLLMScorer` with an engine that only records its start."""
    started = []

    def start(path, **settings):
        started.append(path)
        raise RuntimeError("started")

    @dataclass
    class EngineArgs:
        seed: int = 0

    vllm, config = ModuleType("vllm"), ModuleType("vllm.config")
    vllm.LLM, vllm.EngineArgs, vllm.PoolingParams, vllm.SamplingParams = start, EngineArgs, object, object
    config.PoolerConfig = dict
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    monkeypatch.delitem(sys.modules, "trl_hrm.scoring.vllm_scorer", raising=False)
    from trl_hrm.scoring.vllm_scorer import VLLMScorer

    monkeypatch.delitem(sys.modules, "trl_hrm.scoring.vllm_scorer")
    return SimpleNamespace(from_pretrained=VLLMScorer.from_pretrained, started=started)
