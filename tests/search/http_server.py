"""A small completions server with faults on request. Its policy depends only on prompt and seed."""

import json
import random
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from trl_hrm.search.engines.base import CharTokenizer, find_stop


WORDS = ["add ", "sub ", "so ", "# Step 2\n", "seven ", "three.\n\n"]
TOKENIZER = CharTokenizer()


def policy(prompt: str, seed: int, temperature: float) -> str:
    """Return everything that the model would write, up to its end."""
    rng = random.Random(f"{prompt}/{seed if temperature else 'greedy'}")
    return "".join(rng.choice(WORDS) for _ in range(40))


class FakeServer:
    """
    Context manager that runs the server.

    Args:
        style (`str`, *optional*, defaults to `"vllm"`):
            `"vllm"`: ids, `n`, stop reasons. `"text"`: only text, one choice, stop strings kept. `"strips"`: text without
            stop strings. `"ignores"`: text that runs past them. `"greedy"`: like `"text"`, always the same.
        max_length (`int`, *optional*, defaults to `10_000`):
            Maximum length of prompt and sample for `"vllm"`.
        hidden_length (`int`, *optional*):
            Maximum prompt length that the server does not report. Longer prompts fail with vLLM's message.

    Attributes:
        faults (`list[Callable[[Handler], None]]`):
            Each one replaces the answer to one of the next requests.
        requests (`list[dict]`):
            Request bodies so far.
        headers (`list[dict]`):
            Request headers so far.
        weights (`float`):
            Log-probability of every prompt token. `None` if the server does not return them.
        words (`dict[str, float]`):
            Log-probabilities of next tokens. -50 for others.
    """

    model = "lm"
    max_stops = 4
    weights: float | None = -1.5
    words: dict[str, float] = {}

    def __init__(self, style: str = "vllm", max_length: int = 10_000, hidden_length: int | None = None):
        self.style = style
        self.max_length = max_length if hidden_length is None else None
        self.hidden_length = hidden_length
        self.faults: list[Callable[[Handler], None]] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    def __enter__(self) -> "FakeServer":
        self.server = _Server(("127.0.0.1", 0), Handler)
        self.server.fake = self
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a valid request."""
        if "prompt_logprobs" in body:
            rows = [
                {str(token): {"logprob": self.weights, "rank": 2, "decoded_token": "?"}} for token in body["prompt"]
            ]
            choice = {"index": 0, "text": "s", "finish_reason": "length", "token_ids": [115]}
            return {"choices": [choice | {"prompt_logprobs": None if self.weights is None else [None, *rows[1:]]}]}
        if "allowed_token_ids" in body:
            [token] = body["allowed_token_ids"]
            choice = {"index": 0, "text": chr(token), "finish_reason": "length", "token_ids": [token]}
            return {"choices": [choice | {"logprobs": {"token_logprobs": [self.words.get(chr(token), -50.0)]}}]}
        vllm = self.style == "vllm"
        prompt = TOKENIZER.decode(body["prompt"]) if vllm else body["prompt"]
        choices = [self.choice(prompt, body, body["seed"] + i, i) for i in range(body["n"] if vllm else 1)]
        return {"choices": choices, "usage": {"prompt_tokens_details": {"cached_tokens": len(prompt) // 2}}}

    def write(self, prompt: str, seed: int, temperature: float) -> str:
        """Return everything that the model would write, up to its end."""
        return policy(prompt, seed, temperature)

    def choice(self, prompt: str, body: dict[str, Any], seed: int, index: int) -> dict[str, Any]:
        temperature = 0 if self.style == "greedy" else body["temperature"]
        text = self.write(prompt, seed, temperature)
        found = None if self.style == "ignores" else find_stop(text, body.get("stop", []))
        reason, stop_reason, kept = "stop", None, text
        if found and found[0] <= body["max_tokens"]:
            stop_reason, kept = found[1], text[: found[0]]
        elif len(text) >= body["max_tokens"]:
            reason, kept = "length", text[: body["max_tokens"]]
        ids = TOKENIZER.encode(kept) + ([TOKENIZER.eos_token_id] if reason == "stop" and not stop_reason else [])
        if self.style == "strips" and stop_reason:
            kept = kept.removesuffix(stop_reason)
        choice = {"index": index, "text": kept, "finish_reason": reason}
        return choice | {"stop_reason": stop_reason, "token_ids": ids} if self.style == "vllm" else choice


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that closed the connection."""


class Handler(BaseHTTPRequestHandler):
    """Handle the requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        fake = self.server.fake
        self.reply(200, {"data": [{"id": fake.model, "max_model_len": fake.max_length}]})

    def do_POST(self) -> None:
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.requests.append(body)
        fake.headers.append(dict(self.headers))
        if fake.faults:
            fake.faults.pop(0)(self)
        elif len(body.get("stop", [])) > fake.max_stops:
            status(400, f"List should have at most {fake.max_stops} items after validation")(self)
        elif fake.hidden_length is not None and len(body["prompt"]) >= fake.hidden_length:
            status(400, f"max_tokens must be at least 1, got {fake.hidden_length - len(body['prompt'])}.")(self)
        else:
            self.reply(200, fake.complete(body))

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def status(code: int, message: str = "no", headers: dict[str, str] | None = None) -> Callable[[Handler], None]:
    """Answer with a status code."""
    return lambda handler: handler.reply(code, {"error": {"message": message}}, headers)


def body(content: Any) -> Callable[[Handler], None]:
    """Answer 200 with this body."""
    return lambda handler: handler.reply(200, content)


def cut(handler: Handler) -> None:
    """Promise more bytes than are sent."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"index": 0, "text": "half of an ans')
    handler.close_connection = True


def hang_up(handler: Handler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


def hang(seconds: float) -> Callable[[Handler], None]:
    """Wait for some seconds before closing."""

    def wait(handler: Handler) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return wait
