"""What a search asks of a policy: continue these token ids. The protocol of all engines, what they share, and one for tests."""

import asyncio
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol


FINISHES = ("stop", "eos", "length")


class EngineError(RuntimeError):
    """A request failed after all retries. The search continues without it, and it never becomes a label."""


class PrefixTooLong(EngineError):
    """
    The prefix leaves no room for a token. The solution is cut off here; asking again would not help.

    Args:
        message (`str`):
            What the engine says.
        max_length (`int`, *optional*):
            Maximum number of tokens of prefix and sample together, if a server's message has it.
        num_prefix (`int`, *optional*):
            Number of tokens of the prefix, if a server's message has it.
    """

    def __init__(self, message: str, max_length: int | None = None, num_prefix: int | None = None):
        super().__init__(message)
        self.max_length = max_length
        self.num_prefix = num_prefix


class EngineFatal(OSError):
    """No request can succeed, as when the server does not know the model. The search stops."""


@dataclass(frozen=True)
class Sample:
    """
    One continuation.

    Args:
        token_ids (`list[int]`):
            What was generated, with the tokens of the stop string and with the end-of-sequence token.
        text (`str`):
            The same as text, with the stop string and without special tokens.
        finish (`str`):
            `"stop"` (a stop string), `"eos"` (the policy ended the sequence), `"length"` (`max_tokens`).
        stop_reason (`str`, *optional*):
            The stop string, if one ended it.
        num_cached (`int`, *optional*, defaults to `0`):
            Prefix tokens that were taken from a cache. Of the samples of one request, the first carries the number.
    """

    token_ids: list[int]
    text: str
    finish: str
    stop_reason: str | None = None
    num_cached: int = 0


class Tokenizer(Protocol):
    """
    What a search needs of a tokenizer. All tokenizers of transformers have it. For prompts in a chat template,
    `apply_chat_template` is also needed.
    """

    chat_template: Any

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class Engine(Protocol):
    """
    A policy to sample from. `describe` gives what identifies it (model, sampling, versions) for manifest and card.
    """

    tokenizer: Tokenizer

    async def sample(
        self, prefix_ids: Sequence[int], n: int, stop: Sequence[str], max_tokens: int, seed: int, key: str = ""
    ) -> list[Sample]:
        """
        Sample `n` continuations of `prefix_ids`.

        Args:
            prefix_ids (`Sequence[int]`):
                Token ids to continue, never tokenised again.
            n (`int`):
                Number of samples.
            stop (`Sequence[str]`):
                Strings that end a sample. They stay in its ids and its text.
            max_tokens (`int`):
                Maximum number of tokens of a sample.
            seed (`int`):
                Sample `i` uses `seed + i`, so that seeds of two requests must lie `n` apart.
            key (`str`, *optional*):
                Requests with the same key share prefixes; an engine of several servers sends them to the same one.

        Raises:
            `EngineError`: If the request failed.
            `PrefixTooLong`: If the policy has no room for another token.
            `EngineFatal`: If no request can succeed.
        """
        ...

    def describe(self) -> dict[str, Any]: ...

    async def close(self) -> None: ...


def check_samples(samples: Sequence[Sample], n: int) -> None:
    """Raise [`EngineFatal`] unless there are `n` samples, each of them whole: an engine that errs would bias every value."""
    if len(samples) != n:
        raise EngineFatal(
            f"the engine returned {len(samples)} samples, expected {n}. The server may ignore `n`; ask it for one sample "
            "per request."
        )
    for i, sample in enumerate(samples):
        if sample.finish not in FINISHES:
            raise EngineFatal(f"sample {i} ended with {sample.finish!r}, expected one of {', '.join(FINISHES)}.")
        if sample.finish == "stop" and (sample.stop_reason is None or sample.stop_reason not in sample.text):
            raise EngineFatal(
                f"sample {i} was ended by the stop string {sample.stop_reason!r}, but its text ends with "
                f"{sample.text[-40:]!r}; expected the stop string in the text."
            )


