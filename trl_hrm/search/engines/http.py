"""HTTP client for JSON with retries and load balancing over several servers."""

import asyncio
import errno
import random
import re
import socket
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from ...io import parse_json
from ...terminal import plain
from .base import HALF_PAIR, EngineError, EngineFatal, PrefixTooLong


T = TypeVar("T")

MAX_PAUSE = 60.0
MIN_BYTES = 1 << 18  # limit of a short response, which leaves room for what servers add to it
MAX_DEPTH = 32  # of nested lists and objects
MAX_SHOWN = 300  # characters of a server's message
MIN_SECRET = 8  # characters. Shorter keys, such as `EMPTY`, are placeholders, and occur in ordinary text
# This machine cannot open another connection
LOCAL_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)
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
LIMIT = re.compile(r"(?:context (?:length|size)|max_model_len|must be <=)\D{0,30}?(\d{1,9})\b", re.I)
PREFIX = re.compile(
    r"\b(\d{1,9})(?: tokens)? (?:(?:in|from) the (?:input|messages|prompt)|(?:input|prompt|`inputs`) tokens)", re.I
)


class Fault(Exception):
    """A request failed and may be retried. `pause` is the pause that the server requests, in seconds."""

    def __init__(self, message: str, pause: float = 0.0):
        super().__init__(message)
        self.pause = pause


class Unreachable(Fault):
    """No connection to the server. It may be restarting, possibly with another model."""


class Rejected(EngineFatal):
    """The server does not support something in the request (HTTP 400 or 422)."""


@dataclass(eq=False)
class Server:
    """
    A server and what is known about it.

    Args:
        url (`str`):
            Base URL, without a trailing slash.
        test (`asyncio.Task`, *optional*):
            Test of the server. The first request starts it.
        is_tested (`bool`, *optional*, defaults to `False`):
            Whether the server has passed the test. A server that could not be reached is tested again.
        max_length (`int`, *optional*):
            Maximum number of tokens of prefix and sample together, if the server states it.
        longest_prefix (`int`, *optional*, defaults to `0`):
            Number of tokens of the longest prefix that the server has accepted.
    """

    url: str
    test: asyncio.Task | None = None
    is_tested: bool = False
    max_length: int | None = None
    longest_prefix: int = 0


