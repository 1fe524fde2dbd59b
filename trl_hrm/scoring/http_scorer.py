"""Step scores from a vLLM server."""

import asyncio
import os
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..identity import changed_settings
from ..io import shown
from ..losses import step_score
from ..search.coroutines import run_coroutine
from ..search.engines.answers import MODELS_BYTES, read_cards, read_label_logprobs, read_rows, read_tokens
from ..search.engines.base import EngineError, EngineFatal
from ..search.engines.http import MIN_BYTES, Fault, HTTPClient, Server, no_request
from ..step_format import StepFormat
from .scoring_config import checkpoint_name
from .tree_scorer import ALL_TOKENS, ChainScorer, read_text_contract


PROBE = "Add 12 and 345: the naïve sum is 357.\n\nSo x = 357.\n"
BYTES_PER_NUMBER = 32  # of a response
BYTES_PER_CHOICE = 2000  # of a response with log-probabilities of two tokens
TOLERANCE = 0.01  # between a softmax or sigmoid of the server, in its dtype, and in float32


class ServerScorer(ChainScorer):
    """
    Scores every step of candidate solutions with a server that runs `vllm serve`.

    | head | command | endpoint |
    |---|---|---|
    | `"lm"` | `vllm serve MODEL` | `/v1/completions`: log-probabilities of the label tokens after each step |
    | `"mlp"` | `vllm serve MODEL --runner pooling --pooler-config '{"pooling_type": "ALL"}'` | `/pooling` |
    | `"classification"`, `"regression"` | `vllm serve MODEL --runner pooling` | `/pooling` |

    The scores are equal to the scores of [`StepScorer`] up to float rounding. Each candidate is one request for all its steps.
    Up to `max_requests` requests are open at a time. Temporary errors (HTTP 429 and 5xx, connection errors, timeouts, incomplete
    responses) are retried with exponential backoff.

    The server is checked when the scorer is created and at the start of each call of `score`: it must have the model, use the
    same tokenizer, return the outputs of the head (of a classifier: for every token, with and without activation as requested),
    and the same scores of a short text as at the first check. Every response is checked: one row of finite numbers per token, or
    for `head="lm"` per step.

    Args:
        url (`str`):
            URL of the server, such as `http://localhost:8000`, with or without `/v1`.
        model (`str`):
            Name of the model on the server, or the path or Hub id that the server was started with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        step_format ([`StepFormat`]):
            Step format that the model was trained with.
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
        `ValueError`: If the tokenizer does not fit the step format, vLLM does not support the head, or an option is out of range.
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
        self._identity: dict[str, Any] | None = None
        self._outputs([], False)  # checks the server

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        url: str,
        step_format: StepFormat | str | Path | None = None,
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
            path_or_repo (`str` or `Path`):
                Path or Hub id of the checkpoint, with its tokenizer and `step_format.json`.
            url (`str`):
                URL of the server.
            step_format ([`StepFormat`], `str` or `Path`, *optional*):
                Step format for a checkpoint without `step_format.json`, or its name, file or folder (see [`StepFormat.named`]).
            revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
                Arguments for loading the checkpoint.
            served_model_name (`str`, *optional*):
                Name of the model on the server. Defaults to `path_or_repo`.
            **options:
                Other arguments of [`ServerScorer`].

        Raises:
            `ValueError`: If vLLM does not support the checkpoint (a LoRA adapter, or a head for which it has no class), or its
            weights do not fit the head.
            `FileNotFoundError`: If the checkpoint has no `step_format.json` and `step_format` is not given.
            `OSError`: If the server cannot be used.
        """
        path_or_repo = checkpoint_name(path_or_repo, f"{cls.__name__}(url, model, tokenizer, step_format)")
        tokenizer, step_format = read_text_contract(path_or_repo, step_format, revision, trust_remote_code)
        return cls(url, served_model_name or path_or_repo, tokenizer, step_format, **options)

    def describe(self) -> dict[str, Any]:
        """
        Return the name of the model, and its `identity`: the maximum length, and the scores of a short text. Two servers have the same
        model if these are equal, up to rounding of the scores (`trl_hrm.identity.TOLERANCES`).
        """
        return {"model": self.model, "identity": self._identity}

    def _outputs(self, sequences: list[tuple[list[int], list[int]]], progress: bool) -> list[torch.Tensor]:
        try:
            return run_coroutine(self._ask_all(sequences, progress))
        except EngineError as error:
            raise OSError(f"The server of the reward model failed. {error}") from error

    async def _ask_all(self, sequences: list[tuple[list[int], list[int]]], progress: bool) -> list[torch.Tensor]:
        client = HTTPClient([self.url], lambda server: self._test(client, server), self._api_key, *self._patience)
        for server in client.servers:
            server.url = server.url.removesuffix("/v1")  # the path of the endpoint is /pooling, not /v1/pooling
        slots = asyncio.Semaphore(self.max_requests)

        async def ask(ids: list[int], positions: list[int]) -> torch.Tensor:
            async with slots:
                rows = await client.ask(lambda server: self._score(client, server, ids, positions), "", 0)
                bar.update()
                return rows

        with tqdm(total=len(sequences), desc="Scoring", unit="path", disable=not progress) as bar:
            try:
                await client.ask(no_request, "", 0)  # checks the server before sending all requests
                tasks = [asyncio.ensure_future(ask(ids, positions)) for ids, positions in sequences]
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
        theirs = read_tokens(await client.fetch(server, "tokenize", body))
        if theirs != ids:
            raise EngineFatal(
                f"{server.url}: the tokenizer of the server encodes {PROBE!r} as {shown(theirs)}, but the tokenizer of the "
                f"reward model encodes it as {shown(ids)}. Pass the checkpoint that the server was started with."
            )
        if self.label_token_ids is not None:
            try:
                rows = await self._label_logprobs(client, server, ids, list(range(len(ids))))
            except EngineFatal as error:
                raise EngineFatal(
                    f"{error} The server must run the language model with `vllm serve MODEL`, without `--runner pooling`."
                ) from error
        else:
            try:
                rows = await self._pool(client, server, ids)
                activated = await self._pool(client, server, ids, use_activation=True)
            except EngineFatal as error:
                raise EngineFatal(
                    f"{error} The server must run a token classifier with `vllm serve MODEL --runner pooling`."
                ) from error
            for outputs in (rows, activated):
                self.check_outputs(outputs, len(ids))
            self._check_activation(server, rows, activated)
        scores = [round(score, 4) for score in step_score(rows, self.step_format).tolist()]
        identity = {"max_model_len": self.max_positions, "probe_scores": scores}
        if self._identity is None:
            self._identity = identity
        if changed := changed_settings(self._identity, identity):
            raise EngineFatal(f"{server.url} was restarted with another model: {'; '.join(changed)}.")

    def _check_activation(self, server: Server, rows: torch.Tensor, activated: torch.Tensor) -> None:
        """
        Check that the server respects `use_activation`, which it would otherwise apply a second time. The outputs without it must not
        be probabilities, and a softmax (one label: a sigmoid) must give the outputs with it.
        """
        expected = rows.softmax(-1) if rows.shape[1] > 1 else rows.sigmoid()
        is_activated = rows.shape[1] > 1 and bool(
            (rows >= -TOLERANCE).all() and ((rows.sum(-1) - 1).abs() < TOLERANCE).all()
        )
        # a model without activation is fine, unless its outputs could come from a sigmoid
        is_same = torch.allclose(activated, rows, rtol=0, atol=TOLERANCE)
        is_activated |= is_same and bool(((rows >= 0) & (rows <= 1)).all())
        if is_activated or not (is_same or torch.allclose(activated, expected, rtol=0, atol=TOLERANCE)):
            raise EngineFatal(
                f"{server.url} ignores `use_activation`: without activation, the last token of a test has the outputs "
                f"{rows[-1].tolist()}, and with activation {activated[-1].tolist()}, expected {expected[-1].tolist()}. Scores would "
                "be wrong, because this package applies the activation itself. Use a version of vLLM that supports "
                "`use_activation`, and set no activation in the config of the model."
            )

    async def _read_model(self, client: HTTPClient, server: Server) -> None:
        """Read the name of the model on the server and its maximum sequence length."""
        cards = read_cards(await client.fetch(server, "v1/models", max_bytes=MODELS_BYTES))
        for card in cards:
            if self.model in (card.id, card.root):
                if card.max_model_len is None:
                    raise Fault("the max_model_len in the response of /v1/models is None, not a number")
                # a request for log-probabilities also generates a token
                max_positions = card.max_model_len - (self.label_token_ids is not None)
                self._served_name, self.max_positions = card.id, max_positions
                return
        raise EngineFatal(
            f"{server.url} does not serve {self.model!r}, but {', '.join(shown(card.id) for card in cards[:10])}. If one of "
            "these is the same model, set `served_model_name` (`--served_model_name` on the command line) to its name."
        )

    async def _score(self, client: HTTPClient, server: Server, ids: list[int], positions: list[int]) -> torch.Tensor:
        """Return the outputs at S positions of one sequence, shape `(S, C)`, without softmax or sigmoid."""
        if self.label_token_ids is not None:
            return await self._label_logprobs(client, server, ids, positions)
        rows = await self._pool(client, server, ids)
        expected = (len(ids), self.step_format.num_labels)
        if tuple(rows.shape) != expected:
            raise Fault(f"the response has outputs of shape {tuple(rows.shape)}, expected {expected}")
        return rows[positions]

    async def _pool(
        self, client: HTTPClient, server: Server, ids: list[int], use_activation: bool = False
    ) -> torch.Tensor:
        """Return the outputs of a classifier for all L tokens of one sequence, shape `(L, C)`."""
        body = {
            "model": self._served_name,
            "input": [ids],
            "task": "token_classify",
            "use_activation": use_activation,
        }
        max_bytes = MIN_BYTES + BYTES_PER_NUMBER * len(ids) * self.step_format.num_labels
        answer = await client.fetch(server, "pooling", body, max_bytes)
        data = answer.get("data")
        if isinstance(data, list) and data and all(isinstance(one, dict) and one.get("data") == [] for one in data):
            raise EngineFatal(
                f'{server.url} returned no rows for {len(ids)} tokens: its pooling type is "STEP", which returns only rows at one '
                f"special token. Add {ALL_TOKENS}, so that it returns all tokens."
            )
        return torch.tensor(read_rows(answer), dtype=torch.float32)

    async def _label_logprobs(
        self, client: HTTPClient, server: Server, ids: list[int], positions: list[int]
    ) -> torch.Tensor:
        """Return the log-probabilities of the two label tokens after S positions of one sequence, shape `(S, 2)`."""
        body = {
            "model": self._served_name,
            "prompt": [ids[: position + 1] for position in positions],
            "add_special_tokens": False,
            "max_tokens": 1,
            "logprobs": len(self.label_token_ids),
            "logprob_token_ids": self.label_token_ids,
            "return_tokens_as_token_ids": True,
            # neutral values, so that the generation_config.json of the model has no influence with any `--logprobs-mode`
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        max_bytes = MIN_BYTES + BYTES_PER_CHOICE * len(positions)
        answer = await client.fetch(server, "v1/completions", body, max_bytes)
        return torch.tensor(read_label_logprobs(answer, self.label_token_ids, len(positions)), dtype=torch.float32)
