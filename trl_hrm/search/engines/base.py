"""Interface of all engines, their shared functions, and a scripted engine for tests. An engine continues token ids."""

import asyncio
import hashlib
import math
import random
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from ...io import shown


FINISHES = ("stop", "eos", "length")
HALF_PAIR = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which is invalid in UTF-8
MAX_TOKEN_ID = 2**31 - 1  # token ids are saved as 32-bit integers


class EngineError(RuntimeError):
    """A request failed after all retries. The search continues without it, and no label depends on it."""


class PrefixTooLong(EngineError):
    """
    The prefix fills the model's context, so no token can be generated. The solution is cut off; a retry would not help.

    Args:
        message (`str`):
            Error message of the engine.
        max_length (`int`, *optional*):
            Maximum number of tokens of prefix and sample together, if the server's message states it.
        num_prefix (`int`, *optional*):
            Number of tokens of the prefix, if the server's message states it.
    """

    def __init__(self, message: str, max_length: int | None = None, num_prefix: int | None = None):
        super().__init__(message)
        self.max_length = max_length
        self.num_prefix = num_prefix


class EngineFatal(OSError):
    """No request can succeed, for example because the server does not have the model. The search stops."""


@dataclass(frozen=True)
class Sample:
    """
    One continuation.

    Args:
        token_ids (`list[int]`):
            Generated token ids, including the stop string and the end-of-sequence token.
        text (`str`):
            Generated text, including the stop string but no special tokens.
        finish (`str`):
            Why generation ended: `"stop"` (a stop string), `"eos"` (end-of-sequence token) or `"length"` (`max_tokens`).
        stop_reason (`str`, *optional*):
            The stop string that ended the sample, if any.
        num_cached (`int`, *optional*, defaults to `0`):
            Number of prefix tokens taken from a cache. Only the first sample of a request has it.
    """

    token_ids: list[int]
    text: str
    finish: str
    stop_reason: str | None = None
    num_cached: int = 0


class Tokenizer(Protocol):
    """
    Tokenizer interface that a search requires. All transformers tokenizers implement it. Prompts with a chat template also
    require `apply_chat_template`.
    """

    chat_template: Any
    eos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class Engine(Protocol):
    """
    Interface of an engine. `describe` returns the model, sampling parameters and versions for the manifest and dataset card.

    An engine that returns probabilities of its model also has `has_logprobs=True`, `max_length` (the context length of the model, or `None`
    if it is unknown), and the coroutine `next_logprobs(prefix_ids, token_ids, key="")`. It returns the log-probability of each of `token_ids`
    after `prefix_ids`, at temperature 1 and without `top_p` and `top_k`, and raises the errors of `sample`.
    """

    tokenizer: Tokenizer

    async def sample(
        self, prefix_ids: Sequence[int], n: int, stop: Sequence[str], max_tokens: int, seed: int, key: str = ""
    ) -> list[Sample]:
        """
        Sample `n` continuations of `prefix_ids`.

        Args:
            prefix_ids (`Sequence[int]`):
                Token ids to continue. They are never re-tokenized.
            n (`int`):
                Number of samples.
            stop (`Sequence[str]`):
                Strings that end a sample. They are kept in its ids and text.
            max_tokens (`int`):
                Maximum number of tokens per sample.
            seed (`int`):
                Random seed. Sample `i` uses `seed + i`, so the seeds of two requests must differ by at least `n`.
            key (`str`, *optional*):
                Requests with the same key share prefixes. An engine with several servers sends them to the same server.

        Raises:
            `EngineError`: If the request failed.
            `PrefixTooLong`: If the prefix fills the policy's context.
            `EngineFatal`: If no request can succeed.
        """
        ...

    def describe(self) -> dict[str, Any]: ...

    async def close(self) -> None: ...


def check_logprobs(logprobs: Sequence[float], source: str, remedy: str) -> None:
    """Raise [`EngineFatal`] if the probabilities of different next tokens add up to more than 1, so they are not of one distribution."""
    if sum(map(math.exp, logprobs)) > 1.01:
        raise EngineFatal(
            f"{source} returned the log-probabilities {shown(list(logprobs))} for different next tokens. Their probabilities must add up "
            f"to at most 1. Use {remedy}."
        )


