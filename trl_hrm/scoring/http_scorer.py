"""Step scores from a vLLM server."""

import asyncio
import os
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..search.engines.base import EngineError, EngineFatal
from ..search.engines.http import Fault, HTTPClient, Server
from ..step_format import StepFormat
from .tree_scorer import ChainScorer, read_text_contract


PROBE = "Add 12 and 345: the naïve sum is 357.\n\nSo x = 357.\n"


class ServerScorer(ChainScorer):
    """
    Scores every step of candidate solutions with a server that runs `vllm serve MODEL --runner pooling`.

    It takes what [`StepScorer`] takes and gives the same scores up to float rounding. A candidate is one request, of which all
    steps are read; `max_requests` of them are open at a time. What may pass (HTTP 429 and 5xx, a refused or cut connection, no
    answer in time, an answer that is not whole) is tried again, with pauses that double.

    The server is tested when the scorer is made and at the beginning of each `score`: whether it has the model, this tokenizer,
    and outputs of its classifier for every token.

    Args:
        url (`str`):
            Address of the server, such as `http://localhost:8000`, with or without `/v1`.
        model (`str`):
            Name of the model at the server, or the folder or repository that it was started with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        step_format ([`StepFormat`]):
            Text contract the model was trained with. vLLM serves the heads `"classification"` and `"regression"`.
        api_key (`str`, *optional*):
            Sent as bearer token. By default the environment variable `OPENAI_API_KEY`, if set.
        max_requests (`int`, *optional*, defaults to `64`):
            Maximum number of open requests.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for an answer, the time in the server's queue included.
        max_retries (`int`, *optional*, defaults to `5`):
            How often a failed request is tried again.
        backoff (`float`, *optional*, defaults to `0.5`):
            Seconds of the first pause.

    Raises:
        `ValueError`: If tokenizer and format do not fit each other, or an option is out of range.
        `OSError`: If the server cannot be used, with what to do.
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
            raise ValueError(f"max_requests is {max_requests}, expected 1 or more.")
        self.url = url
        self.model = model
        self.max_requests = max_requests
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY")
        self._patience = (timeout, max_retries, backoff)
        self._served_name = model
        self._outputs([], False)  # tests the server

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
        Read tokenizer and format of the checkpoint that a server has.

        The configuration and the names of the weights are checked too, as far as the folder or the Hub has them. What the
        server has loaded is not visible.

        Args:
            path_or_repo (`str`):
                Folder or Hub repository with the tokenizer and `step_format.json`.
            url (`str`):
                Address of the server.
            step_format ([`StepFormat`], *optional*):
                Format to use for a checkpoint that has no `step_format.json`.
            revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
                Passed on when loading.
            served_model_name (`str`, *optional*):
                Name of the model at the server, by default `path_or_repo`.
            **options:
                Other arguments of [`ServerScorer`].

        Raises:
            `ValueError`: If vLLM cannot serve the checkpoint, a LoRA adapter or a causal language model, or if its weights
            do not fit the head.
            `FileNotFoundError`: If the checkpoint has no `step_format.json` and none is given.
            `OSError`: If the server cannot be used, with what to do.
        """
        tokenizer, step_format = read_text_contract(path_or_repo, step_format, revision, trust_remote_code)
        return cls(url, served_model_name or path_or_repo, tokenizer, step_format, **options)

    def _outputs(self, sequences: list[list[int]], progress: bool) -> list[torch.Tensor]:
        try:
            return _run(self._ask_all(sequences, progress))
        except EngineError as error:
            raise OSError(f"The server of the reward model failed. {error}") from error

    async def _ask_all(self, sequences: list[list[int]], progress: bool) -> list[torch.Tensor]:
        client = HTTPClient([self.url], lambda server: self._test(client, server), self._api_key, *self._patience)
        for server in client.servers:
            server.url = server.url.removesuffix("/v1")  # /pooling is not below it
        slots = asyncio.Semaphore(self.max_requests)

        async def ask(ids: list[int]) -> torch.Tensor:
            async with slots:
                rows = await client.ask(lambda server: self._pool(client, server, ids), "", 0)
                bar.update()
                return rows

        with tqdm(total=len(sequences), desc="Scoring", unit="path", disable=not progress) as bar:
            try:
                await client.ask(_nothing, "", 0)  # tests the server, before a multitude of requests
                tasks = [asyncio.ensure_future(ask(ids)) for ids in sequences]
                try:
                    return await asyncio.gather(*tasks)
                finally:
                    for task in tasks:  # where one failed, the others are of no use
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
                f"{server.url}: its tokenizer makes {str(theirs)[:80]} of {PROBE!r}, but {str(ids)[:80]} was expected: it "
                "serves another model. Name the checkpoint that it was started with."
            )
        try:
            rows = await self._pool(client, server, ids)
        except EngineFatal as error:
            raise EngineFatal(
                f"{error} Expected a token classifier that was started with `vllm serve MODEL --runner pooling`."
            ) from error
        self.check_outputs(rows, len(ids))

    async def _read_model(self, client: HTTPClient, server: Server) -> None:
        """What the server calls the model, and how long a sequence may be."""
        cards = (await client.fetch(server, "v1/models")).get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise Fault("the answer to /v1/models has no list of models")
        for card in cards:
            if self.model in (card.get("id"), card.get("root")):
                length = card.get("max_model_len")
                if not isinstance(length, int):
                    raise Fault(f"the answer to /v1/models has a max_model_len of {length!r}, expected a number")
                self._served_name, self.max_positions = card["id"], length
                return
        raise EngineFatal(
            f"{server.url} does not serve {self.model!r}, but {', '.join(repr(card.get('id')) for card in cards)}. If one of "
            "these is this model, name it: `served_model_name` (`--served_model_name` on the command line)."
        )

    async def _pool(self, client: HTTPClient, server: Server, ids: list[int]) -> torch.Tensor:
        """Outputs at every token of one sequence, without softmax or sigmoid."""
        body = {"model": self._served_name, "input": [ids], "task": "token_classify", "use_activation": False}
        answer = await client.fetch(server, "pooling", body)
        try:
            [found] = answer["data"]
            return torch.from_numpy(np.array(found["data"], dtype=np.float32))
        except (KeyError, TypeError, ValueError) as error:
            raise Fault(f"the answer has no rows of numbers: {str(answer)[:200]}") from error


async def _nothing(server: Server) -> None:
    """Ask nothing of a server."""


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
