"""The prompt of the policy: control tokens in the problem, dates, template variables, runs of earlier versions."""

import json
from dataclasses import asdict, replace

import pytest

from trl_hrm.encoding import control_tokens
from trl_hrm.search.engines.base import EngineError
from trl_hrm.search.engines.openai import OpenAIEngine
from trl_hrm.search.prompts import OLD_DEFAULTS, Prompt, started_prompt
from trl_hrm.search.run_folder import MANIFEST, check_manifest, resumed_prompt
from trl_hrm.search.steps import RULES, cut_prefix

from ..fakes import GPT, LLAMA, byte_level


CHAT = Prompt("mine", "<|im_start|>Q: {question}", "blank_line", system_prompt="Be brief.<|im_end|>")
PLAIN = Prompt("raw", "<|im_start|>{question}<|im_end|>\n<think>", "blank_line", style="plain")
OLD = {"chat_template_date": None, "sanitize_control_tokens": False}


def written(tokenizer, ids) -> list[str]:
    control = control_tokens(tokenizer)
    return [control[i] for i in ids if i in control]


@pytest.mark.parametrize("prompt", [CHAT, PLAIN], ids=["chat", "plain"])
def test_a_problem_writes_no_control_tokens(prompt):
    """Control tokens of the prompt file and the system message are intended. Those of a problem would end the turn."""
    tokenizer = byte_level()
    expected = written(tokenizer, prompt.encode(tokenizer, "1+1?"))
    assert expected.count("<|im_end|>") == (3 if prompt is CHAT else 1)
    for token in control_tokens(tokenizer).values():
        ids = prompt.encode(tokenizer, f"1{token}1?{token}")
        assert written(tokenizer, ids) == expected
        assert f"1{token}1?{token}" in tokenizer.decode(ids)
        assert written(tokenizer, replace(prompt, **OLD).encode(tokenizer, f"1{token}")) != expected


@pytest.mark.parametrize("prompt", [CHAT, PLAIN], ids=["chat", "plain"])
def test_ordinary_problems_keep_their_ids(prompt):
    tokenizer = byte_level()
    for problem in ("1+1?", " Find\n\n\n x <table>", ""):
        assert prompt.encode(tokenizer, problem) == replace(prompt, **OLD).encode(tokenizer, problem)


def test_problems_with_control_tokens_are_counted():
    tokenizer = byte_level()
    assert CHAT.describe_control_text(tokenizer, ["1", "im_end"]) is None
    note = CHAT.describe_control_text(tokenizer, ["1", "2</s>", "<｜User｜>"])
    assert (
        note
        == "Problems that contain control tokens of the policy, such as '</s>': 2. They are encoded as plain text."
    )
    assert "as these tokens, as when" in replace(CHAT, **OLD).describe_control_text(tokenizer, ["</s>"])


@pytest.mark.parametrize("template", [LLAMA, GPT])
def test_ids_do_not_depend_on_the_day(template, on_day):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    found = set()
    for day in ("2024-07-26", "2025-03-04"):
        on_day(day)
        found.add(tuple(CHAT.encode(tokenizer, "1+1?")))
    assert len(found) == 1
    on_day("2025-03-04")
    with pytest.warns(UserWarning, match="today's date"):
        assert tuple(replace(CHAT, **OLD).encode(tokenizer, "1+1?")) not in found


def test_variables_of_the_template():
    tokenizer = byte_level()
    tokenizer.chat_template = GPT
    high = replace(CHAT, chat_template_kwargs={"effort": "high"})
    assert "high" in tokenizer.decode(high.encode(tokenizer, "1+1?"))
    with pytest.raises(ValueError, match="enable_thinking.*effort"):
        replace(CHAT, chat_template_kwargs={"enable_thinking": False}).encode(tokenizer, "1+1?")
    with pytest.raises(ValueError, match="prompt style chat"):
        replace(PLAIN, chat_template_kwargs={"effort": "high"})
    with pytest.raises(ValueError, match="add_generation_prompt"):
        replace(CHAT, chat_template_kwargs={"add_generation_prompt": False})


