"""Several processes publish at once, and one is killed."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from .publishing import build, commits_of, files_of, local, published, rows_of


pytestmark = pytest.mark.slow  # processes that import datasets
COMMAND = [sys.executable, "-m", "trl_hrm.cli", "push-dataset"]


def start(folder: Path, repo: str, **environ: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, str(folder), "--repo_id", repo],
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_four_processes_push_four_configurations(hub, repo, tmp_path):
    """With the datasets library's own push, one of the four succeeds and three fail."""
    views = ("tree", "hrm", "prm", "orm")
    folders = {view: build(tmp_path / view, view, word=f"{view} {repo}") for view in views}
    barrier = threading.Barrier(4)  # all four read the same head before the first commit
    hub.fault("POST", "/commit/", 0, times=4, delay=lambda: barrier.wait(120))
    begin = len(hub.log)
    pushes = [start(folder, repo) for folder in folders.values()]
    outputs = [push.communicate(timeout=240) for push in pushes]
    assert [push.returncode for push in pushes] == [0, 0, 0, 0], outputs
    refused = [r for r in hub.log[begin:] if "/commit/" in r["path"] and r["status"] == 412]
    assert len(refused) >= 3
    assert sum("committing: HfHubHTTPError: Client error '412" in errors for _, errors in outputs) == 3
    assert sorted(commits_of(repo)) == sorted([*(f"Push {view} with trl_hrm" for view in views), "initial commit"])
    for view, folder in folders.items():
        assert rows_of(published(repo, view, tmp_path)) == rows_of(local(folder))


@pytest.mark.parametrize("where", ["upload", "commit", "landed"])
def test_killed_in_the_middle(hub, repo, uses_xet, tmp_path, where):
    """What a killed push leaves behind must not be visible to readers or stop the next push."""
    upload = ("POST", "^/cas/v1/xorbs") if uses_xet else ("PUT", "^/_put/")
    assert start(build(tmp_path / "tree", word=f"old {repo}"), repo).wait(120) == 0
    old = rows_of(local(tmp_path / "tree"))
    before = files_of(repo)
    new = build(tmp_path / "new", word=f"new {repo}", rows=40)
    reached, killed = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        assert killed.wait(60)

    hub.fault(
        *(upload if where == "upload" else ("POST", "/commit/")),
        0 if where != "landed" else 504,
        delay=hold,
        after=where == "landed",
    )
    push = start(new, repo)
    assert reached.wait(120), push.communicate(timeout=10)
    os.kill(push.pid, signal.SIGKILL)
    push.wait(10)
    if where != "landed":
        hub.faults[0].drop = True  # the killed process does not send the rest
    killed.set()
    if where == "landed":
        wait_for(lambda: len(commits_of(repo)) == 3)
        assert rows_of(published(repo, "tree", tmp_path)) == rows_of(local(new))
    else:
        assert files_of(repo) == before
        assert rows_of(published(repo, "tree", tmp_path)) == old
    again = start(new, repo)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert ("nothing to send" in output) == (where == "landed")
    assert rows_of(published(repo, "tree", tmp_path)) == rows_of(local(new))
    assert commits_of(repo) == ["Push tree with trl_hrm", "Push tree with trl_hrm", "initial commit"]


def wait_for(is_true) -> None:
    turn = threading.Event()
    for _ in range(200):
        if is_true():
            return
        turn.wait(0.05)
    raise AssertionError("it did not come true")
