"""Fixtures for many test files."""

import datetime
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from .browser import Browser, find_chromium


signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower with more threads


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real files: `$TRL_HRM_SHARED_DATA`, by default `shared/data` next to the repository."""
    folder = Path(os.environ.get("TRL_HRM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder of real files at {folder}; set TRL_HRM_SHARED_DATA to one")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """A headless Chromium."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium found; install one (Debian: apt-get install chromium) or set CHROMIUM to its path")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a page. At the end of the test, check that it made no request and reported no error."""
    file = tmp_path / "page.html"

    def show(text: str, width: int = 1280, height: int = 900, dark: bool = False) -> Browser:
        file.write_text(text, encoding="utf-8")
        browser.show(width, height, dark)
        browser.open(file)
        return browser

    yield show
    asked = [address for address in browser.requests if not address.startswith("data:")]
    assert asked == [file.absolute().as_uri()] and browser.errors == []


@pytest.fixture
def on_day(monkeypatch):
    """Return a function that sets the clock of chat templates."""
    from transformers.utils import chat_template_utils

    def set_clock(day: str) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(f"{day}T13:14:15")

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_clock
