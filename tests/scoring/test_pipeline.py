"""transformers' pipeline, and the recipe that compares it: training token ids, or an error."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, pipeline

from trl_hrm import StepFormat, StepScorer, StepTree

from ..helpers import HEADS, WORDS, load_recipe, tiny_model, tiny_tokenizer
from .pooling_server import PoolingServer
from .solutions import CANDIDATES, PROMPTS, flat, save


RECIPE = load_recipe("serve_and_score.py")
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
PROMPT, STEPS = "1+2+3 = ?", ["add 1+2 = 3.", "so 3+3 = 7.", " thus x"]


def tokenizer_of(kind: str, special: str, bos: str | None, template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a small BPE tokenizer of a common kind. `special` is what it adds around a text."""
    splitters = {
        "bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        "bytes, space first": (pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
        "metaspace": (pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()),
        "metaspace, first": (pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()),
    }
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitters[kind]
    names = ["<unk>", "<s>", "</s>"]
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "\n"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS) + " 1+2 = 3.\n\n"] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=special, special_tokens=[(name, i) for i, name in enumerate(names)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="<unk>", chat_template=template
    )


class TestWords:
    """Each word is tokenized alone, so the ids equal the training ids for every tokenizer."""

    def encode(self, tokenizer, step_format) -> tuple[list[int], list[int]]:
        prompt_ids, step_ids = step_format.encode(tokenizer, PROMPT, STEPS)
        words = RECIPE.words_of(tokenizer, step_format, PROMPT, STEPS)
        found = tokenizer(words, is_split_into_words=True, truncation=True)["input_ids"]
        return found, prompt_ids + [token for step in step_ids for token in step]

    @pytest.mark.parametrize("kind", ["bytes", "bytes, space first", "metaspace", "metaspace, first"])
    @pytest.mark.parametrize(
        ("special", "bos", "end"),
        [("$A", None, []), ("$A", "<s>", []), ("<s> $A", "<s>", []), ("<s> $A </s>", "<s>", [2])],
    )
    def test_plain(self, kind, special, bos, end):
        """BOS must appear only where training had it, even if the tokenizer has one. Later text changes nothing."""
        found, expected = self.encode(tokenizer_of(kind, special, bos), StepFormat())
        assert found == expected + end

    @pytest.mark.parametrize(
        ("special", "template", "equal"),
        [
            ("$A", TEMPLATE, True),
            ("$A", "<s>" + TEMPLATE, True),
            ("<s> $A", "<s>" + TEMPLATE, True),
            ("<s> $A", TEMPLATE, False),  # training had no BOS, but the pipeline always adds it
        ],
    )
    def test_chat(self, special, template, equal):
        """A template that writes BOS and a tokenizer that adds it would silently give two."""
        step_format = StepFormat(prompt_style="chat", system_prompt="Judge.")
        found, expected = self.encode(tokenizer_of("bytes", special, "<s>", template), step_format)
        assert (found == expected) == equal

    def test_plain_text_gives_other_ids(self):
        """Qwen encodes "." and the line breaks after it as one token, so plain text would move the step token."""
        ids, steps = StepFormat().encode(tiny_tokenizer(), PROMPT, STEPS)
        joined = tiny_tokenizer()(PROMPT + "".join(step + "\n\n" for step in STEPS))["input_ids"]
        assert joined != ids + [token for step in steps for token in step]


class TestScores:
    @pytest.mark.parametrize("chat", [False, True])
    def test_of_step_scorer(self, chat, tmp_path):
        step_format = StepFormat(prompt_style="chat", merge_separator=" ") if chat else StepFormat()
        folder = save(tmp_path, step_format)
        if chat:
            (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
        scorer = StepScorer.from_pretrained(folder)
        chains = [
            StepTree(prompt, steps, [None] * len(steps), list(range(-1, len(steps) - 1)))
            for prompt, candidates in zip(PROMPTS, CANDIDATES, strict=True)
            for steps in candidates
        ]
        expected = np.concatenate(scorer.score_trees(chains))
        found = RECIPE.pipeline_scores(folder, scorer.tokenizer, step_format, chains)
        np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=1e-5)
        assert expected.min() < 0.4 and expected.max() > 0.6  # each label is the more likely one for some step

    def test_plain_text_gives_other_scores(self, tmp_path):
        """Passing plain text to the same pipeline raises no error but gives other scores."""
        folder = save(tmp_path)
        classifier = pipeline("token-classification", folder, dtype=torch.float32)
        tokens = classifier(PROMPT + "".join(step + "\n\n" for step in STEPS))
        ends = len(PROMPT) + np.cumsum([len(step + "\n\n") for step in STEPS])
        last = [next(token for token in tokens if token["end"] == end) for end in ends]
        found = [t["score"] if t["entity"] == "LABEL_1" else 1 - t["score"] for t in last]
        [[expected]] = StepScorer.from_pretrained(folder).score([PROMPT], [[STEPS]])
        assert np.abs(np.subtract(found, expected)).max() > 0.05

    def test_truncation(self, tmp_path):
        """The pipeline truncates texts to the tokenizer's maximum length, which would lose a step token."""
        folder = save(tmp_path)
        tokenizer = tiny_tokenizer()
        chain = StepTree(PROMPT, STEPS, [None] * 3, [-1, 0, 1])
        length = len(tokenizer(RECIPE.words_of(tokenizer, StepFormat(), PROMPT, STEPS), is_split_into_words=True)[0])
        loaded = StepScorer.from_pretrained(folder).tokenizer
        loaded.model_max_length = length
        assert len(RECIPE.pipeline_scores(folder, loaded, StepFormat(), [chain])[0]) == 3
        loaded.model_max_length = length - 1
        with pytest.raises(ValueError, match=f"{length - 1} tokens"):
            RECIPE.pipeline_scores(folder, loaded, StepFormat(), [chain])


