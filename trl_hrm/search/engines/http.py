"""HTTP client for JSON with retries and load balancing over several servers."""

import asyncio
import json
import random
import re
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from ...io import shown
from .base import EngineError, EngineFatal, PrefixTooLong


T = TypeVar("T")

MAX_PAUSE = 60.0
PASSING = (408, 409, 425, 429)  # retried, as is 5xx
# Messages of vLLM, SGLang, TGI, llama.cpp, TensorRT-LLM and others for prefixes that are too long
TOO_LONG = re.compile(
    r"context[ _](length|window|size)|max_(model|seq|total)_len|session_len|maximum (model|input|prompt|sequence) length"
    r"|(prompt|inputs?|context|messages?|conversation|request|(?<!stop )sequence)\b.{0,60}\b(is|are|was|were)? ?"
    r"(too long|longer than)|\b(prompt|inputs?)\b.{0,40}\b(is|are) (too large|larger than)"
    r"|input tokens?\b.{0,60}\bexceed|\b(prompt|input|total tokens)\b.{0,60}\bexceeds?\b.{0,60}\b(length|tokens|limit|maximum)\b"
    r"|inputs` (tokens \+ `max_new_tokens` must be <=|must have less than)"
    r"|reduce (the )?(length of )?(the |your )?(prompt|input|messages)"
    # this client always requests at least one token, so the server has subtracted the prefix from its context length
    r"|max_(completion_|new_|output_)?tokens\b[^,;]{0,60}?(at least ([01]|one)\b|\bpositive|\bnegative|\bbelow minimum|\b1 or more"
    r"|(greater|larger|more) than( or equal to)? [01]\b|>=? ?[01]\b|less than 1\b)",
    re.I | re.S,
)
LIMIT = re.compile(r"(?:context (?:length|size)|max_model_len|must be <=)\D{0,30}?(\d+)", re.I)
PREFIX = re.compile(
    r"(\d+)(?: tokens)? (?:(?:in|from) the (?:input|messages|prompt)|(?:input|prompt|`inputs`) tokens)", re.I
)


class Fault(Exception):
    """A request failed and may be retried. `pause` is the pause that the server requests, in seconds."""

    def __init__(self, message: str, pause: float = 0.0):
        super().__init__(message)
        self.pause = pause


@dataclass(eq=False)
class Server:
    """
    A server and what is known about it.

    Args:
        url (`str`):
            Base URL, without a trailing slash.
        test (`asyncio.Task`, *optional*):
            Test of the server. The first request starts it.
        max_length (`int`, *optional*):
            Maximum number of tokens of prefix and sample together, if the server states it.
    """

    url: str
    test: asyncio.Task | None = None
    max_length: int | None = None