def continued_text(tokenizer: Tokenizer, prefix_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """
    Return the text of `token_ids` after `prefix_ids`.

    Decoding them alone would lose a leading space with tokenizers that mark it on the first token of a text.
    """
    before = tokenizer.decode(list(prefix_ids[-8:]), skip_special_tokens=True)
    return tokenizer.decode([*prefix_ids[-8:], *token_ids], skip_special_tokens=True)[len(before) :]


def find_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Return where the first stop string in `text` ends, and the string: of those that end first, the longest."""
    found = [(text.find(string) + len(string), -len(string), string) for string in stop if string in text]
    if not found:
        return None
    end, _, string = min(found)
    return end, string


@dataclass(frozen=True)
class Sampling:
    """
    How the next token is drawn.

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits. `0` takes the most probable token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Draws from the fewest tokens that together have this probability.
        top_k (`int`, *optional*, defaults to `0`):
            Draws from the `top_k` most probable tokens. `0` for all.

    Raises:
        `ValueError`: If one is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (all tokens) or more.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def num_draws(self, n: int) -> int:
        """Return how many of `n` samples have to be made. All greedy samples are equal."""
        return min(n, 1) if self.is_greedy else n

    def repeat(self, samples: list[Sample], n: int) -> list[Sample]:
        """Return the `n` samples of a request from the `num_draws` that were made."""
        if not self.is_greedy:
            return samples
        return samples + [replace(s, token_ids=list(s.token_ids), num_cached=0) for s in samples for _ in range(n - 1)]

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def room(prefix_ids: Sequence[int], max_tokens: int, max_length: int | None, model: str) -> int:
    """
    Return how many tokens may follow: `max_tokens`, or fewer if they do not fit into the model's length.

    Raises:
        `PrefixTooLong`: If no token fits.
    """
    if max_length is None:
        return max_tokens
    if len(prefix_ids) >= max_length:
        raise PrefixTooLong(
            f"the prefix has {len(prefix_ids)} tokens, but {model} takes {max_length} with what follows. Lower the depth "
            "or the number of tokens of a step, or raise the model's length where it can be."
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
    """Return a sample whose text is decoded from its ids, so that the joined texts of a path are the text of the joined ids."""
    ids = list(token_ids)
    text = continued_text(tokenizer, prefix_ids, ids[:-1] if finish == "eos" else ids)
    return Sample(ids, text, finish, stop_reason, num_cached)


def sample_from_vllm(
    tokenizer: Tokenizer,
    prefix_ids: Sequence[int],
    token_ids: Sequence[int],
    finish_reason: str | None,
    stop_reason: str | int | None,
    num_cached: int = 0,
) -> Sample:
    """
    Return a sample of vLLM. Its `"stop"` also stands for the end of the sequence, where `stop_reason` is not a string.

    Raises:
        `EngineError`: If vLLM gave the request up.
        `EngineFatal`: If the reason is unknown.
    """
    if finish_reason in ("abort", "error"):
        raise EngineError(f"vLLM ended the request with {finish_reason!r}.")
    if finish_reason not in ("stop", "length"):
        raise EngineFatal(f"vLLM ended a sample with {finish_reason!r}, expected 'stop' or 'length'.")
    if finish_reason == "length":
        return sample_from_ids(tokenizer, prefix_ids, token_ids, "length", num_cached=num_cached)
    if isinstance(stop_reason, str):
        return sample_from_ids(tokenizer, prefix_ids, token_ids, "stop", stop_reason, num_cached)
    return sample_from_ids(tokenizer, prefix_ids, token_ids, "eos", num_cached=num_cached)


class CharTokenizer:
    """One token per character: the tokenizer of [`ScriptedEngine`]."""

    chat_template = None
    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids if i)


class ScriptedEngine:
    """
    A deterministic engine for tests: `script(prefix_text, rng)` writes what the policy would write to the very end.

    Each sample has a random generator of its own, seeded with the prefix and the sample's seed; its text is cut after the
    first stop string or at `max_tokens` characters.

    Args:
        script (`Callable[[str, random.Random], str]`):
            The policy.
        latency (`Callable[[random.Random], float]`, *optional*):
            Seconds that a request takes. The default answers at once.
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
