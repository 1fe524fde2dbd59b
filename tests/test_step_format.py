"""The step format: exact ids, errors, and saving and loading."""

import copy
import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_hrm import StepScorer
from trl_hrm.encoding import control_tokens
from trl_hrm.step_format import OLD_DEFAULTS, STEP_FORMAT_NAME, VERSION, StepFormat

from .fakes import GPT, INDIRECT, LLAMA, byte_level
from .helpers import tiny_model, tiny_tokenizer
from .mutations import VALUES


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
        step_format.save(tmp_path)
        assert StepFormat.from_pretrained(tmp_path) == step_format
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
                assert name != "version" and asdict(found) == expected and getattr(found, name) == value
                assert (
                    value is None
                    or isinstance(value, str)
                    or (name == "sanitize_control_tokens" and value is True)
                    or (name == "chat_template_kwargs" and isinstance(value, dict))
                )


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
