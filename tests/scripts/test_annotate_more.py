"""The command `annotate --more_from`, from a finished run to a dataset, with a real engine on a tiny policy, and its errors."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset

from trl_hrm import AnnotateConfig, annotate
from trl_hrm.cli import main
from trl_hrm.search.nodes import read_trees
from trl_hrm.search.run_folder import node_files, read_manifest, read_summary, summary_warnings, unfinished_shards

from ..search.policies import KNOWN


PROMPT = {
    "engine": "transformers",
    "prompt": "question",
    "prompt_style": "plain",
    "segmentation": "step_header",
    "final_stops": ["# END!"],
    "max_in_flight": 24,
}
SEARCHES = {
    "full_tree": {"num_children": 3, "max_depth": 4, "max_step_tokens": 40},
    "rollouts": {"search": "rollouts", "num_solutions": 3, "num_completions": 2, "max_solution_tokens": 80},
    "puct": {"search": "puct", "num_completions": 3, "max_selections": 2, "max_solution_tokens": 80},
    "solutions": {"search": "rollouts", "num_solutions": 3, "num_completions": 0, "max_solution_tokens": 80},
}
NODES = "nodes-00000-of-00001.parquet"
LOG = "log-00000-of-00001.jsonl"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, policy) -> dict[str, Path]:
    """A finished run of each search."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in KNOWN))
    found = {}
    for name, options in SEARCHES.items():
        problems = {"problems": str(folder / "problems.jsonl"), "output_dir": str(folder / name)}
        annotate(AnnotateConfig(policy=policy, **problems, **PROMPT, **options))
        found[name] = folder / name
    return found


def more(policy, run, folder, number=40, **options):
    settings = {"more_samples": number, "num_completions": 4, **PROMPT, **options}
    return annotate(AnnotateConfig(more_from=str(run), policy=policy, output_dir=str(folder), **settings))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def trees_of(folder) -> dict:
    return {tree.problem.problem_id: tree for file in node_files(folder) for tree in read_trees(file)}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_can_be_continued(tmp_path, policy, runs, name, capsys):
    """The old run stays, and everything that reads runs reads the new one."""
    before = contents(runs[name])
    # the tiny policy rarely ends a solution of 2,048 tokens
    length = {"max_solution_tokens": 80} if name == "full_tree" else {}
    done = more(policy, runs[name], tmp_path / "more", **length)
    assert contents(runs[name]) == before
    assert done.progress.num_sequences == 40 and unfinished_shards(tmp_path / "more") == []
    old, new = trees_of(runs[name]), trees_of(tmp_path / "more")
    assert list(new) == list(old)
    nodes = [node for tree in new.values() for node in tree.nodes if node.role in ("step", "rollout")]
    assert len({node.seed for node in nodes}) == len(nodes)
    added = sum(len(tree.nodes) for tree in new.values()) - sum(len(tree.nodes) for tree in old.values())
    assert added == 40
    manifest = read_manifest(tmp_path / "more")
    assert manifest["search"] == read_manifest(runs[name])["search"] | {"max_solution_tokens": 80}
    assert manifest["more_from"]["samples"] + 40 == len(nodes)
    assert manifest["more_from"]["where"] == "uncertain" and manifest["more_from"]["more_samples"] == 40
    summaries = [read_summary(folder) for folder in (runs[name], tmp_path / "more")]
    assert summaries[1]["problems"] == summaries[0]["problems"]
    summary_warnings(summaries[1], manifest)
    for estimator in ("child_mean", "leaf_share"):
        rows = []
        for folder in (runs[name], tmp_path / "more"):
            out = str(tmp_path / f"{folder.name}-{estimator}")
            words = ["export", str(folder), "--estimator", estimator, "--view", "tree", "--output_dir", out]
            assert main([*words, "--num_proc", "1"]) == 0
            is_uneven = (name, estimator, folder.name) == ("full_tree", "leaf_share", "more")
            assert ("Use --estimator child_mean" in capsys.readouterr().out) == is_uneven
            rows.append({row["prompt"]: row for row in load_dataset(out, split="train")})
        assert rows[0].keys() == rows[1].keys()
        assert all(rows[0][key]["completions"] == rows[1][key]["completions"] for key in rows[0])
        changed = [key for key in rows[0] if rows[0][key]["labels"] != rows[1][key]["labels"]]
        assert changed and sum(sum(row["mc_total"]) for row in rows[1].values()) > 0


