"""token_steps by hand, against slow references, and on what TRL's generation with tools gives."""

import itertools
import json
import os
import random
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template

from trl_hrm import StepFormat, StepGRPOConfig, StepGRPOTrainer, StepScorer
from trl_hrm.rewards import ScoredCompletion, StepReward
from trl_hrm.search.steps import RULES, step_spans
from trl_hrm.search.thinking import ThinkingRule
from trl_hrm.token_steps import token_steps

from .fakes import byte_level
from .helpers import HEADS, tiny_model, tiny_tokenizer


PIECES = [
    *(
        "Let x = 3.\n\n",
        "Now \\frac{6}{3} = 2",
        "。\n\n",
        "因此 x = 2。",
        "😀",
        "👩‍👧",
        "\r\n\r\n",
        " \n \n",
        "  a",
        "\t",
        ".",
        "é",
    ),
    *(
        "<think>",
        "</think>",
        "\n\n\n",
        "do n't .",
        "\ufffd",
        "\n\n# Answer\n\n",
        "$x^2$",
        "kilogram",
        "</s>",
        "[INST]",
    ),
]


def completion_of(*texts: str, keep_thinking: bool = False, **fields) -> ScoredCompletion:
    """Return a completion whose steps end at blank lines. The score of step j is j."""
    spans = [step_spans(text, RULES["blank_line"], keep_thinking) for text in texts]
    scores = [float(j) for j in range(sum(map(len, spans)))]
    return ScoredCompletion(list(texts), spans, **{"scores": scores, "reward": 0.0, **fields})