class HTTPClient:
    """
    Sends JSON requests to several servers of the same model.

    Args:
        base_urls (`list[str]`):
            Base URLs of the servers. `/v1` is appended to a URL without a path.
        test (`Callable[[Server], Awaitable[None]]`):
            Function that tests a server. It is called once per server, before its first request.
        api_key (`str`, *optional*):
            Bearer token. It is not shown in messages, and a response that contains it is a fault.
        timeout (`float`):
            Timeout of a request, in seconds.
        max_retries (`int`):
            Maximum number of retries of a failed request.
        backoff (`float`):
            First pause before a retry, in seconds. It doubles each time all servers have failed.

    Raises:
        `ValueError`: If a URL or the API key is invalid, or an option is out of range.
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
                raise ValueError(f"`{name}` is {value!r}. It must be a number of at least 0.")
        if api_key is not None and not re.fullmatch("[!-~]+", api_key):
            raise ValueError(
                "The API key is empty or contains characters that are not allowed in a key, such as whitespace. Copy it again."
            )
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
                if isinstance(error, Unreachable):
                    server.is_tested = False
            rounds, place = divmod(attempt + 1, len(self.servers))
            if place == 0 and attempt < self.max_retries:  # otherwise the next server is tried immediately
                pause = self.backoff * 2 ** (rounds - 1) * (0.5 + rng.random())
                await asyncio.sleep(min(max(pause, fault.pause), MAX_PAUSE))
        raise EngineError(f"{server.url}: the request failed after {self.max_retries + 1} tries. Last error: {fault}")

    async def _tested(self, server: Server) -> None:
        """Wait for the test of a server. Its first requests share one test. A test with a temporary fault is repeated."""
        if server.is_tested:
            return
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
        server.is_tested, server.test = True, None

    async def fetch(
        self, server: Server, path: str, body: dict[str, Any] | None = None, max_bytes: int = MIN_BYTES
    ) -> dict[str, Any]:
        """
        Send `body` with `POST`, or a `GET` request without `body`, and return the JSON object in the response.

        Args:
            server ([`Server`]):
                Server to ask.
            path (`str`):
                Path below the URL of the server.
            body (`dict[str, Any]`, *optional*):
                JSON object to send.
            max_bytes (`int`, *optional*):
                Maximum size of the response. The rest of a longer response is not read.

        Raises:
            `Fault`: If a retry may succeed.
            `PrefixTooLong`: If the server reports that the prefix is too long.
            `EngineFatal`: If the server rejects the request or redirects it, or if this machine cannot open a connection.
        """
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                headers={"Accept-Encoding": "identity"}
                | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}),
                timeout=aiohttp.ClientTimeout(total=self.timeout, sock_connect=min(self.timeout, 10.0)),
                connector=aiohttp.TCPConnector(limit=0),  # the scheduler limits the number of requests
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        method = "GET" if body is None else "POST"
        # raised outside of `except`, so that no traceback shows an error of aiohttp, which may quote the API key
        fault: Exception | None = None
        try:
            # a redirect would send the API key to another place
            async with self._session.request(
                method, f"{server.url}/{path}", json=body, allow_redirects=False
            ) as response:
                status, headers = response.status, response.headers
                content = await _read(response, max_bytes if status == 200 else MIN_BYTES)
        except TimeoutError:
            fault = Fault(f"no response within {self.timeout:g} seconds")
        except (aiohttp.ClientError, OSError) as error:
            message = self._shown(f"{type(error).__name__}: {error}")
            if _is_local(error):
                fault = EngineFatal(
                    f"This machine cannot open another connection to {server.url} ({message}). Lower --max_in_flight, or raise "
                    "the limit of open files (`ulimit -n`), and run the same command again to resume."
                )
            else:
                fault = (Unreachable if isinstance(error, aiohttp.ClientConnectorError) else Fault)(message)
        if fault is not None:
            raise fault
        if status == 200:
            return self._parsed(content, headers, max_bytes)
        if 300 <= status < 400:
            raise EngineFatal(
                f"{server.url}/{path} redirects to {self._shown(headers.get('Location', 'an unknown address'))}. Redirects are "
                "not followed, because they would send the API key to another place. Pass the final URL."
            )
        said = _message(content)
        message = f"HTTP {status}: {self._shown(said)}"
        if status in PASSING or status >= 500:
            pause = headers.get("Retry-After", "").strip()
            raise Fault(message, float(pause) if pause.isdecimal() else 0.0)  # a date is ignored
        if status == 413 or status in (400, 422) and TOO_LONG.search(said):
            raise PrefixTooLong(f"{server.url}: {message}", _number(LIMIT, said), _number(PREFIX, said))
        kind = Rejected if status in (400, 422) else EngineFatal
        raise kind(f"{server.url}/{path} rejected the request. {message}")

    def _parsed(self, content: bytes, headers: Any, max_bytes: int) -> dict[str, Any]:
        """Return the JSON object in a response. Its strings are valid Unicode and do not contain the API key."""
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Fault(
                f"the response is compressed ({self._shown(headers['Content-Encoding'])}), although the request does not accept "
                "compression"
            )
        self.check_text(content.decode(errors="ignore"))
        if len(content) > max_bytes:
            raise Fault(f"the response has more than {max_bytes:,} bytes, which is too much for this request")
        try:
            value = parse_json(content, "the response")
        except ValueError as error:
            fault = Fault(self._shown(f"{error} It starts with {content[:1000].decode(errors='replace')}"))
        else:
            fault = None
        if fault is not None:
            raise fault
        if not isinstance(value, dict):
            raise Fault(f"the response is a JSON {type(value).__name__}, expected an object")
        level = [value]
        for _ in range(MAX_DEPTH):
            inner = [one for part in level for one in (part if isinstance(part, list) else [*part, *part.values()])]
            for text in inner:
                if isinstance(text, str):
                    self.check_text(text)
            level = [part for part in inner if isinstance(part, list | dict)]
            if not level:
                return value
        raise Fault(f"the response has more than {MAX_DEPTH} levels of nested lists and objects")

    def check_text(self, text: str) -> None:
        """Raise [`Fault`] if a text from a server is not valid Unicode or contains the API key."""
        if HALF_PAIR.search(text):
            raise Fault("the response contains half of a surrogate pair, which is not valid Unicode")
        if self.api_key and len(self.api_key) >= MIN_SECRET and self.api_key in text:
            raise Fault("the response contains the API key. The server must not repeat it")

    def _shown(self, text: str) -> str:
        """Return a text of a server or library on one line, shortened, and without the API key and control characters."""
        if self.api_key and len(self.api_key) >= MIN_SECRET:
            text = text.replace(self.api_key, "***")
        text = plain(text[: 2 * MAX_SHOWN])
        return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " ..."

    async def close(self) -> None:
        for server in self.servers:
            if server.test is not None:
                server.test.cancel()
        if self._session is not None:
            await self._session.close()


async def no_request(server: Server) -> None:
    """Function for [`HTTPClient.ask`] that only tests the server."""


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the body of a response, up to about `max_bytes` of it. The rest of a longer body is not read."""
    chunks, size = [], 0
    async for chunk in response.content.iter_chunked(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            response.close()
            break
    return b"".join(chunks)


def _is_local(error: BaseException) -> bool:
    """Return whether a connection failed because of a limit of this machine."""
    if getattr(error, "errno", None) in LOCAL_FAULTS:
        return True
    if isinstance(
        error, aiohttp.ClientConnectorError
    ):  # without file descriptors, a resolver reports that it knows no such name
        try:
            socket.socket().close()
        except OSError:
            return True
    return False


def _base_url(url: str) -> str:
    """Return the URL of a server without a trailing slash, with `/v1` if it has no path."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"The base URL of {parts.hostname} contains a user, a password, a query or a fragment. Remove it, and pass a key as "
            "`api_key`, or in the environment variable OPENAI_API_KEY."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"The base URL is {url!r}. It must be an HTTP URL, such as http://localhost:8000/v1.")
    return url.rstrip("/") if parts.path.strip("/") else url.rstrip("/") + "/v1"


def _message(content: bytes) -> str:
    """Return the error message of a response: OpenAI's `error.message`, FastAPI's `detail`, or the whole body."""
    whole = content[:MIN_BYTES].decode(errors="replace")
    try:
        value = parse_json(content, "the response")
    except ValueError:
        return whole
    if isinstance(value, dict):
        error = value.get("error")
        value = (error.get("message") if isinstance(error, dict) else error) or value.get("detail")
    return value if isinstance(value, str) else whole


def _number(pattern: re.Pattern, message: str) -> int | None:
    found = pattern.search(message)
    return int(found[1]) if found else None
