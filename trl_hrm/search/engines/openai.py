"""Engine for servers with OpenAI's completions API. Each server is tested before it is used."""

import asyncio
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from ...encoding import control_tokens
from ...io import shown
from .base import EngineError, EngineFatal, PrefixTooLong, Sample, Sampling, find_stop, room, sample_from_vllm
from .http import Fault, HTTPClient, Server


APIS = ("vllm", "transformers", "text")
MAX_STOPS = 4  # limit of OpenAI's API; `transformers serve` has no limit
HALF_PAIR = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which is invalid in UTF-8

# Requests that test a server
PROMPT = "Counting in words: one, two, three, four,"
NUM_TOKENS = 24
NUM_SAMPLES = 4
GREEDY = Sampling(temperature=0.0)
HOT = Sampling(temperature=2.0)


class OpenAIEngine:
    """
    Samples from servers with a `/completions` endpoint.

    Requests with the same `key` go to the same server, so its prefix cache can reuse their prefixes. Temporary errors (HTTP 429
    and 5xx, a refused or lost connection, a timeout, an incomplete response) are retried on the next server, with exponential
    backoff. After the last retry, an [`EngineError`] is raised.

    Before its first use, each server is tested with a few short requests. They check that it stops at stop strings and keeps them
    in the text, that it samples, and, for vLLM, that it serves this model with this tokenizer. If a check fails, an
    [`EngineFatal`] is raised.

    Args:
        base_urls (`list[str]`):
            Base URLs of the servers, such as `http://localhost:8000/v1`. All must serve the same model.
        model (`str`):
            Name of the model on the servers. For `transformers serve`, the path or Hub id it was started with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        api (`str`, *optional*, defaults to `"vllm"`):
            Kind of server. `"vllm"` exchanges token ids. The others exchange text, with one request per sample. They re-tokenize
            the generated text, so its ids are approximate, and the prefix cache is less effective.
            `"transformers"`: `transformers serve`, without `--continuous-batching`. Its requests share one random state, so
            samples are not reproducible.
            `"text"`: any other server that keeps stop strings in the text. The server may apply additional sampling parameters.
        api_key (`str`, *optional*):
            API key, sent as a bearer token. Defaults to the environment variable `OPENAI_API_KEY`, if set.
        temperature, top_p, top_k (`float`, `float` and `int`, *optional*, default to `1.0`, `1.0` and `0`):
            Sampling parameters. See [`Sampling`]. `top_k` is not available with `api="text"`.
        timeout (`float`, *optional*, defaults to `600.0`):
            Timeout of a request in seconds, including the time in the server's queue.
        max_retries (`int`, *optional*, defaults to `5`):
            Maximum number of retries of a failed request.
        backoff (`float`, *optional*, defaults to `0.5`):
            Pause after the first failure of all servers, in seconds. It doubles with each failure, up to 60 seconds, even if a server
            requests more.
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
            raise ValueError(f"`api` is {shown(api)}. It must be one of {', '.join(APIS)}.")
        if api == "text" and top_k:
            raise ValueError(
                f'`top_k` is {top_k}, but `api="text"` does not support it. Set `top_k` to 0, or use another `api`.'
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
                f"The search uses {len(stop)} stop strings ({', '.join(map(repr, stop))}), but servers accept at most "
                f"{MAX_STOPS} per request. Set fewer --final_stops, or use the vllm or transformers engine."
            )

        async def ask(m: int, seed: int) -> list[Sample]:
            """Return `m` samples from the first server that answers."""

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
            for task in tasks:  # the others are not needed if one failed
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
        """Return the response of a server to one request, without retries."""
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
                # set all of them, because the server would use defaults from the model's generation config
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
            # some servers state their context length only in this message; retry with fewer tokens if some still fit
            num_prefix = len(prefix_ids) if error.num_prefix is None else error.num_prefix
            left = (error.max_length or 0) - num_prefix
            if not 0 < left < body["max_tokens"]:
                raise
            return await self.client.fetch(server, "completions", body | {"max_tokens": left})

    def samples(
        self, server: Server, answer: dict[str, Any], prefix_ids: Sequence[int], stop: Sequence[str]
    ) -> list[Sample]:
        """Return all samples in a response."""
        choices = answer.get("choices")
        if not isinstance(choices, list) or not all(
            isinstance(choice, dict)
            and isinstance(choice.get("text"), str)
            and not HALF_PAIR.search(choice["text"])
            and isinstance(choice.get("index"), int)
            and isinstance(choice.get("finish_reason"), str)
            for choice in choices
        ):
            raise Fault(f"the response has missing or incomplete choices: {json.dumps(answer)[:200]}")
        choices = sorted(choices, key=lambda choice: choice["index"])
        if self.api != "vllm":
            return [self._from_text(choice, stop) for choice in choices]
        num_cached = _num_cached(answer)
        if any(choice.get("token_ids") is None for choice in choices):
            raise EngineFatal(
                f'{server.url}: the response has no token ids. api="vllm" requires a vLLM server. For other servers, use '
                'api="text".'
            )
        if not all(
            isinstance(choice["token_ids"], list)
            and all(isinstance(token, int) and token >= 0 for token in choice["token_ids"])
            for choice in choices
        ):
            raise Fault(f"the token ids in the response are invalid: {json.dumps(choices)[:200]}")
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
        """Return a sample from a text. A "stop" without a stop string in the text is the end of the sequence."""
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
        Return the prefix as text, without the special tokens that the server adds at the start.

        Raises:
            `EngineError`: If the prefix contains control tokens as plain text. The server would turn them into tokens.
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
                f"The prompt contains control tokens as plain text ({', '.join(map(repr, dict.fromkeys(read)))}). A server that "
                "accepts text would turn them into tokens. Remove them from the problem, or use vLLM, which accepts token ids."
            )
        return text

    async def check(self, server: Server) -> None:
        """
        Test a server with a few short requests before its first use. Each fault found here would corrupt labels without an error.

        Raises:
            `EngineFatal`: If the server cannot be used.
        """
        prefix_ids = self.tokenizer.encode(PROMPT, add_special_tokens=False)

        async def ask(sampling: Sampling, stop: Sequence[str] = (), seed: int = 0) -> tuple[str, str]:
            """Return the text of one sample as decoded by this tokenizer, and as sent by the server."""
            answer = await self.complete(server, sampling, prefix_ids, 1, stop, NUM_TOKENS, seed)
            samples = self.samples(server, answer, prefix_ids, stop)
            if len(samples) != 1:
                raise EngineFatal(f"{server.url} returned {len(samples)} samples for a request of one sample.")
            return samples[0].text, answer["choices"][0]["text"]

        if self.api == "vllm":
            await self._read_model(server)
        text, sent = await ask(GREEDY)
        if self.api == "vllm" and not text.startswith(sent.rstrip("\ufffd")):  # half a character at the end
            raise EngineFatal(
                f"{server.url}: the server decodes its tokens to {sent[:60]!r}, but this tokenizer to {text[:60]!r}. Pass the "
                "tokenizer of the model (--policy_tokenizer)."
            )
        words = re.findall(
            r"[^\s\ufffd]{2,3}", text[: 2 * len(text) // 3]
        )  # in the first two thirds, so that text follows
        if not words:
            raise EngineFatal(
                f"{server.url}: the model continues {PROMPT!r} with {shown(text)}, which is too short to test stop strings. Check "
                "that the server runs a language model."
            )
        stop = words[len(words) // 2]
        end, _ = find_stop(text, [stop])
        stopped, _ = await ask(GREEDY, [stop])
        if stopped == text:
            raise EngineFatal(
                f"{server.url} ignores stop strings: it did not stop at {shown(stop)}. Start `transformers serve` without "
                '`--continuous-batching`. For vLLM, use api="vllm".'
            )
        if stopped == text[: end - len(stop)]:
            raise EngineFatal(
                f"{server.url} removes stop strings from the text, so the end of a step cannot be distinguished from the "
                'end of a solution. For vLLM, use api="vllm". Otherwise use a server that keeps them, such as `transformers serve`.'
            )
        if not (stopped.startswith(text[:end]) and len(stopped) < len(text)):
            raise Fault(
                f"two greedy samples differ: {text[:60]!r}, and {stopped[:60]!r} with the stop string {shown(stop)}"
            )
        if not self.sampling.is_greedy:
            drawn = [(await ask(HOT, seed=seed))[0] for seed in range(NUM_SAMPLES)]
            if all(one == text for one in drawn):
                raise EngineFatal(
                    f"{server.url} does not sample: it returned the greedy text for {NUM_SAMPLES} seeds at temperature "
                    f'{HOT.temperature:g}. For `transformers serve`, use api="transformers".'
                )

    async def _read_model(self, server: Server) -> None:
        """Check that a vLLM server has the model, and read its context length."""
        cards = (await self.client.fetch(server, "models")).get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise Fault("the response of /models has no list of models")
        for card in cards:
            if card.get("id") == self.model:
                length = card.get("max_model_len")
                if length is not None and not isinstance(length, int):
                    raise Fault(f"the response of /models has a max_model_len of {shown(length)}, expected a number")
                server.max_length = length
                return
        raise EngineFatal(
            f"{server.url} does not serve {shown(self.model)}. It serves {', '.join(repr(card.get('id')) for card in cards)}. Use "
            "one of these names, or start the server with `--served-model-name`."
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
    """Return the number of cached prefix tokens. 0 unless the server runs with `--enable-prompt-tokens-details`."""
    value: Any = answer
    for name, kind in (("usage", dict), ("prompt_tokens_details", dict), ("cached_tokens", int)):
        value = value.get(name)
        if value is None:
            return 0
        if not isinstance(value, kind):
            raise Fault(f"`{name}` in the response is {json.dumps(value)[:200]}, expected a JSON {kind.__name__}")
    return value
