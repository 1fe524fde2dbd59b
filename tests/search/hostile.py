"""A policy server with a fault on request, for each fault that a server or a gateway in front of it can have."""

import copy
import gzip
import json
import random
import time
from collections.abc import Callable
from typing import Any

from .http_server import TOKENIZER, FakeServer, Handler, body, cut, hang_up, policy, status
from .scripted import write_coins


KEY = "sk-planted-4711"  # API key of the client
BLOCK = b"[" * (1 << 20)
BOMB = gzip.compress(b" " * (1 << 20)) * (1 << 10)


class HostileServer(FakeServer):
    """
    Server that solves the problems of [`write_coins`], with one fault.

    Args:
        mode (`Callable[[dict, dict], Any]`, *optional*):
            Function of a request and of a copy of its honest response. It changes the copy, or returns a function that answers
            instead. By default, the server is honest.
        every (`int`, *optional*, defaults to `1`):
            The fault occurs in every `every`-th request of a search.
        in_test (`bool`, *optional*, defaults to `False`):
            Whether the fault also occurs while the client tests the server.
    """

    def __init__(self, mode: Callable | None = None, every: int = 1, in_test: bool = False):
        super().__init__()
        self.mode, self.every, self.in_test = mode, every, in_test
        self.num_asked = 0
        self.cards = lambda: [{"id": self.model, "root": "/models/lm", "max_model_len": self.max_length}]

    def write(self, prompt: str, seed: int, temperature: float) -> str:
        if "Question:" not in prompt:
            return policy(prompt, seed, temperature)
        return write_coins(prompt, random.Random(f"{prompt}/{seed if temperature else 'greedy'}"))

    def respond(self, request: dict[str, Any]) -> Any:
        """Return the response to a request, or a function that answers it."""
        honest = super().complete(request)
        is_search = "Question:" in TOKENIZER.decode(request["prompt"]) and "prompt_logprobs" not in request
        self.num_asked += is_search
        if self.mode is None or not (is_search and self.num_asked % self.every == 0 or self.in_test):
            return honest
        changed = copy.deepcopy(honest)
        answer = self.mode(request, changed)
        return answer if callable(answer) else changed

    def __enter__(self) -> "HostileServer":
        super().__enter__()
        self.server.RequestHandlerClass = HostileHandler
        return self


class HostileHandler(Handler):
    """Handle the requests of one connection."""

    def do_GET(self) -> None:
        self.reply(200, {"data": self.server.fake.cards()})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.server.fake.respond(json.loads(content))
        try:
            answer(self) if callable(answer) else self.reply(200, answer)
        except OSError:  # the client has closed the connection
            self.close_connection = True


def raw(content: bytes, headers: dict[str, str] | None = None, code: int = 200) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(code, content, headers)


def endless(code: int = 200, chunked: bool = False) -> Callable[[Handler], None]:
    """Send opening brackets until the client closes the connection, at most 8 GB."""

    def send(handler: Handler) -> None:
        handler.send_response(code)
        handler.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(1 << 33))))
        handler.end_headers()
        for _ in range(1 << 13):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(BLOCK), BLOCK) if chunked else BLOCK)
        handler.close_connection = True

    return send


def bomb(handler: Handler) -> None:
    """Send 1 GB that gzip compresses to 1 MB."""
    handler.reply(200, BOMB, {"Content-Encoding": "gzip"})


