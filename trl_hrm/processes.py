"""Processes that end when they should: workers with their parent, and a command on Ctrl-C and SIGTERM."""

import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any, TextIO


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
KILL = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL  # on Windows, SIGTERM kills
GRACE_SECONDS = 4.0  # from the signal to the end of the process, below the 10 seconds of `docker stop`
_PR_SET_PDEATHSIG = 1
_PROGRESS = re.compile(r"(\d+)/(\d+) \[")  # of tqdm's bars, which every job prints
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(parent: int, number: int = KILL) -> None:
    """
    Send this process a signal when its parent ends, even if the parent is killed.

    On Linux, the kernel sends the signal, so that it also ends a process that computes without running Python code. It does so as soon as
    the thread that started this process ends. On other systems, a thread checks the parent.

    Args:
        parent (`int`):
            Process id of the parent.
        number (`int`, *optional*):
            Signal to send. By default, it ends this process at once.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), number)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def start_worker(parent: int) -> None:
    """
    Set up a worker process: it ends with its parent, and Ctrl-C and SIGTERM do nothing, because the parent, which often gets them at the
    same time, stops its workers. Call it first in the process, which was started in [`holding_signals`].
    """
    end_with_parent(parent)
    for number in STOP_SIGNALS:
        # Unlike `SIG_IGN`, a function is not inherited by programs that the worker starts
        signal.signal(number, lambda *_: None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def holding_signals() -> Iterator[None]:
    """
    Hold signals back while worker processes are started. The workers hold them back until [`start_worker`]. Otherwise Ctrl-C prints a
    traceback of the imports of each worker.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Workers(ProcessPoolExecutor):
    """
    `ProcessPoolExecutor` whose processes end with this process, even if it is killed, and at once when an exception leaves the `with`
    block.

    Args:
        num_workers (`int`):
            Number of processes.
        start_method (`str`):
            `"fork"` or `"spawn"`.
        remedy (`str`):
            What to do if a worker was killed, for the error message.
        setup (`Callable`, *optional*):
            Function that each worker calls first.
        *args:
            Arguments of `setup`.

    Raises:
        `ChildProcessError`: At the end of the `with` block, if a worker was killed. It is an `OSError`.
    """

    def __init__(
        self, num_workers: int, start_method: str, remedy: str, setup: Callable | None = None, *args: Any
    ) -> None:
        super().__init__(
            num_workers, get_context(start_method), initializer=_start, initargs=(os.getpid(), setup, args)
        )
        self.remedy = remedy

    def submit(self, *args: Any, **options: Any) -> Future:
        with holding_signals():  # this starts processes
            return super().submit(*args, **options)

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None:
            for process in list((self._processes or {}).values()):  # `kill_workers` of Python 3.14
                process.kill()
        self.shutdown(cancel_futures=True)
        if kind is not None and issubclass(kind, BrokenProcessPool):
            raise ChildProcessError(
                f"A worker process was killed, probably because the memory is used up. {self.remedy}"
            ) from None


def _start(parent: int, setup: Callable | None, args: tuple) -> None:
    start_worker(parent)
    if setup is not None:
        setup(*args)


