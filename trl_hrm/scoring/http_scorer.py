"""Step scores from a vLLM server."""

import asyncio
import os
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..io import shown
from ..search.coroutines import run_coroutine
from ..search.engines.base import EngineError, EngineFatal
from ..search.engines.http import Fault, HTTPClient, Server
from ..step_format import StepFormat
from .tree_scorer import ChainScorer, read_text_contract


PROBE = "Add 12 and 345: the naïve sum is 357.\n\nSo x = 357.\n"


class ServerScorer(ChainScorer):
    """
    Scores every step of candidate solutions with a server that runs `vllm serve MODEL --runner pooling`.

    The scores are equal to the scores of [`StepScorer`] up to float rounding. Each candidate is one request for all its steps.
    Up to `max_requests` requests are open at a time. Temporary errors (HTTP 429 and 5xx, connection errors, timeouts, incomplete
    responses) are retried with exponential backoff.

    The server is checked when the scorer is created and at the start of each call of `score`: it must have the model, use the
    same tokenizer, and return classifier outputs for every token.

    Args:
        url (`str`):
            URL of the server, such as `http://localhost:8000`, with or without `/v1`.
        model (`str`):
            Name of the model on the server, or the path or Hub id that the server was started with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        step_format ([`StepFormat`]):
            Step format that the model was trained with. vLLM supports the heads `"classification"` and `"regression"`.
        api_key (`str`, *optional*):
            API key, sent as a bearer token. Defaults to the environment variable `OPENAI_API_KEY`, if set.
        max_requests (`int`, *optional*, defaults to `64`):
            Maximum number of open requests.
        timeout (`float`, *optional*, defaults to `600.0`):
            Timeout of a request in seconds, including the time in the server's queue.
        max_retries (`int`, *optional*, defaults to `5`):
            Maximum number of retries of a failed request.
        backoff (`float`, *optional*, defaults to `0.5`):
            Pause before the first retry, in seconds. It doubles with each retry, up to 60 seconds.

    Raises:
        `ValueError`: If the tokenizer does not fit the step format, or an option is out of range.
        `OSError`: If the server cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        step_format: StepFormat,
        api_key: str | None = None,
        max_requests: int = 64,
        timeout: float = 600.0,
        max_retries: int = 5,
        backoff: float = 0.5,
    ):
        super().__init__(tokenizer, step_format)
        if max_requests < 1:
            raise ValueError(f"`max_requests` is {max_requests}. It must be at least 1.")
        self.url = url
        self.model = model
        self.max_requests = max_requests
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY")
        self._patience = (timeout, max_retries, backoff)
        self._served_name = model
        self._outputs([], False)  # checks the server

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str,
        url: str,
        step_format: StepFormat | None = None,
        revision: str | None = None,
        served_model_name: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> "ServerScorer":
        """
        Create a scorer with the tokenizer and the step format of the checkpoint that a server runs.

        The config and the names of the weights are also checked if the folder or repository contains them. The weights that
        the server has loaded cannot be checked.

        Args:
            path_or_repo (`str`):
                Path or Hub id of the checkpoint, with its tokenizer and `step_format.json`.
            url (`str`):
                URL of the server.
            step_format ([`StepFormat`], *optional*):
                Step format for a checkpoint without `step_format.json`.
            revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
                Arguments for loading the checkpoint.
            served_model_name (`str`, *optional*):
                Name of the model on the server. Defaults to `path_or_repo`.
            **options:
                Other arguments of [`ServerScorer`].

        Raises:
            `ValueError`: If vLLM does not support the checkpoint (a LoRA adapter or a causal language model), or its weights
            do not fit the head.
            `FileNotFoundError`: If the checkpoint has no `step_format.json` and `step_format` is not given.
            `OSError`: If the server cannot be used.
        """
        tokenizer, step_format = read_text_contract(path_or_repo, step_format, revision, trust_remote_code)
        return cls(url, served_model_name or path_or_repo, tokenizer, step_format, **options)

    def _outputs(self, sequences: list[list[int]], progress: bool) -> list[torch.Tensor]:
        try:
            return run_coroutine(self._ask_all(sequences, progress))
        except EngineError as error:
            raise OSError(f"The server of the reward model failed. {error}") from error

    async def _ask_all(self, sequences: list[list[int]], progress: bool) -> list[torch.Tensor]:
        client = HTTPClient([self.url], lambda server: self._test(client, server), self._api_key, *self._patience)
        for server in client.servers:
            server.url = server.url.removesuffix("/v1")  # the path of the endpoint is /pooling, not /v1/pooling
        slots = asyncio.Semaphore(self.max_requests)

        async def ask(ids: list[int]) -> torch.Tensor:
            async with slots:
                rows = await client.ask(lambda server: self._pool(client, server, ids), "", 0)
                bar.update()
                return rows

        with tqdm(total=len(sequences), desc="Scoring", unit="path", disable=not progress) as bar:
            try:
                await client.ask(_nothing, "", 0)  # checks the server before sending all requests
                tasks = [asyncio.ensure_future(ask(ids)) for ids in sequences]
                try:
                    return await asyncio.gather(*tasks)
                finally:
                    for task in tasks:  # if one failed, the others are not needed
                        task.cancel()
            finally:
                await client.close()

    async def _test(self, client: HTTPClient, server: Server) -> None:
        await self._read_model(client, server)
        ids = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        body = {"model": self._served_name, "prompt": PROBE, "add_special_tokens": False}
        theirs = (await client.fetch(server, "tokenize", body)).get("tokens")
        if theirs != ids:
            raise EngineFatal(
                f"{server.url}: the tokenizer of the server encodes {PROBE!r} as {shown(theirs)}, but the tokenizer of the "
                f"reward model encodes it as {shown(ids)}. Pass the checkpoint that the server was started with."
            )
        try:
            rows = await self._pool(client, server, ids)
        except EngineFatal as error:
            raise EngineFatal(
                f"{error} The server must run a token classifier with `vllm serve MODEL --runner pooling`."
            ) from error
        self.check_outputs(rows, len(ids))

    async def _read_model(self, client: HTTPClient, server: Server) -> None:
        """Read the name of the model on the server and its maximum sequence length."""
        cards = (await client.fetch(server, "v1/models")).get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise Fault("the response of /v1/models contains no list of models")
        for card in cards:
            if self.model in (card.get("id"), card.get("root")):
                length = card.get("max_model_len")
                if not isinstance(length, int):
                    raise Fault(f"the max_model_len in the response of /v1/models is {shown(length)}, not a number")
                self._served_name, self.max_positions = card["id"], length
                return
        raise EngineFatal(
            f"{server.url} does not serve {shown(self.model)}, but {', '.join(repr(card.get('id')) for card in cards)}. If one of "
            "these is the same model, set `served_model_name` (`--served_model_name` on the command line) to its name."
        )

    async def _pool(self, client: HTTPClient, server: Server, ids: list[int]) -> torch.Tensor:
        """Return the outputs at every token of one sequence, without softmax or sigmoid."""
        body = {"model": self._served_name, "input": [ids], "task": "token_classify", "use_activation": False}
        answer = await client.fetch(server, "pooling", body)
        try:
            [found] = answer["data"]
            return torch.from_numpy(np.array(found["data"], dtype=np.float32))
        except (KeyError, TypeError, ValueError) as error:
            raise Fault(f"the response contains no rows of numbers: {str(answer)[:200]}") from error


async def _nothing(server: Server) -> None:
    """Send no request. `HTTPClient.ask` checks the server anyway."""
