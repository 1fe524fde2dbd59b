"""Checks of the responses of servers. Each function returns what is used of a response, or raises [`Fault`]."""

from dataclasses import dataclass, replace
from typing import Any

from ...io import shown
from .http import Fault


# Of the other servers. The last three are reasons of Text Generation Inference
FINISH_REASONS = ("stop", "length", "eos_token", "stop_sequence", "eos")
MODELS_BYTES = 1 << 20  # limit of a list of models
LOWEST_LOGPROB = -9999.0  # what vLLM returns instead of minus infinity


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number that is finite in float32."""
    return type(value) in (int, float) and abs(value) < 3e38


@dataclass(frozen=True)
class Card:
    """A model in the response of `/models`."""

    id: str
    root: str | None
    max_model_len: int | None


@dataclass(frozen=True)
class Choice:
    """A sample in the response of `/completions`. Only vLLM returns `token_ids` and `stop_reason`."""

    text: str
    finish_reason: str
    token_ids: list[int] | None = None
    stop_reason: str | int | None = None
    num_cached: int = 0


def read_cards(answer: dict[str, Any]) -> list[Card]:
    """Return the models in a response of `/models`."""
    cards = answer.get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise Fault("the response of /models has no list of models")
    found = []
    for card in cards:
        name, root, length = card.get("id"), card.get("root"), card.get("max_model_len")
        if not isinstance(name, str) or not (root is None or isinstance(root, str)):
            raise Fault(
                f"the response of /models has a model with id {shown(name)} and root {shown(root)}, expected texts"
            )
        if length is not None and (type(length) is not int or length < 1):
            raise Fault(f"the response of /models has a max_model_len of {shown(length)}, expected a positive integer")
        found.append(Card(name, root, length))
    return found


def read_choices(answer: dict[str, Any], n: int) -> list[Choice]:
    """Return the texts of a response of `/completions`, in the order of their indices."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Fault(f"the response has no list of choices, but {shown(choices)}")
    indices = [choice.get("index") for choice in choices]
    if len(indices) != n or {i for i in indices if type(i) is int} != set(range(n)):
        raise Fault(f"the response has choices with the indices {shown(indices)}, expected 0 to {n - 1}, each once")
    found: dict[int, Choice] = {}
    for choice in choices:
        text, reason = choice.get("text"), choice.get("finish_reason")
        if not isinstance(text, str) or not isinstance(reason, str):
            raise Fault(
                f"the response has a choice with text {shown(text)} and finish_reason {shown(reason)}, expected texts"
            )
        if reason not in FINISH_REASONS:
            raise Fault(f"the server ended a sample with {shown(reason)}, expected one of {', '.join(FINISH_REASONS)}")
        found[choice["index"]] = Choice(text, reason, choice.get("token_ids"), choice.get("stop_reason"))
    return [found[i] for i in range(n)]


def read_vllm_choices(
    answer: dict[str, Any], prefix_ids: list[int], n: int, max_tokens: int, num_ids: int
) -> list[Choice]:
    """Return the samples of a response of `/completions` of vLLM, in the order of their indices."""
    choices = read_choices(answer, n)
    for choice in choices:
        ids = choice.token_ids
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < num_ids for token in ids):
            raise Fault(f"the token ids in the response are {shown(ids)}, expected integers from 0 to {num_ids - 1}")
        if not 0 < len(ids) <= max_tokens:
            raise Fault(f"the response has a sample of {len(ids)} tokens, expected 1 to {max_tokens}")
        if type(choice.stop_reason) not in (str, int, type(None)):
            raise Fault(f"the response has the stop_reason {shown(choice.stop_reason)}, expected a text or a token id")
    for value in [answer["choices"][0].get("prompt_token_ids"), answer.get("prompt_token_ids")]:
        if value is not None and value != prefix_ids:
            raise Fault(
                "the server continued another prompt: `prompt_token_ids` in the response differ from the request"
            )
    usage = _object(answer.get("usage"), "usage")
    num_cached = _object(usage.get("prompt_tokens_details"), "prompt_tokens_details").get("cached_tokens")
    if usage.get("prompt_tokens", len(prefix_ids)) not in (None, len(prefix_ids)):
        raise Fault(
            f"the server continued {shown(usage['prompt_tokens'])} tokens (`prompt_tokens`), but the request has {len(prefix_ids)}"
        )
    if num_cached is not None and (type(num_cached) is not int or not 0 <= num_cached <= len(prefix_ids)):
        raise Fault(
            f"`cached_tokens` in the response is {shown(num_cached)}, expected an integer from 0 to {len(prefix_ids)}"
        )
    return [replace(choices[0], num_cached=num_cached or 0), *choices[1:]]


