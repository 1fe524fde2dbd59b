"""Scorers that read plain sequences match StepScorer and read each path once. Slow: vLLM in this process."""

import importlib
import json
import random
import sys

import numpy as np
import pytest
import torch

from trl_hrm import StepFormat, StepScorer
from trl_hrm.scoring.tree_scorer import read_text_contract

from ..helpers import HEADS, random_tree, tiny_model, tiny_tokenizer
from .solutions import (
    CANDIDATES,
    NATIVE,
    PROBLEM,
    PROMPTS,
    SOLUTIONS,
    VLLM,
    PlainScorer,
    flat,
    long_candidates,
    num_tokens,
    save,
    save_published,
)


class TestPaths:
    """Convert trees to plain sequences and back."""

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("settings", [{}, {"spans": (1, 2)}, {"spans": (1, 2, 3), "combine": "mean"}])
    def test_scores_of_step_scorer(self, head, settings):
        step_format = HEADS[head]
        expected = StepScorer(tiny_model(step_format), tiny_tokenizer(), step_format).score(
            PROMPTS, CANDIDATES, **settings
        )
        found = PlainScorer(tiny_model(step_format), step_format).score(PROMPTS, CANDIDATES, **settings)
        assert [[len(c) for c in p] for p in found] == [[len(c) for c in p] for p in CANDIDATES]
        np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-5)
        assert flat(expected).std() > 0.01

    def test_trees(self):
        """Rows are easily mixed up where a tree branches inside a step, or a merged step starts like a single one."""
        rng = random.Random(0)
        trees = [random_tree(rng, name, max_steps=12) for name in "abcdef"]
        expected = StepScorer(tiny_model(), tiny_tokenizer(), StepFormat()).score_trees(trees, spans=(1, 2))
        found = PlainScorer(tiny_model(), StepFormat()).score_trees(trees, spans=(1, 2))
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=0, atol=1e-5)

    def test_every_path_once(self):
        """Each leaf needs one sequence. An extra request changes no score and only costs more."""
        scorer = PlainScorer(tiny_model(), StepFormat())
        scorer.score(PROMPTS, CANDIDATES)
        expected = []
        for prompt, longest in (
            (PROMPTS[0], [["add 1", "so = 3"], ["add 1", "so = 7", "thus y"], ["x"]]),
            (PROMPTS[1], [["sub", "sum"], ["add 1"]]),
            (PROMPTS[3], CANDIDATES[3]),
        ):
            for steps in longest:
                prompt_ids, step_ids = scorer.step_format.encode(scorer.tokenizer, prompt, steps)
                expected.append(prompt_ids + [token for ids in step_ids for token in ids])
        [batch] = scorer.batches
        assert sorted(batch) == sorted(expected)

    def test_a_merged_step_is_a_sequence(self):
        scorer = PlainScorer(tiny_model(), StepFormat(merge_separator=" then "))
        scorer.score(["p"], [[["a", "b", "c"]]], spans=(1, 2))
        [batch] = scorer.batches
        texts = [scorer.tokenizer.decode(ids) for ids in batch]
        assert set(texts) == {"pa then b\n\n", "pa\n\nb then c\n\n", "pa\n\nb\n\nc\n\n"}

    @pytest.mark.parametrize("candidates", [[], [[]], [[], []]])
    def test_nothing_to_score(self, candidates):
        """vLLM raises on an empty batch."""
        scorer = PlainScorer(tiny_model(), StepFormat())
        assert scorer.score(["p"], [candidates]) == [candidates]
        assert scorer.score([], []) == [] and scorer.batches == []

    def test_more_tokens_than_positions(self):
        """The error must name the solution that is too long before anything is read. One that just fits is scored."""
        scorer = PlainScorer(tiny_model(), StepFormat())
        length = num_tokens(scorer, 30)
        scorer.max_positions = length
        assert len(scorer.score(["p"], [[["a"], ["x" * 30]]])[0]) == 2
        scorer.max_positions, scorer.batches = length - 1, []
        message = f"{length} tokens.*{length - 1} positions.*'p'"
        with pytest.raises(ValueError, match=message):
            scorer.score(["q", "p", "r"], [[["a"]], [["a"], ["x" * 30]], [["a"]]])
        assert scorer.batches == []

    def test_nan_scores(self):
        scorer = PlainScorer(tiny_model(), StepFormat())
        with torch.no_grad():
            scorer.model.score.weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="prompt 'p'.*finite"):
            scorer.score(["q", "p"], [[], [["a"]]])

    @pytest.mark.parametrize("rows", [lambda rows: rows[1:], lambda rows: rows[:, :1], lambda rows: rows[-1]])
    def test_outputs_of_another_shape(self, rows):
        """Pooled step tokens, another head, or one row per sequence would all be read as step scores."""
        scorer = PlainScorer(tiny_model(), StepFormat())
        all_rows = scorer.rows
        scorer.rows = lambda ids: rows(all_rows(ids))
        with pytest.raises(ValueError, match=r"\(\d+, 2\).*--runner pooling"):
            scorer.score(["p"], [[["a"]]])


