"""JSON Lines files: what a kill may leave behind, and which process may write."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from trl_hrm.io import AppendedLines


@pytest.mark.parametrize("torn", [b"", b"x", b"x" * (1 << 16), b"x" * ((1 << 17) + 1)])
@pytest.mark.parametrize("whole", [b"", b"1\n", b"2" * (1 << 16) + b"\n"])
def test_a_torn_line_is_dropped(tmp_path, whole, torn):
    """Works for a line of any length, because the file is searched backwards block by block."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(whole + torn)
    with AppendedLines(path) as lines:
        assert (lines.size, lines.torn) == (len(whole), len(torn))
        assert lines.append({"a": "ü"}) == '{"a": "ü"}\n'.encode()
        assert path.read_bytes() == whole + '{"a": "ü"}\n'.encode() and lines.size == path.stat().st_size
        lines.clear()
        lines.append(1)
    assert path.read_bytes() == b"1\n" and [file.name for file in tmp_path.iterdir()] == ["lines.jsonl"]


def test_a_killed_process_holds_no_lock(tmp_path):
    """Only the running process may write. After a kill, any process may, and the old lock file is removed."""
    path = tmp_path / "lines.jsonl"
    program = "import sys, time; from trl_hrm.io import AppendedLines; lines = AppendedLines(sys.argv[1]); lines.append(1); time.sleep(60)"
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], env=os.environ | {"PYTHONPATH": "."})
    while not path.exists() or not path.stat().st_size:
        time.sleep(0.01)
    with pytest.raises(
        BlockingIOError, match="lines.jsonl: another process is writing to this file. Wait for it or stop it"
    ):
        AppendedLines(path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1  # the lock file is hidden
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with AppendedLines(path) as lines:
        lines.append(2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["lines.jsonl"]
