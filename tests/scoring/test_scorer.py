"""Compare scores with plain forward passes, one text at a time."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, set_seed

from trl_hrm import StepFormat, StepScorer, StepTree
from trl_hrm.losses import step_score
from trl_hrm.scoring.tree_scorer import read_text_contract
from trl_hrm.search.engines.transformers import TransformersEngine
from trl_hrm.step_format import STEP_FORMAT_NAME

from ..helpers import HEADS, SIZES, WORDS, make_trainer, path_logits, random_tree, tiny_model, tiny_tokenizer


PROMPTS = ["1+2+3?", "add x y", "nothing"]
CANDIDATES = [
    [["add 1", "so = 3"], ["add 1", "so = 7", "thus y"], ["x"]],
    [["sub", "sum"], ["add 1"]],
    [],
]


def scorer_of(step_format=HEADS["classification"], **settings) -> StepScorer:
    return StepScorer(tiny_model(step_format), tiny_tokenizer(), step_format, **settings)


def plain_score(scorer: StepScorer, prompt: str, steps: list[str]) -> float:
    """Return the score of the last step, computed in its own sequence."""
    chain = StepTree(prompt, steps, [None] * (len(steps) - 1) + [1.0], list(range(-1, len(steps) - 1)))
    with torch.no_grad():
        logits = path_logits(scorer.model, scorer.step_format, chain)[len(steps) - 1]
    return step_score(logits, scorer.step_format).item()


def flat(scores) -> np.ndarray:
    return np.array([score for prompt in scores for candidate in prompt for score in candidate])


class TestScore:
    @pytest.mark.parametrize("head", HEADS)
    def test_each_step_as_if_alone(self, head):
        scorer = scorer_of(HEADS[head])
        scores = scorer.score(PROMPTS, CANDIDATES)
        assert [[len(candidate) for candidate in prompt] for prompt in scores] == [[2, 3, 1], [2, 1], []]
        for prompt, candidates, found in zip(PROMPTS, CANDIDATES, scores, strict=True):
            for steps, values in zip(candidates, found, strict=True):
                expected = [plain_score(scorer, prompt, steps[: i + 1]) for i in range(len(steps))]
                assert values == pytest.approx(expected, abs=1e-5)
        assert all(type(score) is float for score in flat(scores).tolist())
        assert flat(scores).std() > 0.01

    @pytest.mark.parametrize("combine", ["max", "mean"])
    @pytest.mark.parametrize("spans", [(1, 2), (2, 1), (1, 2, 3), (1, 3)])
    def test_spans_are_scores_of_the_merged_text(self, spans, combine):
        """An HRM training row has the previous step, the merge separator, the step and the step separator."""
        scorer = scorer_of(StepFormat(merge_separator=" then "))
        scores = scorer.score(PROMPTS, CANDIDATES, spans=spans, combine=combine)
        for prompt, candidates, found in zip(PROMPTS, CANDIDATES, scores, strict=True):
            for steps, values in zip(candidates, found, strict=True):
                for i, value in enumerate(values):
                    given = [
                        plain_score(
                            scorer, prompt, steps[: i + 1 - span] + [" then ".join(steps[i + 1 - span : i + 1])]
                        )
                        for span in spans
                        if span <= i + 1
                    ]
                    assert len(given) == len([span for span in spans if span <= i + 1])
                    expected = max(given) if combine == "max" else sum(given) / len(given)
                    assert value == pytest.approx(expected, abs=1e-5)

    def test_order_of_candidates_and_prompts_does_not_matter(self):
        scorer = scorer_of()
        expected = scorer.score(PROMPTS, CANDIDATES, spans=(1, 2))
        for order in itertools.permutations(range(3)):
            found = scorer.score(PROMPTS[:1], [[CANDIDATES[0][i] for i in order]], spans=(1, 2))
            for i, values in zip(order, found[0], strict=True):
                assert values == pytest.approx(expected[0][i], abs=1e-6)
        found = scorer.score(PROMPTS[::-1], CANDIDATES[::-1], spans=(1, 2))[::-1]
        np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("settings", [{"batch_size": 1}, {"max_length": 20}, {"max_length": 1, "batch_size": 3}])
    def test_rows_and_batches_do_not_matter(self, settings):
        """Trees longer than a row are split. A path longer than a row makes the row longer."""
        rng = random.Random(0)
        trees = [random_tree(rng, name, max_steps=12) for name in "abcde"]
        expected = scorer_of().score_trees(trees, spans=(1, 2))
        found = scorer_of(**settings).score_trees(trees, spans=(1, 2))
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=0, atol=1e-5)

    def test_thoughts(self):
        """A step that begins with a mark is also scored merged with the thought before it, all others alone."""
        scorer = scorer_of(step_format=StepFormat(merge_separator=" then "))
        steps = ["add 1", "x = 2", "Wait, x = 3", "so", "Hmm, y"]
        [[scores]] = scorer.score(["p"], [[steps]], spans=(1, "thought"), combine="mean")
        expected = [plain_score(scorer, "p", steps[: i + 1]) for i in range(5)]
        expected[2] = (expected[2] + plain_score(scorer, "p", [" then ".join(steps[:3])])) / 2
        expected[4] = (expected[4] + plain_score(scorer, "p", [*steps[:2], " then ".join(steps[2:])])) / 2
        assert scores == pytest.approx(expected, abs=1e-5)
        [[both]] = scorer.score(["p"], [[steps]], spans=(1, 2, "thought"))
        pairs = [plain_score(scorer, "p", [*steps[:i], " then ".join(steps[i : i + 2])]) for i in range(4)]
        assert both[1] == pytest.approx(max(plain_score(scorer, "p", steps[:2]), pairs[0]), abs=1e-5)
        assert both[4] >= max(scores[4], pairs[3]) - 1e-5

    @pytest.mark.parametrize(("max_length", "batch_size", "most"), [(20, 4, 80), (20, 1, 20), (500, 2, 1000)])
    def test_tokens_of_a_forward_pass(self, monkeypatch, max_length, batch_size, most):
        """A batch of long paths would need many times the memory of a batch of ordinary rows."""
        scorer, shapes = scorer_of(max_length=max_length, batch_size=batch_size), []
        forward = scorer.model.forward
        monkeypatch.setattr(
            scorer.model, "forward", lambda **inputs: shapes.append(inputs["input_ids"].shape) or forward(**inputs)
        )
        rng = random.Random(0)
        candidates = [
            [" ".join(rng.choices(("add", "x", "=", "3"), k=3)) for _ in range(rng.randrange(1, 12))]
            for _ in range(12)
        ]
        found = scorer.score(["p"] * 12, [[one] for one in candidates], spans=(1, 2))
        np.testing.assert_allclose(
            flat(found), flat(scorer_of().score(["p"] * 12, [[one] for one in candidates], spans=(1, 2))), atol=1e-5
        )
        assert (
            all(rows == 1 or rows * width <= most for rows, width in shapes)
            and max(rows for rows, _ in shapes) <= batch_size
        )

    def test_equal_candidates_have_equal_scores(self):
        """A step that appears twice is judged once, and both copies get the score."""
        scores = scorer_of().score(["p"], [[["a", "b"], ["a", "b"], ["a"]]], spans=(1, 2))[0]
        assert scores[0] == scores[1] and scores[2] == scores[0][:1]

    def test_step_with_the_text_of_a_merged_step(self):
        """Step `a\\nb` and the merged steps `a`, `b` are the same text and must get one score anywhere in the tree."""
        scorer = scorer_of()
        scores = scorer.score(["p"], [[["a", "b"], ["a\nb"]]], spans=(1, 2))[0]
        alone = plain_score(scorer, "p", ["a\nb"])
        assert scores[1] == pytest.approx([alone], abs=1e-5)
        assert scores[0][1] == pytest.approx(max(alone, plain_score(scorer, "p", ["a", "b"])), abs=1e-5)

    @pytest.mark.parametrize("candidates", [[], [[]], [[], []]])
    def test_nothing_to_score(self, candidates):
        assert scorer_of().score(["p"], [candidates]) == [candidates]
        assert scorer_of().score([], []) == []
        assert scorer_of().score_trees([]) == []

    @pytest.mark.parametrize("form", [tuple, np.array])
    def test_other_sequences(self, form):
        scorer, steps = scorer_of(), CANDIDATES[0][1]
        expected = scorer.score(["p"], [[steps]])
        assert scorer.score(["p"], [[form(steps)]]) == scorer.score(form(["p"]), form([[steps]])) == expected

    def test_empty_and_ragged_candidates(self):
        scores = scorer_of().score(["p", "q"], [[[], ["a", "b"]], [["a"]]], spans=(1, 2))
        assert [[len(candidate) for candidate in prompt] for prompt in scores] == [[0, 2], [1]]

    def test_trees(self):
        rng = random.Random(1)
        scorer = scorer_of()
        for tree in (random_tree(rng), random_tree(rng)):
            expected = [
                plain_score(scorer, tree.prompt, [tree.completions[j] for j in tree.path(i)])
                for i in range(len(tree.labels))
            ]
            assert scorer.score_trees([tree])[0] == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("architecture", ["qwen2-sliding", "mistral", "llama"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_architectures(self, architecture, attention):
        model = tiny_model(architecture=architecture, attention=attention)
        scorer = StepScorer(model, tiny_tokenizer(), StepFormat())
        scores = scorer.score(["1+2?"], [CANDIDATES[0]])[0]
        for steps, values in zip(CANDIDATES[0], scores, strict=True):
            expected = [plain_score(scorer, "1+2?", steps[: i + 1]) for i in range(len(steps))]
            assert values == pytest.approx(expected, abs=1e-5)

    def test_a_nested_config(self):
        """A multimodal model has its sliding window and its number of positions in its text config."""
        text = SIZES | {"vocab_size": 300, "head_dim": 32, "sliding_window": 4, "pad_token_id": 0}
        text["layer_types"] = ["sliding_attention", "full_attention"]
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        set_seed(0)
        model = AutoModelForCausalLM.from_config(
            Gemma3Config(
                text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, dtype="float32"
            )
        )
        scorer = StepScorer(model, tiny_tokenizer(), HEADS["lm"])
        assert scorer.max_positions == 512
        for steps, values in zip(CANDIDATES[0], scorer.score(["1+2?"], [CANDIDATES[0]])[0], strict=True):
            expected = [plain_score(scorer, "1+2?", steps[: i + 1]) for i in range(len(steps))]
            assert values == pytest.approx(expected, abs=1e-5)

    def test_dropout_is_off(self):
        model = tiny_model(attention_dropout=0.5).train()
        scorer = StepScorer(model, tiny_tokenizer(), StepFormat())
        assert scorer.score(PROMPTS, CANDIDATES) == scorer.score(PROMPTS, CANDIDATES)


@pytest.mark.parametrize(
    "instructions, dtype, number",
    [("AVX2", torch.bfloat16, 1), ("AVX2", torch.float32, 0), ("AVX512", torch.bfloat16, 0)],
)
@pytest.mark.parametrize("use", ["scorer", "engine", "trainer"])
def test_a_warning_of_slow_bf16(monkeypatch, caplog, tmp_path, use, instructions, dtype, number):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    model = tiny_model(HEADS["lm"] if use == "engine" else HEADS["classification"])
    if use == "scorer":
        StepScorer(model.to(dtype), tiny_tokenizer(), StepFormat())
    elif use == "engine":
        TransformersEngine(model.to(dtype), tiny_tokenizer())
    else:
        tree = StepTree("1+2?", ["3"], [True], [-1])
        make_trainer(tmp_path, [tree], model, bf16=dtype == torch.bfloat16, max_steps=1).train()
    assert caplog.text.count("bf16 is several times slower than float32") == number


@pytest.mark.parametrize("blank", ["", " ", "\n"])
@pytest.mark.parametrize("spans", [(1,), (1, 2)])
def test_blank_steps_are_scored(blank, spans):
    """Benchmarks label blank steps too. Skipping one would shift all later scores by a step."""
    scorer = scorer_of()
    steps = ["so 3", blank, "thus 3"]
    scores = scorer.score(["1+2?"], [[steps]], spans=spans)[0][0]
    assert len(scores) == 3
    if spans == (1,):
        assert scores == pytest.approx([plain_score(scorer, "1+2?", steps[: i + 1]) for i in range(3)], abs=1e-5)


class TestRefusals:
    def test_lists_that_do_not_match(self):
        with pytest.raises(ValueError, match="3 prompts.* 1"):
            scorer_of().score(PROMPTS, [[["a"]]])

    @pytest.mark.parametrize("candidates", [["1+2."], [["1+2."]]])
    def test_a_candidate_is_a_string(self, candidates):
        """A missing pair of brackets would score single characters."""
        with pytest.raises(ValueError, match="prompt 0: a candidate is a string, expected a list"):
            scorer_of().score(["1+2?"], candidates)
        with pytest.raises(ValueError, match="`prompts` is a string"):
            scorer_of().score("q", [[["1+2."]]])

    def test_step_is_not_a_string(self):
        with pytest.raises(ValueError, match=r"prompt 1: candidate 1 has the step None"):
            scorer_of().score(["p", "q"], [[["a"]], [["a", "b"], [None]]])

    @pytest.mark.parametrize("candidates", [None, [None], [{"role": "assistant", "content": "a"}]])
    def test_a_candidate_is_not_a_list(self, candidates):
        """The keys of an object would be scored as steps."""
        with pytest.raises(ValueError, match="prompt 1: found .*, expected a list of candidates"):
            scorer_of().score(["p", "q"], [[["a"]], candidates])

    @pytest.mark.parametrize(("spans", "combine"), [((2,), "max"), ((0, 1), "max"), ((1, 2), "min")])
    def test_spans(self, spans, combine):
        with pytest.raises(ValueError, match="`spans` is|`combine` is 'min'"):
            scorer_of().score(["p"], [[["a"]]], spans=spans, combine=combine)

    def test_more_tokens_than_positions(self):
        """Beyond its maximum length, a model returns meaningless numbers."""
        scorer = scorer_of()
        long = " ".join(WORDS * 60)
        with pytest.raises(ValueError, match="512 positions"):
            scorer.score(["p"], [[["a"], [long]]])

    def test_equal_separators_with_spans(self):
        scorer = scorer_of(StepFormat(merge_separator="\n\n"))
        scorer.score(["p"], [[["a", "b"]]])
        with pytest.raises(ValueError, match="same ids"):
            scorer.score(["p"], [[["a", "b"]]], spans=(1, 2))

    def test_nan_scores(self):
        scorer = scorer_of()
        with torch.no_grad():
            scorer.model.score.weight.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"prompt 'q'.*nan"):
            scorer.score(["p", "q"], [[], [["a"]]])

    @pytest.mark.parametrize("name", ["batch_size", "max_length"])
    def test_numbers_below_one(self, name):
        """A batch size of 0 would score nothing."""
        with pytest.raises(ValueError, match=f"`{name}` is 0"):
            scorer_of(**{name: 0})

    def test_models_that_do_not_fit(self):
        with pytest.raises(ValueError, match="num_labels=2.*'regression'"):
            StepScorer(tiny_model(), tiny_tokenizer(), HEADS["regression"])
        model = tiny_model()
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="tree masks"):
            StepScorer(model, tiny_tokenizer(), StepFormat())
        model = tiny_model()
        model.config.layer_types = ["linear_attention", "full_attention"]
        with pytest.raises(ValueError, match="linear_attention"):
            StepScorer(model, tiny_tokenizer(), StepFormat())


class TestFromPretrained:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        StepFormat(step_separator="; ").save(tmp_path)
        return tmp_path

    def test_reads_the_format(self, checkpoint):
        scorer = StepScorer.from_pretrained(str(checkpoint), batch_size=2, max_length=64)
        expected = StepScorer(tiny_model(), tiny_tokenizer(), StepFormat(step_separator="; "))
        assert scorer.score(PROMPTS, CANDIDATES) == expected.score(PROMPTS, CANDIDATES)
        assert (scorer.batch_size, scorer.max_length) == (2, 64)
        assert not scorer.model.training and scorer.model.dtype == torch.float32

    def test_model_arguments(self, checkpoint):
        scorer = StepScorer.from_pretrained(str(checkpoint), dtype="bfloat16", attn_implementation="eager")
        assert scorer.model.dtype == torch.bfloat16 and scorer.model.config._attn_implementation == "eager"
        expected = StepScorer.from_pretrained(str(checkpoint)).score(PROMPTS, CANDIDATES)
        np.testing.assert_allclose(flat(scorer.score(PROMPTS, CANDIDATES)), flat(expected), rtol=0, atol=0.1)

    def test_without_a_format(self, checkpoint):
        """Without a format the step separator is unknown, and every guess would return plausible scores."""
        (checkpoint / STEP_FORMAT_NAME).unlink()
        with pytest.raises(FileNotFoundError, match="step_format.json.*`step_format="):
            StepScorer.from_pretrained(str(checkpoint))
        found = StepScorer.from_pretrained(str(checkpoint), step_format=StepFormat()).score(PROMPTS, CANDIDATES)
        assert found == scorer_of().score(PROMPTS, CANDIDATES)

    @pytest.mark.parametrize("form", [str, Path])
    def test_paths(self, checkpoint, form):
        """A checkpoint, and a step format as a file or folder, may be a `Path`."""
        (checkpoint / "other").mkdir()
        StepFormat(step_separator=" so ").save(checkpoint / "other")
        for place in (checkpoint / "other", checkpoint / "other" / STEP_FORMAT_NAME):
            scorer = StepScorer.from_pretrained(form(checkpoint), step_format=form(place))
            assert scorer.step_format.step_separator == " so "
        tokenizer, step_format = read_text_contract(str(checkpoint), form(checkpoint), None, False)
        assert step_format.step_separator == "; "
        with pytest.raises(FileNotFoundError, match=r"empty.step_format.json does not exist"):
            (checkpoint / "empty").mkdir()
            StepFormat.named(form(checkpoint / "empty"))

    def test_wrong_arguments(self, checkpoint):
        with pytest.raises(TypeError, match=r"is a `Qwen2For.*use `StepScorer\(model, tokenizer, step_format\)`"):
            StepScorer.from_pretrained(tiny_model())
        with pytest.raises(ValueError, match="has no argument 'foo' for loading a model. Remove it"):
            StepScorer.from_pretrained(checkpoint, foo=1)

    def test_a_format_of_another_head(self, checkpoint):
        StepFormat(head="regression").save(checkpoint)
        with pytest.raises(ValueError, match=r"`score.bias` \(2,\).*\(1,\)"):
            StepScorer.from_pretrained(str(checkpoint))

    def test_a_damaged_format(self, checkpoint):
        (checkpoint / STEP_FORMAT_NAME).write_text(json.dumps({"haed": "lm"}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"'haed'"):
            StepScorer.from_pretrained(str(checkpoint))
