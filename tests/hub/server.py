"""
A local Hugging Face Hub for tests: real git commits, LFS, Xet, tokens, faults on demand.

It answers the requests that the client libraries send to push and load. Checked with huggingface_hub 2.4, hf_xet 1.8,
datasets 5.2 and transformers 5.23. Quotas, organisation roles, gated repositories and TLS are missing. Only the
YAML of a card is checked.

    python -m tests.hub.server 8765     # prints the variables that make the client libraries use it
"""

import json
import re
import secrets
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from .repository import Repository


class HubError(Exception):
    """An error response, with the headers that clients read to choose their exception."""

    def __init__(self, status: int, message: str = "", code: str | None = None, body=None, headers=None):
        self.status, self.body = status, body or {"error": message}
        named = {"X-Error-Message": message, "X-Error-Code": code}
        self.headers = {name: value for name, value in named.items() if value} | (headers or {})


@dataclass
class Fault:
    """
    A false answer to requests whose method and path match.

    After `skip` matches, answer `status` `times` times (0: the real answer, after the delay). `after`: do the work, and
    lose the answer. `drop`: cut the connection. `delay`: seconds, or a function that returns when the answer may go.
    """

    method: str
    pattern: str
    status: int = 500
    times: int = 1
    skip: int = 0
    after: bool = False
    drop: bool = False
    delay: float | Callable[[], Any] = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    seen: int = 0

    @property
    def fired(self) -> int:
        return max(self.seen - self.skip, 0)

    def matches(self, method: str, path: str) -> bool:
        left = self.seen < self.skip + self.times
        return left and self.method == method and re.search(self.pattern, path) is not None


class Hub:
    """
    The state of the Hub and its server.

    Args:
        root (`Path`):
            Folder for git repositories, LFS objects by sha256, Xet xorbs and file recipes.
        tokens (`dict[str, tuple[str, str]]`):
            User and role (`"write"` or `"read"`) of each token.
        organisations (`dict[str, list[str]]`, *optional*):
            Members of each organisation.
        page (`int`, *optional*, defaults to `1000`):
            Number of tree entries per response.
    """

    def __init__(
        self,
        root: Path,
        tokens: dict[str, tuple[str, str]],
        organisations: dict[str, list[str]] | None = None,
        page: int = 1000,
    ):
        self.root, self.tokens, self.organisations, self.page = Path(root), tokens, organisations or {}, page
        self.lock = threading.RLock()
        self.log: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.crashes: list[str] = []  # of the server itself, which a client's retry would hide
        self.signature = secrets.token_hex(8)  # signs the URLs of the storage
        for folder in ("lfs", "xorbs", "files"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def start(self, port: int = 0) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("BoundRequest", (Request,), {"hub": self}))
        self.server.daemon_threads = True
        # Two host names, as for the Hub and its storage: the client must not send its token to the storage
        self.base, self.storage = (f"http://{host}:{self.server.server_port}" for host in ("127.0.0.1", "localhost"))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method: str, pattern: str, status: int = 500, **options: Any) -> Fault:
        """Add a fault to the answers from now on. See [`Fault`]."""
        fault = Fault(method, pattern, status, **options)
        self.faults.append(fault)
        return fault

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.matches(method, path):
                    fault.seen += 1
                    return fault if fault.fired else None
        return None

    def count(self, method: str, pattern: str, since: int = 0) -> int:
        """Return how many requests of the log match, from entry `since` on."""
        return sum(r["method"] == method and re.search(pattern, r["path"]) is not None for r in self.log[since:])

    def url(self, repository: Repository) -> str:
        folder = "" if repository.kind == "model" else repository.kind + "s/"
        return f"{self.base}/{folder}{repository.name}"

    def lfs(self, oid: str) -> Path:
        return self.root / "lfs" / oid


@dataclass(frozen=True)
class Route:
    methods: list[str]
    pattern: re.Pattern
    answer: Callable[..., int]
    access: str | None  # None, "read" or "write" on the repository that the path names


ROUTES: list[Route] = []


def route(methods: str, pattern: str, access: str | None = None):
    """Register a function `(request, **groups of the pattern)` as the answer to a request."""

    def register(answer):
        ROUTES.append(Route(methods.split("|"), re.compile(pattern), answer, access))
        return answer

    return register