class TestRecipe:
    """Run the recipe with a server that answers like vLLM. `tests/hub/test_serving.py` uses vLLM itself."""

    @pytest.fixture
    def rows(self, tmp_path) -> str:
        file = tmp_path / "rows.jsonl"
        tree = {"prompt": "x?", "completions": ["x", "y", "x y"], "parents": [-1, 0, 0], "labels": [1, None, 0]}
        file.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "1+2?", "completions": ["so 3"]}, tree)))
        return str(file)

    def run(self, *argv: str) -> None:
        RECIPE.main(RECIPE.make_parser().parse_args(list(argv)))

    def test_equal(self, rows, tmp_path, capsys):
        folder = save(tmp_path / "model")
        with PoolingServer(tiny_model(), tiny_tokenizer()) as server:
            self.run("--model", folder, "--input", rows, "--url", server.url, "--served_model_name", "prm")
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split() == ["StepScorer", "pipeline", "vllm", "serve", "step"]
        chains = [("1+2?", ["so 3"]), ("x?", ["x", "y"]), ("x?", ["x", "x y"])]
        expected = StepScorer.from_pretrained(folder).score([p for p, _ in chains], [[s] for _, s in chains])
        scores = [line.split()[:3] for line in lines if "." in line and "step" not in line.lower()]
        np.testing.assert_allclose(np.array(scores, float), np.repeat(flat(expected)[:, None], 3, axis=1), atol=2e-6)
        assert lines[-1].startswith("Largest difference from StepScorer: pipeline ")

    def test_different(self, rows, tmp_path):
        """A server with slightly different weights must fail the check."""
        folder, model = save(tmp_path / "model"), tiny_model()
        with PoolingServer(model, tiny_tokenizer(), rows=lambda rows: rows + torch.tensor([0.0, 0.01])) as server:
            argv = ["--model", folder, "--input", rows, "--url", server.url, "--served_model_name", "prm"]
            with pytest.raises(ValueError, match=r"0.0001.*--tolerance"):
                self.run(*argv)
            self.run(*argv, "--tolerance", "0.01")

    def test_not_a_number(self):
        """NaN compares false with everything, so `max` may skip it."""
        found = RECIPE.largest_differences({"a": [[0.5, 0.5]], "b": [[0.4, float("nan")]], "c": [[0.5], [0.25]]})
        assert np.isnan(found["b"]) and found["c"] == 0.25

    def test_regression_has_no_pipeline(self, rows, tmp_path, capsys, monkeypatch):
        """The softmax over one label is 1 for every step, so a difference would mean nothing."""
        monkeypatch.setattr(RECIPE, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="nothing to compare"):
            self.run("--model", save(tmp_path / "model", HEADS["regression"]), "--input", rows)
        printed = capsys.readouterr().out
        assert "pipeline: skipped" in printed and "vLLM is not installed" in printed

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--url", "http://127.0.0.1:1", "--", "--max-model-len", "256"], "--url"),
            (["--served_model_name", "prm"], "without --url"),
        ],
    )
    def test_options_without_effect(self, rows, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            self.run("--model", str(tmp_path), "--input", rows, *options)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no records found"),
            ('{"prompt": "x"}\n', "rows.jsonl:1.*`completions`"),
            ("{", "JSON"),
        ],
    )
    def test_bad_input(self, rows, tmp_path, text, message):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            self.run("--model", str(tmp_path), "--input", rows)
