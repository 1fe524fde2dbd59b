"""Grading in worker processes, each answer under a deadline."""

import asyncio
import logging
import math
import signal
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from queue import SimpleQueue
from typing import Any

from .comparison import RULES_VERSION, Grade, judge


logger = logging.getLogger(__name__)

START_SECONDS = 300  # a worker imports SymPy, which may lie on a slow disk
MAX_SHOWN = 10  # references that cannot be read
ORPHAN_SECONDS = 10  # past the deadline, when a parent would long have killed its worker
SELF_TEST = (("y+x", "x+y", True), ("y", "x", False))  # pairs that math-verify decides, without SymPy's slow parts


class GraderError(OSError):
    """The grader does not work: its worker does not start, or math-verify judges a known pair wrongly."""


class _Worker:
    """A process that judges one pair at a time. It is killed when it takes too long, and started anew when needed."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.process = None

    def start(self) -> None:
        context = get_context("spawn")  # a fork would copy locks that other threads hold, and what they have in memory
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.timeout), daemon=True)
        self.process.start()
        theirs.close()
        try:
            ready = self.connection.poll(START_SECONDS) and self.connection.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.stop()
            raise GraderError(
                "a grading worker did not start; its own message stands above. Is math-verify installed, and does a "
                'script that starts a grader do so under `if __name__ == "__main__":`?'
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

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _serve(connection: Any, timeout: float) -> None:
    """What a worker runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends its workers
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off
    import math_verify  # noqa: F401  (so that the first deadline does not pay for it)

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
    """End this process after so many seconds, 0 for never: its parent may have been killed while it computes."""
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(seconds)


class AnswerGrader:
    r"""
    Grades answers in worker processes, each answer under a deadline. See [`judge`] for the rules.

    SymPy may compute forever on an answer such as `9^{9^{9^9}}`, out of reach of signals: the worker is then killed and
    replaced. Each distinct pair of answer and reference is graded once, also when it is asked for again while it is
    being graded, and whatever came out, timeouts included.

    It is a context manager; on entering, a known right and a known wrong answer are graded, since a broken install of
    math-verify calls every answer wrong. Leaving it waits for the answers that are being graded, for one deadline at most.

    Args:
        num_workers (`int`, *optional*, defaults to `1`):
            Number of worker processes.
        timeout (`float`, *optional*, defaults to `10.0`):
            Seconds that one answer may take.

    Raises:
        `ValueError`: If an option is out of range.
        `GraderError`: On entering, if the grader does not work. It is an `OSError`.
    """

    def __init__(self, num_workers: int = 1, timeout: float = 10.0):
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}, expected 1 or more.")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}, expected a number of seconds above 0.")
        self.num_workers = num_workers
        self.timeout = timeout
        self._futures: dict[tuple[str, str], Future[Grade]] = {}
        self._num_asked = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "AnswerGrader":
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
                        f"math-verify {version('math-verify')} judged {answer!r} against {reference!r} as {grade}, "
                        f"expected correct={correct}. Its install is broken, or the machine too slow for a timeout of "
                        f"{self.timeout} s: install math-verify anew, or raise the timeout."
                    )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Cancel pending grades, wait for running ones, end the workers, and warn of references that cannot be read."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()
        references = self.unreadable_references()
        if references:
            shown = ", ".join(map(repr, references[:MAX_SHOWN])) + ", ..." * (len(references) > MAX_SHOWN)
            logger.warning(
                f"{len(references):,} reference answers cannot be read, and no answer to their problems is graded: {shown}. "
                "Write them as LaTeX, numbers or words."
            )

    def grade(self, answer: str, reference: str) -> Grade:
        """
        Grade one answer. A reference that is not correct against itself cannot be read. See [`judge`].

        Args:
            answer (`str`):
                The answer.
            reference (`str`):
                The right answer.

        Returns:
            [`Grade`]
        """
        return self._submit(answer, reference).result()

    async def agrade(self, answer: str, reference: str) -> Grade:
        """Grade one answer, as [`AnswerGrader.grade`] does, without blocking the event loop."""
        # Shielded: cancelling one of those who wait must not cancel the others' grade.
        return await asyncio.shield(asyncio.wrap_future(self._submit(answer, reference)))

    def counts(self) -> dict[str, int]:
        """
        How many distinct pairs were `num_graded`, `num_unparseable`, `num_ungradable`, `num_timeouts`, `num_died`, and
        how many times an earlier grade was given again, `num_cached`.
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
                (pair[1], future) for pair, future in self._futures.items() if future.done() and not future.cancelled()
            ]
        return sorted(
            {ref for ref, future in done if future.exception() is None and future.result().status == "ungradable"}
        )

    def describe(self) -> dict[str, Any]:
        """Return what decides the grades, for the manifest and the dataset card: `rules` is the version of our own rules."""
        packages = ("math-verify", "latex2sympy2_extended", "sympy")
        return {"rules": RULES_VERSION, "timeout": self.timeout} | {name: version(name) for name in packages}

    def _submit(self, answer: str, reference: str) -> "Future[Grade]":
        pair = " ".join(answer.split()), " ".join(reference.split())
        with self._lock:
            self._num_asked += 1
            if pair not in self._futures:
                self._futures[pair] = self._threads.submit(self._judge, *pair)
            return self._futures[pair]

    def _judge(self, answer: str, reference: str) -> Grade:
        worker = self._idle.get()
        try:
            grade = worker.judge(answer, reference)
            # It may have been ended for want of memory that others took: once more.
            return worker.judge(answer, reference) if grade.status == "died" else grade
        finally:
            self._idle.put(worker)
