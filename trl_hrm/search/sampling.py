"""What the engines share: sampling parameters, the room that a prefix leaves, and a sample made of its ids."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .engine import EngineError, EngineFatal, PrefixTooLong, Sample, continued_text


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
        """How many of `n` samples have to be made: greedy ones are all the same."""
        return min(n, 1) if self.is_greedy else n

    def repeat(self, samples: list[Sample], n: int) -> list[Sample]:
        """The `n` samples of a request, of which `num_draws` were made."""
        if not self.is_greedy:
            return samples
        return samples + [replace(s, token_ids=list(s.token_ids), num_cached=0) for s in samples for _ in range(n - 1)]

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def room(prefix_ids: Sequence[int], max_tokens: int, max_length: int | None, model: str) -> int:
    """
    How many tokens may follow: `max_tokens`, or fewer where the model's length ends before.

    Raises:
        `PrefixTooLong`: If none may follow.
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
    tokenizer: Any,
    prefix_ids: Sequence[int],
    token_ids: Sequence[int],
    finish: str,
    stop_reason: str | None = None,
    num_cached: int = 0,
) -> Sample:
    """A sample whose text is that of its ids, so that the texts along a path join to the text of the joined ids."""
    ids = list(token_ids)
    text = continued_text(tokenizer, prefix_ids, ids[:-1] if finish == "eos" else ids)
    return Sample(ids, text, finish, stop_reason, num_cached)


def sample_from_vllm(
    tokenizer: Any,
    prefix_ids: Sequence[int],
    token_ids: Sequence[int],
    finish_reason: str | None,
    stop_reason: str | int | None,
    num_cached: int = 0,
) -> Sample:
    """
    A sample from vLLM's words: its `"stop"` is also the end of the sequence, where `stop_reason` is no string.

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
