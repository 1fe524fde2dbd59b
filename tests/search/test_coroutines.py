"""A notebook calls the functions of this package while its event loop is running."""

import asyncio
import signal
import threading

import pytest

from trl_hrm.search.coroutines import run_coroutine


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


def test_without_a_running_loop():
    assert run_coroutine(answer()) == 42


def in_running_loop(function):
    """Call a function as a cell of a notebook does: the event loop runs in the main thread, without the SIGINT handler of `asyncio.run`."""

    async def cell():
        return function()

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(cell())
    finally:
        loop.close()


def test_in_a_running_loop():
    assert in_running_loop(lambda: run_coroutine(answer())) == 42


def test_an_error_in_a_running_loop_is_raised():
    async def fail():
        raise ValueError("no such problem")

    with pytest.raises(ValueError, match="no such problem"):
        in_running_loop(lambda: run_coroutine(fail()))


def test_an_interrupt_in_a_running_loop_cancels_the_coroutine():
    """Otherwise an interrupted search would keep sampling until it is finished."""
    cancelled = []

    async def interrupted():
        await asyncio.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(KeyboardInterrupt):
        in_running_loop(lambda: run_coroutine(interrupted()))
    assert cancelled == [True]
