"""Tokens of steps with the tokenizers of real models: every decoded prefix, merges over borders of steps, and TRL's parser of responses."""

import itertools
import os
import random

import pytest
from transformers import AutoTokenizer
from trl import chat_template_utils
from trl.chat_template_utils import add_response_schema, parse_response

from trl_hrm import StepFormat, StepScorer
from trl_hrm.rewards import ScoredCompletion, StepReward
from trl_hrm.search.steps import RULES, step_spans
from trl_hrm.token_steps import token_steps

from ..helpers import tiny_model, tiny_tokenizer


pytestmark = pytest.mark.real_model

NAMES = ["smollm2", "qwen3", "llama3", "gemma3", "deepseek_v3", "gptoss", "mistral_v1"]
PIECES = [
    *(
        "Let $x$ be 3.\n\n",
        "Now \\frac{6}{3} = 2",
        "。\n\n",
        "因此 x = 2。",
        "😀👩‍👧",
        "\r\n\r\n",
        " \n \n",
        "  a",
        "𝑥²",
        "\t",
        "\n\n\n",
    ),
    *("don't .", "Ünïcödé", "한국어", "\ufffd", "\n\n# Answer\n\n", "```py\nx\n```", ".", "\n", "<think>", "</think>"),
]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name, real_folder):
    return AutoTokenizer.from_pretrained(real_folder(name))


def scored_of(text: str) -> ScoredCompletion:
    spans = step_spans(text, RULES["blank_line"])
    return ScoredCompletion([text], [spans], [0.0] * len(spans), 0.0)


def test_every_prefix(name, tokenizer):
    """Against a plain reference, for encoded texts, texts with other tokens within and a cut end, and random tokens."""
    rng, several = random.Random(name), 0
    for trial in range(90):
        ids = tokenizer.encode("".join(rng.choices(PIECES, k=rng.randint(1, 15))), add_special_tokens=False)
        if trial % 3 == 1:
            for _ in range(3):
                added = rng.choice([rng.randrange(len(tokenizer)), *tokenizer.all_special_ids])
                ids.insert(rng.randrange(len(ids) + 1), added)
            ids = ids[: rng.randint(1, len(ids))]
        elif trial % 3 == 2:
            ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 40))]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        scored = scored_of(text)
        expected, reached = [], 0
        for end in range(1, len(ids) + 1):
            prefix = tokenizer.decode(ids[:end], skip_special_tokens=True)
            common = len(os.path.commonprefix([prefix, text]))
            start, reached = reached, max(reached, common)
            characters = range(start, reached + (common < len(prefix)))
            inside = [j for i in characters for j, (first, last) in enumerate(scored.spans[0]) if first <= i < last]
            before = [j for j, (first, _) in enumerate(scored.spans[0]) if first < start]
            expected.append(inside[0] if inside else max([0, *before, *expected[-1:]]))
        assert token_steps(tokenizer, ids, scored) == expected
        several += len(scored.steps) > 1
    assert several > 10


@pytest.mark.parametrize("end", ["", "\n\n", "eos"])
def test_the_text_of_each_step(tokenizer, end):
    """Steps of whole characters. Their tokens are the step, the separator after it, and nothing else."""
    steps = ["Let $x = 3$.", "因此 x = 2。", "So \\frac{6}{3} = 2 😀", "# Answer\n\n한국어"]
    text = "\n\n".join(steps) + end.removeprefix("eos")
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids += [tokenizer.eos_token_id] * 3 if end == "eos" else []
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    found = token_steps(tokenizer, ids, scored_of(text))
    position = 0
    for step, run in itertools.groupby(range(len(ids)), lambda i: found[i]):
        piece = tokenizer.decode(ids[: max(run) + 1], skip_special_tokens=True)[position:]
        position += len(piece)
        assert piece.strip() == steps[step]
    assert set(found) == {0, 1, 2, 3}


def test_tokens_with_the_separator(name, tokenizer):
    """Qwen, DeepSeek, Llama 3 and gpt-oss have a token for the full stop and the blank line."""
    ids = tokenizer.encode("3.\n\nNow", add_special_tokens=False)
    merged = any(tokenizer.decode(i) == ".\n\n" for i in ids)
    assert merged == (name in ("qwen3", "llama3", "deepseek_v3", "gptoss"))
    found = token_steps(tokenizer, ids, scored_of("3.\n\nNow"))
    assert found == [*[0] * (len(ids) - 1), 1] and tokenizer.decode(ids[-1]) == "Now"


CALLS = {  # chat template of TRL, then pieces that the policy generates: (step, text), and the thinking that the parser finds
    "qwen3": [
        ("qwen3_chat_template", "<|im_end|>"),
        [(0, "<think>\nAdd.\n\nSo 3.\n</think>\n\nAdd.\n\n"), (1, 'So 3.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>')],
        "Add.\n\nSo 3.",
    ],
    "llama3": [("llama3_1_chat_template", "<|eot_id|>"), [(0, "Add.\n\n"), (1, "So 3.<|eot_id|>")], ""],
    "gptoss": [
        ("gptoss_chat_template", "<|return|>"),
        [
            (0, "<|channel|>analysis<|message|>Add.\n\nSo 3.<|end|><|start|>assistant<|channel|>final<|message|>Add.\n\n"),
            (1, "So 3.<|return|>"),
        ],
        "Add.\n\nSo 3.",
    ],
    "deepseek_v3": [
        ("deepseek_r1_distill_chat_template", "<｜end▁of▁sentence｜>"),
        [(0, "Add.\n\nSo 3.\n</think>\n\nAdd.\n\n"), (1, "So 3.<｜end▁of▁sentence｜>")],
        "Add.\n\nSo 3.",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS, scope="module")
@pytest.mark.parametrize("num_messages", [1, 2])
def test_messages_of_trl(name, tokenizer, num_messages):
    """The same steps are in the thinking and in the content that TRL's parser separates."""
    (template, eos), pieces, thinking = CALLS[name]
    tokenizer.chat_template, tokenizer.eos_token = getattr(chat_template_utils, template), eos
    add_response_schema(tokenizer)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1+2?"}], add_generation_prompt=True)
    prompt_ids = prompt["input_ids"]
    ids, mask, expected, completion = [], [], [], []
    for number in range(num_messages):
        if number:
            result = tokenizer.encode("\n3\n\nAdd.", add_special_tokens=False)
            ids, mask, expected = ids + result, mask + [0] * len(result), expected + [expected[-1]] * len(result)
            completion.append({"role": "tool", "content": "3"})
        turn = []
        for step, piece in pieces:
            encoded = tokenizer.encode(piece, add_special_tokens=False)
            turn, expected = turn + encoded, expected + [2 * number + step] * len(encoded)
        completion.append(parse_response(tokenizer, turn, prefix=prompt_ids))
        ids, mask = ids + turn, mask + [1] * len(turn)
    assert completion[0]["content"] == "Add.\n\nSo 3."
    scorer = StepScorer(tiny_model(), tiny_tokenizer(), StepFormat())
    reward = StepReward(scorer, max_repeated=None)
    reward([[{"role": "user", "content": "1+2?"}]], [completion])
    assert reward.scored[0].steps == ["Add.", "So 3."] * num_messages
    assert reward.scored[0].thinking == [thinking] * num_messages
    assert token_steps(tokenizer, ids, reward.scored[0], mask) == expected