def test_views_and_commands_that_read_runs(tmp_path, policy, runs, capsys):
    """Node compression, candidates and the tree on a page."""
    more(policy, runs["full_tree"], tmp_path / "tree", max_solution_tokens=80)
    more(policy, runs["rollouts"], tmp_path / "rollouts")
    for name in ("tree", "rollouts"):
        words = ["export", str(tmp_path / name), "--view", "hrm", "--hnc", "--num_proc", "1"]
        assert main([*words, "--output_dir", str(tmp_path / f"{name}-data")]) == 0
        assert main(["inspect", str(tmp_path / name), "--problem", "0"]) == 0
    assert "rollouts" in capsys.readouterr().out
    words = ["--problems", str(runs["full_tree"].parent / "problems.jsonl"), "--policy", policy]
    flags = (
        "--engine transformers --prompt question --prompt_style plain --segmentation step_header --final_stops".split()
    )
    words = ["annotate", *words, "--output_dir", str(tmp_path / "x"), *flags, "# END!", "--search", "rollouts"]
    words += "--num_solutions 3 --num_completions 2 --max_solution_tokens 80 --dry_run --pilot".split()
    assert main([*words, str(runs["rollouts"])]) == 0
    assert main([*words, str(tmp_path / "rollouts")]) == 1
    assert "has additional rollouts" in capsys.readouterr().err


def test_the_words_of_the_command_line(tmp_path, policy, runs, capsys):
    words = ["annotate", "--more_from", str(runs["rollouts"]), "--where", "uncertain", "--more_samples", "9"]
    words += ["--policy", policy, "--output_dir", str(tmp_path / "run"), "--max_in_flight", "24"]
    flags = (
        "--engine transformers --prompt question --prompt_style plain --segmentation step_header --final_stops".split()
    )
    assert main([*words, *flags, "# END!", "--dry_run", "--tokens_per_second", "100"]) == 0
    printed = capsys.readouterr().out
    assert "8 of 9 rollouts, in 4 requests of 2" in printed
    assert "At most 640 sampled tokens in total: 0.00 GPU hours." in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith("  ")]
    assert sum(int(row[-1]) for row in rows if row[-1].isdigit()) == 8
    assert not (tmp_path / "run").exists()
    assert main([*words, *flags, "# END!"]) == 0
    assert "8 of 9 rollouts" in capsys.readouterr().out
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    old = [json.loads(line)["event"] for line in (runs["rollouts"] / LOG).read_text().splitlines()]
    assert Counter(events)["samples"] == Counter(old)["samples"] + 4
    # the other meaning of `where`
    assert AnnotateConfig(problems="a", policy=policy, output_dir="b", where=["level=5"]).where == {"level": "5"}