def read_prompt_logprobs(answer: dict[str, Any], prompt_ids: list[int]) -> list[float] | None:
    """
    Return the log-probability of each prompt token except the first in a response of `/completions` of vLLM, rounded to 3 decimals,
    or `None` if the server does not return them.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Fault(f"the response has no list of one choice, but {shown(choices)}")
    rows = choices[0].get("prompt_logprobs")
    if rows is None:
        return None
    if not isinstance(rows, list) or len(rows) != len(prompt_ids):
        raise Fault(f"`prompt_logprobs` in the response is {shown(rows)}, expected one entry per token of the prompt")
    found = []
    for token, row in zip(prompt_ids[1:], rows[1:], strict=True):
        value = _object(_object(row, "prompt_logprobs").get(str(token)), "prompt_logprobs").get("logprob")
        if not is_number(value) or value > 0.01:
            raise Fault(
                f"`prompt_logprobs` in the response has {shown(value)} for a token, expected a log-probability"
            )
        found.append(round(float(value), 3))
    return found


def read_next_logprob(answer: dict[str, Any], token: int) -> float:
    """Return the log-probability of the only token of a response of `/completions` of vLLM, which must be `token`."""
    [choice] = read_choices(answer, 1)
    if choice.token_ids != [token]:
        raise Fault(
            f"the response has the token ids {shown(choice.token_ids)}, expected only the allowed token {token}"
        )
    found = _object(answer["choices"][0].get("logprobs"), "logprobs").get("token_logprobs")
    if not isinstance(found, list) or len(found) != 1 or not is_number(found[0]) or found[0] > 0.01:
        raise Fault(f"`token_logprobs` in the response is {shown(found)}, expected one log-probability")
    return float(found[0])


def read_tokens(answer: dict[str, Any]) -> list[int]:
    """Return the token ids in a response of `/tokenize`."""
    tokens = answer.get("tokens")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise Fault(f"the response of /tokenize has the tokens {shown(tokens)}, expected integers")
    return tokens


def read_rows(answer: dict[str, Any]) -> list[Any]:
    """Return the outputs in a response of `/pooling` to one sequence: finite numbers, or lists of the same number of them."""
    data = answer.get("data")
    if not isinstance(data, list) or len(data) != 1 or not isinstance(data[0], dict):
        raise Fault(f"the response has no data of one sequence, but {shown(data)}")
    if data[0].get("index") not in (0, None) or isinstance(data[0].get("index"), bool):
        raise Fault(f"the response has the index {shown(data[0].get('index'))}, expected 0")
    rows = data[0].get("data")
    if not isinstance(rows, list) or not rows:
        raise Fault(f"the response contains no rows of numbers, but {shown(rows)}")
    widths = {len(row) if isinstance(row, list) else None for row in rows}
    numbers = [number for row in rows for number in (row if isinstance(row, list) else [row])]
    if len(widths) > 1 or not all(map(is_number, numbers)):
        raise Fault(f"the response contains no rows of finite numbers, but {shown(rows)}")
    return rows


def read_label_logprobs(answer: dict[str, Any], token_ids: list[int], n: int) -> list[list[float]]:
    """
    Return the log-probabilities of certain tokens after each of n prompts, from a response of `/completions` of vLLM to a request with
    `logprob_token_ids` and `return_tokens_as_token_ids`.
    """
    read_choices(answer, n)
    found: dict[int, list[float]] = {}
    for choice in answer["choices"]:
        places = _object(choice.get("logprobs"), "logprobs").get("top_logprobs")
        if not isinstance(places, list) or len(places) != 1:
            raise Fault(
                f"`top_logprobs` in the response is {shown(places)}, expected the log-probabilities of one token"
            )
        logprobs = _object(places[0], "top_logprobs")
        values = [logprobs.get(f"token_id:{token}") for token in token_ids]
        if not all(is_number(value) and value > LOWEST_LOGPROB for value in values):
            raise Fault(
                f"the response has the log-probabilities {shown(logprobs)}, expected finite numbers for the tokens {token_ids}. The "
                "server must support `logprob_token_ids`, as vLLM 0.30 does"
            )
        found[choice["index"]] = [float(value) for value in values]
    return [found[i] for i in range(n)]


def _object(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Fault(f"`{name}` in the response is {shown(value)}, expected a JSON object")
    return value
