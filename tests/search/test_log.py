"""The event log, the manifest, and the folder of a run."""

import json
import re
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


def first(events, name, **having):
    """Return the index of the first event of a kind that has some values."""
    return next(
        i
        for i, event in enumerate(events)
        if event["event"] == name and all(event.get(key) == value for key, value in having.items())
    )


def change(name, key, value, **having):
    """Return a change of one key of the first event of a kind, or of its first sample."""

    def apply(events):
        event = events[first(events, name, **having)]
        (event["samples"][0] if key in (*event.get("samples", [{}])[0], "cuts") else event)[key] = value

    return apply


def final(events):
    """Return the index of the first grades of an answer."""
    return next(
        i
        for i, event in enumerate(events)
        if event["event"] == "grades" and any(c is not None for c in event["correct"])
    )


FAULTS = {
    "an unknown event": (change("samples", "event", "sample"), "expected an event of a search"),
    "a status for no position": (change("problem", "position", "open"), "its position is 'open', expected a whole number"),
    "a negative position": (change("problem", "position", -1), "its position is None"),
    "a null prompt": (change("problem", "prompt", None), "`prompt` is None"),
    "a missing answer": (lambda events: events[first(events, "problem")].pop("answer"), "`answer` is missing"),
    "a prefix without its steps": (change("problem", "prefix", "Step"), "a prefix without prefix_cuts and prefix_ids"),
    "an unknown key": (change("samples", "colour", "red"), "`colour` is not a known key"),
    "a problem twice": (lambda events: events.append(events[first(events, "problem")]), "the problem begins twice"),
    "samples twice": (
        lambda events: events.insert(first(events, "samples") + 1, events[first(events, "samples")]),
        "is sampled twice in round 0",
    ),
    "an event after the end": (
        lambda events: events.insert(first(events, "close") + 1, events[first(events, "close")]),
        r"an event follows the end of the search \(done\)",
    ),
    "an unknown status": (change("close", "status", "finished"), "its status is 'finished', expected one of open, done"),
    "a token id of 2^31": (change("samples", "token_ids", [1, 2**31]), r"`samples\[0\].token_ids\[1\]` is 2147483648"),
    "a negative token id": (change("samples", "token_ids", [-1]), r"`samples\[0\].token_ids\[0\]` is -1"),
    "a token id that is true": (change("samples", "token_ids", [True]), r"`samples\[0\].token_ids\[0\]` is True"),
    "a weight of NaN": (change("samples", "weight", float("nan")), "not valid JSON .*'NaN' is not a finite number"),
    "a weight of 0": (change("samples", "weight", 0), "`weight` is 0"),
    "an unknown finish": (change("samples", "finish", "end"), r"`samples\[0\].finish` is 'end'"),
    "an unknown role": (change("samples", "role", "leaf"), "`role` is 'leaf'"),
    "a seed out of range": (change("samples", "seed", 2**63 - 1), "`seed` is 9223372036854775807"),
    "a tail beyond the text": (change("samples", "tail", 10**6), r"`samples\[0\].tail` is 1000000, but its text has"),
    "another parent": (change("samples", "above", "0123456789abcdef"), "'0123456789abcdef', but no earlier event created it"),
    "grades of other samples": (change("grades", "above", "0123456789abcdef"), "no earlier event created them"),
    "too few grades": (lambda events: events[first(events, "grades")]["correct"].pop(), "has 2 values of `correct`, but .* 3 samples"),
    "a grade of 1": (change("grades", "correct", [1, None, None]), r"`correct\[0\]` is 1"),
    "a grade without an answer": (
        lambda events: events[final(events)].update(correct=[True] * 3),
        "grades the sample .*, which has no answer",
    ),
    "grades twice": (
        lambda events: events.insert(first(events, "grades") + 1, events[first(events, "grades")]),
        "are graded twice",
    ),
    "missing grades": (
        lambda events: events.pop(first(events, "grades")),
        "the search ended, but the samples of '.*' have no grades",
    ),
    "scores of other samples": (
        lambda events: events.insert(
            first(events, "samples") + 1, {**events[first(events, "grades")], "event": "scores", "scores": [0.5]}
        ),
        "`correct` is not a known key",
    ),
    "cuts out of order": (change("samples", "cuts", [[1, 2, 0], [0, 1, 0]]), "is out of order"),
    "cuts that end early": (change("samples", "cuts", [[1, 1, 0]]), "the cuts end after 1 tokens and 1 characters, but there are"),
    "a cut of two numbers": (change("samples", "cuts", [[1, 2]]), r"`samples\[0\].cuts\[0\]\[2\]` is missing"),
    "no cuts": (change("samples", "cut", True), r"`samples\[0\]` has no `cuts`"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS)
def test_damaged_events(tmp_path, fault, words):
    """Each is one line with the file, the number of the line, the problem and the remedy."""
    run_scripted(tmp_path, problems=make_problems(4))
    path = tmp_path / LOG
    before = path.read_text().splitlines()
    events = [json.loads(line) for line in before]
    fault(events)
    lines = [json.dumps(event, ensure_ascii=False) for event in events]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=words) as error, EventLog(path) as log:
        for problem_id in log.problems:
            log.read(problem_id)
    found = re.fullmatch(r"(.*):(\d+): (problem '(p\d+)': )?.*searched again\.", str(error.value))
    assert found and found[1] == str(path)
    number = int(found[2])
    changed = next((i for i, (old, new) in enumerate(zip(before, lines, strict=False)) if old != new), len(before))
    assert number > changed and found[4] in (None, json.loads(lines[number - 1])["problem_id"])


def test_step_searches_check_scores(tmp_path):
    """Scores that are repeated, missing or of other samples would rank other paths than the search did."""
    event = {"problem_id": "p", "above": "r", "round": 0}
    sample = {"token_ids": [1], "text": "a", "num_cached": 0, "finish": "eos", "stop_reason": None, "is_final": True}
    samples = event | {"event": "samples", "role": "step", "cut": False, "weight": 1.0, "seed": 0, "samples": [sample]}
    problem = {
        "event": "problem",
        "problem_id": "p",
        "position": 0,
        "root_id": "r",
        "prompt": "?",
        "answer": "7",
        "prompt_ids": [],
    }
    scores = {"event": "scores"} | event
    for added, words in (
        ([scores | {"scores": [0.5]}] * 2, "are scored twice"),
        ([scores | {"scores": [0.5, 0.5]}], "has 2 values of `scores`, but the request has 1 samples"),
        ([scores | {"scores": ["0.5"]}], r"`scores\[0\]` is '0.5'"),
        ([scores | {"scores": [None], "round": 1}], "no earlier event created them"),
    ):  # fmt: skip
        (tmp_path / LOG).write_text(
            "".join(json.dumps(one) + "\n" for one in (problem, {"event": "samples"} | samples, *added))
        )
        with EventLog(tmp_path / LOG) as log, pytest.raises(ValueError, match=rf"{LOG}:\d: problem 'p': .*{words}"):
            log.read("p")