class HTTPClient:
    """
    Sends JSON requests to several servers of the same model.

    Args:
        base_urls (`list[str]`):
            Base URLs of the servers. `/v1` is appended to a URL without a path.
        test (`Callable[[Server], Awaitable[None]]`):
            Function that tests a server. It is called once per server, before its first request.
        api_key (`str`, *optional*):
            Bearer token. It is never shown in messages.
        timeout (`float`):
            Timeout of a request, in seconds.
        max_retries (`int`):
            Maximum number of retries of a failed request.
        backoff (`float`):
            First pause before a retry, in seconds. It doubles each time all servers have failed.

    Raises:
        `ValueError`: If a URL is invalid, or an option is out of range.
    """

    def __init__(
        self,
        base_urls: list[str],
        test: Callable[[Server], Awaitable[None]],
        api_key: str | None,
        timeout: float,
        max_retries: int,
        backoff: float,
    ):
        if not base_urls:
            raise ValueError("No base URL given. Pass at least one, such as http://localhost:8000/v1.")
        for name, value in (("timeout", timeout), ("max_retries", max_retries), ("backoff", backoff)):
            if not isinstance(value, int | float) or value < 0:
                raise ValueError(f"`{name}` is {shown(value)}. It must be a number of at least 0.")
        self.servers = [Server(_base_url(url)) for url in base_urls]
        self.test = test
        self.api_key = api_key
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, read: Callable[[Server], Awaitable[T]], key: str, seed: int) -> T:
        """
        Return the result of `read` for the first server that answers. `key` decides which server is tried first.

        Raises:
            `EngineError`: If all tries failed.
            `EngineFatal`: If no request can succeed.
        """
        rng = random.Random(f"{key}/{seed}")
        home = zlib.crc32(key.encode())
        for attempt in range(self.max_retries + 1):
            server = self.servers[(home + attempt) % len(self.servers)]
            try:
                await self._tested(server)
                return await read(server)
            except Fault as error:
                fault = error
            rounds, place = divmod(attempt + 1, len(self.servers))
            if place == 0 and attempt < self.max_retries:  # otherwise the next server is tried immediately
                pause = self.backoff * 2 ** (rounds - 1) * (0.5 + rng.random())
                await asyncio.sleep(min(max(pause, fault.pause), MAX_PAUSE))
        raise EngineError(f"{server.url}: the request failed after {self.max_retries + 1} tries. Last error: {fault}")

    async def _tested(self, server: Server) -> None:
        """Wait for the test of a server. Its first requests share one test. A test with a temporary fault is repeated."""
        if server.test is None:
            server.test = asyncio.get_running_loop().create_task(self.test(server))
        test = server.test
        try:
            await asyncio.shield(test)
        except Fault:
            if server.test is test:
                server.test = None
            raise
        except PrefixTooLong as error:  # otherwise every solution would be cut off
            raise EngineFatal(
                f"The context of {server.url} is too short for the test request. Start the server with a longer context. "
                f"({error})"
            ) from error

    async def fetch(self, server: Server, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """
        Send `body` with `POST`, or a `GET` request without `body`, and return the JSON object in the response.

        Raises:
            `Fault`: If a retry may succeed.
            `PrefixTooLong`: If the server reports that the prefix is too long.
            `EngineFatal`: If the server rejects the request.
        """
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
                timeout=aiohttp.ClientTimeout(total=self.timeout, sock_connect=min(self.timeout, 10.0)),
                connector=aiohttp.TCPConnector(limit=0),  # the scheduler limits the number of requests
            )
        method = "GET" if body is None else "POST"
        try:
            async with self._session.request(method, f"{server.url}/{path}", json=body) as response:
                status, headers, content = response.status, response.headers, await response.read()
        except TimeoutError as error:
            raise Fault(f"no response within {self.timeout:g} seconds") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Fault(self._shown(f"{type(error).__name__}: {error}")) from error
        if status == 200:
            try:
                value = json.loads(content)
            except ValueError as error:
                raise Fault(f"the response is not JSON ({error}); it starts with {content[:60]!r}") from error
            if not isinstance(value, dict):
                raise Fault(f"the response is a JSON {type(value).__name__}, expected an object")
            return value
        said = _message(content)
        message = f"HTTP {status}: {self._shown(said)}"
        if status in PASSING or status >= 500:
            pause = headers.get("Retry-After", "").strip()
            raise Fault(message, float(pause) if pause.isdecimal() else 0.0)  # a date is ignored
        if status == 413 or status in (400, 422) and TOO_LONG.search(said):
            raise PrefixTooLong(f"{server.url}: {message}", _number(LIMIT, said), _number(PREFIX, said))
        raise EngineFatal(f"{server.url}/{path} rejected the request. {message}")

    def _shown(self, text: str) -> str:
        """Return a text on one line, shortened and without the API key."""
        text = " ".join(text.split())
        if self.api_key:
            text = text.replace(self.api_key, "***")
        return text if len(text) <= 300 else text[:300] + " ..."

    async def close(self) -> None:
        for server in self.servers:
            if server.test is not None:
                server.test.cancel()
        if self._session is not None:
            await self._session.close()


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"The base URL is {shown(url)}. It must be an HTTP URL, such as http://localhost:8000/v1.")
    if parts.username or parts.password:
        raise ValueError(f"The base URL of {parts.hostname} contains a user or password. Pass the key as `api_key`.")
    return url.rstrip("/") if parts.path.strip("/") else url.rstrip("/") + "/v1"


def _message(content: bytes) -> str:
    """Return the error message of a response: OpenAI's `error.message`, FastAPI's `detail`, or the whole body."""
    try:
        value = json.loads(content)
    except ValueError:
        return content[:1000].decode(errors="replace")
    if isinstance(value, dict):
        error = value.get("error")
        value = (error.get("message") if isinstance(error, dict) else error) or value.get("detail") or value
    return value if isinstance(value, str) else json.dumps(value)


def _number(pattern: re.Pattern, message: str) -> int | None:
    found = pattern.search(message)
    return int(found[1]) if found else None