def drip(handler: Handler) -> None:
    """Send a space per 50 ms."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def lines(content: bytes) -> Callable[[Handler], None]:
    """Send bytes in place of a response."""

    def send(handler: Handler) -> None:
        handler.wfile.write(content)
        handler.close_connection = True

    return send


def always(answer: Callable[[Handler], None]) -> Callable[[dict, dict], Any]:
    return lambda request, response: answer


def each(**values: Any) -> Callable[[dict, dict], Any]:
    """Set values in all choices. A function is called with the choice."""

    def change(request: dict, response: dict) -> None:
        for choice in response["choices"]:
            new = {name: value(choice) if callable(value) else value for name, value in values.items()}
            choice |= new

    return change


def usage(**values: Any) -> Callable[[dict, dict], Any]:
    return lambda request, response: response["usage"].update(values)


def fewer(request: dict, response: dict) -> None:
    response["choices"].pop()


def more(request: dict, response: dict) -> None:
    response["choices"].append(response["choices"][0] | {"index": len(response["choices"])})


def indices(change: Callable[[int, int], Any]) -> Callable[[dict, dict], Any]:
    def set_all(request: dict, response: dict) -> None:
        for choice in response["choices"]:
            choice["index"] = change(choice["index"], len(response["choices"]))

    return set_all


def over(request: dict, response: dict) -> None:
    """Return more tokens than requested."""
    for choice in response["choices"]:
        number = request["max_tokens"] + 5
        choice |= {"text": "y" * number, "token_ids": [121] * number, "finish_reason": "length", "stop_reason": None}


def short(request: dict, response: dict) -> None:
    """Cut samples off after three tokens. They would count as too long."""
    for choice in response["choices"]:
        choice["token_ids"] = choice["token_ids"][:3]
        choice |= {"text": choice["text"][:3], "finish_reason": "length", "stop_reason": None}


def early(request: dict, response: dict) -> None:
    """End solutions in their middle."""
    for choice in response["choices"]:
        choice["token_ids"] = choice["token_ids"][: len(choice["token_ids"]) // 2]
        choice |= {"text": choice["text"][: len(choice["text"]) // 2], "finish_reason": "stop", "stop_reason": None}


def beyond(finish: str) -> Callable[[dict, dict], Any]:
    """Continue after the stop string."""

    def change(request: dict, response: dict) -> None:
        for choice in response["choices"]:
            text = choice["text"] + " and more\n\n# Answer\n\n7\n# END!"
            ids = TOKENIZER.encode(text)
            if finish == "length":
                text = (text * 99)[: request["max_tokens"]]
                ids = TOKENIZER.encode(text)
                choice |= {"finish_reason": "length", "stop_reason": None}
            elif finish == "eos":
                choice |= {"finish_reason": "stop", "stop_reason": None}
                ids.append(0)
            choice |= {"text": text, "token_ids": ids}

    return change


def speak_key(split: str = "") -> Callable[[dict, dict], Any]:
    """Write the API key as the solution. With `split`, the text differs from the text of the ids by it."""

    def change(request: dict, response: dict) -> None:
        for choice in response["choices"]:
            text = f"{KEY}\n\n# Step 2"
            choice |= {"token_ids": TOKENIZER.encode(text), "finish_reason": "stop", "stop_reason": "# Step 2"}
            choice["text"] = text.replace("planted", f"pl{split}anted")

    return change


def shift(choice: dict) -> list[int]:
    return [token + 1 for token in choice["token_ids"]]


def first_id(value: Any) -> Callable[[dict, dict], Any]:
    return each(token_ids=lambda choice: [value, *choice["token_ids"][1:]])


def set_all(**values: Any) -> Callable[[dict, dict], Any]:
    return lambda request, response: response.update(values)


HTML = b"<html>Sign in</html>"
ECHO = f"Unexpected header Authorization: Bearer {KEY}"
DEEP = b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
# faults of the transport
TRANSPORT = {
    "endless": always(endless()),
    "endless in chunks": always(endless(chunked=True)),
    "endless error": always(endless(500)),
    "gzip bomb": always(bomb),
    "not compressed": always(raw(b"{}", {"Content-Encoding": "gzip"})),
    "100,000 brackets": always(raw(DEEP)),
    "100 brackets": always(raw(b'{"choices": ' + b"[" * 100 + b"]" * 100 + b"}")),
    "100,000 open brackets": always(raw(b"[" * 100_000)),
    "error of 100,000 brackets": always(raw(DEEP, code=500)),
    "many headers": always(lines(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 100_000 + b"\r\n")),
    "long header": always(lines(b"HTTP/1.1 200 OK\r\nA: " + b"b" * (1 << 22) + b"\r\n\r\n")),
    "another protocol": always(lines(f"SSH-2.0 {ECHO}\r\n\r\n".encode())),
    "bad length": always(lines(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n")),
    "many cookies": always(raw(HTML, {"Set-Cookie": "a=" + "b" * 8000})),
    "slow": always(drip),
    "cut": always(cut),
    "hang up": always(hang_up),
    "redirect": always(raw(b"", {"Location": f"http://127.0.0.1:9/?key={KEY}"}, 307)),
    "redirect to itself": always(raw(b"", {"Location": "/v1/completions"}, 302)),
    "no content": always(raw(b"", code=204)),
    "empty": always(raw(b"")),
    "HTML": always(raw(HTML)),
    "not UTF-8": always(raw(b'{"choices": "\xff"}')),
    "a list": always(body([1, 2])),
    "duplicate keys": always(raw(b'{"choices": [], "choices": []}')),
    "NaN": always(raw(b'{"choices": NaN}')),
    "long number": always(raw(b'{"choices": ' + b"9" * 5000 + b"}")),
    "key in an error": always(status(500, ECHO)),
    "key in a rejection": always(status(401, ECHO)),
    "key in a page": always(raw(f"<html>{ECHO}".encode())),
    "key in JSON": always(body({"error": ECHO})),
    "control characters": always(status(500, "\x1b[2J\ud800 \x07\u202e")),
    "endless pause": always(status(429, headers={"Retry-After": "9" * 5000})),
    "context of many digits": always(status(400, f"maximum context length is {'9' * 5000} tokens")),
    "prompt called too long": always(status(400, "The prompt is too long")),
    "request called too large": always(status(413)),
}
# faults of the response
RESPONSE = {
    "too few": fewer,
    "too many": more,
    "no choices": set_all(choices=[]),
    "choices null": set_all(choices=None),
    "choices of text": set_all(choices=["a", "b", "c"]),
    "index twice": indices(lambda index, n: 0),
    "negative index": indices(lambda index, n: index - n),
    "index from 1": indices(lambda index, n: index + 1),
    "index true": indices(lambda index, n: bool(index) if index < 2 else index),
    "index as text": indices(lambda index, n: str(index)),
    "index as float": indices(lambda index, n: float(index)),
    "id 2**31": first_id(2**31),
    "id outside the vocabulary": first_id(0x110000),
    "negative id": first_id(-1),
    "id true": first_id(True),
    "id as float": first_id(65.0),
    "id null": first_id(None),
    "id of 4,000 digits": first_id(10**4000),
    "ids null": each(token_ids=None),
    "no ids": each(token_ids=[]),
    "ids of another text": each(token_ids=shift),
    "text of other ids": each(text=lambda choice: choice["text"].replace("good", "bad").replace("7", "8")),
    "no text": each(text=""),
    "text null": each(text=None),
    "half a surrogate pair": each(text="\ud800 "),
    "ids of half a pair": each(token_ids=[0xD800], text=" ", finish_reason="stop", stop_reason=None),
    "more tokens than requested": over,
    "fewer tokens": short,
    "early end": early,
    "finish abort": each(finish_reason="abort"),
    "finish null": each(finish_reason=None),
    "finish unknown": each(finish_reason="because"),
    "another stop string": each(finish_reason="stop", stop_reason="e"),
    "stop string not in the text": each(
        finish_reason="stop", stop_reason="# END!", text="bad", token_ids=[98, 97, 100]
    ),
    "stop reason of a list": each(stop_reason=["# END!"]),
    "stop reason true": each(stop_reason=True),
    "stop reason of another token": each(finish_reason="stop", stop_reason=5),
    "beyond the stop string": beyond("stop"),
    "beyond the stop string to the end": beyond("eos"),
    "beyond the stop string to the limit": beyond("length"),
    "key as solution": speak_key(),
    "key as ids": speak_key(" "),
    "another prompt": each(prompt_token_ids=[1, 2, 3]),
    "another prompt length": usage(prompt_tokens=3),
    "more cached than the prompt": usage(prompt_tokens_details={"cached_tokens": 10**6}),
    "negative cached": usage(prompt_tokens_details={"cached_tokens": -1}),
    "cached true": usage(prompt_tokens_details={"cached_tokens": True}),
    "usage of a list": set_all(usage=[1]),
}
# responses of /models
CARDS = {
    "another model": [{"id": "other", "max_model_len": 10_000}],
    "key as model": [{"id": KEY, "max_model_len": 10_000}],
    "no model": [],
    "models null": None,
    "model of text": ["lm"],
    "id of a list": [{"id": ["lm"], "max_model_len": 10_000}],
    "length true": [{"id": "lm", "max_model_len": True}],
    "negative length": [{"id": "lm", "max_model_len": -1}],
    "length as text": [{"id": "lm", "max_model_len": "long"}],
    "root of a list": [{"id": "lm", "root": [], "max_model_len": 10_000}],
    "many models": [{"id": f"model-{i}", "max_model_len": 10_000} for i in range(100_000)],
}