class TestPublished:
    """Models in the formats of published reward models."""

    @pytest.mark.parametrize("name", NATIVE)
    def test_scores_of_the_loop(self, tmp_path, name):
        """Paths with a part after the step token, steps before the separator and label tokens of another text."""
        published, folder, step_format = save_published(tmp_path, name)
        local = StepScorer.from_pretrained(folder, step_format)
        tokenizer, step_format = read_text_contract(folder, step_format, None, False)
        scorer = PlainScorer(local.model, step_format, tokenizer)
        expected = published.scores(folder, PROBLEM, SOLUTIONS)
        np.testing.assert_allclose(
            flat(scorer.score([PROBLEM], [SOLUTIONS])), np.concatenate(expected), rtol=0, atol=3e-6
        )
        for settings in ({"spans": (1, 2)}, {"spans": (1, 3), "combine": "mean"}):
            np.testing.assert_allclose(
                flat(scorer.score([PROBLEM], [SOLUTIONS], **settings)),
                flat(local.score([PROBLEM], [SOLUTIONS], **settings)),
                rtol=0,
                atol=3e-6,
            )

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B", "vLLM has no class for head 'value'. Convert the model"),
            ("ScalableMath/llemma-7b-prm-prm800k-level-1to3-hf", "vLLM has no class for head 'lm_mean'. Convert"),
            ("openreasoner/Math-psa", "is a LoRA adapter, .* Merge"),
        ],
    )
    def test_models_without_a_class_in_vllm(self, tmp_path, name, message):
        _, folder, step_format = save_published(tmp_path, name)
        with pytest.raises(ValueError, match=message):
            read_text_contract(folder, step_format, None, False)

    @pytest.mark.parametrize(
        ("head", "architecture", "message"),
        [
            ("mlp", "llama", r"\['LlamaForProcessRewardModel'\], but vLLM needs one that ends with Qwen2ForProcess"),
            ("lm", "qwen2", r"\['Qwen2ForTokenClassification'\], but vLLM needs one that ends with ForCausalLM or "),
        ],
    )
    def test_another_class(self, tmp_path, head, architecture, message):
        step_format = StepFormat(head=head)
        folder = save(tmp_path, step_format if head == "mlp" else HEADS["classification"], architecture)
        with pytest.raises(ValueError, match=message):
            read_text_contract(folder, step_format, None, False)


def test_missing_vllm_names_the_install_command(monkeypatch):
    """The name of the missing module alone does not say what to install."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "trl_hrm.scoring.vllm_scorer", raising=False)
    with pytest.raises(ImportError, match=r"trl-hrm\[vllm\]"):
        importlib.import_module("trl_hrm.scoring.vllm_scorer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "architecture"),
    [("classification", "qwen2"), ("regression-bce", "llama"), ("regression", "mistral"), ("lm", "llama")],
)
def test_vllm(vllm_environment, tmp_path, head, architecture):
    from trl_hrm.scoring.vllm_scorer import VLLMScorer

    folder = save(tmp_path, HEADS[head], architecture)
    scorer = VLLMScorer.from_pretrained(folder, **VLLM)
    reference = StepScorer.from_pretrained(folder)
    prompts, candidates = long_candidates()
    for settings in ({}, {"spans": (1, 2)}, {"spans": (1, 3), "combine": "mean"}):
        expected = reference.score(prompts, candidates, **settings)
        for _ in range(2):  # the second time with a filled cache
            found = scorer.score(prompts, candidates, **settings, progress=True)
            np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-4)
    assert flat(expected).std() > 0.01
    assert scorer.score(["p"], [[]]) == [[]]
    limit = 255 if head == "lm" else 256  # with a language model, each request generates a token
    longest = next(n for n in range(300) if num_tokens(scorer, n + 1) > limit)
    assert num_tokens(scorer, longest) == scorer.max_positions == limit
    steps = ["x" * longest]
    np.testing.assert_allclose(
        scorer.score(["p"], [[steps]])[0][0], reference.score(["p"], [[steps]])[0][0], rtol=0, atol=1e-4
    )
    with pytest.raises(ValueError, match=f"{limit + 1} tokens.*{limit} positions"):
        scorer.score(["p"], [[["x" * (longest + 1)]]])
    scorer.llm.llm_engine.engine_core.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_published_models_in_vllm(vllm_environment, tmp_path, name):
    """vLLM's kernels round differently: tiny models with large weights differ by up to 4e-6."""
    from trl_hrm.scoring.vllm_scorer import VLLMScorer

    published, folder, step_format = save_published(tmp_path, name)
    scorer = VLLMScorer.from_pretrained(folder, step_format, **VLLM | {"max_model_len": 1024})
    expected = published.scores(folder, PROBLEM, SOLUTIONS)
    for _ in range(2):  # the second time with a filled cache
        found = scorer.score([PROBLEM], [SOLUTIONS])
        np.testing.assert_allclose(flat(found), np.concatenate(expected), rtol=0, atol=1e-5)
    reference = StepScorer.from_pretrained(folder, step_format)
    np.testing.assert_allclose(
        flat(scorer.score([PROBLEM], [SOLUTIONS], spans=(1, 2))),
        flat(reference.score([PROBLEM], [SOLUTIONS], spans=(1, 2))),
        rtol=0,
        atol=1e-5,
    )
    scorer.llm.llm_engine.engine_core.shutdown()


@pytest.mark.slow
def test_vllm_errors(vllm_environment, tmp_path):
    """Each of these would be a traceback, or return an embedding or the wrong class as a score."""
    from trl_hrm.scoring.vllm_scorer import VLLMScorer

    folder = save(tmp_path)
    with pytest.raises(ValueError, match="'max_length'"):
        VLLMScorer.from_pretrained(folder, max_length=64, enforce_eager=True)
    with pytest.raises(ValueError, match="num_labels=2.*'regression'"):
        VLLMScorer.from_pretrained(folder, step_format=HEADS["regression"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM.*ForTokenClassification"):
        VLLMScorer.from_pretrained(folder)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MysteryForTokenClassification"]}))
    with pytest.raises(ValueError, match="vLLM cannot run this model .*MysteryForTokenClassification") as error:
        VLLMScorer.from_pretrained(folder, **VLLM)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    with pytest.raises(ValueError, match="vLLM has no class for head 'value'"):
        VLLMScorer.from_pretrained(folder, step_format=StepFormat(head="value"))
