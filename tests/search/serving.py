"""Run real servers in their own processes."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# No usage statistics, no progress bars, no compilation on the first request, no process that inherits threads of torch
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def serve(folder: Path, module: str, *args: str) -> Iterator[str]:
    """
    Run `python -m module args --port PORT` until the end of the block.

    Args:
        folder (`Path`):
            Folder for the log.
        module (`str`):
            Module to run.
        *args (`str`):
            Its arguments.

    Yields:
        `str`: The base URL, once the server answers.
    """
    port = _free_port()
    path = folder / f"{module}.log"
    # `transformers serve` lists the model cache and fails if it does not exist
    environment = os.environ | ENVIRONMENT | {"HF_HOME": str(folder / "home")}
    (folder / "home" / "hub").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *args, "--host", "127.0.0.1", "--port", str(port)]
    with open(path, "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", path)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(process: subprocess.Popen, url: str, log: Path, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    end = log.read_text(encoding="utf-8", errors="replace")[-5000:]
    raise AssertionError(f"{url} does not answer; exit code {process.poll()}. The end of its log:\n{end}")


def _end(process: subprocess.Popen) -> None:
    """Ask the server to stop, then kill all processes that it started."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
