"""Grade answers in worker processes, with a timeout per answer."""

import asyncio
import logging
import math
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from queue import SimpleQueue
from types import ModuleType
from typing import Any

from ..io import shown
from ..processes import holding_signals, start_worker
from .comparison import RULES_VERSION, Grade, judge


logger = logging.getLogger(__name__)

START_SECONDS = 300  # importing SymPy from a slow disk may take long
MAX_SHOWN = 10  # maximum number of unreadable references in a warning
ORPHAN_SECONDS = 10  # after the timeout; a living parent would have killed its worker by then
_main_lock = threading.Lock()
SELF_TEST = (("y+x", "x+y", True), ("y", "x", False))  # decided by math-verify, without the slow parts of SymPy


class GraderError(OSError):
    """The grader does not work, because a worker does not start or math-verify fails its self-test."""


class _Worker:
    """Process that grades one pair at a time. It is killed after the timeout, and restarted when needed."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.process = None

    def start(self) -> None:
        context = get_context("spawn")  # fork would copy the memory and the held locks of other threads
        self.connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.timeout, os.getpid()), daemon=True)
        with holding_signals(), _without_main():
            process.start()
        self.process = process
        theirs.close()
        try:
            ready = self.connection.poll(START_SECONDS) and self.connection.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.stop()
            raise GraderError(
                "A grading worker did not start. See its error message above. Check that math-verify is installed."
            )

    def judge(self, answer: str, reference: str) -> Grade:
        if self.process is None:
            self.start()
        try:
            self.connection.send((answer, reference))
            if self.connection.poll(self.timeout):
                return self.connection.recv()
            grade = Grade(None, "timeout")
        except (EOFError, OSError):
            grade = Grade(None, "died")
        self.stop()
        return grade

    def kill(self) -> None:
        """Kill the process. Another thread may be waiting for a grade."""
        process = self.process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


@contextmanager
def _without_main() -> Iterator[None]:
    """
    Context manager in which a process can be started that does not import the script that runs. Otherwise a training script without
    `if __name__ == "__main__":` would run again in the worker, and every worker would import torch.
    """
    with _main_lock:  # another thread would restore the wrong module
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _serve(connection: Any, timeout: float, parent: int) -> None:
    """Main loop of a worker process."""
    start_worker(parent)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are disabled
    import math_verify  # noqa: F401  (not within the timeout of the first answer)

    try:
        connection.send(True)
        while True:
            pair = connection.recv()
            _set_alarm(math.ceil(timeout) + ORPHAN_SECONDS)
            grade = judge(*pair)
            _set_alarm(0)
            connection.send(grade)
    except (EOFError, OSError):  # the parent is gone
        return


def _set_alarm(seconds: int) -> None:
    """End this process after some seconds (0 for never), because its parent may have been killed."""
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(seconds)


class AnswerGrader:
    r"""
    Grades answers in worker processes, with a timeout per answer. See [`judge`] for the rules.

    On an answer such as `9^{9^{9^9}}`, SymPy may run forever and ignore signals. The worker is then killed and replaced. Each
    distinct pair of answer and reference is graded only once, and all results are cached, including timeouts.

    Use it as a context manager. On entry, it grades a known right and a known wrong answer, because a broken installation of
    math-verify grades every answer as wrong. On exit, it waits for running grades, at most for one timeout.

    Args:
        num_workers (`int`, *optional*, defaults to `1`):
            Number of worker processes.
        timeout (`float`, *optional*, defaults to `10.0`):
            Timeout for grading an answer, in seconds.

    Raises:
        `ValueError`: If an option is out of range.
        `GraderError`: On entry, if the grader does not work. It is an `OSError`.
    """

    def __init__(self, num_workers: int = 1, timeout: float = 10.0):
        if num_workers < 1:
            raise ValueError(f"`num_workers` is {num_workers}. It must be at least 1.")
        if not timeout > 0:
            raise ValueError(f"`timeout` is {timeout}. It must be greater than 0 seconds.")
        self.num_workers = num_workers
        self.timeout = timeout
        self._futures: dict[tuple[str, str], Future[Grade]] = {}
        self._references: set[str] = set()
        self._num_asked = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "AnswerGrader":
        self._stopped = threading.Event()
        self._workers = [_Worker(self.timeout) for _ in range(self.num_workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="grader")
        try:
            for answer, reference, correct in SELF_TEST:
                grade = self._threads.submit(self._judge, answer, reference).result()
                if grade.correct is not correct:
                    raise GraderError(
                        f"math-verify {version('math-verify')} graded the answer {shown(answer)} to the reference {shown(reference)} as "
                        f"{grade}, expected correct={correct}. Its installation is broken, or the timeout of {self.timeout} s "
                        "is too short. Reinstall math-verify, or raise the timeout."
                    )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None:  # waiting for running grades would delay the end of a stopped command
            self._stopped.set()
            for worker in self._workers:
                worker.kill()
        self.close()

    def close(self) -> None:
        """Cancel pending grades, wait for running ones, stop the workers, and warn about unreadable references."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()
        references = self.unreadable_references()
        if references:
            some = ", ".join(map(shown, references[:MAX_SHOWN])) + ", ..." * (len(references) > MAX_SHOWN)
            logger.warning(
                f"{len(references):,} reference answers are unreadable, so answers to their problems are not graded: {some}. "
                "Write them as LaTeX, numbers or words."
            )

    def grade(self, answer: str, reference: str, is_reference: bool = True) -> Grade:
        """
        Grade one answer. See [`judge`] for the rules.

        Args:
            answer (`str`):
                Extracted answer.
            reference (`str`):
                Reference answer.
            is_reference (`bool`, *optional*, defaults to `True`):
                Whether `reference` is the reference answer of a problem. Set it to `False` to compare two extracted answers, so that
                an unreadable one is not reported as a reference.

        Returns:
            [`Grade`]
        """
        return self._submit(answer, reference, is_reference).result()

    async def agrade(self, answer: str, reference: str) -> Grade:
        """Grade one answer without blocking the event loop. See [`AnswerGrader.grade`]."""
        # shielded, because cancelling one waiter must not cancel the grade for the others
        return await asyncio.shield(asyncio.wrap_future(self._submit(answer, reference)))

    def counts(self) -> dict[str, int]:
        """
        Return the number of distinct pairs by status (`num_graded`, `num_unparseable`, `num_ungradable`, `num_timeouts`,
        `num_died`), and the number of reused grades (`num_cached`).
        """
        with self._lock:
            done = [future for future in self._futures.values() if future.done() and not future.cancelled()]
            cached = self._num_asked - len(self._futures)
        statuses = Counter(future.result().status for future in done if future.exception() is None)
        return {
            "num_graded": statuses["graded"],
            "num_unparseable": statuses["unparseable"],
            "num_ungradable": statuses["ungradable"],
            "num_timeouts": statuses["timeout"],
            "num_died": statuses["died"],
            "num_cached": cached,
        }

    def unreadable_references(self) -> list[str]:
        """Return the reference answers of all `"ungradable"` grades, in alphabetical order."""
        with self._lock:
            done = [
                (pair[1], future)
                for pair, future in self._futures.items()
                if pair[1] in self._references and future.done() and not future.cancelled()
            ]
        return sorted(
            {ref for ref, future in done if future.exception() is None and future.result().status == "ungradable"}
        )

    def describe(self) -> dict[str, Any]:
        """Return versions and timeout, for the manifest and the dataset card. `rules` is the version of this package's rules."""
        packages = ("math-verify", "latex2sympy2_extended", "sympy")
        return {"rules": RULES_VERSION, "timeout": self.timeout} | {name: version(name) for name in packages}

    def _submit(self, answer: str, reference: str, is_reference: bool = True) -> "Future[Grade]":
        pair = " ".join(answer.split()), " ".join(reference.split())
        with self._lock:
            self._num_asked += 1
            if is_reference:
                self._references.add(pair[1])
            if pair not in self._futures:
                self._futures[pair] = self._threads.submit(self._judge, *pair)
            return self._futures[pair]

    def _judge(self, answer: str, reference: str) -> Grade:
        worker = self._idle.get()
        try:
            grade = worker.judge(answer, reference)
            # retry once, because other processes may have used up the memory
            is_retried = grade.status == "died" and not self._stopped.is_set()
            return worker.judge(answer, reference) if is_retried else grade
        finally:
            self._idle.put(worker)
