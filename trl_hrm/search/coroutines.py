"""Coroutines in ordinary functions."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """
    Run a coroutine and return its result, as `asyncio.run` does, but also while an event loop is running, as in a notebook.

    In that case the coroutine runs in a thread with its own event loop. If the notebook is interrupted, the coroutine is
    cancelled.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    started: Future = Future()

    async def run() -> Any:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    def cancel(future: Future) -> None:
        loop, task = future.result()
        loop.call_soon_threadsafe(task.cancel)

    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(asyncio.run, run()).result()
        except KeyboardInterrupt:
            started.add_done_callback(cancel)
            raise
