"""Token ids and scored positions of published step formats with real tokenizers, against the encodings of the authors' scripts."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from trl_hrm import StepFormat

from ..scoring.published import (
    CHATML,
    LLAMA_CHAT,
    MARK,
    NEWLINES,
    REAL_TOKENIZERS,
    Encoded,
    rlhflow_process_bench,
)


pytestmark = pytest.mark.real_model

SOLUTIONS = {
    "plain": ("What is 1+2?", ["1+2 = 3.", "The answer is 3"]),
    "latex": (r"Solve $\frac{x}{2} \le \sqrt{2}$.", [r"\[x \le 2\sqrt{2}\]", r"So $x - 1 \le 1.9$,", r"\boxed{2\sqrt 2}"]),
    "chinese": ("小明有 3 个苹果，又买了 2 个。", ["第一步：3 加 2。", "所以答案是 5。"]),
    "numbered": ("Add 2 to 3.", ["Step 1: so 2 + 3", "Step 2: thus 5."]),
    "lines": ("Two lines.\nWhat is x?", ["We have\nx = 2", "- a\n- b)", "so\nx + 1 = 3."]),
    "letters": ("Why?! 🙂", ["🙂...", "((x))", "café Ωmega", "ends with 123", "−1", "Привет"]),
    "one step": ("x + y", ["+"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def load(real_folder) -> Callable[..., PreTrainedTokenizerBase]:
    """Return a function that loads a real tokenizer and gives it what the published model's tokenizer has."""

    @cache
    def load(name: str, has_bos: bool = False) -> PreTrainedTokenizerBase:
        if name == "mistral_v1":
            import sentencepiece  # noqa: F401 (transformers reads the file with it)

            return LlamaTokenizer.from_pretrained(real_folder(name), add_bos_token=True)
        tokenizer = AutoTokenizer.from_pretrained(real_folder(name), add_bos_token=name != "qwen3")
        if name == "qwen3":
            tokenizer.add_special_tokens({"extra_special_tokens": [MARK]})
            tokenizer.chat_template = CHATML
        if name == "llama3":
            tokenizer.chat_template = LLAMA_CHAT  # Llama 3.1's, without a generation prompt of its own
        if has_bos:
            tokenizer.bos_token = "<|endoftext|>"
        return tokenizer

    return load


def encode(step_format: StepFormat, tokenizer: PreTrainedTokenizerBase, problem: str, steps: list[str]) -> Encoded:
    prompt_ids, step_ids = step_format.encode(tokenizer, problem, steps)
    ends = itertools.accumulate(map(len, [prompt_ids, *step_ids]))
    return sum(step_ids, prompt_ids), [end - 1 for end in ends][1:]


@pytest.mark.parametrize("solution", SOLUTIONS)
@pytest.mark.parametrize(("format_name", "name", "reference"), REAL_TOKENIZERS)
def test_ids(load, format_name, name, reference, solution):
    """The ids up to the last scored token. What follows does not change a score."""
    tokenizer = load(name, has_bos=format_name == "skywork-o1-prm")
    step_format = StepFormat.published(format_name)
    problem, steps = SOLUTIONS[solution]
    expected_ids, expected_places = reference(tokenizer, problem, steps)
    ids, places = encode(step_format, tokenizer, problem, steps)
    assert places == expected_places and len(places) == len(steps)
    assert ids == expected_ids[: places[-1] + 1]


@pytest.mark.parametrize(("format_name", "name"), [case[:2] for case in REAL_TOKENIZERS])
def test_the_formats_fit(load, format_name, name):
    StepFormat.published(format_name).check(load(name, has_bos=format_name == "skywork-o1-prm"), merged=True)


def test_rlhflow_as_in_process_bench(load):
    tokenizer = load("llama3")
    step_format = replace(StepFormat.published("rlhflow-prm"), prompt_template="{problem}\n\n")
    problem, steps = SOLUTIONS["plain"]
    expected_ids, expected_places = rlhflow_process_bench(tokenizer, problem, steps)
    ids, places = encode(step_format, tokenizer, problem, steps)
    assert (ids, places) == (expected_ids[: places[-1] + 1], expected_places)


class TestKnownIds:
    """Ids that the authors' scripts name."""

    def test_math_shepherd(self, load):
        tokenizer, step_format = load("mistral_v1"), StepFormat.published("math-shepherd")
        prompt_ids, step_ids = step_format.encode(tokenizer, "1+2?", ["1+2 = 3.", "So 3"])
        assert prompt_ids[0] == tokenizer.bos_token_id
        assert [ids[-1] for ids in step_ids] == [12902, 12902]
        assert tokenizer.convert_ids_to_tokens(step_ids[0][-1:] + step_ids[1][:2]) == ["▁ки", "<0x0A>", "Step"]
        assert step_format.label_token_ids(tokenizer) == [387, 648]

    def test_math_psa(self, load):
        tokenizer, step_format = load("qwen3"), StepFormat.published("math-psa")
        _, step_ids = step_format.encode(tokenizer, "1+2?", ["1+2 = 3.", "So 3"])
        assert [ids[-1] for ids in step_ids] == [76325, 76325]
        assert tokenizer.decode(step_ids[0][-1:]) == f" {NEWLINES}"
        assert step_format.label_token_ids(tokenizer) == [481, 488]

    def test_rlhflow(self, load):
        tokenizer, step_format = load("llama3"), StepFormat.published("rlhflow-prm")
        assert step_format.label_token_ids(tokenizer)[1] == 10
        _, step_ids = step_format.encode(tokenizer, "1+2?", ["1+2 = 3.", "So 3"])
        assert tokenizer.decode(step_ids[0][-2:]) == "<|end_header_id|>\n\n" and step_ids[1][0] == 10