def words_of(tokenizer, text: str) -> list[str]:
    return [tokenizer.decode(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def fast(model, decoder, pre_tokenizer=None, **kwargs) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **kwargs)


def crossing() -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges over borders of steps, and parts of two characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["</s>"])
    rng = random.Random(0)
    tokenizer.train_from_iterator(("".join(rng.choices(PIECES[:12], k=9)) for _ in range(300)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Like SentencePiece in Llama 2, Mistral and Gemma: spaces are `▁`, unknown characters are bytes, the first space is dropped."""
    characters = ["▁", *"\n.x=23Leta因。", "▁x", "▁=", "\n\n", ".\n\n"]
    vocab = {token: i for i, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters])}
    model = models.BPE(
        vocab, [("▁", "x"), ("▁", "="), ("\n", "\n"), (".", "\n\n")], unk_token="<unk>", byte_fallback=True
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return fast(model, decoders.Sequence(parts), pre_tokenizers.Metaspace(split=False))


def wordpiece() -> PreTrainedTokenizerFast:
    """A tokenizer whose text changes with the next token: `do`, `n't` and `.` are decoded as `don't.`."""
    words = ["[UNK]", "do", "n't", ".", "x", "=", "2", "##2", "Let", "\n\n", "?", "a", "##a", "'", "m"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    split = pre_tokenizers.Split(Regex(r"\n\n| |(?=\.)"), "isolated")
    return fast(model, decoders.WordPiece(cleanup=True), split, clean_up_tokenization_spaces=True)


TOKENIZERS = {
    "byte_level": byte_level,
    "crossing": crossing,
    "byte_fallback": byte_fallback,
    "wordpiece": wordpiece,
    "python": ByT5Tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def samples(tokenizer, seed: str, number: int = 60):
    """Yield ids: of texts, of texts with other tokens within and a cut end, and random ones."""
    rng = random.Random(seed)
    for trial in range(number):
        ids = tokenizer.encode("".join(rng.choices(PIECES, k=rng.randint(1, 12))), add_special_tokens=False)
        if trial % 3 == 1:
            for _ in range(3):
                ids.insert(
                    rng.randrange(len(ids) + 1),
                    rng.choice([rng.randrange(len(tokenizer)), *tokenizer.all_special_ids]),
                )
            ids = ids[: rng.randint(1, len(ids))]
        elif trial % 3 == 2:
            ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 50))]
        yield ids


def by_prefixes(tokenizer, ids: list[int], text: str, skip_special_tokens: bool = True) -> list[range]:
    """Return the characters of each token, from every decoded prefix of the ids."""
    found, reached = [], 0
    for end in range(1, len(ids) + 1):
        prefix = tokenizer.decode(ids[:end], skip_special_tokens=skip_special_tokens)
        common = len(os.path.commonprefix([prefix, text]))
        start, reached = reached, max(reached, common)
        found.append(range(start, min(reached + (common < len(prefix)), len(text))))
    return found


def by_bytes(tokenizer, ids: list[int]) -> list[range] | None:
    """Return the characters of each token of a byte-level tokenizer, from its bytes, or `None` if they are not valid UTF-8."""
    byte_of = {character: byte for byte, character in zip(alphabet_bytes(), pre_tokenizers_alphabet(), strict=True)}
    pieces = []
    for i in ids:
        token = tokenizer.convert_ids_to_tokens(i)
        added = tokenizer.added_tokens_decoder.get(i)
        if added is not None:
            pieces.append(b"" if added.special else token.encode())
        else:
            pieces.append(bytes(byte_of[character] for character in token))
    try:
        text = b"".join(pieces).decode()
    except UnicodeDecodeError:
        return None
    character_of = [i for i, character in enumerate(text) for _ in character.encode()]
    ends = [0, *itertools.accumulate(map(len, pieces))]
    character_of.append(len(text))
    return [
        range(character_of[start], character_of[end - 1] + 1 if start < end else character_of[start])
        for start, end in itertools.pairwise(ends)
    ]


def alphabet_bytes() -> list[int]:
    """Return the bytes in the order of the characters of byte-level tokenizers: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*printable, *(byte for byte in range(256) if byte not in printable)]


def pre_tokenizers_alphabet() -> list[str]:
    others = itertools.count(256)
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return [chr(byte if byte in printable else next(others)) for byte in alphabet_bytes()]


def steps_of(characters: list[range], spans: list[tuple[int, int]]) -> list[int]:
    """Return the step of each token: of its first character inside a step, or the last step that starts before it."""
    found: list[int] = []
    for token in characters:
        inside = [j for i in token for j, (start, end) in enumerate(spans) if start <= i < end]
        before = [j for j, (start, _) in enumerate(spans) if start < token.start]
        found.append(inside[0] if inside else max([0, *before, *found[-1:]]))
    return found


class TestReferences:
    def test_every_prefix(self, tokenizer, request):
        """Tokens are decoded a few at a time. The text of a few tokens may differ from their part of the whole text."""
        several = 0
        for ids in samples(tokenizer, request.node.name):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            scored = completion_of(text)
            several += len(scored.steps) > 1
            assert token_steps(tokenizer, ids, scored) == steps_of(by_prefixes(tokenizer, ids, text), scored.spans[0])
        assert several > 5

    @pytest.mark.parametrize("name", ["byte_level", "crossing"])
    def test_bytes_of_the_vocabulary(self, name):
        """Without decoding: each byte of a token belongs to one character of the text."""
        tokenizer, compared = TOKENIZERS[name](), 0
        for ids in samples(tokenizer, name, 120):
            characters = by_bytes(tokenizer, ids)
            if characters is not None:
                scored = completion_of(tokenizer.decode(ids, skip_special_tokens=True))
                assert token_steps(tokenizer, ids, scored) == steps_of(characters, scored.spans[0])
                compared += len(scored.steps) > 1
        assert compared > 15

    def test_indices(self, tokenizer, request):
        """Every token has a step, steps never go back, and each step begins with a token of its own unless a merged token hides it."""
        for ids in samples(tokenizer, request.node.name):
            scored = completion_of(tokenizer.decode(ids, skip_special_tokens=True))
            found = token_steps(tokenizer, ids, scored)
            assert len(found) == len(ids) and found == sorted(found)
            assert set(found) <= set(range(max(len(scored.steps), 1)))

    def test_time_is_linear(self):
        """Decoding every prefix of 3,000 tokens would decode 4,500,000 of them."""
        tokenizer = byte_level()
        ids = tokenizer.encode("".join(random.Random(0).choices(PIECES[:12], k=600)))[:3000]
        decoded = []

        class Counting:
            def decode(self, ids, skip_special_tokens):
                decoded.append(len(ids))
                return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

        scored = completion_of(tokenizer.decode(ids))
        found = token_steps(Counting(), ids, scored)
        assert len(ids) == 3000 and len(scored.steps) > 100 and len(set(found)) > 100
        assert sum(decoded) < 25 * 3000


class TestByHand:
    def test_separators_and_parts_of_characters(self):
        tokenizer = byte_level()
        text = "a =\n\n因b"
        assert words_of(tokenizer, text) == ["a", " =", "\n", "\n", "\ufffd", "\ufffd", "\ufffd", "b"]
        assert token_steps(tokenizer, tokenizer.encode(text), completion_of(text)) == [0, 0, 0, 0, 1, 1, 1, 1]

    @pytest.mark.parametrize(
        "merges, words, steps",
        [
            ([("\n", "\n")], ["a", ".", "\n\n", "N", "o"], [0, 0, 0, 1, 1]),
            ([("\n", "\n"), (".", "\n\n")], ["a", ".\n\n", "N", "o"], [0, 0, 1, 1]),
            ([("\n", "\n"), ("\n\n", "N")], ["a", ".", "\n\nN", "o"], [0, 0, 1, 1]),
            ([("\n", "\n"), (".", "\n\n"), (".\n\n", "N")], ["a", ".\n\nN", "o"], [0, 0, 1]),
            ([("\n", "\n"), (".", "\n\n"), (".\n\n", "N"), (".\n\nN", "o")], ["a", ".\n\nNo"], [0, 0]),
        ],
    )
    def test_tokens_over_a_border(self, merges, words, steps):
        """A token belongs to the step of its first character in a step, because this step is credited for sampling it."""
        vocab = {token: i for i, token in enumerate([*"a.\nNo", *(a + b for a, b in merges)])}
        tokenizer = fast(models.BPE(vocab, merges), decoders.Fuse())
        text = "a.\n\nNo"
        assert words_of(tokenizer, text) == words
        assert token_steps(tokenizer, tokenizer.encode(text), completion_of(text)) == steps

    @pytest.mark.parametrize(
        "text, steps",
        [
            ("<think>\n\nx\n\n</think>\n\na\n\nb", "000000000 0001"),
            ("x\n\n</think>\n\na\n\nb", "000000 0001"),
            (" \n\na\n\nb", "0000001"),
            ("a\n\n<think>x</think>b", "000 0001"),
            ("a<think>x</think>b\n\nc", "00000001"),
        ],
    )
    def test_thinking(self, text, steps):
        """Thinking belongs to the step before it, and at the start to the first step."""
        tokenizer = byte_level()
        expected = [int(step) for step in steps if step != " "]
        assert token_steps(tokenizer, tokenizer.encode(text), completion_of(text)) == expected

    def test_thinking_that_is_scored(self):
        tokenizer = byte_level()
        text = "<think>a\n\nb</think>c\n\nd"
        scored = completion_of(text, keep_thinking=True, thinking=[""])
        assert token_steps(tokenizer, tokenizer.encode(text), scored) == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]

    @pytest.mark.parametrize(
        "text, fields",
        [
            ("", {}),
            ("\n\n \n", {}),
            ("<think>a\n\nb", {}),
            ("a\n\nb\n\nc", {"scores": None, "guards": ["too_many_steps"]}),
            ("a\n\nb\n\nc", {"scores": None, "reward": None}),
        ],
    )
    def test_without_scores(self, text, fields):
        """One reward for all tokens, or none."""
        tokenizer = byte_level()
        ids = tokenizer.encode(text)
        assert token_steps(tokenizer, ids, completion_of(text, **fields)) == [0] * len(ids)

    def test_end_of_the_sequence_and_padding(self):
        tokenizer = byte_level()
        end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
        ids = tokenizer.encode("a\n\nb")
        for tail in ([], [end], [end, end], [end, *[pad] * 40]):
            for text in {"a\n\nb", tokenizer.decode(ids + tail[:1])}:  # some trainers keep EOS in the text
                scored = ScoredCompletion([text], [[(0, 1), (3, 4)]], [0.0, 1.0], 0.0)
                assert token_steps(tokenizer, ids + tail, scored) == [0, 0, 0, *[1] * (1 + len(tail))]

    def test_a_text_that_ends_within_a_character(self):
        tokenizer = byte_level()
        ids = tokenizer.encode("a\n\n因")[:-1]
        text = tokenizer.decode(ids)
        assert text == "a\n\n\ufffd" and token_steps(tokenizer, ids, completion_of(text)) == [0, 0, 0, 1, 1]

    def test_bytes_that_are_no_text(self):
        """SentencePiece decodes all bytes of a run as unknown characters if one of them is wrong. A prefix is then another text."""
        tokenizer = byte_fallback()
        ids = [*tokenizer.convert_tokens_to_ids(["x", "\n\n", "x"]), *(1 + byte for byte in "数数数数".encode()[:-1])]
        text = tokenizer.decode(ids)
        assert text == "x\n\nx" + "\ufffd" * 11
        assert tokenizer.decode(ids[:-2]) == "x\n\nx数数数"
        spans = [[(0, 1), (3, 8), (8, 15)]]
        found = token_steps(tokenizer, ids, ScoredCompletion([text], spans, [0.0] * 3, 0.0))
        assert found == [0, 0, 1, 1, 1, 1, 1, *[2] * 7]

    def test_text_that_depends_on_tokens_far_before_it(self):
        """Tokens that are decoded a few at a time give another text here, which all prefixes correct."""

        class CapsLock:
            def decode(self, ids, skip_special_tokens):
                text = "".join(map(chr, ids))
                return text.removeprefix("^").upper() if text.startswith("^") else text

        text = "1" * 20 + "\n\n" + "abcdefghij" * 2 + "\n\nb"
        assert token_steps(CapsLock(), list(map(ord, text)), completion_of(text)) == [*[0] * 22, *[1] * 22, 2]
        upper = completion_of(text.upper())
        assert token_steps(CapsLock(), list(map(ord, "^" + text)), upper) == [*[0] * 23, *[1] * 22, 2]


