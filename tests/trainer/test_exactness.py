"""A forest row gives the same logits and gradients as one sequence per judged step."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention
from transformers.integrations import flex_attention as transformers_flex

from trl_hrm import StepFormat, StepTree, hrm_view, tree_attention
from trl_hrm.data.build import Dropped
from trl_hrm.data.prm800k import parse_prm800k
from trl_hrm.heads import gather_steps, step_outputs
from trl_hrm.tiny_model import make_tokenizer
from trl_hrm.trainer.forest_dataset import TOKEN_COLUMNS, DataCollatorForForest, ForestBuilder
from trl_hrm.tree_attention import TREE_SDPA, model_inputs

from ..fakes import CHAT
from ..helpers import (
    ALL_HEADS,
    ARCHITECTURES,
    HEADS,
    assert_gradients_equal,
    dataset_of,
    gradients,
    path_logits,
    random_tree,
    tiny_model,
    tiny_tokenizer,
)


def number_labels(trees: list[StepTree]) -> list[StepTree]:
    """Return trees with merged steps where the label identifies the step: step k of n has the label k / n."""
    total = sum(label is not None for tree in trees for label in tree.labels)
    numbers = iter(range(1, total + 1))
    for tree in trees:
        tree.labels = [None if label is None else next(numbers) / total for label in tree.labels]
    return [hrm_view(tree) for tree in trees]


def key_of(label: float, num_merged: int) -> tuple[float, int]:
    return round(float(label), 5), int(num_merged)


def reference(model, step_format, trees, tokenizer=None) -> dict[tuple, torch.Tensor]:
    return {
        key_of(tree.labels[step], tree.num_merged[step]): logits
        for tree in trees
        for step, logits in path_logits(model, step_format, tree, tokenizer).items()
    }


def forest(model, step_format, trees, tokenizer=None, batch_size=3, **settings) -> dict[tuple, torch.Tensor]:
    """Return the logits of every judged step, computed in batches through builder, collator and masks."""
    tokenizer = tokenizer or tiny_tokenizer()
    rows, _ = ForestBuilder(tokenizer, step_format, **settings)(dataset_of(trees), "dataset")
    shared = settings.get("shared_prefix", True)
    collator = DataCollatorForForest(tokenizer.pad_token_id, padding_free=not shared)
    label_token_ids = step_format.label_token_ids(tokenizer) if step_format.head == "lm" else None
    found = {}
    for start in range(0, len(rows), batch_size):
        batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        tokens = {name: batch[name] for name in TOKEN_COLUMNS}
        if shared:
            tokens = model_inputs(**tokens, config=model.config, dtype=model.dtype)
        else:
            tokens = {"input_ids": tokens["input_ids"], "position_ids": tokens["position_ids"], "use_cache": False}
        with step_outputs(model, step_format, label_token_ids):
            logits = gather_steps(model(**tokens).logits, batch["step_positions"])
        judged = batch["labels"] >= 0
        for label, weight, merged, values in zip(
            batch["labels"][judged],
            batch["label_weights"][judged],
            batch["num_merged"][judged],
            logits[judged],
            strict=True,
        ):
            key = key_of(label, merged)
            assert key not in found and weight == 1
            found[key] = values
    return found


def assert_same(model, found: dict[tuple, torch.Tensor], expected: dict[tuple, torch.Tensor]) -> None:
    """Every judged step occurs once. Logits agree to 1e-5, gradients of a random functional to 1e-5 of the largest."""
    assert found.keys() == expected.keys()
    keys = sorted(expected)
    found, expected = (torch.stack([logits[key] for key in keys]) for logits in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if expected.requires_grad:
        coefficients = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)) / len(keys)
        assert_gradients_equal(
            gradients(model, (coefficients * found).sum()), gradients(model, (coefficients * expected).sum())
        )


def longest_path(trees: list[StepTree], tokenizer=None) -> int:
    rows, _ = ForestBuilder(tokenizer or tiny_tokenizer(), HEADS["classification"], None)(dataset_of(trees), "dataset")
    return max(max(row["position_ids"]) for row in rows) + 1


@pytest.fixture(scope="module")
def trees() -> list[StepTree]:
    rng = random.Random(0)
    return number_labels([random_tree(rng, name) for name in "abcdef"])


@pytest.mark.parametrize("attention", ["sdpa", "eager", TREE_SDPA])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(trees, architecture, attention, monkeypatch):
    """Only a sliding window shows whether windows count row indices instead of positions in the path."""
    model = tiny_model(architecture=architecture, attention=attention)
    assert model.config._attn_implementation == attention
    monkeypatch.setattr(tree_attention, "BLOCK_SIZE", 16)  # several blocks in each row
    expected = reference(model, HEADS["classification"], trees)
    assert_same(model, forest(model, HEADS["classification"], trees, max_length=200), expected)


@pytest.mark.parametrize("head", ["mlp", "regression", "value", "lm", "lm_mean"])
@pytest.mark.parametrize("tied", [False, True])
def test_heads(trees, head, tied):
    model = tiny_model(ALL_HEADS[head], tie_word_embeddings=tied)
    expected = reference(model, ALL_HEADS[head], trees)
    assert_same(model, forest(model, ALL_HEADS[head], trees, max_length=200), expected)


TEXT_FORMATS = {
    "qwen2.5-math-prm": StepFormat.published("qwen2.5-math-prm"),
    "math-shepherd": StepFormat.published("math-shepherd"),
    "rlhflow-prm": StepFormat.published("rlhflow-prm"),
    "skywork-o1-prm": StepFormat.published("skywork-o1-prm"),
    "pieces before the separator": StepFormat(
        score_position="before_separator",
        step_prefix="{number}) ",
        step_suffix=" | ",
        prompt_template="Q: {problem}\n",
    ),
    "string before the separator": StepFormat(
        score_position="before_separator",
        step_prefix="{number}) ",
        step_separator=" |",
        step_suffix=" ",
        tokenization="string",
    ),
}


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_text_formats(trees, name, shared_prefix):
    """Steps that are numbered, a whole solution that is one string, and conversations with a reply after each step."""
    step_format = TEXT_FORMATS[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra_0>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    model = tiny_model(step_format, vocab_size=len(tokenizer), max_position_embeddings=1024)
    trees = [replace(tree, completions=[merged(text, step_format) for text in tree.completions]) for tree in trees]
    expected = reference(model, step_format, trees, tokenizer)
    settings = {"max_length": 600, "packing": True, "shared_prefix": shared_prefix}
    assert_same(model, forest(model, step_format, trees, tokenizer, **settings), expected)


def merged(text: str, step_format: StepFormat) -> str:
    """Return the text of a step with the separator of this format between merged steps."""
    return step_format.merge(text.split(StepFormat().merge_separator))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("extra", [0, 1, 7, 40])
def test_splits_and_packing(trees, extra, packing):
    """At the shortest row length that holds every path, most trees are split and packed with parts of other trees."""
    model = tiny_model()
    max_length = longest_path(trees) + extra
    found = forest(model, HEADS["classification"], trees, max_length=max_length, packing=packing)
    assert_same(model, found, reference(model, HEADS["classification"], trees))


def test_no_max_length(trees):
    model = tiny_model()
    expected = reference(model, HEADS["classification"], trees)
    assert_same(model, forest(model, HEADS["classification"], trees, max_length=None), expected)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2-sliding", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", TREE_SDPA])
@pytest.mark.parametrize("packing", [False, True])
def test_one_sequence_per_path(trees, architecture, attention, packing):
    """With `shared_prefix=False`, a wrong cache or mask would let packed sequences see each other without an error."""
    model = tiny_model(architecture=architecture, attention=attention)
    expected = reference(model, HEADS["classification"], trees)
    settings = {"max_length": longest_path(trees) + 30, "packing": packing, "shared_prefix": False}
    assert_same(model, forest(model, HEADS["classification"], trees, **settings), expected)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2-sliding"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flex_attention_forward(trees, architecture, compiled, monkeypatch):
    """Forward only, because flex attention has no backward pass on CPU."""
    if not compiled:
        # torch 2.7 has no such switch and needs none
        monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
        monkeypatch.setattr(transformers_flex, "WrappedFlexAttention", lambda _: lambda: flex_attention.flex_attention)
    model = tiny_model(architecture=architecture, attention="flex_attention")
    plain = tiny_model(architecture=architecture)
    with torch.no_grad():
        expected = reference(plain, HEADS["classification"], trees)
        assert_same(model, forest(model, HEADS["classification"], trees, max_length=128), expected)


def test_the_comparison_can_fail(trees):
    """Plain causal rows instead of trees must be far outside the tolerance."""
    model = tiny_model()
    expected = reference(model, HEADS["classification"], trees)
    rows, _ = ForestBuilder(tiny_tokenizer(), HEADS["classification"], 200)(dataset_of(trees), "dataset")
    batch = DataCollatorForForest(tiny_tokenizer().pad_token_id)(list(rows))
    logits = gather_steps(model(batch["input_ids"], use_cache=False).logits, batch["step_positions"])
    judged = batch["labels"] >= 0
    keys = [key_of(*pair) for pair in zip(batch["labels"][judged], batch["num_merged"][judged], strict=True)]
    wrong = torch.stack([expected[key] for key in keys]) - logits[judged]
    assert wrong.abs().max() > 0.1


@pytest.mark.parametrize(
    ("head", "attention"),
    # random trees are exact for every head and attention above
    [("classification", TREE_SDPA), pytest.param("lm", TREE_SDPA, marks=pytest.mark.slow)],
)
def test_prm800k(prm800k, head, attention):
    """
    Trees of people's ratings with merged steps, packed and split: all of the hand-written file, and of the real one the four
    smallest and one of 18 KB.
    """
    trees = []
    with open(prm800k, encoding="utf-8") as file:
        for number, line in enumerate(file):
            try:
                trees.append(parse_prm800k(json.loads(line), f"line {number}", Counter()))
            except Dropped:
                continue
    trees.sort(key=lambda tree: sum(map(len, tree.completions)))
    trees = number_labels(trees if len(trees) < 20 else [*trees[:4], trees[len(trees) // 2]])
    tokenizer = make_tokenizer([text for tree in trees for text in tree.completions], vocab_size=1000)
    model = tiny_model(HEADS[head], attention=attention, vocab_size=len(tokenizer), max_position_embeddings=4096)
    expected = reference(model, HEADS[head], trees, tokenizer)
    assert len(expected) > 80 and any(merged == 2 for _, merged in expected)
    for max_length in (longest_path(trees, tokenizer), 1024):
        found = forest(model, HEADS[head], trees, tokenizer, max_length=max_length)
        assert_same(model, found, expected)
        expected = reference(model, HEADS[head], trees, tokenizer)  # the graph has been freed
