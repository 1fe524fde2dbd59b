"""The event log, the manifest, and the folder of a run."""

import json
import resource
import subprocess
import sys
import textwrap

import pytest

from trl_hrm.search.log import EventLog
from trl_hrm.search.run_folder import check_manifest

from .scripted import make_problems, run_scripted


LOG = "log-00000-of-00001.jsonl"


def test_torn_line_is_dropped_with_a_warning(tmp_path):
    """A kill leaves half a line. Without its line break, even valid JSON may be incomplete."""
    run_scripted(tmp_path)
    whole = (tmp_path / LOG).read_bytes()
    lines = whole.splitlines(keepends=True)
    for torn in (lines[-1][:-1], lines[-1][: len(lines[-1]) // 2], b"{"):
        (tmp_path / LOG).write_bytes(b"".join(lines[:-1]) + torn)
        with EventLog(tmp_path / LOG) as log:
            assert log.torn == len(torn) and log.size == len(whole) - len(lines[-1])
        assert (tmp_path / LOG).read_bytes().endswith(torn)  # reading must not change the file
        with EventLog(tmp_path / LOG, write=True) as log:
            assert log.torn == len(torn)
        assert (tmp_path / LOG).read_bytes() == b"".join(lines[:-1])


def test_damage_in_the_middle_is_an_error(tmp_path):
    """Dropping it like a torn last line would silently lose a problem."""
    run_scripted(tmp_path)
    lines = (tmp_path / LOG).read_bytes().splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(b"".join([*lines[:3], b"\0\0\0\n", *lines[3:]]))
    with pytest.raises(ValueError, match=r"jsonl:4: found b.*expected an event"):
        EventLog(tmp_path / LOG)
    head = lines[3][:60]
    (tmp_path / LOG).write_bytes(b"".join([*lines[:3], head + b"\n", *lines[4:]]))
    with (
        EventLog(tmp_path / LOG) as log,
        pytest.raises(ValueError, match=r"jsonl:4: problem 'p0.*not valid JSON"),
    ):
        for problem_id in log.problems:
            log.read(problem_id)


def test_events_that_refer_to_nothing_are_an_error(tmp_path):
    """A line removed by hand must give an error that says what to do, not a KeyError."""
    run_scripted(tmp_path)
    lines = (tmp_path / LOG).read_bytes().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if b'"problem"' in line[:20])
    (tmp_path / LOG).write_bytes(b"".join(lines[:first] + lines[first + 1 :]))
    with pytest.raises(ValueError, match="Remove all lines of this problem"):
        EventLog(tmp_path / LOG)
    first = next(i for i, line in enumerate(lines) if b'"samples"' in line[:20])
    name = json.loads(lines[first])["problem_id"]
    (tmp_path / LOG).write_bytes(b"".join(lines[:first] + lines[first + 1 :]))
    with (
        EventLog(tmp_path / LOG) as log,
        pytest.raises(ValueError, match="no earlier event"),
    ):
        log.read(name)


def test_ids_with_any_characters(tmp_path):
    """The index reads ids without parsing the line, so quotes, braces and backslashes must not confuse it."""
    names = ['a"b', "a\\", 'x", "status": "done', "ü🎲", "line\nbreak", ""]
    with EventLog(tmp_path / LOG, write=True) as log:
        for i, name in enumerate(names):
            problem = {"root_id": "r", "prompt": "p", "answer": "7", "prompt_ids": []}
            log.append({"event": "problem", "problem_id": name, "position": i} | problem)
        log.append({"event": "close", "problem_id": names[2], "status": "done"})
    with EventLog(tmp_path / LOG) as log:
        assert [(p.position, p.status) for p in log.problems.values()] == [
            (i, "done" if i == 2 else "open") for i in range(len(names))
        ]
        assert [log.read(name).tree.problem.problem_id for name in names] == names


def test_one_writer_at_a_time(tmp_path):
    """Two processes on one log would interleave their lines."""
    with EventLog(tmp_path / LOG, write=True):
        with pytest.raises(BlockingIOError):
            EventLog(tmp_path / LOG, write=True)
    EventLog(tmp_path / LOG, write=True).close()
    assert [path.name for path in tmp_path.iterdir()] == [LOG]  # no lock is left behind


def test_full_disk_raises_and_the_log_stays_usable(tmp_path):
    """A failed write may leave half a line. It must raise, and must not damage later lines."""
    program = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        from tests.search.scripted import run_scripted
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        run_scripted(Path(sys.argv[1]))
        """
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    folder = tmp_path / "full"
    result = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert result.returncode and "a line could not be written (File too large)" in last
    assert "run the same command again to resume" in last and str(folder / LOG) in last
    assert result.stderr.count("Traceback") == 2  # only the error and its cause, nothing from other requests
    assert 4000 < (folder / LOG).stat().st_size <= 5000
    assert (folder / LOG).read_bytes().endswith(b"\n")
    run_scripted(folder)
    run_scripted(tmp_path / "whole")
    assert sorted(map(len, (folder / LOG).read_bytes().splitlines())) == sorted(
        map(len, (tmp_path / "whole" / LOG).read_bytes().splitlines())
    )


def test_every_event_is_flushed(tmp_path):
    """A kill loses buffered text, so each line must reach the file when it is appended."""
    with EventLog(tmp_path / LOG, write=True) as log:
        for i, (_, problem) in enumerate(make_problems(3)):
            event = {"event": "problem", "problem_id": problem.problem_id, "position": i, "root_id": "r"}
            log.append(event | {"prompt": "p", "answer": "7", "prompt_ids": []})
            assert (tmp_path / LOG).read_bytes().count(b"\n") == i + 1


def test_manifest(tmp_path):
    """Restarting with another temperature would mix two policies in one tree."""
    first = {
        "engine": {"model": "a", "temperature": 1.0},
        "seed": 1,
        "versions": {"x": "1"},
        "started_with": {"problems": "a"},
    }
    check_manifest(tmp_path / "run", first)
    text = (tmp_path / "run" / "manifest.json").read_text()
    assert json.loads(text) == first
    check_manifest(tmp_path / "run", first | {"versions": {"x": "2"}, "started_with": {"problems": "b"}})
    assert (tmp_path / "run" / "manifest.json").read_text() == text
    second = {"engine": {"model": "a", "temperature": 0.5, "top_p": 0.9}, "seed": 2}
    with pytest.raises(ValueError) as error:
        check_manifest(tmp_path / "run", second)
    for part in (
        "engine.temperature was 1.0 and is 0.5",
        "engine.top_p was null and is 0.9",
        "seed was 1 and is 2",
        "another --output_dir",
    ):
        assert part in str(error.value)
    assert "versions" not in str(error.value) and "engine.model" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["manifest.json"]