class TestMessages:
    def ids_of(self, tokenizer, *parts: str) -> tuple[list[int], list[int]]:
        """Return the ids and mask of parts that alternate between the policy and the chat template with results of tools."""
        encoded = [tokenizer.encode(part) for part in parts]
        mask = [i % 2 == 0 for i, ids in enumerate(encoded) for _ in ids]
        return sum(encoded, []), [int(value) for value in mask]

    def found(self, scored, *parts: str) -> str:
        """Return the steps of the tokens, one digit for each, with a space between the parts."""
        tokenizer = byte_level()
        ids, mask = self.ids_of(tokenizer, *parts)
        steps = iter(map(str, token_steps(tokenizer, ids, scored, mask)))
        return " ".join("".join(next(steps) for _ in tokenizer.encode(part)) for part in parts)

    @pytest.mark.parametrize("name", ["byte_level", "crossing", "python"])
    def test_random_messages(self, name):
        """Each message is known from its parts: thinking, a content that may occur in it, and a call that may repeat it."""
        rng, tokenizer, several = random.Random(name), TOKENIZERS[name](), 0
        for _ in range(40):
            ids, mask, expected, texts, thinking = [], [], [], [], []
            for number in range(rng.randint(1, 4)):
                if number:
                    result = tokenizer.encode("".join(rng.choices(PIECES[:12], k=2)), add_special_tokens=False)
                    last = max(len(completion_of(*texts).steps) - 1, 0)
                    ids, mask, expected = ids + result, mask + [0] * len(result), expected + [last] * len(result)
                content = "".join(rng.choices(PIECES[:12], k=rng.choice([0, 1, 4, 8])))
                thought = rng.choice(["", f"So {content}", f"{content} x"]).strip()
                parts = [f"^{thought}^\n" if thought else "", content, rng.choice(["", "\n^", f"^{content[:9]}^"])]
                head, *rest = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
                run = [*head, *rest[0], *rest[1]]
                texts.append(content.strip())
                thinking.append(thought)
                scored = completion_of(*texts)
                start = len(parts[0]) + len(content) - len(content.lstrip())
                spans = [(first + start, last + start) for first, last in scored.spans[-1]]
                steps = steps_of(by_prefixes(tokenizer, run, "".join(parts)), spans)
                before = sum(map(len, scored.spans[:-1]))
                expected += [before + step if spans else max(before - 1, 0) for step in steps]
                ids, mask = ids + run, mask + [1] * len(run)
                if not run:
                    break
            else:
                scored = completion_of(*texts, thinking=thinking)
                assert token_steps(tokenizer, ids, scored, mask) == expected
                several += len(texts) > 1 and len(scored.steps) > 3
        assert several > 8

    def test_each_message_starts_a_step(self):
        parts = ("a\n\nb<|im_end|>", "[INST]3", "c\n\nd<|im_end|>")
        assert self.found(completion_of("a\n\nb", "c\n\nd"), *parts) == "00011 11 22233"

    def test_thinking_and_calls_around_a_content(self):
        """The content `a` also occurs in the thinking and in the call."""
        first = "<think>\na\n</think>\n\na\n<call>a<call><|im_end|>"
        parts = (first, "3", "<think>b</think>b\n\nc")
        scored = completion_of("a", "b\n\nc", thinking=["a", "b"])
        assert self.found(scored, *parts) == "0" * len(byte_level().encode(first)) + " 0 11111" + "12"

    def test_thinking_without_tags(self):
        """gpt-oss and Gemma 4 mark thinking with other tokens, which the parser of the response knows."""
        tokenizer = byte_level()
        first = "[INST]a\n\nb[INST]a\n\nb<call>a"
        assert words_of(tokenizer, first) == ["[INST]", "a", "\n", "\n", "b"] * 2 + ["<call>", "a"]
        scored = completion_of("a\n\nb", thinking=["a\n\nb"])
        assert self.found(scored, first) == "0" * 9 + "111"

    def test_thinking_with_a_special_token(self):
        """Decoded without special tokens, it could not be told from the content."""
        scored = completion_of("a\n\nb", thinking=["a</s>\n\nb"])
        assert self.found(scored, "[INST]a</s>\n\nb[INST]a\n\nb<call>a") == "0" * 10 + "111"
        with pytest.raises(ValueError, match=r"after the thinking 'x', but its token ids.*'a\\n\\nb<call>a'"):
            self.found(completion_of("a\n\nb", thinking=["x"]), "a\n\nb<call>a")

    def test_thinking_that_begins_in_the_prompt(self):
        """Its beginning is not among the tokens, but the content is all that follows."""
        assert self.found(completion_of("a\n\nb", thinking=["So a\n\nb"]), "a\n\nb</think>a\n\nb") == "000000001"

    @pytest.mark.parametrize("thought", ["c", "a"])
    def test_thinking_after_a_content(self, thought):
        """If the policy thinks once more and does not come to an end, the parser returns what it wrote before as the content."""
        scored = completion_of("a\n\nb", thinking=[thought])
        assert self.found(scored, f"a\n\nb[INST]{thought}") == "000111"

    def test_messages_without_text(self):
        """Their tokens belong to the step before them, or to the first step."""
        parts = ("<call>x", "3", "<call>", "3", "a\n\nb", "3", "<call>x", "33", "c")
        scored = completion_of("", "", "a\n\nb", "", "c")
        assert self.found(scored, *parts) == "00 0 0 0 0001 1 11 11 2"

    def test_a_result_at_the_end(self):
        """TRL adds no message if the result of a tool leaves no room for it."""
        assert self.found(completion_of("a\n\nb"), "a\n\nb<call>", "<think></think>3") == "00011 111"

    def test_special_tokens_in_a_content(self):
        """The parser of the response keeps them. TRL's decoded texts do not."""
        scored = completion_of("a</s>\n\nb", "c")
        assert self.found(scored, "a</s>\n\nb<|im_end|>", "3", "c<|im_end|>") == "000011 1 22"

    def test_text_of_an_environment(self):
        """TRL decodes all tokens of a rollout function as one text."""
        scored = completion_of("a\n\n3\n\nb")
        for parts in (("a\n\n", "3\n\n", "b"), ("", "a\n\n3", "\n\nb")):
            assert self.found(scored, *parts).replace(" ", "") == "0001112"

    def test_a_wrong_number_of_messages(self):
        with pytest.raises(ValueError, match="1 assistant message.* 2 runs"):
            self.found(completion_of("a"), "a", "3", "b")
        with pytest.raises(ValueError, match="2 assistant messages.* 1 run"):
            self.found(completion_of("a", "b"), "ab", "3")

    def test_a_text_of_other_ids(self):
        with pytest.raises(ValueError, match="'c\\\\n\\\\nd'.*'a'.*tokenizer of the policy"):
            self.found(completion_of("c\n\nd"), "a")

    def test_a_mask_of_another_length(self):
        with pytest.raises(ValueError, match="`tool_mask` has 2 values for 3 token ids"):
            token_steps(byte_level(), [1, 2, 3], completion_of("a"), [1, 0])