class TestTemplatesWithoutSystemMessages:
    """Gemma 2 and Mistral 7B fail for a system message, and other templates ignore it."""

    TURNS = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    MINE = Prompt("mine", "Q: {question}", "blank_line", system_prompt="Be brief.")

    def tokenizer(self, template):
        tokenizer = byte_level()
        tokenizer.chat_template = template
        return tokenizer

    @pytest.mark.parametrize("template", [TURNS, REFUSES + TURNS], ids=["ignores", "refuses"])
    def test_the_user_message_begins_with_it(self, template):
        tokenizer = self.tokenizer(template)
        prompt = self.MINE.for_tokenizer(tokenizer)
        assert tokenizer.decode(prompt.encode(tokenizer, "1+1?")) == "<user>Be brief.\n\nQ: 1+1?"
        assert prompt.messages("1+1?") == [{"role": "user", "content": "Be brief.\n\nQ: 1+1?"}]  # of rows for TRL
        assert prompt.for_tokenizer(tokenizer) == prompt

    def test_others_are_not_changed(self):
        assert self.MINE.for_tokenizer(byte_level()) is self.MINE
        without = replace(self.MINE, system_prompt=None)
        assert without.for_tokenizer(self.tokenizer(self.REFUSES + self.TURNS)) is without
        assert self.MINE.for_tokenizer(self.tokenizer(None)) is self.MINE  # `encode` raises

    def test_a_question_in_the_system_message(self):
        prompt = replace(self.MINE, system_prompt="Answer {question}.")
        assert prompt.for_tokenizer(byte_level()) is prompt
        with pytest.raises(ValueError, match="no system messages, and `system_prompt` contains {question}"):
            prompt.for_tokenizer(self.tokenizer(self.TURNS))

    def test_a_template_that_fails_for_every_message(self):
        with pytest.raises(Exception, match="never"):
            self.MINE.for_tokenizer(self.tokenizer("{{ raise_exception('never') }}"))


class TestManifest:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"chat_template_kwargs": {"effort": "high"}}, 'chat_template_kwargs.effort.*"high"'),
            ({"chat_template_date": "2025-01-01"}, 'chat_template_date.*"2024-07-26".*"2025-01-01"'),
            ({"sanitize_control_tokens": False}, "sanitize_control_tokens"),
        ],
    )
    def test_a_restart_with_other_options_is_refused(self, tmp_path, change, message):
        check_manifest(tmp_path, {"prompt": asdict(CHAT)})
        check_manifest(tmp_path, {"prompt": asdict(CHAT)})
        with pytest.raises(ValueError, match=f"prompt.{message}"):
            check_manifest(tmp_path, {"prompt": asdict(replace(CHAT, **change))})

    def test_run_of_an_earlier_version_resumes_with_its_settings(self, tmp_path):
        values = {name: value for name, value in asdict(CHAT).items() if name not in OLD_DEFAULTS}
        check_manifest(tmp_path, {"prompt": values})
        prompt = resumed_prompt(CHAT, tmp_path, tmp_path / "new")
        assert prompt == replace(CHAT, **OLD)
        check_manifest(tmp_path, {"prompt": asdict(prompt)})
        started = Prompt(**started_prompt(json.loads((tmp_path / MANIFEST).read_text())))
        assert replace(started, final_stops=()) == prompt
        assert resumed_prompt(CHAT, tmp_path / "new") == CHAT

    def test_new_options_raise_for_a_run_of_an_earlier_version(self, tmp_path):
        """Resuming with the old settings would ignore the option."""
        values = {name: value for name, value in asdict(CHAT).items() if name not in OLD_DEFAULTS}
        check_manifest(tmp_path, {"prompt": values})
        for change in ({"chat_template_kwargs": {"effort": "high"}}, {"chat_template_date": "2025-01-01"}):
            prompt = resumed_prompt(replace(CHAT, **change), tmp_path)
            with pytest.raises(ValueError, match="prompt.chat_template"):
                check_manifest(tmp_path, {"prompt": asdict(prompt)})


def test_a_prefix_with_control_tokens_is_refused():
    """DeepSeek's `<｜User｜>` is not marked as special, so decoding returns it and does not reveal it."""
    tokenizer = byte_level()
    with pytest.raises(ValueError, match="'<｜User｜>'"):
        cut_prefix(RULES["blank_line"], tokenizer, [], "x<｜User｜> = 3.\n\n")
    ids, _ = cut_prefix(
        RULES["blank_line"], tokenizer, [], "<think>Add.</think>x = 3.\n\n"
    )  # as written by the policy
    assert written(tokenizer, ids) == ["<think>", "</think>"]


def test_a_server_that_takes_text_is_not_sent_control_tokens_as_text():
    """The server would convert them to tokens."""
    tokenizer = byte_level()
    tokenizer.eos_token = "</s>"
    engine = OpenAIEngine(["http://localhost:1"], "policy", tokenizer, api="text")
    ids = CHAT.encode(tokenizer, "1+1?")
    assert engine._prompt_text(ids) == tokenizer.decode(ids)
    with pytest.raises(EngineError, match="'<｜User｜>'.*use vLLM"):
        engine._prompt_text(CHAT.encode(tokenizer, "1+1?<｜User｜>"))
