"""Trees of a run in trackers: exact rows, the pages that are chosen, and runs of commands."""

import json
import os
import random
import subprocess
import sys

import pytest

from trl_hrm.cli import main
from trl_hrm.search import tree_table
from trl_hrm.search.nodes import read_trees
from trl_hrm.search.run_folder import node_files
from trl_hrm.search.tree_table import TreeRow, log_trees, tree_row
from trl_hrm.tracking import check_trackers

from ..helpers import save_checkpoint
from .policies import KNOWN
from .random_trees import rollout_tree
from .trees import tree_of


RIGHT, WRONG = {"answer": "3", "correct": True}, {"answer": "4", "correct": False}
STEPS = (
    "--engine transformers --prompt question --prompt_style plain --segmentation step_header --max_depth 2 "
    "--max_step_tokens 40 --limit 3"
).split()
OPTIONS = [*STEPS, "--num_children", "2"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in KNOWN))
    return str(path)


@pytest.fixture(scope="module")
def run(made_once, policy, problems):
    """A run of three problems."""

    def make(folder):
        command = ["annotate", "--problems", problems, "--policy", policy, "--output_dir", str(folder / "run")]
        assert main([*command, *OPTIONS]) == 0

    return made_once("tree_table_run", make) / "run"


def test_rows():
    """The solved share counts solutions, while the score of a first step is the mean of its children."""
    tree = tree_of(
        (-1, "A", {}),  # 0: mean of 1.0 and 0.5
        (0, "right", RIGHT),
        (0, "more", {}),
        (2, "right", RIGHT),
        (2, "wrong", WRONG),
        (-1, "wrong", WRONG),
        (-1, "cut", {"finish": "length"}),
        prompt="What\nis 1 + 2?",
    )
    assert tree_row(tree, "tree_1") == TreeRow(
        problem_id="p1",
        problem="What is 1 + 2?",
        status="done",
        solved_share=0.5,
        num_solutions=4,
        num_steps=7,
        num_tokens=21,
        first_steps="0.75 0.00 –",
        page="tree_1",
    )
    assert tree_row(tree_of())._asdict() | {"problem": ""} == {
        **{"problem_id": "p1", "problem": "", "status": "done", "solved_share": None},
        **{"num_solutions": 0, "num_steps": 0, "num_tokens": 0, "first_steps": "", "page": ""},
    }


def test_rollouts_are_not_steps():
    """Solutions of `rollouts` and of a root filter are children of the prompt, next to its first steps."""
    tree = rollout_tree(random.Random(0), num_solutions=3)
    row = tree_row(tree)
    assert row.num_steps == sum(node.role == "segment" for node in tree.nodes) < len(tree.nodes)
    assert len(row.first_steps.split()) == 3
    filtered = tree_of(
        (-1, "the whole", RIGHT | {"role": "rollout"}),
        (-1, "the other", WRONG | {"role": "rollout"}),
        (-1, "A", RIGHT),
    )
    assert (tree_row(filtered).first_steps, tree_row(filtered).num_steps) == ("1.00", 1)


def test_a_run(run, trackers, monkeypatch):
    """Pages show the problems that are nearest to one half, in the order of the table, and a run of the program stays open."""
    monkeypatch.setattr(tree_table, "NUM_PAGES", 2)
    log_trees({"n-2/": run}, ["trackio", "wandb"], "project")
    [values] = trackers["trackio"].logged
    assert trackers["wandb"].logged == [values] and not trackers["wandb"].runs
    assert trackers["wandb"].run == "run"
    rows = [tree_row(tree) for file in node_files(run) for tree in read_trees(file)]
    assert len(rows) == 3
    kind, columns, found = values["n-2/trees"]
    assert (kind, columns) == ("table", list(TreeRow._fields))
    assert [row[:-1] for row in found] == [list(row[:-1]) for row in rows]
    distances = {row.problem_id: abs(row.solved_share - 0.5) for row in rows}
    shown = [row[0] for row in found if row[-1]]
    assert max(distances[name] for name in shown) <= min(distances[name] for name in distances.keys() - shown)
    assert [row[-1] for row in found if row[-1]] == ["n-2/tree_1", "n-2/tree_2"]
    for row in found:
        if row[-1]:
            kind, page, inject = values[row[-1]]
            assert (kind, inject) == ("html", False)
            assert f'"id":{json.dumps(row[0])}' in page
    assert values.keys() == {"n-2/trees", "n-2/tree_1", "n-2/tree_2"}


def test_a_long_table(run, trackers, monkeypatch, capsys):
    monkeypatch.setattr(tree_table, "MAX_PROBLEMS", 1)
    log_trees({"": run}, ["trackio"], "project")
    assert len(trackers["trackio"].logged[0]["trees"][2]) == 1
    assert "the first 1 of 3 problems" in capsys.readouterr().out