def scorer_of(tokenizer, **step_format) -> StepScorer:
    return StepScorer(tiny_model(vocab_size=len(tokenizer)), tokenizer, StepFormat(**step_format))


class TestRewardModels:
    def test_a_reward_model_of_another_tokenizer(self):
        """Steps are aligned with the tokens of the policy, whatever the reward model's tokens are."""
        policy, text = crossing(), "因此 x = 2。\n\nLet x = 3.\n\n# Answer\n\n6"
        found = []
        for tokenizer in (tiny_tokenizer(), byte_level()):
            reward = StepReward(scorer_of(tokenizer))
            reward(["x?"], [text])
            assert reward.scored[0].steps == ["因此 x = 2。", "Let x = 3.", "# Answer\n\n6"]
            found.append(token_steps(policy, policy.encode(text), reward.scored[0]))
        characters = by_bytes(policy, policy.encode(text))
        assert found[0] == found[1] == steps_of(characters, reward.scored[0].spans[0]) and set(found[0]) == {0, 1, 2}

    def test_control_tokens_of_the_reward_model(self):
        """The policy writes them as ordinary text. One at the end is not part of the last step, others are forged."""
        policy = crossing()
        reward = StepReward(scorer_of(byte_level()), guard_reward=-1)
        texts = ["a\n\nb<|im_end|>", "a<|im_end|>\n\nb"]
        reward(["x?"] * 2, texts)
        ended, forged = reward.scored
        assert ended.spans == [[(0, 1), (3, 4)]] and forged.guards == ["control_text"] and forged.step_rewards == [-1]
        ids = policy.encode(texts[0])
        assert len(ids) > 8 and token_steps(policy, ids, ended) == steps_of(by_bytes(policy, ids), ended.spans[0])
        assert set(token_steps(policy, policy.encode(texts[1]), forged)) == {0}


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'