def num_token_ids(tokenizer: Tokenizer) -> int:
    """Return the largest token id of a tokenizer plus one, or the largest that can be saved if the tokenizer lists no tokens."""
    if hasattr(tokenizer, "get_vocab"):
        return max(tokenizer.get_vocab().values()) + 1  # `len` would be too small if some ids have no token
    return len(tokenizer) if hasattr(tokenizer, "__len__") else MAX_TOKEN_ID + 1


def check_samples(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    prefix_ids: Sequence[int],
    n: int,
    stop: Sequence[str],
    max_tokens: int,
    num_ids: int | None = None,
) -> None:
    """
    Check the answer of an engine to a request. Only samples that pass are written to the log of a search.

    Args:
        samples (`Sequence[Sample]`):
            Answer of the engine.
        tokenizer ([`Tokenizer`]):
            Tokenizer of the engine.
        prefix_ids, n, stop, max_tokens:
            The request. See [`Engine.sample`].
        num_ids (`int`, *optional*):
            Number of token ids. Defaults to [`num_token_ids`].

    Raises:
        `EngineError`: If there are not `n` samples, or if a sample has invalid token ids or more than `max_tokens`, a text that is
            not the text of its ids, another end than `FINISHES`, a stop string that was not requested or is not in its text, a
            stop string that did not end it, or an impossible number of cached tokens.
    """
    num_ids = num_token_ids(tokenizer) if num_ids is None else num_ids
    if len(samples) != n:
        raise EngineError(f"The engine returned {len(samples)} samples, expected {n}. Check that it respects `n`.")
    for i, sample in enumerate(samples):
        fault = _sample_fault(sample, tokenizer, prefix_ids, stop, max_tokens, num_ids)
        if fault is not None:
            raise EngineError(f"Sample {i} of the engine is invalid: {fault}.")


def _sample_fault(
    sample: Sample,
    tokenizer: Tokenizer,
    prefix_ids: Sequence[int],
    stop: Sequence[str],
    max_tokens: int,
    num_ids: int,
) -> str | None:
    """Return what is wrong with a sample, or `None`."""
    ids, text = sample.token_ids, sample.text
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < num_ids for token in ids):
        return f"its token ids are {shown(ids)}, expected integers from 0 to {num_ids - 1}"
    if not 0 < len(ids) <= max_tokens:
        return f"it has {len(ids)} tokens, expected 1 to {max_tokens}"
    if not isinstance(text, str) or HALF_PAIR.search(text):
        return f"its text is {shown(text)}, which is not valid Unicode"
    if sample.finish not in FINISHES:
        return f"it ended with {shown(sample.finish)}, expected one of {', '.join(FINISHES)}"
    if sample.finish == "stop":
        if sample.stop_reason not in stop:
            return f"it was ended by {shown(sample.stop_reason)}, which is not one of the stop strings {shown(list(stop))}"
        if sample.stop_reason not in text:
            return (
                f"it was ended by the stop string {sample.stop_reason!r}, but its text does not contain it. The text ends with "
                f"{text[-40:]!r}"
            )
    elif sample.stop_reason is not None:
        return f"it has the stop string {shown(sample.stop_reason)}, but ended with {sample.finish!r}"
    elif found := find_stop(text, stop):
        return f"it contains the stop string {found[1]!r}, but did not end there"
    if type(sample.num_cached) is not int or not 0 <= sample.num_cached <= len(prefix_ids):
        return f"it has {shown(sample.num_cached)} cached tokens, but the prefix has {len(prefix_ids)} tokens"
    written = [continued_text(tokenizer, prefix_ids, ids)]
    if sample.finish == "eos":  # the last token may or may not be visible
        written.append(continued_text(tokenizer, prefix_ids, ids[:-1]))
    if _visible(text) not in map(_visible, written):
        return f"its text is {shown(text)}, but its token ids are the text {shown(written[-1])}"
    return None


def _visible(text: str) -> str:
    """Return a text without white space and incomplete characters, which tokenizers and detokenizers change."""
    return "".join(text.replace("\ufffd", "").split())


