"""A test server that answers like `vllm serve MODEL`, with faults on request."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..search.http_server import FakeServer, Handler


class PoolingServer(FakeServer):
    """
    Context manager that runs the server.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Token classifier, served as with `--runner pooling`, or causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        name (`str`, *optional*, defaults to `"prm"`):
            Name of the model.
        rows (`Callable`, *optional*):
            Function applied to the outputs of a sequence.
        pooling (`bool`, *optional*, defaults to `True`):
            Whether the server has the route of its model: `/pooling` or `/v1/completions`.

    Attributes:
        sequences (`list[list[int]]`):
            Token ids of all pooling requests so far, and of the longest prompt of each request for log-probabilities.
        before (`Callable[[], None]`):
            Called during each of these requests.
        models (`Callable[[], Any]`):
            Returns the response of `/v1/models`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "prm",
        rows: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
        pooling: bool = True,
    ):
        super().__init__(max_length=model.config.max_position_embeddings)
        self.classifier, self.tokenizer, self.model = model, tokenizer, name
        self.rows = rows
        own_route = "/pooling" if model.get_output_embeddings() is None else "/v1/completions"
        self.routes = ["/tokenize", own_route] if pooling else ["/tokenize"]
        self.sequences: list[list[int]] = []
        self.before: Callable[[], None] = lambda: None
        self.models = lambda: [{"id": self.model, "root": "/models/prm", "max_model_len": self.max_length}]

    def __enter__(self) -> "PoolingServer":
        super().__enter__()
        self.server.RequestHandlerClass = PoolingHandler
        return self

    @property
    def url(self) -> str:
        return super().url.removesuffix("/v1")

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if "logprob_token_ids" in body:
            return self.label_logprobs(body)
        return self.tokenize(body) if "prompt" in body else self.pool(body)

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["add_special_tokens"] is False  # vLLM would prepend BOS if the tokenizer has one
        return {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}

    def pool(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["task"] == "token_classify"
        [ids] = body["input"]
        if not body["use_activation"]:
            self.sequences.append(ids)
            self.before()
        with torch.inference_mode():
            rows = self.classifier(input_ids=torch.tensor([ids])).logits[0]
            if body["use_activation"]:
                rows = rows.softmax(-1) if rows.shape[1] > 1 else rows.sigmoid()
            rows = self.rows(rows)
        return {"data": [{"index": 0, "object": "pooling", "data": rows.tolist()}]}

    def label_logprobs(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["max_tokens"] == 1 and body["logprobs"] == len(body["logprob_token_ids"]) == 2
        assert body["return_tokens_as_token_ids"] is True and body["add_special_tokens"] is False
        self.sequences.append(max(body["prompt"], key=len))
        self.before()
        with torch.inference_mode():
            logits = [self.classifier(input_ids=torch.tensor([ids])).logits[0, -1] for ids in body["prompt"]]
            rows = self.rows(torch.stack(logits).log_softmax(-1))
        choices = []
        for index, row in enumerate(rows):
            sampled = int(row.argmax())
            logprobs = {f"token_id:{token}": row[token].item() for token in (sampled, *body["logprob_token_ids"])}
            choice = {"index": index, "text": "s", "finish_reason": "length"}
            choices.append(choice | {"logprobs": {"tokens": [f"token_id:{sampled}"], "top_logprobs": [logprobs]}})
        return {"choices": choices}


class PoolingHandler(Handler):
    """Handle the requests of one connection."""

    def do_GET(self) -> None:
        fake = self.server.fake
        self.reply(200 if self.path == "/v1/models" else 404, {"data": fake.models()})

    def do_POST(self) -> None:
        if self.path not in self.server.fake.routes:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(404, {"detail": "Not Found"})
            return
        super().do_POST()