def test_annotate(tmp_path, policy, problems, trackers, monkeypatch, capsys):
    """A run in shards is logged once, when the last shard is finished. The command starts a run and ends it."""
    for tracker in trackers.values():
        tracker.run = None
    command = ["annotate", "--problems", problems, "--policy", policy, "--output_dir", str(tmp_path / "run"), *OPTIONS]
    command += ["--report_to", "trackio", "--project", "p", "--run_name", "r"]
    assert main([*command, "--shard", "1/2"]) == 0
    assert not trackers["trackio"].runs and "Missing: 0" in capsys.readouterr().out
    assert main([*command, "--shard", "0/2"]) == 0
    [settings] = trackers["trackio"].runs
    assert (settings["project"], settings["name"], settings["resume"]) == ("p", "r", "allow")
    assert settings["config"]["search"]["search"] == "full_tree"
    assert trackers["trackio"].run is None and not trackers["wandb"].runs
    [values] = trackers["trackio"].logged
    assert len(values["trees"][2]) == 3
    for shard in ("0/2", "1/2"):  # as after a crash: each shard finds that nothing is left to do
        assert main([*command, "--shard", shard]) == 0
        assert "already logged" in capsys.readouterr().out
    assert len(trackers["trackio"].logged) == 1
    other = [*command, "--shard", "0/2", "--run_name", "other"]
    with monkeypatch.context() as patch:
        patch.setattr(trackers["trackio"], "init", lambda **settings: (_ for _ in ()).throw(OSError("no network")))
        assert main(other) == 1
    assert main(other) == 0  # a failure does not count as logged
    assert len(trackers["trackio"].logged) == 2


def test_step_search(tmp_path, policy, problems, trackers):
    """One run has the trees of each N."""
    for tracker in trackers.values():
        tracker.run = None
    command = [
        "step-search",
        "--problems",
        problems,
        "--policy",
        policy,
        "--reward_model",
        save_checkpoint(tmp_path / "model"),
    ]
    command += [
        "--output_dir",
        str(tmp_path / "out"),
        *STEPS,
        "--n",
        "2",
        "1",
        "--report_to",
        "trackio",
        "--run_name",
        "r",
    ]
    assert main(command) == 0
    [settings] = trackers["trackio"].runs
    assert settings["name"] == "r" and settings["config"]["search"]["search"] == "step_search"
    assert trackers["trackio"].run is None and not trackers["wandb"].runs
    [values] = trackers["trackio"].logged
    for n in (1, 2):
        found = [TreeRow(*row) for row in values[f"n-{n}/trees"][2]]
        expected = [
            tree_row(tree)
            for file in node_files(tmp_path / "out" / f"n-{n}")
            for tree in read_trees(file, token_ids=True)
        ]
        assert [row._replace(page="") for row in found] == expected and len(found) == 3
        assert all(row.page in ("", *values) for row in found)


def test_errors(tmp_path, policy, problems, monkeypatch, capsys):
    """A missing tracker is found before anything is sampled."""
    monkeypatch.setattr("trl_hrm.tracking.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        check_trackers(["wandb"])
    command = ["annotate", "--problems", problems, "--policy", policy, "--output_dir", str(tmp_path / "run"), *OPTIONS]
    assert main([*command, "--report_to", "trackio"]) == 1
    assert "pip install trackio" in capsys.readouterr().err and not (tmp_path / "run").exists()
    for option in ("--project", "--run_name"):
        assert main([*command, option, "x"]) == 1
        assert "`report_to`" in capsys.readouterr().err


@pytest.mark.slow
def test_trackio(run, tmp_path):
    """The table and the pages are in trackio's local database."""
    pytest.importorskip("trackio", reason="needs trackio; `make test-slow` installs it")
    script = (
        "import json, sys; from trl_hrm.search.tree_table import log_trees; "
        "log_trees({'': sys.argv[1]}, ['trackio'], 'trees', 'run'); "
        "from trackio.sqlite_storage import SQLiteStorage as storage; "
        "print(json.dumps(storage.get_logs('trees', 'run'), default=str))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRACKIO_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(run)], env=env, capture_output=True, text=True, check=True
    )
    [entry] = json.loads(done.stdout.splitlines()[-1])
    rows = [tree_row(tree) for file in node_files(run) for tree in read_trees(file)]
    for row, found in zip(rows, entry["trees"]["_value"], strict=True):
        assert found | {"page": ""} == row._asdict()
        assert found["page"] and entry[found["page"]]["_type"].startswith("trackio.")