class Scripted(StepGRPOTrainer):
    """Generates given texts, turn after turn. All else is TRL's: tool calls, chat template, parser of responses."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        texts = [turns.pop(0) for turns in self.turns if turns]
        assert len(texts) == len(prompt_ids)
        return [self.processing_class.encode(text) for text in texts], None

    def _generate(self, prompts):
        self.generated = super()._generate(prompts)
        return self.generated

    def _generate_and_score_completions(self, inputs):
        self.output = super()._generate_and_score_completions(inputs)
        return self.output


def test_tools_in_trl(tmp_path):
    """
    What TRL passes on differs from what the policy generated: its parser strips contents, and removes thinking and calls. The last
    completion is truncated, and not trained on.
    """
    tokenizer = byte_level()
    tokenizer.chat_template = qwen3_chat_template
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "</s>"
    reward = StepReward(scorer_of(tokenizer), min_steps=1)
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 220, "max_steps": 1}
    trainer = Scripted(
        tiny_model(HEADS["lm"], vocab_size=len(tokenizer), max_position_embeddings=4096),
        step_reward=reward,
        tools=[add],
        args=StepGRPOConfig(str(tmp_path), gradient_checkpointing=False, mask_truncated_completions=True, **options),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "1+2?"}]}]),
        processing_class=tokenizer,
    )
    trainer.turns = [
        [
            "<think>\nAdd 1.\n</think>\n\nAdd 1.\n\nThen 2.\n" + CALL,
            "<think>\nx\n</think>\n\nIt is 3.\n\nSo 3.<|im_end|>",
        ],
        [CALL, "So it is 3.\n\nDone 3.<|im_end|>"],
        ["No tool.\n\nIt is 3.<|im_end|>"],
        ["Add.\n" + CALL, "x" * 220],  # cut at max_completion_length
    ]
    trainer.train()
    _, completion_ids, tool_mask, completions, *_ = trainer.generated
    assert [[message["role"] for message in one] for one in completions] == [
        *[["assistant", "tool", "assistant"]] * 2,
        ["assistant"],
        ["assistant", "tool", "assistant"],
    ]
    assert "reasoning_content" in completions[0][0] and len(completion_ids[3]) == 220
    assert reward.metrics["tool_messages_left_out"] == 0.75 and reward.metrics["thinking_left_out"] == 0.25
    pieces = []
    for ids, mask, scored in zip(completion_ids, tool_mask, reward.scored, strict=True):
        steps = token_steps(tokenizer, ids, scored, mask)
        assert len(scored.scores) == max(steps) + 1
        row = len(pieces)
        if row < 3:
            values = trainer._scored_batch[row][2]
            assert len(set(values)) == len(values)
            assert trainer.output["advantages"][row, : len(ids)].tolist() == pytest.approx([values[k] for k in steps])
        tokens = zip(steps, mask, ids, strict=True)
        pieces.append(
            [(k, tokenizer.decode([i for *_, i in run])) for k, run in itertools.groupby(tokens, lambda x: x[:2])]
        )
    assert trainer.output["completion_mask"].sum(1).tolist() == [*map(len, completion_ids[:3]), 0]
    result = "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert pieces[0] == [
        ((0, 1), "<think>\nAdd 1.\n</think>\n\nAdd 1.\n\n"),
        ((1, 1), "Then 2.\n" + CALL),
        ((1, 0), result),
        ((2, 1), "<think>\nx\n</think>\n\nIt is 3.\n\n"),
        ((3, 1), "So 3.<|im_end|>"),
    ]
    assert pieces[1] == [
        ((0, 1), CALL),
        ((0, 0), result),
        ((0, 1), "So it is 3.\n\n"),
        ((1, 1), "Done 3.<|im_end|>"),
    ]
    assert pieces[2] == [((0, 1), "No tool.\n\n"), ((1, 1), "It is 3.<|im_end|>")]
    assert pieces[3][:2] == [((0, 1), "Add.\n" + CALL), ((0, 0), result)] and pieces[3][2][0] == (1, 1)


TRACES = [
    json.loads(line)
    for line in (Path(__file__).parent / "fixtures" / "thinking_traces.jsonl").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize("tokenizer", [crossing(), byte_level()], ids=["crossing", "byte level"])
@pytest.mark.parametrize("trace", TRACES, ids=[trace["name"] for trace in TRACES])
def test_thinking_traces(trace, tokenizer):
    """The tokens of a step of thinking decode to this step, up to tokens over its borders. Tags belong to the step before them."""
    text, rule = trace["text"], ThinkingRule(**trace.get("options", {}))
    spans = step_spans(text, rule)
    scored = ScoredCompletion([text], [spans], scores=[0.0] * len(spans), reward=0.0, keep_thinking=True)
    assert scored.steps == trace["steps"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = token_steps(tokenizer, ids, scored)
    assert len(found) == len(ids) and found == sorted(found)
    # Characters before the end of each token, without a character whose last bytes are in later tokens
    ends = [len(os.path.commonprefix([tokenizer.decode(ids[:i]), text])) for i in range(len(ids) + 1)]
    for step, (start, end) in enumerate(spans):
        # A token belongs to the step if it has a character of it and none of a step before
        expected = [
            i
            for i, (first, last) in enumerate(zip(ends, ends[1:], strict=False))
            if first < end and start < max(last, first + 1) and (step == 0 or first >= spans[step - 1][1])
        ]
        own = [i for i, number in enumerate(found) if number == step]
        assert set(expected) <= set(own), (step, expected, own)
        for i in set(own) - set(expected):  # before the first step, or a gap with white space or a tag after the step
            assert (step == 0 and ends[i + 1] <= start) or ends[i] >= end
