"""Fixtures for many test files."""

import datetime
import functools
import gc
import importlib.metadata
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from .browser import Browser, find_chromium
from .tools.fetch_real_model import place


signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower with more threads
# accelerate parses the metadata of PEFT several times in each training step
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


def pytest_collection_finish():
    """Take what is imported out of garbage collection. Each training ends with a collection, which would scan all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real files: `$TRL_HRM_SHARED_DATA`, by default `shared/data` next to the repository."""
    folder = Path(os.environ.get("TRL_HRM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder of real files at {folder}; set TRL_HRM_SHARED_DATA to one")
    return folder


@pytest.fixture(scope="session")
def real_folder():
    """
    Return a function that gives the folder of a real model or tokenizer, such as `smollm2` or `qwen3`. Only for tests marked `real_model`.

    If it was not downloaded, the test is skipped, or fails if `$TEST_REAL_MODELS` is 1 as in `make test-real`.
    """

    def find(name: str) -> Path:
        folder = place(name)
        if not folder.is_dir():
            message = f"{name} is not at {folder}; run `python tests/tools/fetch_real_model.py {name}`, or set TRL_HRM_REAL_MODELS"
            if os.environ.get("TEST_REAL_MODELS") == "1":
                pytest.fail(message)
            pytest.skip(message)
        return folder

    return find


FIXTURES = Path(__file__).parent / "fixtures"


# Each of the next three is a hand-written file of a public data set's format, and a real file where there is one.


@pytest.fixture(scope="session", params=["prm800k", "phase1_test"])
def prm800k(request) -> Path:
    if request.param == "prm800k":
        return FIXTURES / "prm800k.jsonl"
    return request.getfixturevalue("shared_data") / "prm800k" / "phase1_test.jsonl"


@pytest.fixture(scope="session", params=["gsm8k", "test"])
def gsm8k(request) -> Path:
    if request.param == "gsm8k":
        return FIXTURES / "gsm8k.jsonl"
    return request.getfixturevalue("shared_data") / "gsm8k" / "test.jsonl"


@pytest.fixture(scope="session", params=["openr", "math-aps-tree"])
def openr(request) -> Path:
    if request.param == "openr":
        return FIXTURES / "openr.jsonl"
    return request.getfixturevalue("shared_data") / "samples" / "math-aps-tree.jsonl"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that makes a folder once for all processes of `pytest -n`. Tests must not change the folder."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                unfinished = tmp_path_factory.mktemp(name)
                make(unfinished)
                unfinished.rename(root / name)
        return root / name

    return made


@pytest.fixture(scope="session")
def policy(made_once) -> str:
    """Folder of a tiny policy that has memorised `SOLUTIONS`."""
    from .search.policies import SOLUTIONS, make_policy

    return str(made_once("policy", lambda folder: make_policy(folder, 256, texts=SOLUTIONS)))


class GraderPool:
    """
    Grading workers that serve one grader after the other, because each new process imports SymPy.

    A worker ends with the thread that started it, so a thread of this pool starts all of them.
    """

    def __init__(self) -> None:
        self.starter = ThreadPoolExecutor(1)
        self.idle: dict[float, list[tuple]] = {}  # by timeout: the process and the connection to it

    def start(self, worker: Any, original: Callable) -> None:
        while self.idle.get(worker.timeout):
            worker.process, worker.connection = self.idle[worker.timeout].pop()
            if worker.process.is_alive():
                return
            worker.stop()
        self.starter.submit(original, worker).result()

    def keep(self, grader: Any) -> None:
        """Take the workers of a grader that is closed next, unless one is busy."""
        if grader._idle.qsize() == len(grader._workers):
            for worker in grader._workers:
                if worker.process is not None and worker.process.is_alive():
                    self.idle.setdefault(worker.timeout, []).append((worker.process, worker.connection))
                    worker.process = None


@pytest.fixture(scope="session")
def grader_pool() -> Iterator[GraderPool]:
    pool = GraderPool()
    yield pool
    for process, connection in sum(pool.idle.values(), []):
        process.kill()
        process.join()
        connection.close()
    pool.starter.shutdown()


@pytest.fixture(scope="module", autouse=True)
def shared_graders(grader_pool) -> Iterator[None]:
    """Graders share their workers. Tests of the workers define a fixture of this name that does nothing."""
    from trl_hrm.grading import grader

    start, leave = grader._Worker.start, grader.AnswerGrader.__exit__

    def leave_and_keep(self: grader.AnswerGrader, kind: type[BaseException] | None, *error: Any) -> None:
        self._threads.shutdown(wait=kind is None, cancel_futures=True)
        grader_pool.keep(self)
        leave(self, kind, *error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grader._Worker, "start", lambda worker: grader_pool.start(worker, start))
        patch.setattr(grader.AnswerGrader, "__exit__", leave_and_keep)
        yield


@pytest.fixture(scope="session")
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


@pytest.fixture
def trackers(monkeypatch) -> dict[str, Any]:
    """Replace trackio and wandb by a `Tracker`. Both have a current run."""
    from .fakes import Tracker  # imports huggingface_hub, which tests/hub must import first

    found = {name: Tracker(name, "run") for name in ("trackio", "wandb")}
    for name, tracker in found.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    return found