def test_settings_of_the_run_are_compared(tmp_path, policy, runs, capsys):
    """Other samples would estimate other probabilities."""
    for options, message in (
        ({"temperature": 0.5}, "engine.temperature was 1.0 and is 0.5"),
        ({"segmentation": "blank_line"}, "steps.name was"),
        ({"extractors": ["boxed"]}, "extractors was"),
        ({"final_stops": ["END!"]}, "prompt.final_stops was"),
        ({"max_solution_tokens": 81}, "`max_solution_tokens` is 81, but the rollouts of"),
        ({"number": 3}, "`more_samples` is 3. It must be at least 4"),
        ({"accept_changes": ["grader.timeout"]}, "did not change"),
    ):
        with pytest.raises(ValueError, match=message):
            more(policy, runs["rollouts"], tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()
    more(policy, runs["rollouts"], tmp_path / "run", temperature=0.5, accept_changes=["engine.temperature"])
    manifest = read_manifest(tmp_path / "run")
    assert [change["name"] for change in manifest["accepted_changes"]] == ["engine.temperature"]
    assert "mixes different policies" in " ".join(summary_warnings(read_summary(tmp_path / "run"), manifest))
    # a run that continues this one is a mixture, too
    more(policy, tmp_path / "run", tmp_path / "next", temperature=0.5, seed=7)
    assert read_manifest(tmp_path / "next")["accepted_changes"] == manifest["accepted_changes"]
    assert read_manifest(tmp_path / "next")["seed"] == 7


def test_resumed_byte_for_byte(tmp_path, policy, runs):
    """A run that was killed after any event, or while its log was copied, gives the same files."""
    more(policy, runs["rollouts"], tmp_path / "whole")
    log = (tmp_path / "whole" / LOG).read_bytes()
    copied = sum(line.count(b"\n") for line in [(runs["rollouts"] / LOG).read_bytes()]) - len(KNOWN)
    lines = log.splitlines(keepends=True)
    for number in (0, copied + 1, copied + 5, len(lines) - 1):
        shutil.copytree(tmp_path / "whole", tmp_path / f"cut-{number}")
        for name in (NODES, "summary-00000-of-00001.json"):
            (tmp_path / f"cut-{number}" / name).unlink()
        path = tmp_path / f"cut-{number}" / LOG
        if number:
            path.write_bytes(b"".join(lines[:number]) + lines[number][:7])
        else:
            path.rename(path.with_name(f".{LOG}.123"))  # as a killed copy leaves it
        more(policy, runs["rollouts"], tmp_path / f"cut-{number}")
        assert (tmp_path / f"cut-{number}" / NODES).read_bytes() == (tmp_path / "whole" / NODES).read_bytes()
        assert not path.with_name(f".{LOG}.123").exists()


def test_a_changed_run_is_not_resumed(tmp_path, policy, runs, capsys):
    shutil.copytree(runs["rollouts"], tmp_path / "source")
    more(policy, tmp_path / "source", tmp_path / "run")
    for options, message in (
        ({"number": 44}, "more_from.more_samples was 40 and is 44"),
        ({"where": "uniform"}, 'more_from.where was "uncertain" and is "uniform"'),
        ({"num_completions": 5}, "more_from.num_completions was 4 and is 5"),
        ({"seed": 1}, "seed was 42 and is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            more(policy, tmp_path / "source", tmp_path / "run", **options)
    shutil.copytree(tmp_path / "source", tmp_path / "moved")
    more(policy, tmp_path / "moved", tmp_path / "run")  # the same content at another path
    problems = str(tmp_path / "problems.jsonl")
    Path(problems).write_text(json.dumps({"id": "new", "problem": "What is 1 - 1 + 7?", "answer": "7"}) + "\n")
    options = PROMPT | SEARCHES["rollouts"]
    annotate(AnnotateConfig(problems=problems, policy=policy, output_dir=str(tmp_path / "source"), **options))
    with pytest.raises(ValueError, match="more_from.digest was"):
        more(policy, tmp_path / "source", tmp_path / "run")
    with pytest.raises(ValueError, match="different settings: more_from.digest"):
        annotate(AnnotateConfig(problems=problems, policy=policy, output_dir=str(tmp_path / "run"), **options))
    with pytest.raises(ValueError, match="different settings: more_from.digest"):
        more(policy, tmp_path / "moved", tmp_path / "source")


def test_shards_of_a_continued_run(tmp_path, policy, runs):
    for shard in range(2):
        more(policy, runs["rollouts"], tmp_path / "two", shard=f"{shard}/2")
    more(policy, runs["rollouts"], tmp_path / "one")
    assert trees_of(tmp_path / "two") == trees_of(tmp_path / "one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"more_samples": None}, "`more_from` requires `more_samples`"),
        ({"where": "widest"}, "`where` is 'widest'. With `more_from`, it must be one of uncertain, uniform"),
        ({"where": ["level=5"]}, "`where` is 'level=5'"),
        ({"problems": "p.jsonl"}, "`problems` is 'p.jsonl', but `more_from` has the problems and the search"),
        ({"limit": 3}, "`limit` is 3"),
        ({"search": "full_tree"}, "`search` is 'full_tree'"),
        ({"num_children": 3}, "`num_children` is 3"),
        ({"max_tokens": 3}, "`max_tokens` is 3"),
        ({"root_filter": 3}, "`root_filter` is 3"),
        ({"pilot": "run", "dry_run": True}, "`pilot` is 'run'"),
        ({"num_completions": 0}, "`num_completions` is 0"),
        ({"temperature": 0}, "`temperature` is 0, so all samples after the same prefix would be the same"),
        ({"output_dir": "a/../run"}, "the run `more_from`"),
        ({"policy": None}, "`policy` is missing"),
        ({"more_from": None}, "`more_samples` requires `more_from`"),
        ({"more_from": None, "more_samples": None, "where": "uncertain"}, "`where` is uncertain, which requires"),
    ],
)
def test_options_that_do_not_fit(options, message):
    settings = {"more_from": "run", "more_samples": 8, "policy": "p", "engine": "transformers", "output_dir": "out"}
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        AnnotateConfig(**(settings | options))


def test_a_folder_without_a_run(tmp_path, policy):
    with pytest.raises(FileNotFoundError, match="manifest.json does not exist"):
        more(policy, tmp_path / "nothing", tmp_path / "run")
    assert not (tmp_path / "run").exists()
