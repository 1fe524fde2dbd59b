"""Recompute every exported label from the event log with plain code that shares nothing with the package."""

import json
import math
import random
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from datasets import load_dataset

from trl_hrm.cli import main
from trl_hrm.io import write_json
from trl_hrm.search.tree import make_id

from ..search.scripted import SEARCHES, make_problems, run_scripted, write_solution


def unique(prefix: str, rng: random.Random) -> str:
    """The scripted policy with unique values, so that no two siblings are united."""
    return re.sub(r"is \d", lambda match: f"is {rng.random()}", write_solution(prefix, rng))


@pytest.fixture(scope="module", params=["full_tree", "narrow", "rollouts"])
def run(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    run_scripted(
        folder, SEARCHES[request.param], make_problems(12), script=unique, latency=lambda rng: rng.random() / 500
    )
    write_json(folder / "manifest.json", {"engine": {"model": "scripted"}, "search": {"search": request.param}})
    return folder


def read_events(run: Path) -> dict[str, list[dict]]:
    """Return the lines of the log by problem."""
    events: dict[str, list[dict]] = {}
    for line in next(run.glob("log-*.jsonl")).read_text().splitlines():
        event = json.loads(line)
        events.setdefault(event["problem_id"], []).append(event)
    return events


def texts_of(text: str) -> tuple[str, ...]:
    """Return the steps of a solution so far."""
    return tuple(piece.strip() for piece in re.split(r"(?=# Step \d)", text) if piece.strip())


def recompute(events: list[dict], estimator: str, truncated: str) -> dict[tuple[str, ...], float | None]:
    """Return the score of each step, by the texts of the steps up to it."""
    asked = {}
    for event in events:
        if event["event"] == "samples":
            asked[event["above"]] = event
    grades = {e["above"]: e["correct"] for e in events if e["event"] == "grades"}

    def leaf(sample, correct):
        return correct if sample["is_final"] and sample.get("answer") is not None else None

    def leaves(node_id):
        """Return the outcomes of all leaves below, and the weighted mean, recursively."""
        event = asked[node_id]
        outcomes, total, weights = [], 0.0, 0.0
        names = [make_id(node_id, event["round"], i) for i in range(len(event["samples"]))]
        thinned = any(name in asked and asked[name]["weight"] > 1 for name in names)
        for name, sample, correct in zip(names, event["samples"], grades[node_id], strict=True):
            weight = 1.0
            if name in asked:
                below, mean = leaves(name)
                weight = asked[name]["weight"]
            elif thinned and sample["finish"] == "stop" and not sample["is_final"]:
                continue
            else:
                below = [leaf(sample, correct)]
                mean = None if below[0] is None and truncated == "drop" else float(bool(below[0]))
            outcomes += below
            if mean is not None:
                total, weights = total + weight * mean, weights + weight
        return outcomes, total / weights if weights else None

    def score(outcomes, mean):
        if estimator == "child_mean":
            return mean
        counted = [o for o in outcomes if o is not None] if truncated == "drop" else outcomes
        return sum(bool(o) for o in counted) / len(counted) if counted else None

    root = next(e["root_id"] for e in events if e["event"] == "problem")
    found: dict[tuple[str, ...], float | None] = {}

    def visit(node_id, text):
        event = asked[node_id]
        for i, sample in enumerate(event["samples"]):
            name, whole = make_id(node_id, event["round"], i), text + sample["text"]
            own = [leaf(sample, grades[node_id][i])]
            mean = None if own[0] is None and truncated == "drop" else float(bool(own[0]))
            if event["role"] == "rollout":
                if not event["cut"]:
                    continue
                steps = texts_of(whole)
                for k in range(1, len(steps)):
                    segment = make_id("segment", name, k)
                    found[steps[:k]] = score(*leaves(segment)) if segment in asked else None
                found[steps] = score(own, mean)
            elif name in asked:
                found[texts_of(cut_header(whole))] = score(*leaves(name))
                visit(name, whole)
            else:
                siblings = [make_id(node_id, event["round"], k) for k in range(len(event["samples"]))]
                left_out = sample["finish"] == "stop" and not sample["is_final"]
                left_out = left_out and any(s in asked and asked[s]["weight"] > 1 for s in siblings)
                found[texts_of(cut_header(whole))] = None if left_out else score(own, mean)

    visit(root, "")
    return found


def cut_header(text: str) -> str:
    """Remove the header of the next step, which ended this one."""
    return re.sub(r"# Step \d+$", "", text)


LABELS = {
    "soft": lambda p: p,
    "hard": lambda p: float(p > 0),
    "entropy": lambda p: math.log(1 + p * (math.e**2 - 1)) / 2,
}


@pytest.mark.parametrize("labels", list(LABELS))
@pytest.mark.parametrize(("estimator", "truncated"), [("child_mean", "drop"), ("leaf_share", "wrong")])
def test_labels_match_the_log(tmp_path, run, labels, estimator, truncated):
    output = tmp_path / "data"
    command = [
        "export",
        str(run),
        "--output_dir",
        str(output),
        "--view",
        "tree",
        "--labels",
        labels,
        "--num_proc",
        "1",
    ]
    command += ["--estimator", estimator, "--truncated", truncated, *(["--eta", "2"] if labels == "entropy" else [])]
    assert main([*command, "--test_size", "0"]) == 0
    expected = {name: recompute(events, estimator, truncated) for name, events in read_events(run).items()}
    compared = 0
    for row in load_dataset(str(output), split="train"):
        scores = expected[row["problem_id"]]
        paths: list[tuple[str, ...]] = []
        for text, label, parent in zip(row["completions"], row["labels"], row["parents"], strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), text))
            score = scores.pop(paths[-1])
            assert (label is None) == (score is None)
            if score is not None:
                assert label == pytest.approx(LABELS[labels](score), abs=1e-6)  # float32
                compared += 1
        assert not scores, "steps of the log that are not exported"
    assert compared > 60


def test_a_full_disk_leaves_no_dataset(tmp_path, run):
    """Half a Parquet file with the name of the output would load, or fail much later."""
    program = textwrap.dedent(
        """
        import resource, signal, sys
        import trl_hrm.cli
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
        sys.exit(trl_hrm.cli.main(sys.argv[1:]))
        """
    )
    output = tmp_path / "data"
    command = ["export", str(run), "--output_dir", str(output), "--num_proc", "1"]
    main([*command[:-2], "--output_dir", str(tmp_path / "warm"), "--num_proc", "1"])  # write the node files first
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    result = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert result.returncode == 1 and "error:" in result.stderr and "too large" in result.stderr, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["warm"]
    assert main(command) == 0
