"""Engine for servers with OpenAI's completions API. Each server is tested before it is used."""

import asyncio
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from ...encoding import control_tokens
from ...identity import changed_settings
from ...io import shown
from ..coroutines import run_coroutine
from .answers import (
    MODELS_BYTES,
    Choice,
    read_cards,
    read_choices,
    read_next_logprob,
    read_prompt_logprobs,
    read_vllm_choices,
)
from .base import (
    EngineError,
    EngineFatal,
    PrefixTooLong,
    Sample,
    Sampling,
    check_logprobs,
    check_samples,
    continued_text,
    find_stop,
    num_token_ids,
    room,
    sample_from_vllm,
)
from .http import MIN_BYTES, Fault, HTTPClient, Rejected, Server, no_request


APIS = ("vllm", "transformers", "text")
MAX_STOPS = 4  # limit of OpenAI's API; `transformers serve` has no limit
BYTES_PER_TOKEN = 64  # of a response: the id, and the text with escapes
MAX_OVERRUN = 128  # characters after a stop string. No token has more

# Requests that test a server
PROMPT = "Counting in words: one, two, three, four,"
NUM_TOKENS = 24
NUM_SAMPLES = 4  # per request
GREEDY = Sampling(temperature=0.0)
HOT = Sampling(temperature=2.0, top_k=1000)  # without the tokens that only pad the vocabulary of a model
# Its log-probabilities identify the model. Text of several kinds, so that it is hard to predict
IDENTITY_PROMPT = (
    "Question: A train leaves Oslo at 7:45 and travels 318 km at 72 km/h. When does it arrive?\n\nThe café's owner, Zoë, "
    "juggled quartz vials. def f(x): return 3*x**2 - 1\nHence 17 + 26 = 43, and \\frac{9}{12} = \\frac{3}{4}."
)


