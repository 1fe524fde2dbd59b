"""
A loopback Hub for the tests in this folder, which need their own process: `pytest tests/hub`.

The Hub starts here because the client libraries read HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET when they are imported.
They transfer files with Xet by default, and with LFS if `TEST_HUB_XET=0`. Tests that depend on the transfer use the fixture
`uses_xet` and so have the mark `transfer`: only these tests run both ways. Every process has its own Hub.
"""

import os
import re
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from . import api, xet  # noqa: F401  their routes
from .server import Hub


assert "huggingface_hub" not in sys.modules, "run these tests alone: pytest tests/hub"

XET = os.environ.get("TEST_HUB_XET", "1") == "1"
_folder = tempfile.TemporaryDirectory(prefix="hub_")
_hub = Hub(
    Path(_folder.name) / "hub",
    tokens={"hf_alice": ("alice", "write"), "hf_bob": ("bob", "write"), "hf_ro": ("alice", "read")},
    organisations={"acme": ["alice"]},
).start()
os.environ.update(
    HF_ENDPOINT=_hub.base,
    HF_HOME=str(Path(_folder.name) / "home"),
    HF_TOKEN="hf_alice",
    HF_HUB_OFFLINE="0",
    HF_HUB_DISABLE_XET="" if XET else "1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
)
_getaddrinfo = socket.getaddrinfo


def _loopback_only(host, *args, **kwargs):
    # load_dataset also requests "datasets-server.<host of HF_ENDPOINT>": nothing leaves this machine
    if host not in ("127.0.0.1", "localhost", None):
        raise socket.gaierror(f"no network in tests: {host}")
    return _getaddrinfo(host, *args, **kwargs)


socket.getaddrinfo = _loopback_only


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "uses_xet" in item.fixturenames:
            item.add_marker("transfer")


@pytest.fixture(scope="session")
def uses_xet() -> bool:
    return XET


@pytest.fixture
def hub():
    """Return the Hub. A test fails if a fault never happened, a request has no handler, or a handler crashed."""
    _hub.faults.clear()
    _hub.crashes.clear()
    start = len(_hub.log)
    yield _hub
    idle = [(fault.method, fault.pattern) for fault in _hub.faults if not fault.fired]
    _hub.faults.clear()
    assert not idle, f"faults that never happened: {idle}"
    assert not _hub.crashes, "\n".join(_hub.crashes)
    # hf_xet tries newer routes of the store before it uses these
    unknown = [
        (request["method"], request["path"])
        for request in _hub.log[start:]
        if request["route"] is None and request["status"] == 404 and not request["path"].startswith("/cas/")
    ]
    assert not unknown, f"requests without a handler: {unknown}"


@pytest.fixture
def repo(request) -> str:
    """Return a name that no other test uses: nothing to clean up, and nothing in the client's cache."""
    return "alice/" + re.sub(r"\W+", "-", request.node.name).strip("-").lower()[:80]
