"""The step format: exact ids, errors, and saving and loading."""

import copy
import json
import random
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_hrm import StepScorer
from trl_hrm.encoding import control_tokens
from trl_hrm.forest import TokenTrie
from trl_hrm.published_formats import PUBLISHED_FORMATS
from trl_hrm.step_format import OLD_DEFAULTS, STEP_FORMAT_NAME, VERSION, StepFormat

from .fakes import GPT, INDIRECT, LLAMA, byte_level, merging_tokenizer
from .helpers import tiny_model, tiny_tokenizer
from .mutations import VALUES
from .scoring.published import (
    SYSTEM,
    deepseek_tokenizer,
    llama3_tokenizer,
    qwen_tokenizer,
    sentencepiece_tokenizer,
)


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(words: list[str], **special) -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits at white space and drops it."""
    vocab = {word: i for i, word in enumerate(["[UNK]", "[BOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


TURNS = {"prompt_style": "turns", "tokenization": "string", "step_separator": "+"}


def write(folder: Path, content) -> None:
    (folder / STEP_FORMAT_NAME).write_text(json.dumps(content) + "\n", encoding="utf-8")


class TestEncode:
    def test_exact_ids(self):
        """BOS once before the prompt, and the separator after every step but not after the prompt."""
        tokenizer = word_tokenizer(["1+2?", "3", "4", ";", "x"], bos_token="[BOS]")
        prompt_ids, step_ids = StepFormat(step_separator="; x").encode(tokenizer, "1+2?", ["3 3", "4"])
        assert prompt_ids == [1, 2]
        assert step_ids == [[3, 3, 5, 6], [4, 5, 6]]

    def test_no_bos(self):
        tokenizer = word_tokenizer(["1+2?", "3", ";"])
        assert StepFormat(step_separator=";").encode(tokenizer, "1+2?", []) == ([2], [])

    def test_a_step_has_the_same_ids_at_every_position(self):
        """BPE over the joined text could merge "." and the separator, so a prefix would depend on the steps after it."""
        tokenizer = tiny_tokenizer()
        step_format = StepFormat()
        both = step_format.encode(tokenizer, "p", ["1+2=3.", "thus 7"])[1]
        assert both == [step_format.encode(tokenizer, "p", [text])[1][0] for text in ("1+2=3.", "thus 7")]
        separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        assert all(ids[-len(separator) :] == separator for ids in both)
        assert tokenizer.decode([token for ids in both for token in ids]) == "1+2=3.\n\nthus 7\n\n"

    def test_chat(self):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        try:
            plain = StepFormat(prompt_style="chat").encode_prompt(tokenizer, "1+2?")
            system = StepFormat(prompt_style="chat", system_prompt="Sum.").encode_prompt(tokenizer, "1+2?")
        finally:
            tokenizer.chat_template = None
        assert tokenizer.decode(plain) == "<user>1+2?<assistant>"
        assert tokenizer.decode(system) == "<system>Sum.<user>1+2?<assistant>"

    def test_merge(self):
        assert StepFormat(merge_separator=" | ").merge(["a", "b", "c"]) == "a | b | c"

    def test_label_tokens_are_wrong_then_correct(self):
        """With the classes reversed, the model would learn to reward errors."""
        tokenizer = tiny_tokenizer()
        wrong, correct = StepFormat(head="lm", label_tokens=("+", "-")).label_token_ids(tokenizer)
        assert tokenizer.decode([wrong, correct]) == "-+"


class TestPieces:
    """Texts around the steps, each tokenized separately."""

    FORMAT = StepFormat(
        step_separator="; x", step_suffix="|", step_prefix="n {number} : ", prompt_template="Q {problem} A"
    )
    WORDS = ["Q", "A", "1+2?", "n", "1", "2", ":", "a", ";", "x", "|"]  # ids from 2

    def test_exact_ids(self):
        tokenizer = word_tokenizer(self.WORDS, bos_token="[BOS]")
        prompt_ids, step_ids = self.FORMAT.encode(tokenizer, "1+2?", ["a", "n 2 : a a"])
        assert prompt_ids == [1, 2, 4, 3]
        assert step_ids == [[5, 6, 8, 9, 10, 11], [12, 5, 7, 8, 9, 9, 10, 11]]

    def test_before_the_separator(self):
        """The separator of a step comes after its step token, and before the suffix."""
        step_format = replace(self.FORMAT, score_position="before_separator")
        prompt_ids, step_ids = step_format.encode(word_tokenizer(self.WORDS), "1+2?", ["a", "a a"])
        assert prompt_ids == [2, 4, 3]
        assert step_ids == [[5, 6, 8, 9], [10, 11, 12, 5, 7, 8, 9, 9]]

    def test_a_split_separator_is_not_scored(self, recwarn):
        StepFormat(step_separator="; x", score_position="before_separator").check(word_tokenizer([";", "x"]))
        assert not recwarn

    def test_label_tokens_as_ids(self):
        tokenizer = word_tokenizer(["+", "-"])
        step_format = StepFormat(step_separator="+", head="lm", label_tokens=(2, 3))
        step_format.check(tokenizer)
        assert step_format.label_token_ids(tokenizer) == [3, 2]
        for wrong in (-1, 4):
            with pytest.raises(ValueError, match=f"label token {wrong} is not an id of this tokenizer, which has 4"):
                replace(step_format, label_tokens=(2, wrong)).check(tokenizer)


class TestString:
    """The whole solution is tokenized as one string."""

    @staticmethod
    def text(name: str, tokenizer, prompt: str, steps: list[str]) -> str:
        """Return the text that a published format encodes to. Every step ends at its step token."""
        prompt_ids, step_ids = StepFormat.published(name).encode(tokenizer, prompt, steps)
        assert len(step_ids) == len(steps)
        return tokenizer.decode([*prompt_ids, *(token for ids in step_ids for token in ids)])

    @pytest.mark.parametrize(
        ("name", "make", "expected"),
        [
            ("qwen2.5-math-prm", qwen_tokenizer, f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n So 5.\n<extra_0>Step 2: \n\n5<extra_0>"),
            ("reasonflux-prm", qwen_tokenizer, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n So 5.\n<extra_0>Step 2: \n\n5<extra_0>"),
            ("math-shepherd", sentencepiece_tokenizer, "<s> 2 + 3? Step 1: So 5. ки\nStep 2: \n\n5 ки"),
            ("er-prm", llama3_tokenizer, "<|begin_of_text|>2 + 3? Step 1: So 5. киStep 2: \n\n5 ки"),
            ("math-psa", qwen_tokenizer, "2 + 3? So 5. \n\n\n\n\n Step 2: \n\n5 \n\n\n\n\n"),
            ("llemma-prm", sentencepiece_tokenizer, "<s> # Question\n\n2 + 3?\n\n# Solution\n\nSo 5.\n\nStep 2: \n\n5\n"),
        ],
    )  # fmt: skip
    def test_white_space_around_steps(self, name, make, expected):
        """It stays before a control token. It is removed before a separator that is text, which it would become a part of."""
        assert self.text(name, make(), "2 + 3?", [" So 5.\n", "Step 2: \n\n5"]) == expected

    def test_turns(self):
        tokenizer = llama3_tokenizer()
        text = self.text("rlhflow-prm", tokenizer, "2 + 3?", ["So 5.", "Step 2:\n5"])
        turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
        system = turn.format("system", "Today Date: 26 Jul 2024\n\n")
        turns = [turn.format("user", "2 + 3? So 5."), turn.format("assistant", "+"), turn.format("user", "Step 2:\n5")]
        assert (
            text == "<|begin_of_text|>" + system + "".join(turns) + "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )

    def test_a_separator_that_merges_with_a_step(self):
        """The step token would be another token, which the model has never seen there."""
        tokenizer = merging_tokenizer([("z", ";")])
        step_format = StepFormat(step_separator=";", tokenization="string")
        step_format.check(tokenizer)
        assert step_format.encode(tokenizer, "p", ["a"])[1][0][-1:] == tokenizer.convert_tokens_to_ids([";"])
        with pytest.raises(ValueError, match="The step 'az' ends with the token 'z;' instead of the step token ';'"):
            step_format.encode(tokenizer, "p", ["a", "az"])

    def test_a_separator_that_merges_with_the_next_step(self):
        tokenizer = merging_tokenizer([(";", "z")])
        step_format = StepFormat(step_separator=";", tokenization="string")
        with pytest.raises(ValueError, match="merges the end of step 1 with the text after it"):
            step_format.encode(tokenizer, "p", ["a", "z"])

    def test_check_finds_merges_with_common_text(self):
        """Before the first row: here a period and the separator are one token, as in the byte-level BPE of many models."""
        for pair in ((".", ";"), (";", "S")):
            with pytest.raises(ValueError, match='StepFormat: .* Choose a different `step_separator`.*"pieces"`'):
                StepFormat(step_separator=";", tokenization="string").check(merging_tokenizer([pair]))

    def test_check_finds_separators_that_are_not_tokens(self):
        with pytest.raises(ValueError, match="'<extra_0>' is not a token of this tokenizer. Use the tokenizer of the"):
            StepFormat(step_separator="<extra_0>", tokenization="string").check(tiny_tokenizer())

    def test_check_finds_unknown_step_tokens(self):
        tokenizer = word_tokenizer(["a"])
        with pytest.raises(ValueError, match="the step token is the unknown token"):
            StepFormat(step_separator=" ки", step_suffix=" ", tokenization="string").check(tokenizer)

    def test_turns_without_a_fitting_template(self):
        tokenizer = tiny_tokenizer()
        step_format = StepFormat.published("rlhflow-prm")
        with pytest.raises(ValueError, match="`prompt_style` is 'turns', but the tokenizer has no chat template"):
            step_format.check(tokenizer)
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        with pytest.raises(ValueError, match="renders 0 of 1 replies of the assistant"):
            step_format.check(tokenizer)

    def test_a_text_with_the_mark_of_replies(self):
        """The character is part of the step, and another one marks the replies."""
        tokenizer, step_format = llama3_tokenizer(), StepFormat.published("rlhflow-prm")
        step = "a\U000f0000b"
        prompt_ids, step_ids = step_format.encode(tokenizer, "p", [step, "c"])
        expected_prompt, expected = step_format.encode(tokenizer, "p", ["aXb", "c"])
        assert prompt_ids == expected_prompt and step_ids[1] == expected[1]
        assert tokenizer.decode(step_ids[0]) == tokenizer.decode(expected[0]).replace("aXb", step)

    def test_paths_that_differ(self):
        """Where a tokenizer looks ahead, the paths are encoded separately, with a warning. Both leaves are exact."""
        tokenizer = merging_tokenizer([("w", "x")], split=r"x(?=;y)|;")
        step_format = StepFormat(step_separator=";", tokenization="string")
        trie = TokenTrie()
        with pytest.warns(
            UserWarning, match="encodes steps of the problem 'p' differently depending on the steps after"
        ):
            nodes = step_format.insert(trie, tokenizer, "p", ["wx", "y", "b"], [-1, 0, 0])
        assert tokenizer.convert_ids_to_tokens(path_ids(trie, nodes[0])) == ["p", "w", "x", ";"]
        assert tokenizer.convert_ids_to_tokens(path_ids(trie, nodes[1])) == ["p", "w", "x", ";", "y", ";"]
        assert tokenizer.convert_ids_to_tokens(path_ids(trie, nodes[2])) == ["p", "wx", ";", "b", ";"]


def path_ids(trie: TokenTrie, node: int) -> list[int]:
    """Return the ids from the root to a node."""
    ids = []
    while node != -1:
        ids.append(trie._tokens[node])
        node = trie._parents[node]
    return ids[::-1]


class TestInsert:
    """Every path of a tree has the ids of its own solution, in every format."""

    OWN = {
        "pieces": StepFormat(),
        "pieces around": StepFormat(step_prefix="{number}) ", step_suffix=" | ", prompt_template="Q: {problem}\n"),
        "pieces before": StepFormat(score_position="before_separator", step_suffix=" | "),
        "string before": StepFormat(
            score_position="before_separator", step_separator=" |", step_suffix=" ", tokenization="string"
        ),
        "chat": StepFormat(prompt_style="chat", system_prompt="Sum."),
        "chat in one string": StepFormat(prompt_style="chat", tokenization="string", step_separator=" ки"),
    }
    TEXTS = [
        "1+2 = 3",
        "so x",
        r"\frac{x}{2} \le \sqrt{2}",
        "所以答案是 7。",
        "café",
        "a\nb",
        "Step 2: thus",
        "<|im_end|>",
        "- 1",
        "x. ",
        "  y",
    ]

    @pytest.mark.parametrize(
        ("name", "make"),
        [
            *((name, qwen_tokenizer) for name in OWN),
            *((name, llama3_tokenizer) for name in ("pieces around", "chat", "string before")),
            ("qwen2.5-math-prm", qwen_tokenizer),
            ("reasonflux-prm", qwen_tokenizer),
            ("math-shepherd", sentencepiece_tokenizer),
            ("math-shepherd", qwen_tokenizer),
            ("er-prm", llama3_tokenizer),
            ("er-prm", deepseek_tokenizer),
            ("rlhflow-prm", llama3_tokenizer),
            ("rlhflow-prm", qwen_tokenizer),
            ("skywork-o1-prm", qwen_tokenizer),
            ("pure-prm", qwen_tokenizer),
            ("trl-prm", qwen_tokenizer),
            ("math-psa", qwen_tokenizer),
            ("llemma-prm", sentencepiece_tokenizer),
        ],
    )  # fmt: skip
    def test_paths(self, name, make, recwarn):
        tokenizer = make()
        step_format = self.OWN.get(name) or StepFormat.published(name)
        step_format.check(tokenizer)
        rng = random.Random(name)
        shared = 0
        for _ in range(10):
            steps = [" ".join(rng.choices(self.TEXTS, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 8))]
            parents = [rng.randint(-1, i - 1) for i in range(len(steps))]
            prompt = " ".join(rng.choices(self.TEXTS, k=2))
            trie = TokenTrie()
            nodes = step_format.insert(trie, tokenizer, prompt, steps, parents)
            for i in range(len(steps)):
                path = [i]
                while parents[path[0]] != -1:
                    path.insert(0, parents[path[0]])
                prompt_ids, step_ids = step_format.encode(tokenizer, prompt, [steps[j] for j in path])
                ids = [*prompt_ids, *(token for ids in step_ids for token in ids)]
                assert path_ids(trie, nodes[i]) == ids
                known = path_ids(trie, nodes[-1])[: len(prompt_ids)]
                assert all(step_ids) and known and ids[: len(known)] == known
                shared += len(ids)
            shared -= len(trie._tokens)
        assert shared > 100  # trees have branches
        assert not [warning for warning in recwarn if "differently" in str(warning.message)]


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"prompt_style": "instruct"}, "`prompt_style` is 'instruct'. It must be one of plain, chat"),
            ({"head": "binary"}, "`head` is 'binary'. It must be one of"),
            ({"regression_loss": "huber"}, "`regression_loss` is 'huber'. It must be one of"),
            ({"system_prompt": "Sum."}, '`system_prompt` requires `prompt_style="chat"`'),
            ({"label_tokens": ["+", "+"]}, "`label_tokens` is ('+', '+'). It must be two different tokens"),
            ({"label_tokens": ["+"]}, "`label_tokens` is ('+',). It must be two"),
            ({"label_tokens": (7, 7)}, "`label_tokens` is (7, 7). It must be two different tokens or two ids"),
            ({"label_tokens": (True, False)}, "`label_tokens` is (True, False). It must be two different"),
            ({"tokenization": "words"}, "`tokenization` is 'words'. It must be one of pieces, string"),
            (
                {"score_position": "after"},
                "`score_position` is 'after'. It must be one of separator, before_separator",
            ),
            ({"prompt_template": "Solve: "}, "`prompt_template` is 'Solve: '. It must contain {problem} once"),
            ({"prompt_template": "{problem} {problem}"}, "It must contain {problem} once"),
            ({"step_prefix": None}, "`step_prefix` is None. It must be a string"),
            ({"step_suffix": 1}, "`step_suffix` is 1. It must be a string"),
            ({"prompt_style": "turns"}, '`prompt_style="turns"` requires `tokenization="string"`'),
            ({**TURNS, "step_separator": ""}, "`step_separator` is the reply to each step"),
            (
                {**TURNS, "step_separator": " +"},
                "without white space around it, and `step_suffix` is empty. Found ' +'",
            ),
            ({**TURNS, "step_suffix": "\n"}, "`step_suffix` is empty. Found '+' and '\\n'"),
        ],
    )
    def test_values(self, values, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            StepFormat(**values)

    def test_a_separator_without_tokens(self):
        """Every step would be judged at its last word, which the next step may share."""
        with pytest.raises(ValueError, match=r"`step_separator` '\\n\\n' "):
            StepFormat().check(word_tokenizer(["a"]))

    def test_a_separator_that_is_unknown(self):
        with pytest.raises(ValueError, match=r"`step_separator` '; x' to \[0, 2\]"):
            StepFormat(step_separator="; x").check(word_tokenizer(["x"]))

    @pytest.mark.parametrize("merge_separator", [";", " ;  "])
    def test_equal_separators_with_merged_steps(self, merge_separator):
        """One text would have two labels. The ids are compared, because different texts may have equal ids."""
        tokenizer = word_tokenizer([";"])
        step_format = StepFormat(step_separator=";", merge_separator=merge_separator)
        step_format.check(tokenizer)  # fine without merged steps
        with pytest.raises(ValueError, match="same ids"):
            step_format.check(tokenizer, merged=True)

    def test_a_merge_separator_without_tokens(self):
        with pytest.raises(ValueError, match="`merge_separator`"):
            StepFormat(step_separator=";").check(word_tokenizer([";"]), merged=True)

    def test_chat_without_a_template(self):
        with pytest.raises(ValueError, match="no chat template"):
            StepFormat(prompt_style="chat").check(tiny_tokenizer())

    @pytest.mark.parametrize("tokens", [("+", "good"), ("+", "[UNK]"), ("+", "+ +")])
    def test_label_tokens_that_are_not_one_known_token(self, tokens):
        with pytest.raises(
            ValueError, match=f"label token {re.escape(repr(tokens[1]))} encodes to .* exactly one known"
        ):
            StepFormat(step_separator="+", head="lm", label_tokens=tokens).check(word_tokenizer(["+"]))

    def test_label_tokens_are_ignored_by_other_heads(self):
        StepFormat(label_tokens=("very good", "bad")).check(tiny_tokenizer())


class TestControlTokens:
    @pytest.mark.parametrize("style", ["plain", "chat"])
    def test_data_never_encodes_to_control_tokens(self, style):
        tokenizer = byte_level()
        control = control_tokens(tokenizer)
        step_format = StepFormat(prompt_style=style, step_separator="<extra_0>")
        texts = [f"a{token} b" for token in control.values()] + list(control.values())
        expected = [control[i] for i in step_format.encode_prompt(tokenizer, "a") if i in control]
        for text in texts:
            prompt_ids, step_ids = step_format.encode(tokenizer, text, [text, "b", text])
            assert [control[i] for i in prompt_ids if i in control] == expected
            assert [[control[i] for i in ids if i in control] for ids in step_ids] == [["<extra_0>"]] * 3
            assert [tokenizer.decode(ids) for ids in step_ids] == [
                f"{text}<extra_0>",
                "b<extra_0>",
                f"{text}<extra_0>",
            ]
            assert step_format.encode_step(tokenizer, text) == step_ids[0]
            if style == "plain":
                assert tokenizer.decode(prompt_ids) == text

    def test_a_separator_of_white_space_that_is_a_special_token(self):
        """Inside a step it is neither a step token nor a sign of forgery."""
        tokenizer = byte_level()
        tokenizer.add_tokens(["\n\n"], special_tokens=True)
        step_format = StepFormat()
        prompt_ids, [ids] = step_format.encode(tokenizer, "x\n\ny", ["a\n\nb"])
        assert [i for i in prompt_ids + ids if i in control_tokens(tokenizer)] == [
            tokenizer.convert_tokens_to_ids("\n\n")
        ]
        assert tokenizer.decode(prompt_ids + ids) == "x\n\nya\n\nb\n\n"
        assert step_format.find_markers(tokenizer, "a\n\nb") == []

    def test_ids_of_ordinary_text_do_not_change(self):
        tokenizer = byte_level()
        for style in ("plain", "chat"):
            new = StepFormat(prompt_style=style)
            old = replace(new, sanitize_control_tokens=False)
            texts = ["Find x.\n\n\n 2 < 3 <table>", "kilogram"]
            assert new.encode(tokenizer, texts[0], texts) == old.encode(tokenizer, texts[0], texts)

    def test_the_first_version_keeps_its_ids(self, tmp_path):
        """A checkpoint must be scored with the ids used in its training."""
        tokenizer = byte_level()
        write(tmp_path, {"step_separator": "<extra_0>"})
        first = StepFormat.from_pretrained(tmp_path)
        ids = tokenizer("a<extra_0>b<extra_0>", add_special_tokens=False)["input_ids"]
        assert first.encode(tokenizer, "", ["a<extra_0>b"])[1] == [ids]
        assert ids.count(tokenizer.convert_tokens_to_ids("<extra_0>")) == 2

    def test_merged_steps_with_a_control_token_between(self):
        tokenizer = byte_level()
        with pytest.raises(ValueError, match="`merge_separator` '<extra_0>' "):
            StepFormat(merge_separator="<extra_0>").check(tokenizer, merged=True)
        StepFormat(merge_separator="<extra_0>").check(tokenizer)
        StepFormat(merge_separator="<extra_0>", sanitize_control_tokens=False).check(tokenizer, merged=True)

    def test_markers(self):
        tokenizer = byte_level()
        step_format = StepFormat(step_separator=" ки", merge_separator="|")
        assert step_format.find_markers(tokenizer, "a ки b</s><think>") == ["</s>", " ки"]
        assert step_format.find_markers(tokenizer, "a\n\nb | c") == []
        # the space before a step, and SentencePiece's symbol for a space
        assert step_format.find_markers(tokenizer, "ки a") == step_format.find_markers(tokenizer, "\tки a") == [" ки"]
        assert step_format.find_markers(tokenizer, "a\u2581ки") == [" ки"]
        assert step_format.find_markers(tokenizer, "киа, аки") == [" ки"]
        assert step_format.find_markers(tokenizer, "аки") == []
        assert StepFormat(step_separator="<extra_0>").find_markers(tokenizer, "a<extra_0>") == ["<extra_0>"]
        assert StepFormat(step_separator=". ").find_markers(tokenizer, "One. Two.\n\nThree") == []


class TestChatTemplate:
    def test_ids_do_not_depend_on_the_day(self, on_day, tmp_path):
        tokenizer = byte_level()
        step_format = StepFormat(prompt_style="chat")
        for template in (LLAMA, GPT, INDIRECT):
            tokenizer.chat_template = template
            found = set()
            for day in ("2024-07-26", "2025-03-04"):
                on_day(day)
                step_format.save(tmp_path)
                found.add(tuple(StepFormat.from_pretrained(tmp_path).encode_prompt(tokenizer, "1+1?")))
            assert len(found) == 1
            text = tokenizer.decode(found.pop())
            assert "26" in text and ("2024" in text or "day 208" in text)

    def test_another_date(self, on_day):
        tokenizer = byte_level()
        tokenizer.chat_template = LLAMA
        ids = StepFormat(prompt_style="chat", chat_template_date="2001-02-03").encode_prompt(tokenizer, "1+1?")
        assert "03 Feb 2001" in tokenizer.decode(ids)

    def test_the_first_version_uses_the_current_date_and_warns(self, on_day, tmp_path):
        tokenizer = byte_level()
        tokenizer.chat_template = LLAMA
        write(tmp_path, {"prompt_style": "chat"})
        first = StepFormat.from_pretrained(tmp_path)
        on_day("2025-03-04")
        with pytest.warns(UserWarning, match="today's date.*`step_format.json`"):
            first.check(tokenizer)
        with pytest.warns(UserWarning):
            assert "04 Mar 2025" in tokenizer.decode(first.encode_prompt(tokenizer, "1+1?"))
        write(tmp_path, {"prompt_style": "chat", "chat_template_date": "2024-12-24"})
        dated = StepFormat.from_pretrained(tmp_path)
        assert "24 Dec 2024" in tokenizer.decode(dated.encode_prompt(tokenizer, "1+1?"))

    def test_variables_are_saved(self, tmp_path):
        tokenizer = byte_level()
        tokenizer.chat_template = GPT
        StepFormat(prompt_style="chat", chat_template_kwargs={"effort": "high"}).save(tmp_path)
        loaded = StepFormat.from_pretrained(tmp_path)
        assert "high" in tokenizer.decode(loaded.encode_prompt(tokenizer, "1+1?"))
        with pytest.raises(ValueError, match="sets thinking"):
            replace(loaded, chat_template_kwargs={"thinking": False}).check(tokenizer)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"chat_template_kwargs": {"a": 1}}, '`chat_template_kwargs` requires `prompt_style="chat"`'),
            ({"chat_template_kwargs": ["a"]}, "`chat_template_kwargs` is ['a']. It must be a JSON object"),
            ({"chat_template_kwargs": {"a": {1}}}, "must have JSON values only"),
            ({"chat_template_kwargs": {"a": float("nan")}}, "must have JSON values only"),
            ({"chat_template_kwargs": {1: "a"}}, "must be a JSON object"),
            (
                {"chat_template_kwargs": {"messages": []}},
                "`chat_template_kwargs` sets messages, which is reserved",
            ),
            ({"chat_template_kwargs": {"tokenize": True}}, "`chat_template_kwargs` sets tokenize"),
            ({"chat_template_kwargs": {"strftime_now": "x"}}, "`chat_template_kwargs` sets strftime_now"),
            (
                {"chat_template_date": "26 Jul 2024"},
                "`chat_template_date` is '26 Jul 2024'. It must be a date such as",
            ),
            ({"chat_template_date": 2024}, "`chat_template_date` is 2024. It must be a date such as"),
            ({"sanitize_control_tokens": "no"}, "`sanitize_control_tokens` is 'no'. It must be true or false"),
        ],
    )
    def test_values(self, values, message):
        style = "plain" if "requires" in message else "chat"
        with pytest.raises(ValueError, match=re.escape(message)):
            StepFormat(prompt_style=style, **values)


class TestSplitSeparator:
    """The judged token would be a common piece, such as `>`."""

    def test_a_token_that_is_not_in_the_vocabulary(self):
        with pytest.warns(UserWarning, match=r"'<extra_0>' to \d+ tokens.*add_tokens\(\['<extra_0>'\]"):
            StepFormat(step_separator="<extra_0>").check(tiny_tokenizer())

    def test_after_it_was_added_as_the_warning_says(self, recwarn):
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.add_tokens(["<extra_0>"], special_tokens=True)
        StepFormat(step_separator="<extra_0>").check(tokenizer)
        assert not recwarn

    @pytest.mark.parametrize("step_separator", ["\n\n", "\n", " "])
    def test_single_tokens(self, recwarn, step_separator):
        StepFormat(step_separator=step_separator).check(tiny_tokenizer())
        assert not recwarn

    @pytest.mark.parametrize("step_separator", ["; ", " ки\n", "\n\n\n\n#"])
    def test_texts_of_several_tokens(self, step_separator):
        with pytest.warns(UserWarning, match="inside steps"):
            StepFormat(step_separator=step_separator).check(tiny_tokenizer())

    def test_creating_a_scorer_warns(self):
        with pytest.warns(UserWarning, match="'<extra_0>' to"):
            StepScorer(tiny_model(), tiny_tokenizer(), StepFormat(step_separator="<extra_0>"))


class TestChatTemplates:
    """Template faults, and content that a template ignores, must be found before the first row."""

    REFUSES = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    IGNORES = "{% for message in messages if message['role'] != 'system' %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    BLIND = "{% for message in messages %}<{{ message['role'] }}>{% endfor %}"
    BLOCKS = (
        "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"  # content as a list of blocks
    )
    PAIRS = "{{ messages[1]['content'] + messages[0]['content'] }}"  # requires two messages
    BROKEN = "{% for message in messages %}"
    WITHIN = "{% for m in messages if m['role'] == 'user' %}{{ messages[0]['content'] }}{{ m['content'] }}{% endfor %}"
    SYSTEM = {"system_prompt": "Sum."}

    @staticmethod
    def check(template: str, **values) -> None:
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.chat_template = template
        StepFormat(prompt_style="chat", **values).check(tokenizer)

    @pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITHIN])
    @pytest.mark.parametrize("values", [{}, SYSTEM])
    def test_fine(self, template, values):
        self.check(template, **values)

    def test_unused_system_messages(self):
        self.check(self.REFUSES)
        self.check(self.IGNORES)

    @pytest.mark.parametrize(
        ("template", "values", "message"),
        [
            (REFUSES, SYSTEM, r"fails for a system message \(System role not supported\). Remove `system_prompt`"),
            (IGNORES, SYSTEM, "ignores the system message, so `system_prompt` would have no effect"),
            (BLIND, {}, "ignores the user message, so every problem has the same ids"),
            (BLIND, SYSTEM, "ignores the user message"),
            (BLOCKS, {}, "ignores the user message"),
            (PAIRS, {}, "fails for a user message"),
            (BROKEN, {}, "is not valid Jinja"),
        ],
    )
    def test_refused(self, template, values, message):
        with pytest.raises(ValueError, match=message):
            self.check(template, **values)


class TestFile:
    def test_round_trip(self, tmp_path):
        step_format = StepFormat("chat", "Süm", " ки\n", "\t", "lm", "bce", ("a", "b"))
        around = replace(
            step_format, prompt_template="Q {problem}\n", step_prefix="Schritt {number} ", step_suffix="\t"
        )
        ids = replace(around, label_tokens=(648, 387), score_position="before_separator")
        turns = StepFormat(**TURNS, head="value", regression_loss="bce", system_prompt="Sum.")
        for one in (around, ids, turns, StepFormat(head="mlp"), StepFormat(head="lm_mean"), step_format):
            one.save(tmp_path)
            assert StepFormat.from_pretrained(tmp_path) == one
        assert json.loads((tmp_path / STEP_FORMAT_NAME).read_text(encoding="utf-8"))["step_separator"] == " ки\n"

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"step_format.json.*`step_format=StepFormat"):
            StepFormat.from_pretrained(tmp_path)

    def test_no_such_folder(self, monkeypatch):
        """The Hub's own error does not say which file is missing."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match="outputs/nothing: "):
            StepFormat.from_pretrained("outputs/nothing")

    def test_torn(self, tmp_path):
        """With several checkpoints, the message must name the file."""
        (tmp_path / STEP_FORMAT_NAME).write_text('{"head"')
        with pytest.raises(ValueError, match="step_format.json: not valid JSON"):
            StepFormat.from_pretrained(tmp_path)

    def test_unknown_keys(self, tmp_path):
        """An unknown key may change every score."""
        write(tmp_path, asdict(StepFormat()) | {"suffix": "x"})
        with pytest.raises(ValueError, match=r"step_format.json: .*\['suffix'\]"):
            StepFormat.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"step_separator": 5}, "`step_separator` is 5. It must be a string"),
            ({"step_separator": None}, "`step_separator` is None. It must be a string"),
            ({"merge_separator": ["\n"]}, "`merge_separator` is ['\\n']. It must be a string"),
            (
                {"prompt_style": "chat", "system_prompt": False},
                "`system_prompt` is False. It must be a string or `None`",
            ),
            ({"head": ["lm"]}, "`head` is ['lm']. It must be one of"),
            ({"label_tokens": "+-"}, "`label_tokens` is '+-'. It must be two different tokens"),
            ({"label_tokens": [1, "b"]}, "`label_tokens` is (1, 'b'). It must be two different tokens"),
            ({"label_tokens": None}, "`label_tokens` is None. It must be two different tokens"),
            ([], "found [], expected a JSON object"),
            (None, "found None, expected a JSON object"),
            ({"version": "2"}, "`version` is '2', expected a whole number from 1 to"),
            ({"version": True}, "`version` is True, expected a whole number from 1 to"),
            ({"version": 2.0}, "`version` is 2.0, expected a whole number from 1 to"),
            ({"version": None}, "`version` is None, expected a whole number from 1 to"),
            ({"version": 0}, "`version` is 0, expected a whole number from 1 to"),
        ],
    )
    def test_malformed(self, tmp_path, content, message):
        write(tmp_path, content)
        with pytest.raises(ValueError, match=rf"{STEP_FORMAT_NAME}: .*{re.escape(message)}"):
            StepFormat.from_pretrained(tmp_path)

    def test_repeated_keys(self):
        """`json` silently keeps the last of repeated keys."""
        with pytest.raises(ValueError, match="mine.json: .*the key 'head' occurs twice"):
            StepFormat.from_json('{"head": "lm", "version": 2, "head": "classification"}', where="mine.json")

    def test_not_utf8(self, tmp_path):
        (tmp_path / STEP_FORMAT_NAME).write_bytes('{"step_separator": "é"}'.encode("latin-1"))
        with pytest.raises(ValueError, match="step_format.json: not valid UTF-8"):
            StepFormat.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", ["version", *(field.name for field in fields(StepFormat))])
    def test_every_key_of_every_wrong_type(self, tmp_path, name):
        """One clear line for each, whatever JSON value a key has."""
        good = {"version": 2} | asdict(StepFormat(prompt_style="chat", system_prompt="s"))
        for value in VALUES:
            path = tmp_path / STEP_FORMAT_NAME
            path.write_text(json.dumps(good | {name: value}))
            try:
                found = StepFormat.from_pretrained(tmp_path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ") and len(str(error)) < 400 and "\n" not in str(error)
            else:
                expected = {field.name: field.default for field in fields(StepFormat)} | asdict(found)
                read = getattr(found, name)
                assert name != "version" and asdict(found) == expected
                assert (list(read) if isinstance(read, tuple) else read) == value
                assert (
                    value is None
                    or isinstance(value, str)
                    or (name == "sanitize_control_tokens" and value is True)
                    or (name == "chat_template_kwargs" and isinstance(value, dict))
                    or (name == "thinking_marks" and all(isinstance(mark, str) for mark in value))
                )


class TestPublished:
    """Formats of published models, by name and by the models that have them."""

    REPOSITORIES = [(name, repository) for name, (found, _) in PUBLISHED_FORMATS.items() for repository in found]

    @pytest.mark.parametrize("name", PUBLISHED_FORMATS)
    def test_names(self, tmp_path, name):
        step_format = StepFormat.published(name)
        assert step_format == StepFormat.named(name) == StepFormat(**PUBLISHED_FORMATS[name][1])
        step_format.save(tmp_path)
        assert (
            StepFormat.from_pretrained(tmp_path) == StepFormat.named(str(tmp_path / STEP_FORMAT_NAME)) == step_format
        )

    def test_formats_differ(self):
        formats = [StepFormat.published(name) for name in PUBLISHED_FORMATS]
        assert all(formats.count(one) == 1 for one in formats)

    def test_unknown_names(self):
        with pytest.raises(ValueError, match="no published step format 'qwen'. Names: qwen2.5-math-prm, "):
            StepFormat.published("qwen")
        with pytest.raises(
            FileNotFoundError, match="the file qwen does not exist. Pass a step_format.json.*: qwen2.5"
        ):
            StepFormat.named("qwen")

    @pytest.mark.parametrize(("name", "repository"), REPOSITORIES)
    def test_models(self, tmp_path, name, repository):
        """By the repository id, also without a connection, and by the name of a folder, in any case."""
        folders = [tmp_path / repository.split("/")[1], tmp_path / repository.split("/")[1].lower()]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        for path in (repository, *folders):
            assert StepFormat.from_pretrained(path) == StepFormat.find(path) == StepFormat.published(name)

    def test_own_files_have_priority(self, tmp_path):
        folder = tmp_path / "Qwen2.5-Math-PRM-7B"
        folder.mkdir()
        StepFormat(step_separator=";").save(folder)
        assert StepFormat.from_pretrained(folder) == StepFormat(step_separator=";")

    def test_copies_on_the_hub(self):
        """Without a connection, it is not known whether a copy has its own format."""
        with pytest.raises(FileNotFoundError, match="the Hub cannot be reached"):
            StepFormat.from_pretrained("me/Qwen2.5-Math-PRM-7B")

    def test_other_folders(self, tmp_path):
        (tmp_path / "Qwen2.5-Math-7B").mkdir()
        assert StepFormat.find(tmp_path / "Qwen2.5-Math-7B") is None
        with pytest.raises(FileNotFoundError, match=r"the name of a published format \(qwen2.5-math-prm, "):
            StepFormat.from_pretrained(tmp_path / "Qwen2.5-Math-7B")


class TestVersions:
    FIRST = {
        "prompt_style": "chat",
        "system_prompt": "Sum.",
        "step_separator": "\n",
        "merge_separator": " | ",
        "head": "lm",
        "regression_loss": "mse",
        "label_tokens": ["a", "b"],
    }

    def test_new_files_name_the_version(self, tmp_path):
        StepFormat().save(tmp_path)
        assert json.loads((tmp_path / STEP_FORMAT_NAME).read_text(encoding="utf-8"))["version"] == VERSION == 3

    def test_files_without_a_version(self, tmp_path):
        """All files written before versions existed."""
        write(tmp_path, self.FIRST)
        first = StepFormat.from_pretrained(tmp_path)
        assert {name: getattr(first, name) for name in self.FIRST} == self.FIRST | {"label_tokens": ("a", "b")}
        write(tmp_path, self.FIRST | {"version": 1})
        assert StepFormat.from_pretrained(tmp_path) == first

    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("key", FIRST)
    def test_missing_keys_have_the_default(self, tmp_path, version, key):
        """Older files lack every field that was added later."""
        values = self.FIRST | {"version": version}
        del values[key]
        if key == "prompt_style":
            del values["system_prompt"]
        write(tmp_path, values)
        assert getattr(StepFormat.from_pretrained(tmp_path), key) == getattr(StepFormat(), key)

    def test_an_old_version_with_its_own_default(self, tmp_path, monkeypatch):
        """A checkpoint keeps the encoding of its training. Keys in the file have priority."""
        monkeypatch.setattr(f"{StepFormat.__module__}.OLD_DEFAULTS", {1: {"step_separator": " old"}})
        found = {}
        for version in (None, 1, 2):
            write(tmp_path, {} if version is None else {"version": version})
            found[version] = StepFormat.from_pretrained(tmp_path).step_separator
        assert found == {None: " old", 1: " old", 2: StepFormat().step_separator}
        write(tmp_path, {"version": 1, "step_separator": " given"})
        assert StepFormat.from_pretrained(tmp_path).step_separator == " given"

    @pytest.mark.parametrize("version", [1, 2])
    def test_files_of_earlier_versions_keep_their_encoding(self, tmp_path, version):
        """The problem, the steps and the separator are tokenized separately, and steps are scored at the separator."""
        write(tmp_path, self.FIRST | {"version": version, "prompt_style": "plain", "system_prompt": None})
        step_format = StepFormat.from_pretrained(tmp_path)
        later = ("tokenization", "prompt_template", "step_prefix", "step_suffix", "score_position")
        assert all(getattr(step_format, name) == getattr(StepFormat(), name) for name in later)
        assert step_format.sanitize_control_tokens == (version == 2)
        tokenizer = tiny_tokenizer()
        ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" p? ", "a. ", " b", "\n")}
        expected = ids[" p? "], [ids["a. "] + ids["\n"], ids[" b"] + ids["\n"]]
        assert step_format.encode(tokenizer, " p? ", ["a. ", " b"]) == expected
        step_format.save(tmp_path)
        assert StepFormat.from_pretrained(tmp_path) == step_format

    def test_old_defaults_name_fields(self):
        """A misspelt field would fail for every old checkpoint."""
        names = {field.name for field in fields(StepFormat)}
        assert all(version < VERSION and names >= set(values) for version, values in OLD_DEFAULTS.items())

    def test_a_version_from_the_future(self, tmp_path):
        """In a newer version, a known key may have a different meaning."""
        write(tmp_path, self.FIRST | {"version": VERSION + 1, "new": 1})
        with pytest.raises(ValueError, match=rf"`version` is {VERSION + 1}. .*Upgrade"):
            StepFormat.from_pretrained(tmp_path)


def test_a_missing_folder_that_no_repository_can_be():
    with pytest.raises(
        FileNotFoundError, match="^./no/such/folder: this folder does not exist, and no Hub repository"
    ):
        StepFormat.from_pretrained("./no/such/folder")
