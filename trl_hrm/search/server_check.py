"""What a server must do before anything is sampled from it. Each fault here would spoil every label without a word."""

import re
from typing import TYPE_CHECKING, Any

from .engine import EngineFatal, find_stop
from .http_client import Fault, Server
from .sampling import Sampling


if TYPE_CHECKING:
    from .openai_engine import OpenAIEngine


PROMPT = "Counting in words: one, two, three, four,"
NUM_TOKENS = 24
NUM_SAMPLES = 4
GREEDY = Sampling(temperature=0.0)
HOT = Sampling(temperature=2.0)


async def check_server(engine: "OpenAIEngine", server: Server) -> None:
    """
    Test one server with a few short requests.

    Raises:
        `EngineFatal`: If it cannot be used, with what to do.
    """
    prefix_ids = engine.tokenizer.encode(PROMPT, add_special_tokens=False)
    if engine.api == "vllm":
        await _read_model(engine, server)
    answer = await engine.complete(server, GREEDY, prefix_ids, 1, [], NUM_TOKENS, 0)
    text = _only(engine.samples(server, answer, prefix_ids, [])).text
    if engine.api == "vllm":
        _check_tokenizer(server, answer["choices"][0]["text"], text)
    stop = _middle_of(server, text)
    answer = await engine.complete(server, GREEDY, prefix_ids, 1, [stop], NUM_TOKENS, 0)
    _check_stop(server, text, stop, _only(engine.samples(server, answer, prefix_ids, [stop])).text)
    if not engine.sampling.is_greedy:
        texts = []
        for seed in range(NUM_SAMPLES):
            answer = await engine.complete(server, HOT, prefix_ids, 1, [], NUM_TOKENS, seed)
            texts.append(_only(engine.samples(server, answer, prefix_ids, [])).text)
        _check_sampling(server, text, texts)


async def _read_model(engine: "OpenAIEngine", server: Server) -> None:
    """vLLM tells what it serves, and how long a sequence may be."""
    cards = (await engine.client.fetch(server, "models")).get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise Fault("the answer to /models has no list of models")
    for card in cards:
        if card.get("id") == engine.model:
            length = card.get("max_model_len")
            if length is not None and not isinstance(length, int):
                raise Fault(f"the answer to /models has a max_model_len of {length!r}, expected a number")
            server.max_length = length
            return
    raise EngineFatal(
        f"{server.url} does not serve {engine.model!r}, but {', '.join(repr(card.get('id')) for card in cards)}. Name one "
        "of these, or start the server with `--served-model-name`."
    )


def _only(samples: list[Any]) -> Any:
    if len(samples) != 1:
        raise EngineFatal(f"a server answered one request for one sample with {len(samples)}.")
    return samples[0]


def _check_tokenizer(server: Server, theirs: str, ours: str) -> None:
    if not ours.startswith(theirs.rstrip("\ufffd")):  # half a character at the end
        raise EngineFatal(
            f"{server.url}: its tokens read {theirs[:60]!r} there, but {ours[:60]!r} here: the tokenizer is not that of its "
            "model. Name the one that belongs to it."
        )


def _middle_of(server: Server, text: str) -> str:
    """A few characters of the text, with more text after them."""
    found = re.findall(r"[^\s\ufffd]{2,3}", text[: 2 * len(text) // 3])
    if not found:
        raise EngineFatal(
            f"{server.url}: the model continues {PROMPT!r} with {text!r}, too little to test whether the server obeys stop "
            "strings. Check that it serves a language model."
        )
    return found[len(found) // 2]


def _check_stop(server: Server, text: str, stop: str, stopped: str) -> None:
    end, _ = find_stop(text, [stop])
    if stopped.startswith(text[:end]) and len(stopped) < len(text):
        return
    if stopped == text:
        raise EngineFatal(
            f"{server.url} ignores stop strings: it went on after {stop!r}. For `transformers serve`, leave out "
            '`--continuous-batching`; for vLLM, use api="vllm".'
        )
    if stopped == text[: end - len(stop)]:
        raise EngineFatal(
            f"{server.url} takes stop strings out of the text, so that a step that was stopped looks like the end of a "
            'solution. For vLLM use api="vllm"; otherwise a server that keeps them, such as `transformers serve`.'
        )
    raise Fault(f"two greedy answers differ: {text[:60]!r} and, to be stopped at {stop!r}, {stopped[:60]!r}")


def _check_sampling(server: Server, greedy: str, texts: list[str]) -> None:
    if all(text == greedy for text in texts):
        raise EngineFatal(
            f"{server.url} does not sample: with {len(texts)} seeds at temperature {HOT.temperature:g} it gave its most "
            'probable text each time. For `transformers serve` use api="transformers".'
        )