@contextmanager
def printed_to(file: TextIO) -> Iterator[None]:
    """Redirect all output of this process, including C code and child processes, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def share_done(log: Path) -> float:
    """Return the progress of a job from the last progress bar in its log. With several bars, progress restarts at each."""
    if not log.exists():
        return 0.0
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        found = _PROGRESS.findall(file.read().decode(errors="replace"))
    return min(int(found[-1][0]) / max(int(found[-1][1]), 1), 0.99) if found else 0.0


def run_logged(
    pool: Workers,
    stage: str,
    jobs: Mapping[str, Callable[[], Any]],
    folder: Path,
    num_finished: int = 0,
    finish: Callable[[str, Any], None] | None = None,
) -> dict[str, BaseException]:
    """
    Run independent jobs in parallel processes of one thread each, with a progress bar. All jobs are run, even if some fail.

    Args:
        pool ([`Workers`]):
            Processes.
        stage (`str`):
            Name for the progress bar and the folder of the logs.
        jobs (`Mapping[str, Callable]`):
            Jobs by name: calls of functions that another process can import.
        folder (`Path`):
            `logs/STAGE/NAME.log` in this folder has what a job prints. Logs of earlier runs are replaced.
        num_finished (`int`, *optional*, defaults to `0`):
            Number of jobs of the stage that are already finished, for the progress bar.
        finish (`Callable[[str, Any], None]`, *optional*):
            Called in this process with the name and the result of each job that succeeded.

    Returns:
        `dict[str, BaseException]`: Exceptions of the failed jobs by name.
    """
    from tqdm import tqdm

    logs = {name: folder / "logs" / stage / f"{name}.log" for name in jobs}
    for log in logs.values():
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)  # the bar would show its progress
    total, failed = num_finished + len(jobs), {}
    running = {pool.submit(_run_job, job, logs[name]): name for name, job in jobs.items()}
    form = "{desc} {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
    with tqdm(
        total=total, initial=num_finished, desc=f"{stage:<16}", bar_format=form, leave=False, disable=None
    ) as bar:
        while running:
            done, _ = wait(running, timeout=0.5)
            for future in done:
                name, error = running.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):  # of all jobs
                    raise error
                if error:
                    failed[name] = error
                elif finish:
                    finish(name, future.result())
            bar.n = total - len(running) + sum(share_done(logs[name]) for name in running.values())
            bar.set_postfix_str(f"{total - len(running)} of {total} jobs")
    return failed


def _run_job(job: Callable[[], Any], log: Path) -> Any:
    import torch

    torch.set_num_threads(1)
    with open(log, "w", encoding="utf-8") as file, printed_to(file):
        try:
            return job()
        except BaseException:
            traceback.print_exc()
            raise


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StopSignals:
    """
    Stops this process on Ctrl-C, SIGTERM (sent by Slurm, systemd and Docker) and SIGHUP (sent when a terminal closes). Create it once, in
    the main thread, at the start of a program that this package owns.

    SIGTERM and SIGHUP do what Ctrl-C does: raise `KeyboardInterrupt`, or cancel the task that `asyncio.run` runs. If the process has not
    ended after `GRACE_SECONDS`, for example because it waits for a thread, or if Ctrl-C is pressed again, it exits without further cleanup.
    Forked processes, such as the workers of a data loader, end with this process.

    Attributes:
        received (`int` or `None`):
            The first signal.
    """

    def __init__(self):
        self.received: int | None = None
        self._message = ""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` ignores SIGHUP, and SIGINT has Python's handler
                signal.signal(number, self._interrupt)
        # The C-level handler writes each signal to this socket, even if the main thread is busy outside of Python
        self._numbers, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._before_fork, after_in_child=self._after_fork)
        sys.unraisablehook = self._interrupt_again
        # Finalizers run in reverse order: temporary folders are deleted first
        weakref.finalize(self, self._leave)

    @property
    def exit_code(self) -> int:
        """Exit code of the stopped process, as in a shell: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + (self.received or signal.SIGINT)

    @contextmanager
    def ending(self, message: str = "") -> Iterator[None]:
        """
        Context manager of the program. After a signal, it raises `KeyboardInterrupt`, even if cleanup has failed with another exception.
        `message` is printed if the process ends without further cleanup, before the end of the block. Code that handles the signals itself,
        as the launcher of several training processes does, raises `KeyboardInterrupt(number)`.
        """
        self._message = f"\n{message}\n" if message else ""
        try:
            yield
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and error.args:
                self.received = self.received or error.args[0]
            if self.received is None:
                raise
            raise KeyboardInterrupt from None
        finally:
            self._message = ""

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        on_ctrl_c = signal.getsignal(signal.SIGINT)
        if callable(on_ctrl_c):  # of `asyncio.run` while it runs
            on_ctrl_c(number, frame)
        else:  # shells ignore SIGINT in programs that they start in the background
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """Exit `GRACE_SECONDS` after the first signal, or at once if Ctrl-C follows it."""
        first = self._next_signal()
        self.received = self.received or first
        timer = threading.Timer(GRACE_SECONDS, self._exit)
        timer.daemon = True
        timer.start()
        while self._next_signal() != signal.SIGINT:
            pass
        self._exit()

    def _next_signal(self) -> int:
        """Wait for a signal that other code, such as `enable_jit_checkpoint` of the Trainer, does not handle."""
        while True:
            number = self._numbers.recv(1)[0]
            if number == signal.SIGINT or number in STOP_SIGNALS and signal.getsignal(number) == self._interrupt:
                return number

    def _exit(self) -> None:
        os.write(2, self._message.encode())
        os._exit(self.exit_code)

    def _leave(self) -> None:
        """Skip the destruction of all modules, which takes seconds on a busy machine, and in which no thread can exit."""
        if self.received is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.exit_code)

    def _interrupt_again(self, unraisable: Any) -> None:
        """Python ignores an exception that a handler raises in `__del__` or in a hook of a fork. Send the signal again after it."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))  # a second SIGINT would exit at once
            again.daemon = True
            again.start()
        else:
            sys.__unraisablehook__(unraisable)

    def _before_fork(self) -> None:
        self._parent = os.getpid()

    def _after_fork(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == self._interrupt:
                signal.signal(number, signal.SIG_DFL)
        if sys.platform == "linux":
            end_with_parent(self._parent)
