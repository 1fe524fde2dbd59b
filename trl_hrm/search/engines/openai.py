"""A policy behind one or more servers with OpenAI's completions protocol, and the test that each server must pass first."""

import asyncio
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from ...encoding import control_tokens
from .base import EngineError, EngineFatal, PrefixTooLong, Sample, Sampling, find_stop, room, sample_from_vllm
from .http import Fault, HTTPClient, Server


APIS = ("vllm", "transformers", "text")
MAX_STOPS = 4  # of OpenAI's protocol; `transformers serve` has no such limit
HALF_PAIR = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which no UTF-8 text can hold

# The requests that test a server
PROMPT = "Counting in words: one, two, three, four,"
NUM_TOKENS = 24
NUM_SAMPLES = 4
GREEDY = Sampling(temperature=0.0)
HOT = Sampling(temperature=2.0)


class OpenAIEngine:
    """
    Samples from servers with a `/completions` endpoint.

    Requests with the same `key` go to the same server, whose prefix cache then holds their prefixes. Temporary faults (HTTP 429
    and 5xx, a refused or lost connection, no answer in time, an incomplete answer) are retried at the next server, with pauses
    that double. After the last retry they raise an [`EngineError`].

    A few short requests first test whether a server obeys stop strings and keeps them, whether it samples at all, and, for
    vLLM, whether it has the model and this tokenizer. If it does not, an [`EngineFatal`] is raised.

    Args:
        base_urls (`list[str]`):
            Servers, such as `http://localhost:8000/v1`. All serve the same model.
        model (`str`):
            Name of the model at the servers. For `transformers serve`, the folder or repository it was started with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        api (`str`, *optional*, defaults to `"vllm"`):
            `"vllm"`: token ids in and out. The others send text, one request per sample, and encode the text that comes
            back: those ids are an approximation, and fewer prefixes are found in a cache.
            `"transformers"`: `transformers serve`, without `--continuous-batching`. Its requests share one random state, so
            that samples are not reproducible.
            `"text"`: any server that keeps stop strings in the text. Sampling parameters of its own may apply.
        api_key (`str`, *optional*):
            Sent as bearer token. By default the environment variable `OPENAI_API_KEY`, if set.
        temperature, top_p, top_k (`float`, `float` and `int`, *optional*, default to `1.0`, `1.0` and `0`):
            How tokens are drawn. See [`Sampling`]. `api="text"` has no `top_k`.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for an answer, the time in the server's queue included.
        max_retries (`int`, *optional*, defaults to `5`):
            Maximum number of retries of a failed request.
        backoff (`float`, *optional*, defaults to `0.5`):
            Seconds of the first pause. No pause is longer than 60 seconds, even if a server asks for it.
        revision (`str`, *optional*):
            Revision of the tokenizer, for the manifest.

    Raises:
        `ValueError`: If an option is out of range.
    """

    def __init__(
        self,
        base_urls: list[str],
        model: str,
        tokenizer: Any,
        api: str = "vllm",
        api_key: str | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        timeout: float = 600.0,
        max_retries: int = 5,
        backoff: float = 0.5,
        revision: str | None = None,
    ):
        if api not in APIS:
            raise ValueError(f"api is {api!r}, expected one of {', '.join(APIS)}.")
        if api == "text" and top_k:
            raise ValueError(
                f"top_k is {top_k}, but the completions protocol has no such option: only other APIs take it."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.api = api
        self.revision = revision
        self.sampling = Sampling(temperature, top_p, top_k)
        api_key = api_key or os.environ.get("OPENAI_API_KEY")
        self.client = HTTPClient(base_urls, self.check, api_key, timeout, max_retries, backoff)

    async def sample(
        self, prefix_ids: Sequence[int], n: int, stop: Sequence[str], max_tokens: int, seed: int, key: str = ""
    ) -> list[Sample]:
        if self.api != "transformers" and len(stop) > MAX_STOPS:
            raise EngineFatal(
                f"there are {len(stop)} stop strings ({', '.join(map(repr, stop))}), but servers take at most {MAX_STOPS} "
                "in a request. Give fewer --final_stops, or run the policy in this process."
            )

        async def ask(m: int, seed: int) -> list[Sample]:
            """`m` samples of the first server that answers."""

            async def read(server: Server) -> list[Sample]:
                answer = await self.complete(server, self.sampling, prefix_ids, m, stop, max_tokens, seed)
                return self.samples(server, answer, prefix_ids, stop)

            return await self.client.ask(read, key, seed)

        draws = self.sampling.num_draws(n)
        requests = [(draws, seed)] if self.api == "vllm" else [(1, seed + i) for i in range(draws)]
        tasks = [asyncio.ensure_future(ask(*request)) for request in requests]
        try:
            samples = [sample for found in await asyncio.gather(*tasks) for sample in found]
        finally:
            for task in tasks:  # if one failed, the others are not needed
                task.cancel()
        return self.sampling.repeat(samples, n)

    async def complete(
        self,
        server: Server,
        sampling: Sampling,
        prefix_ids: Sequence[int],
        n: int,
        stop: Sequence[str],
        max_tokens: int,
        seed: int,
    ) -> dict[str, Any]:
        """Return the answer of a server to one request, without retries."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": room(prefix_ids, max_tokens, server.max_length, self.model),
            "seed": seed,
        }
        if stop:
            body["stop"] = list(stop)
        if self.api == "vllm":
            body |= {
                "prompt": list(prefix_ids),
                "n": n,  # sample i gets seed + i
                "include_stop_str_in_output": True,
                "return_token_ids": True,
                # all of them, since the server fills in what the model's authors advise
                **sampling.describe(),
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            }
        else:
            body |= {
                "prompt": self._prompt_text(prefix_ids),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
        if self.api == "transformers":
            body["generation_config"] = json.dumps(
                {"do_sample": not sampling.is_greedy, "top_k": sampling.top_k, "repetition_penalty": 1.0}
            )
        try:
            return await self.client.fetch(server, "completions", body)
        except PrefixTooLong as error:
            # some servers tell their length only in this message, and have room for fewer tokens than were asked for
            num_prefix = len(prefix_ids) if error.num_prefix is None else error.num_prefix
            left = (error.max_length or 0) - num_prefix
            if not 0 < left < body["max_tokens"]:
                raise
            return await self.client.fetch(server, "completions", body | {"max_tokens": left})

    def samples(
        self, server: Server, answer: dict[str, Any], prefix_ids: Sequence[int], stop: Sequence[str]
    ) -> list[Sample]:
        """Return the samples of an answer, as many as the server sent."""
        choices = answer.get("choices")
        if not isinstance(choices, list) or not all(
            isinstance(choice, dict)
            and isinstance(choice.get("text"), str)
            and not HALF_PAIR.search(choice["text"])
            and isinstance(choice.get("index"), int)
            and isinstance(choice.get("finish_reason"), str)
            for choice in choices
        ):
            raise Fault(f"the answer has no whole choices: {json.dumps(answer)[:200]}")
        choices = sorted(choices, key=lambda choice: choice["index"])
        if self.api != "vllm":
            return [self._from_text(choice, stop) for choice in choices]
        num_cached = _num_cached(answer)
        if any(choice.get("token_ids") is None for choice in choices):
            raise EngineFatal(
                f'{server.url}: the answer has no token ids; expected those of vLLM. For another server use api="text".'
            )
        if not all(
            isinstance(choice["token_ids"], list)
            and all(isinstance(token, int) and token >= 0 for token in choice["token_ids"])
            for choice in choices
        ):
            raise Fault(f"the token ids of the answer are no list of numbers: {json.dumps(choices)[:200]}")
        return [
            sample_from_vllm(
                self.tokenizer,
                prefix_ids,
                choice["token_ids"],
                choice["finish_reason"],
                choice.get("stop_reason"),
                num_cached if place == 0 else 0,
            )
            for place, choice in enumerate(choices)
        ]

    def _from_text(self, choice: dict[str, Any], stop: Sequence[str]) -> Sample:
        """Return a sample from a text. The protocol's "stop" may be a stop string or the end of the sequence, which the text shows."""
        text = choice["text"]
        token_ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        found = find_stop(text, stop)
        if found:
            return Sample(token_ids, text, "stop", found[1])
        if choice["finish_reason"] == "length":
            return Sample(token_ids, text, "length")
        eos = self.tokenizer.eos_token_id
        return Sample(token_ids if eos is None else [*token_ids, eos], text, "eos")

    def _prompt_text(self, prefix_ids: Sequence[int]) -> str:
        """
        Return the prefix as text, without the special tokens that the server puts before every text.

        Raises:
            `EngineError`: If it holds control tokens as plain text: the server would make tokens of them.
        """
        added = list(self.tokenizer.encode("", add_special_tokens=True))
        ids = list(prefix_ids)
        if added and ids[: len(added)] == added:
            ids = ids[len(added) :]
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        known = control_tokens(self.tokenizer)
        sent, read = (
            [known[i] for i in tokens if i in known]
            for tokens in (ids, self.tokenizer.encode(text, add_special_tokens=False))
        )
        if sent != read:
            raise EngineError(
                f"the prompt holds control tokens as plain text ({', '.join(map(repr, dict.fromkeys(read)))}), and a server that "
                "takes text would read them as tokens. Remove them from the problem, or use vLLM, which takes token ids."
            )
        return text

    async def check(self, server: Server) -> None:
        """
        Test a server with a few short requests, before anything is sampled from it. Each fault found here would corrupt all
        labels without an error.

        Raises:
            `EngineFatal`: If the server cannot be used.
        """
        prefix_ids = self.tokenizer.encode(PROMPT, add_special_tokens=False)

        async def ask(sampling: Sampling, stop: Sequence[str] = (), seed: int = 0) -> tuple[str, str]:
            """The text of one sample: as this tokenizer decodes it, and as the server sent it."""
            answer = await self.complete(server, sampling, prefix_ids, 1, stop, NUM_TOKENS, seed)
            samples = self.samples(server, answer, prefix_ids, stop)
            if len(samples) != 1:
                raise EngineFatal(f"a server answered one request for one sample with {len(samples)}.")
            return samples[0].text, answer["choices"][0]["text"]

        if self.api == "vllm":
            await self._read_model(server)
        text, sent = await ask(GREEDY)
        if self.api == "vllm" and not text.startswith(sent.rstrip("\ufffd")):  # half a character at the end
            raise EngineFatal(
                f"{server.url}: its tokens read {sent[:60]!r} there, but {text[:60]!r} here: the tokenizer is not that of its "
                "model. Name the one that belongs to it."
            )
        words = re.findall(r"[^\s\ufffd]{2,3}", text[: 2 * len(text) // 3])  # with more text after them
        if not words:
            raise EngineFatal(
                f"{server.url}: the model continues {PROMPT!r} with {text!r}, too little to test whether the server obeys stop "
                "strings. Check that it serves a language model."
            )
        stop = words[len(words) // 2]
        end, _ = find_stop(text, [stop])
        stopped, _ = await ask(GREEDY, [stop])
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
        if not (stopped.startswith(text[:end]) and len(stopped) < len(text)):
            raise Fault(f"two greedy answers differ: {text[:60]!r} and, to be stopped at {stop!r}, {stopped[:60]!r}")
        if not self.sampling.is_greedy:
            drawn = [(await ask(HOT, seed=seed))[0] for seed in range(NUM_SAMPLES)]
            if all(one == text for one in drawn):
                raise EngineFatal(
                    f"{server.url} does not sample: with {NUM_SAMPLES} seeds at temperature {HOT.temperature:g} it gave its most "
                    'probable text each time. For `transformers serve` use api="transformers".'
                )

    async def _read_model(self, server: Server) -> None:
        """vLLM tells what it serves, and how long a sequence may be."""
        cards = (await self.client.fetch(server, "models")).get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise Fault("the answer to /models has no list of models")
        for card in cards:
            if card.get("id") == self.model:
                length = card.get("max_model_len")
                if length is not None and not isinstance(length, int):
                    raise Fault(f"the answer to /models has a max_model_len of {length!r}, expected a number")
                server.max_length = length
                return
        raise EngineFatal(
            f"{server.url} does not serve {self.model!r}, but {', '.join(repr(card.get('id')) for card in cards)}. Name one "
            "of these, or start the server with `--served-model-name`."
        )

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "openai",
            "api": self.api,
            "model": self.model,
            "tokenizer": getattr(self.tokenizer, "name_or_path", None),
            "revision": self.revision,
            **self.sampling.describe(),
        }

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


def _num_cached(answer: dict[str, Any]) -> int:
    """Number of cached tokens of the prefix, if the server was started with `--enable-prompt-tokens-details`."""
    value: Any = answer
    for name, kind in (("usage", dict), ("prompt_tokens_details", dict), ("cached_tokens", int)):
        value = value.get(name)
        if value is None:
            return 0
        if not isinstance(value, kind):
            raise Fault(f"`{name}` of the answer is {json.dumps(value)[:200]}, expected a JSON {kind.__name__}")
    return value