def continued_text(tokenizer: Tokenizer, prefix_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """
    Return the text of `token_ids` after `prefix_ids`.

    Decoded without the prefix, some tokenizers would drop a leading space.
    """
    before = tokenizer.decode(list(prefix_ids[-8:]), skip_special_tokens=True)
    return tokenizer.decode([*prefix_ids[-8:], *token_ids], skip_special_tokens=True)[len(before) :]


def find_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Return the end of the first stop string in `text`, and the string. If several end there, return the longest."""
    found = [(text.find(string) + len(string), -len(string), string) for string in stop if string in text]
    if not found:
        return None
    end, _, string = min(found)
    return end, string


@dataclass(frozen=True)
class Sampling:
    """
    Sampling parameters.

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. `0` means greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sample from the smallest set of tokens with at least this cumulative probability.
        top_k (`int`, *optional*, defaults to `0`):
            Sample from the `top_k` most probable tokens. `0` means all tokens.

    Raises:
        `ValueError`: If a parameter is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"`temperature` is {self.temperature}. It must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}. It must be in (0, 1].")
        if self.top_k < 0:
            raise ValueError(f"`top_k` is {self.top_k}. It must be at least 0 (0 means all tokens).")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def num_draws(self, n: int) -> int:
        """Return how many of `n` samples must be generated. Greedy samples are identical, so one is enough."""
        return min(n, 1) if self.is_greedy else n

    def repeat(self, samples: list[Sample], n: int) -> list[Sample]:
        """Return the `n` samples of a request from the `num_draws` generated ones."""
        if not self.is_greedy:
            return samples
        return samples + [replace(s, token_ids=list(s.token_ids), num_cached=0) for s in samples for _ in range(n - 1)]

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def room(prefix_ids: Sequence[int], max_tokens: int, max_length: int | None, model: str) -> int:
    """
    Return how many tokens can be generated: `max_tokens`, or fewer if the model's context is too short.

    Raises:
        `PrefixTooLong`: If the prefix fills the context.
    """
    if max_length is None:
        return max_tokens
    if len(prefix_ids) >= max_length:
        raise PrefixTooLong(
            f"The prefix has {len(prefix_ids)} tokens, but {model} has a context of {max_length} tokens. Lower the depth or "
            "the number of tokens per step, or use a longer context."
        )
    return min(max_tokens, max_length - len(prefix_ids))


def sample_from_ids(
    tokenizer: Tokenizer,
    prefix_ids: Sequence[int],
    token_ids: Sequence[int],
    finish: str,
    stop_reason: str | None = None,
    num_cached: int = 0,
) -> Sample:
    """Return a sample with text decoded from its ids. The texts along a path then join to the text of the joined ids."""
    ids = list(token_ids)
    text = continued_text(tokenizer, prefix_ids, ids[:-1] if finish == "eos" else ids)
    return Sample(ids, text, finish, stop_reason, num_cached)