class OpenAIEngine:
    """
    Samples from servers with a `/completions` endpoint.

    Requests with the same `key` go to the same server, so its prefix cache can reuse their prefixes. Temporary errors (HTTP 429
    and 5xx, a refused or lost connection, a timeout, an incomplete response) are retried on the next server, with exponential
    backoff. After the last retry, an [`EngineError`] is raised.

    Before its first use, each server is tested with a few short requests. They check that it stops at stop strings and keeps them
    in the text, that samples of one request and of several seeds differ, and, for vLLM, that it serves this model with this
    tokenizer, and that all servers return the same log-probabilities. If a check fails, an [`EngineFatal`] is raised. A server
    that could not be reached is tested again.

    Every response is checked (see [`check_samples`]), and its size is limited by the request. An invalid response is retried like
    a temporary error.

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
        self.num_ids = num_token_ids(tokenizer)
        self.identity: dict[str, Any] | None = None
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
                return await self.complete(server, self.sampling, prefix_ids, m, stop, max_tokens, seed)

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

    @property
    def has_logprobs(self) -> bool:
        return self.api == "vllm"

    @property
    def max_length(self) -> int | None:
        return (self.identity or {}).get("max_model_len")

    async def next_logprobs(self, prefix_ids: Sequence[int], token_ids: Sequence[int], key: str = "") -> list[float]:
        async def ask(token: int) -> float:
            """Let the server generate this token, and read its log-probability."""
            body = {
                "model": self.model,
                "prompt": list(prefix_ids),
                "max_tokens": 1,
                "allowed_token_ids": [token],
                "logprobs": 1,
                "return_token_ids": True,
                **GREEDY.describe(),
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            }

            async def read(server: Server) -> float:
                max_bytes = MIN_BYTES + 16 * len(prefix_ids)
                return read_next_logprob(await self.client.fetch(server, "completions", body, max_bytes), token)

            return await self.client.ask(read, key, token)

        logprobs = list(await asyncio.gather(*map(ask, token_ids)))
        check_logprobs(logprobs, "The server", "--logprobs-mode raw_logprobs")
        return logprobs

    async def complete(
        self,
        server: Server,
        sampling: Sampling,
        prefix_ids: Sequence[int],
        n: int,
        stop: Sequence[str],
        max_tokens: int,
        seed: int,
    ) -> list[Sample]:
        """
        Return the samples of a server for one request, without retries.

        Raises:
            `Fault`: If the response is invalid.
            `PrefixTooLong`: If the prefix fills the context of the server.
            `EngineFatal`: If the server rejects the request.
        """
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
        # vLLM also returns the token ids of the prompt, for each sample
        max_bytes = MIN_BYTES + n * (BYTES_PER_TOKEN * max_tokens + 16 * len(prefix_ids))
        try:
            answer = await self.client.fetch(server, "completions", body, max_bytes)
        except PrefixTooLong as error:
            # some servers state their context length only in this message; retry with fewer tokens if some still fit
            num_prefix = len(prefix_ids) if error.num_prefix is None else error.num_prefix
            left = (error.max_length or 0) - num_prefix
            has_room = 0 < left < body["max_tokens"]
            least = error.max_length if has_room else len(prefix_ids)
            if (
                server.max_length is not None or least <= server.longest_prefix
            ):  # otherwise the solution would be cut off
                raise Fault(
                    f"the server rejected a prefix of {len(prefix_ids)} tokens as too long ({error}), but it "
                    + (
                        f"accepted a prefix of {server.longest_prefix} tokens"
                        if server.max_length is None
                        else f"states a context of {server.max_length} tokens"
                    )
                ) from None
            if not has_room:
                raise
            body["max_tokens"] = left
            answer = await self.client.fetch(server, "completions", body, max_bytes)
        samples = self._samples(server, answer, prefix_ids, n, stop, body["max_tokens"])
        server.longest_prefix = max(server.longest_prefix, len(prefix_ids))
        return samples

    def _samples(
        self,
        server: Server,
        answer: dict[str, Any],
        prefix_ids: Sequence[int],
        n: int,
        stop: Sequence[str],
        max_tokens: int,
    ) -> list[Sample]:
        """Return the samples in a response."""
        # the first response of a server of another kind has these faults, and a retry would not help
        kind_of_fault = Fault if server.is_tested else EngineFatal
        if self.api != "vllm":
            samples = [self._from_text(choice, stop, max_tokens) for choice in read_choices(answer, n)]
        else:
            choices = answer.get("choices")
            if isinstance(choices, list) and any(isinstance(c, dict) and c.get("token_ids") is None for c in choices):
                raise kind_of_fault(
                    f'{server.url}: the response has no token ids. api="vllm" requires a vLLM server. For other servers, use '
                    'api="text".'
                )
            samples = []
            for choice in read_vllm_choices(answer, list(prefix_ids), n, max_tokens, self.num_ids):
                is_short = choice.finish_reason == "length" and len(choice.token_ids) < max_tokens
                if is_short and server.max_length is not None:
                    raise Fault(
                        f"the server cut a sample off after {len(choice.token_ids)} tokens, but {max_tokens} were requested and fit "
                        f"into its context of {server.max_length} tokens"
                    )
                if any(string in choice.text for string in stop) and not isinstance(choice.stop_reason, str):
                    raise Fault(
                        f"the server did not stop at a stop string in its text, which ends with {choice.text[-60:]!r}"
                    )
                try:
                    samples.append(
                        sample_from_vllm(
                            self.tokenizer,
                            prefix_ids,
                            choice.token_ids,
                            choice.text,
                            choice.finish_reason,
                            choice.stop_reason,
                            choice.num_cached,
                        )
                    )
                except EngineError as error:
                    raise kind_of_fault(f"{server.url}: {error}") from None
        try:
            check_samples(samples, self.tokenizer, prefix_ids, n, stop, max_tokens, self.num_ids)
        except EngineError as error:
            raise Fault(str(error)) from None
        for sample in samples:  # the ids can be the API key where the text of the server is not
            self.client.check_text(sample.text)
        return samples

    def _from_text(self, choice: Choice, stop: Sequence[str], max_tokens: int) -> Sample:
        """Return a sample from a text. A "stop" without a stop string in the text is the end of the sequence."""
        text = choice.text
        token_ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        # tokenized again, a text can have some more tokens than the server generated
        if len(token_ids) > 2 * max_tokens + 8:
            raise Fault(f"the response has a text of {len(token_ids)} tokens, but at most {max_tokens} were requested")
        found = find_stop(text, stop)
        if found and len(text) > found[0] + MAX_OVERRUN:
            raise Fault(f"the server did not stop at {found[1]!r}. Its text ends with {text[-60:]!r}")
        if len(token_ids) > max_tokens:
            token_ids = token_ids[:max_tokens]
            text = continued_text(self.tokenizer, (), token_ids)
            found = find_stop(text, stop)
            return Sample(token_ids, text, "stop", found[1]) if found else Sample(token_ids, text, "length")
        if found:
            return Sample(token_ids, text, "stop", found[1])
        if choice.finish_reason == "length":
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
        server.longest_prefix = 0  # unknown after a restart

        async def ask(sampling: Sampling, stop: Sequence[str] = (), n: int = 1, seed: int = 0) -> list[str]:
            samples = await self.complete(server, sampling, prefix_ids, n, stop, NUM_TOKENS, seed)
            return [sample.text for sample in samples]

        identity = await self._identify(server)
        [text] = await ask(GREEDY)
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
        [stopped] = await ask(GREEDY, [stop])
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
            n = NUM_SAMPLES if self.api == "vllm" else 1
            drawn = [text for seed in range(0, 2 * NUM_SAMPLES, n) for text in await ask(HOT, n=n, seed=1000 * seed)]
            if all(one == text for one in drawn):
                raise EngineFatal(
                    f"{server.url} does not sample: it returned the greedy text for {len(drawn)} seeds at temperature "
                    f'{HOT.temperature:g}. For `transformers serve`, use api="transformers".'
                )
            # Two samples of so many tokens are equal with a probability q below 1e-6, unless the model knows few texts. Two
            # coincidences among 8 samples then have a probability of about (28 q)**2 / 2. One is allowed
            if len(set(drawn)) < len(drawn) - 1:
                raise EngineFatal(
                    f"{server.url} repeats samples: {len(drawn)} samples at temperature {HOT.temperature:g}, {n} per request, "
                    f"contain only {len(set(drawn))} different texts, such as {shown(max(drawn, key=drawn.count))}. Samples must "
                    "differ, otherwise all values of the search are wrong. Check that the server respects `n` and `seed`, and "
                    "that nothing caches its responses."
                )
        if self.identity is None:
            self.identity = identity
        # servers can have the same model in different folders
        known = (self.identity.keys() & identity.keys()) - {"root"}
        before, now = ({name: one[name] for name in known} for one in (self.identity, identity))
        if changed := changed_settings(before, now):
            raise EngineFatal(
                f"{server.url} serves another model than the first server, or than before it was restarted: {'; '.join(changed)}. "
                "All servers must serve the same model with the same context length."
            )

    async def _identify(self, server: Server) -> dict[str, Any]:
        """Check that a vLLM server has the model, read its context length, and return what identifies the model."""
        if self.api != "vllm":
            return {}
        cards = read_cards(await self.client.fetch(server, "models", max_bytes=MODELS_BYTES))
        card = next((card for card in cards if card.id == self.model), None)
        if card is None:
            raise EngineFatal(
                f"{server.url} does not serve {self.model!r}. It serves {', '.join(shown(card.id) for card in cards[:10])}. Use one "
                "of these names, or start the server with `--served-model-name`."
            )
        server.max_length = card.max_model_len
        ids = list(self.tokenizer.encode(IDENTITY_PROMPT, add_special_tokens=False))
        if card.max_model_len is not None:
            ids = ids[: card.max_model_len - 1]
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        identity: dict[str, Any] = {"root": card.root, "max_model_len": card.max_model_len}
        try:
            identity["prompt_logprobs"] = read_prompt_logprobs(
                await self.client.fetch(server, "completions", body), ids
            )
        except Rejected:  # some settings of vLLM do not support log-probabilities
            pass
        return {name: value for name, value in identity.items() if value is not None}

    def connect(self) -> None:
        """
        Test a server, so that `describe` returns the identity of its model. Other servers are tested before their
        first use. They must have the same identity.

        Raises:
            `EngineFatal`: If no server can be used.
        """

        async def test() -> None:
            try:
                await self.client.ask(no_request, "", 0)
            finally:
                await self.client.close()

        try:
            run_coroutine(test())
        except EngineError as error:
            raise EngineFatal(f"No server can be used. {error}") from error

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "openai",
            "api": self.api,
            "model": self.model,
            "tokenizer": getattr(self.tokenizer, "name_or_path", None),
            "revision": self.revision,
            **self.sampling.describe(),
            **({"identity": self.identity} if self.identity else {}),
        }

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()