class Request(BaseHTTPRequestHandler):
    """Handle one request: find its user and repository, and answer."""

    protocol_version = "HTTP/1.1"
    timeout = 120
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass  # `hub.log` records it

    def handle_any(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.role = None
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.entry = {
            "method": self.command,
            "path": path,
            "status": 0,
            "size": len(self.body),
            "user": None,
            "route": None,
            "auth": "Authorization" in self.headers,
        }
        self.hub.log.append(self.entry)  # before the answer, because a test may read the log as soon as it arrives
        fault = self.hub.next_fault(self.command, path)
        try:
            if fault is None:
                self.dispatch(path)
            else:
                self.answer_falsely(fault, path)
        except HubError as error:
            self.reply(error.status, error.body, error.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except Exception:
            self.hub.crashes.append(f"{self.command} {path}\n{traceback.format_exc()}")
            raise

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    @property
    def user(self) -> str | None:
        return self.entry["user"]

    def answer_falsely(self, fault: Fault, path: str) -> int:
        if callable(fault.delay):
            fault.delay()
        else:
            time.sleep(fault.delay)
        if fault.after:
            self.reply = lambda *args, **kwargs: 0
            try:
                self.dispatch(path)
            finally:
                del self.reply
        if fault.drop:
            self.connection.shutdown(2)
            self.close_connection = True
            return 0
        if fault.status:
            body = fault.body or {"error": f"injected {fault.status}"}
            raise HubError(fault.status, body=body, headers=fault.headers)
        return self.dispatch(path)

    def dispatch(self, path: str) -> int:
        authorization = self.headers.get("Authorization")
        if authorization and not path.startswith(("/cas/", "/_")):
            known = self.hub.tokens.get(authorization.removeprefix("Bearer ").strip(), (None, None))
            self.entry["user"], self.role = known
            if not self.user:  # with any other text the client reports a missing repository
                raise HubError(401, "Invalid credentials in Authorization header")
        for known in ROUTES:
            match = known.pattern.fullmatch(path)
            if match and self.command in known.methods:
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                self.entry["route"] = known.answer.__name__
                if known.access:
                    access = "write" if groups.get("what") == "write" else known.access
                    self.open(groups.pop("kind", "model"), groups.pop("name"), access)
                return known.answer(self, **groups)
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def owns(self, namespace: str) -> bool:
        return self.user is not None and (
            self.user == namespace or self.user in self.hub.organisations.get(namespace, ())
        )

    def open(self, kind: str, name: str, access: str) -> None:
        self.repository = repository = Repository(self.hub.root, kind, name)
        if not repository.exists or (repository.facts["private"] and not self.owns(repository.owner)):
            # over http the client needs the error code to understand a 401
            status, message = (404, "Repository not found") if self.user else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        if access == "write":
            self.need_write(repository.owner, f"you do not have write access to {kind} {name} with this token")

    def need_write(self, namespace: str, refusal: str) -> None:
        if not self.user:
            raise HubError(401, "Invalid username or password.")
        if self.role != "write" or not self.owns(namespace):
            raise HubError(403, refusal)

    def commit_id(self, revision: str) -> str:
        found = self.repository.commit_id(revision)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def reply(self, status: int, body: Any = b"", headers: dict[str, Any] | None = None) -> int:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if raw is body else "application/json"
        self.entry["status"] = status
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(raw), **(headers or {})}.items():
            self.send_header(name, " ".join(str(value).split()))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else raw)
        return status

    def span(self, size: int) -> tuple[int, int] | None:
        """Return the first and one past the last requested byte, or `None` for the whole file."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return None
        first, last = match.groups()
        begin = int(first) if first else max(size - int(last), 0)
        end = min(int(last) if first and last else size - 1, size - 1) + 1
        if begin >= end:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        return begin, end

    def content(self, data: bytes, headers: dict[str, Any]) -> int:
        span = self.span(len(data))
        headers = {"Accept-Ranges": "bytes", **headers}
        if span is None:
            return self.reply(200, data, headers)
        begin, end = span
        return self.reply(206, data[begin:end], headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})


def main() -> None:
    from . import api, xet  # noqa: F401  their routes

    hub = Hub(Path(tempfile.mkdtemp(prefix="hub_")), {"hf_me": ("me", "write")}).start(int(sys.argv[1]))
    print(f"export HF_ENDPOINT={hub.base} HF_TOKEN=hf_me  # {hub.root}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    # import it as a module of its package, so that the routes register with this copy
    from tests.hub import server

    server.main()