def sample_from_vllm(
    tokenizer: Tokenizer,
    prefix_ids: Sequence[int],
    token_ids: Sequence[int],
    text: str,
    finish_reason: str | None,
    stop_reason: str | int | None,
    num_cached: int = 0,
) -> Sample:
    """
    Return a sample from an output of vLLM. vLLM also reports `"stop"` at the end of the sequence; `stop_reason` is then not a
    string. Tokens after the token that completes the stop string, from speculative decoding, are dropped.

    Raises:
        `EngineError`: If vLLM aborted the request, or the parts of the output contradict each other.
    """
    if finish_reason not in ("stop", "length"):  # such as "abort", "error", "content_filter"
        raise EngineError(f"vLLM ended a sample with {shown(finish_reason)}. It must be 'stop' or 'length'.")

    def is_complete(number: int) -> bool:
        """Return whether the first tokens contain the stop string."""
        return stop_reason in continued_text(tokenizer, prefix_ids, ids[:number])

    ids, finish = list(token_ids), "length"
    if finish_reason == "stop" and isinstance(stop_reason, str):
        finish = "stop"
        if text.find(stop_reason) + len(stop_reason) != len(text):
            raise EngineError(
                f"vLLM stopped at {shown(stop_reason)}, but its text does not end there: {shown(text[-60:])}."
            )
        if is_complete(len(ids)):
            ids = ids[: bisect_left(range(len(ids)), True, key=is_complete)]
    elif finish_reason == "stop":
        finish = "eos"
        if stop_reason is not None and (type(stop_reason) is not int or ids[-1:] != [stop_reason]):
            raise EngineError(
                f"vLLM stopped at the token {shown(stop_reason)}, but the sample ends with the tokens {shown(ids[-3:])}."
            )
        is_end = stop_reason is not None or ids[-1:] == [tokenizer.eos_token_id]
        # the end of the sequence of vLLM can be another special token, which has no text
        if not is_end and continued_text(tokenizer, prefix_ids, ids[:-1]) != continued_text(
            tokenizer, prefix_ids, ids
        ):
            raise EngineError(
                f"vLLM stopped without a stop string, but after the tokens {shown(ids[-3:])}, which end no sequence."
            )
    reason = stop_reason if finish == "stop" else None
    sample = sample_from_ids(tokenizer, prefix_ids, ids, finish, reason, num_cached)
    ours, theirs = _visible(sample.text), _visible(text)
    # a sample can complete a character that begins in the prefix. Then only vLLM's text contains it
    is_split = tokenizer.decode(list(prefix_ids[-8:]), skip_special_tokens=True).endswith("\ufffd")
    expected = [theirs[start:] for start in range(4 if is_split else 1)]
    # the last token can continue after the end of the stop string
    if not (any(map(ours.startswith, expected)) if finish == "stop" else ours in expected):
        raise EngineError(
            f"vLLM decodes its tokens to {shown(text)}, but this tokenizer decodes them to {shown(sample.text)}. Pass the "
            "tokenizer of the model, for example with --policy_tokenizer or --judge_tokenizer."
        )
    return sample


class CharTokenizer:
    """Tokenizer of [`ScriptedEngine`], with one token per character."""

    chat_template = None
    eos_token_id = 0

    def __len__(self) -> int:
        return sys.maxunicode + 1

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids if i)


class ScriptedEngine:
    """
    Deterministic engine for tests. `script(prefix_text, rng)` returns a whole continuation.

    Each sample has its own random generator, seeded with the prefix and the seed of the sample. The text is cut after the first
    stop string or at `max_tokens` characters.

    Args:
        script (`Callable[[str, random.Random], str]`):
            Function that plays the policy.
        latency (`Callable[[random.Random], float]`, *optional*):
            Duration of a request in seconds. Defaults to no delay.
    """

    def __init__(
        self, script: Callable[[str, random.Random], str], latency: Callable[[random.Random], float] | None = None
    ):
        self.tokenizer = CharTokenizer()
        self.script = script
        self.latency = latency
        self.in_flight = 0
        self.most_in_flight = 0

    async def sample(
        self, prefix_ids: Sequence[int], n: int, stop: Sequence[str], max_tokens: int, seed: int, key: str = ""
    ) -> list[Sample]:
        prefix = self.tokenizer.decode(prefix_ids)
        self.in_flight += n
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.latency(self._rng(prefix, seed, "latency")) if self.latency else 0)
            samples = []
            for i in range(n):
                text = self.script(prefix, self._rng(prefix, seed + i, "text"))
                found = find_stop(text, stop)
                if found and found[0] <= max_tokens:
                    text = text[: found[0]]
                    samples.append(Sample(self.tokenizer.encode(text), text, "stop", found[1]))
                elif len(text) >= max_tokens:
                    text = text[:max_tokens]
                    samples.append(Sample(self.tokenizer.encode(text), text, "length"))
                else:
                    samples.append(Sample([*self.tokenizer.encode(text), self.tokenizer.eos_token_id], text, "eos"))
            return samples
        finally:
            self.in_flight -= n

    @staticmethod
    def _rng(prefix: str, seed: int, use: str) -> random.Random:
        digest = hashlib.blake2b(f"{use}\n{seed}\n{prefix}".encode(), digest_size=8).digest()
        return random.Random(int.from_bytes(digest, "big"))

    def describe(self) -> dict[str, Any]:
        return {"engine": "scripted"}

    async def close(self) -> None:
        return None
