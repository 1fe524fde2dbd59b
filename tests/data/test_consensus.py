"""Consensus of Monte Carlo and a judge: kept solutions and labels against a slow reference, planted noise, and the report."""

import random
import re
import shlex
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from trl_hrm import JudgeConfig, judge
from trl_hrm.cli import main
from trl_hrm.data.export import export
from trl_hrm.data.export_config import ExportConfig
from trl_hrm.data.verdicts import read_verdicts
from trl_hrm.intervals import wilson_interval
from trl_hrm.io import write_json
from trl_hrm.search.tree import ROOT, SearchTree
from trl_hrm.step_tree import StepTree

from ..scoring.judges import Judge
from ..search.random_trees import add_node, empty_tree, end, random_tree, rollout_tree, slow_leaves, slow_score
from .judged_runs import write_run, write_verdicts


def build(tmp_path: Path, *runs: Path, **options) -> tuple[list[dict], dict]:
    """Export runs with a consensus. Return the rows and the report."""
    options = {"consensus": True, "test_size": 0, "num_proc": 1, "overwrite": True} | options
    report = export(ExportConfig(inputs=list(map(str, runs)), output_dir=str(tmp_path / "out"), **options))
    return pq.read_table(tmp_path / "out" / "data" / "train-00000-of-00001.parquet").to_pylist(), report


# A slow reference that shares nothing with the package but the scores of single nodes


def slow_groups(tree: SearchTree) -> dict[tuple[str, ...], list[int]]:
    """Return the nodes of each united step, by the texts from the first step on."""
    groups = defaultdict(list)
    for i, node in enumerate(tree.nodes):
        if node.role != "rollout":
            groups[tuple(tree.step_text(j) for j in tree.path(i))].append(i)
    return groups


def slow_group_score(tree: SearchTree, group: list[int], config: ExportConfig) -> float | None:
    known = []
    for i in group:
        score = slow_score(tree, i, config.estimator, config.truncated)
        if score is not None:
            counted = [leaf for leaf in slow_leaves(tree, i) if leaf in ("right", "wrong")]
            known.append((score, len(counted) if config.estimator == "leaf_share" else tree.nodes[i].weight))
    return sum(s * w for s, w in known) / sum(w for _, w in known) if known else None


def slow_enough(tree: SearchTree, group: list[int], config: ExportConfig) -> bool:
    return sum(leaf in ("right", "wrong") for i in group for leaf in slow_leaves(tree, i)) >= config.min_leaves


def slow_compare(tree: SearchTree, votes_of: dict, config: ExportConfig) -> tuple[Counter, list[tuple]]:
    """Return the number of solutions by result, and `(texts, first error, agreement, agreed)` of the compared ones."""
    groups = slow_groups(tree)
    found, compared = Counter(), []
    for texts, group in groups.items():
        ends = [i for i in group if tree.nodes[i].is_final]
        if not ends:
            continue
        path = [groups[texts[: k + 1]] for k in range(len(texts))]
        votes = votes_of.get((tree.problem.problem_id, tuple(tree.nodes[step[0]].node_id for step in path)))
        if votes is None:
            found["without_verdict"] += 1
            continue
        readable = [vote for vote in votes if vote is not None]
        modes = [vote for vote in set(readable) if readable.count(vote) == max(map(readable.count, readable))]
        if not modes:
            found["unreadable_votes"] += 1
            continue
        if len(modes) > 1 and config.disagreement == "drop":
            found["tied_votes"] += 1
            continue
        scores = [slow_group_score(tree, step, config) for step in path]
        for k, step in enumerate(path[:-1]):
            if not slow_enough(tree, step, config):
                scores[k] = None
        wrong = [k for k, score in enumerate(scores) if score is not None and score <= config.threshold]
        first = wrong[0] if wrong else None
        known = scores if first is None else scores[:first]
        outcomes = {tree.nodes[i].correct for i in ends} - {None}
        if None in known or (first is None and not outcomes):
            found["unknown_mc_score"] += 1
            continue
        if first is None and False in outcomes:
            found["wrong_answer_without_error"] += 1
            continue
        first = -1 if first is None else first
        judged = modes[0] if len(modes) == 1 else None
        if judged is None:
            cell = "tied_votes"
        elif first == -1 or judged == -1:
            cell = f"mc_{'none' if first == -1 else 'error'}_judge_{'none' if judged == -1 else 'error'}"
        else:
            cell = "mc_error_judge_" + ("same" if judged == first else "earlier" if judged < first else "later")
        found[cell] += 1
        compared.append((texts, first, readable.count(first) / len(readable), judged == first))
    return found, compared


def random_run(folder: Path, seed: int, num_trees: int = 200) -> tuple[list[SearchTree], dict]:
    """Return the trees and votes of a run: random trees, and votes that agree with the scores in about half of the cases."""
    rng = random.Random(seed)
    trees = [rng.choice([random_tree, random_tree, rollout_tree])(rng, f"p{i}", 3) for i in range(num_trees)]
    config = ExportConfig(inputs=["none"], output_dir="out")
    votes_of = {}
    for tree in trees:
        groups = slow_groups(tree)
        for texts, group in groups.items():
            if not any(tree.nodes[i].is_final for i in group) or rng.random() < 0.1:
                continue
            path = [groups[texts[: k + 1]] for k in range(len(texts))]
            scores = [slow_group_score(tree, step, config) for step in path]
            first = next((k for k, score in enumerate(scores) if score == 0), -1)
            places = range(-1, len(path))
            likely = first if rng.random() < 0.7 else rng.choice(places)
            votes = [likely if rng.random() < 0.7 else rng.choice([None, *places]) for _ in range(3)]
            if rng.random() < 0.05:
                votes = [None, None, None]
            votes_of[tree.problem.problem_id, tuple(tree.nodes[step[0]].node_id for step in path)] = votes
    write_run(folder, trees)
    write_verdicts(folder, votes_of)
    return trees, votes_of


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory) -> tuple[Path, list[SearchTree], dict]:
    folder = tmp_path_factory.mktemp("judged") / "run"
    return folder, *random_run(folder, 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"view": "hrm", "labels": "hard", "threshold": 0.3},
        {"view": "prm", "after_first_error": "label", "estimator": "leaf_share"},
        {"view": "tree", "disagreement": "weight"},
        {"view": "tree", "disagreement": "weight", "after_first_error": "label", "threshold": 0.5},
        {"view": "tree", "min_leaves": 2},
        {"view": "orm"},
        {"view": "orm", "disagreement": "weight"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_kept_solutions_match_a_slow_reference(tmp_path, judged_run, options):
    run, trees, votes_of = judged_run
    config = ExportConfig(inputs=["none"], output_dir="out", consensus=True, **options)
    rows, report = build(tmp_path, run, **options)
    counts, expected = Counter(), {}
    for tree in trees:
        found, compared = slow_compare(tree, votes_of, config)
        counts += found
        groups = slow_groups(tree)
        steps, agreements = {}, defaultdict(list)
        for texts, first, agreement, agreed in compared:
            if not agreed and config.disagreement == "drop":
                continue
            for k in range(len(texts)):
                key = (tree.problem.problem_id, texts[: k + 1])
                group = groups[texts[: k + 1]]
                score = slow_group_score(tree, group, config)
                if not slow_enough(tree, group, config):
                    score = None
                if config.after_first_error == "context" and -1 < first < k:
                    score = None
                if config.labels == "hard" and score is not None:
                    score = float(score > config.threshold)
                if config.view == "orm":
                    if k < len(texts) - 1:
                        continue
                    score = slow_group_score(tree, [i for i in group if tree.nodes[i].is_final], config)
                steps[key] = score
                agreements[key].append(agreement)
        if any(score is not None for score in steps.values()):
            expected |= {
                key: (score, sum(agreements[key]) / len(agreements[key]) if score is not None else 0.0)
                for key, score in steps.items()
                if config.view != "orm" or score is not None
            }
    given = {}
    for row in rows:
        tree = StepTree.from_row(row)
        paths = [tuple(tree.completions[j] for j in tree.path(i)) for i in range(len(tree.completions))]
        weights = row.get("label_weights") or [None] * len(paths)
        for i, texts in enumerate(paths):
            is_end = i == len(paths) - 1
            if (tree.num_merged is None or tree.num_merged[i] == 1) and (config.view != "orm" or is_end):
                given[row["problem_id"], texts] = (tree.labels[i], weights[i])
    if config.view == "prm":  # paths without a label are not rows
        expected = {key: value for key, value in expected.items() if key in given or value[0] is not None}
    assert given.keys() == expected.keys() and len(given) > 50
    for key, (label, weight) in expected.items():
        assert given[key][0] == (None if label is None else pytest.approx(label, abs=1e-6)), key
        assert given[key][1] == (pytest.approx(weight, abs=1e-6) if config.disagreement == "weight" else None), key
    facts = report["facts"]["consensus"]
    assert {
        name: count for name, count in (facts["not_compared"] | facts["first_wrong_step"]).items() if count
    } == counts
    assert facts["compared"] == sum(facts["first_wrong_step"].values())
    assert facts["solutions"] == facts["compared"] + sum(facts["not_compared"].values())
    assert facts["agreed"] == counts["mc_none_judge_none"] + counts["mc_error_judge_same"]
    assert (facts["agreement_low"], facts["agreement_high"]) == wilson_interval(facts["agreed"], facts["compared"])


def test_the_random_runs_have_every_case(tmp_path, judged_run):
    """Otherwise the comparison above would prove less than it seems."""
    _, report = build(tmp_path, judged_run[0], threshold=0.3)
    facts = report["facts"]["consensus"]
    assert all((facts["not_compared"] | facts["first_wrong_step"]).values())
    assert facts["right_answer_with_error"] and facts["labels_after_first_error"] and facts["steps_dropped"]


# Planted noise


def noisy_run(folder: Path, a: float, b: float, num_steps: int, num_problems: int, seed: int) -> dict[str, int]:
    """
    Write a run with one solution per problem. Monte Carlo names a wrong place with probability `a`, and the judge with
    probability `b`, independently and uniformly over the other places. Return the true first wrong steps by problem.
    """
    rng = random.Random(seed)
    places = range(-1, num_steps)

    def noisy(truth: int, chance: float) -> int:
        return rng.choice([place for place in places if place != truth]) if rng.random() < chance else truth

    trees, votes, truths = [], {}, {}
    for number in range(num_problems):
        name = f"p{number}"
        truths[name] = truth = rng.choice(places)
        mc = noisy(truth, a)
        tree = empty_tree(name)
        above, ids = ROOT, []
        for k in range(num_steps):
            add_node(tree, above, 0, f"step {k}", role="segment")
            above = len(tree.nodes) - 1
            ids.append(tree.nodes[above].node_id)
            if k < num_steps - 1:
                for place in range(2):
                    add_node(tree, above, place, "the rest", role="rollout")
                    end(tree.nodes[-1], place == 0 and not -1 < mc <= k)
        end(tree.nodes[above], mc == -1)
        trees.append(tree)
        votes[name, tuple(ids)] = [noisy(truth, b)]
    write_run(folder, trees)
    write_verdicts(folder, votes)
    return truths


@pytest.mark.parametrize(("a", "b", "num_steps"), [(0.3, 0.2, 3), (0.5, 0.4, 2)])
def test_error_rate_of_kept_labels_is_the_product_rule(tmp_path, a, b, num_steps):
    """Independent errors agree only by chance: in one of m other places."""
    truths = noisy_run(tmp_path / "run", a, b, num_steps, 2500, seed=1)
    both_wrong, both_right = a * b / num_steps, (1 - a) * (1 - b)
    rows, report = build(tmp_path, tmp_path / "run", labels="hard")
    firsts = {row["problem_id"]: row["labels"].index(0) if 0 in row["labels"] else -1 for row in rows}
    for row in rows:  # after the first error, steps are context
        first = firsts[row["problem_id"]]
        labels = [1.0] * num_steps if first < 0 else [1.0] * first + [0.0] + [None] * (num_steps - 1 - first)
        assert row["labels"] == labels
    wrong = sum(first != truths[name] for name, first in firsts.items())
    low, high = wilson_interval(wrong, len(firsts))
    assert low <= both_wrong / (both_wrong + both_right) <= high and wrong > 30
    facts = report["facts"]["consensus"]
    assert facts["agreement_low"] <= both_wrong + both_right <= facts["agreement_high"]
    assert facts["agreed"] == len(rows) and facts["compared"] == facts["solutions"] == 2500
    # without the judge, the error rate is a
    alone, _ = build(tmp_path, tmp_path / "run", labels="hard", consensus=False)
    firsts = {row["problem_id"]: row["labels"].index(0) if 0 in row["labels"] else -1 for row in alone}
    low, high = wilson_interval(sum(first != truths[name] for name, first in firsts.items()), 2500)
    assert low <= a <= high


# By hand


@pytest.fixture
def small_run(tmp_path) -> Path:
    r"""
    Return a run of one tree. Monte Carlo: a 1/2, b 0, c 1, e 0. The judge agrees on a b (1 of 2 readable votes, and a tie if the
    third were readable), agrees on a c d, and disagrees on e.

        a ── b      wrong, votes 1, 1, 0: agreement 2/3
        │
        └─── c ── d right, votes -1, -1, null: agreement 1
        e           wrong, votes -1, 0, -1: agreement 1/3
    """
    tree = empty_tree("p")
    for parent, place, text in ((ROOT, 0, "a"), (0, 0, "b"), (0, 1, "c"), (2, 0, "d"), (ROOT, 1, "e")):
        add_node(tree, parent, place, text)
    for i, correct in ((1, False), (3, True), (4, False)):
        end(tree.nodes[i], correct)
    run = write_run(tmp_path / "run", [tree])
    a, b, c, d, e = (node.node_id for node in tree.nodes)
    write_verdicts(run, {("p", (a, b)): [1, 1, 0], ("p", (a, c, d)): [-1, -1, None], ("p", (e,)): [-1, 0, -1]})
    return run


class TestSmallRun:
    def test_drop(self, tmp_path, small_run):
        """The score of `a` counts all leaves, also in an export without the solution `e`."""
        [row], report = build(tmp_path, small_run)
        assert row["completions"] == ["a", "b", "c", "d"] and row["parents"] == [-1, 0, 0, 2]
        assert row["labels"] == [0.5, 0, 1, 1] and "label_weights" not in row
        assert row["mc_total"] == [2, 1, 1, 1]
        facts = report["facts"]["consensus"]
        assert (facts["solutions"], facts["compared"], facts["agreed"], facts["steps_dropped"]) == (3, 3, 2, 1)
        assert facts["first_wrong_step"] == {
            "mc_none_judge_none": 1,
            "mc_none_judge_error": 0,
            "mc_error_judge_none": 1,
            "mc_error_judge_earlier": 0,
            "mc_error_judge_same": 1,
            "mc_error_judge_later": 0,
        }
        # observed 2/3; by chance 1/3·2/3 without and 2/3·1/3 with an error
        assert facts["kappa_any_error"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
        assert (
            "consensus with judge: 3 of 3 solutions compared, 2 agree (66.7%, 95 % interval 20.8% to 93.9%), kappa 0.40 for "
            "whether there is a wrong step"
        ) in str(report)

    def test_merged_steps(self, tmp_path, small_run):
        [row], _ = build(tmp_path, small_run, view="hrm")
        assert row["completions"][4:] == ["a\nb", "a\nc", "c\nd"] and row["labels"][4:] == [0, 1, 1]

    def test_weight(self, tmp_path, small_run):
        """A shared step has the mean of its solutions."""
        [row], report = build(tmp_path, small_run, disagreement="weight")
        assert row["completions"] == ["a", "b", "c", "d", "e"] and row["labels"] == [0.5, 0, 1, 1, 0]
        assert row["label_weights"] == pytest.approx([5 / 6, 2 / 3, 1, 1, 1 / 3])
        assert report["facts"]["consensus"]["steps_dropped"] == 0

    def test_progress(self, tmp_path, small_run):
        """The score of the prompt, 1/4, counts the solution `e`, which is dropped."""
        [row], _ = build(tmp_path, small_run, labels="progress")
        assert row["prompt_mc_score"] == 1 / 4 and row["mc_scores"] == [1 / 2, 0, 1, 1]
        assert row["labels"] == [5 / 8, 1 / 4, 3 / 4, 1 / 2]

    def test_threshold(self, tmp_path, small_run):
        """With 0.5, the step `a` is wrong, so the judge names a later step or none in the solutions after it."""
        [row], report = build(tmp_path, small_run, threshold=0.5, disagreement="weight")
        facts = report["facts"]["consensus"]
        assert {name: count for name, count in facts["first_wrong_step"].items() if count} == {
            "mc_error_judge_later": 1,
            "mc_error_judge_none": 2,
        }
        assert facts["right_answer_with_error"] == 1
        assert row["labels"] == [0.5, None, None, None, 0]
        assert row["label_weights"] == pytest.approx([1 / 6, 0, 0, 0, 1 / 3])  # one of three votes, and none

    def test_after_first_error(self, tmp_path, small_run):
        [row], report = build(tmp_path, small_run, threshold=0.5, disagreement="weight", after_first_error="label")
        assert row["labels"] == [0.5, 0, 1, 1, 0]
        assert report["facts"]["consensus"]["labels_after_first_error"] == 0

    def test_errors_that_monte_carlo_overlooks(self, tmp_path, small_run):
        """They are few in the run. Then the judge names `a` in the first solution and `c` in the second."""
        _, report = build(tmp_path, small_run)
        assert not any("the judge names a wrong step" in warning for warning in report["warnings"])
        verdicts = [(one.node_ids, one.votes) for one in read_verdicts(small_run)]
        votes = [[0, 0, 0], [1, 1, 1], list(verdicts[2][1])]
        write_verdicts(small_run, {("p", ids): given for (ids, _), given in zip(verdicts, votes, strict=True)})
        _, report = build(tmp_path, small_run, disagreement="weight")
        assert any("in 2 of 3 compared solutions, the judge names" in warning for warning in report["warnings"])

    def test_no_agreed_solution(self, tmp_path, small_run):
        with pytest.raises(ValueError, match="no_agreed_solution: 1"):
            build(tmp_path, small_run, threshold=0.5)
        assert not (tmp_path / "out").exists()

    def test_card_and_rebuild(self, tmp_path, small_run):
        """The command on the card must give the same bytes."""
        options = {"disagreement": "weight", "threshold": 0.25, "after_first_error": "label", "labels": "hard"}
        shutil.copytree(small_run / "judges" / "judge", small_run / "judges" / "other")
        _, report = build(tmp_path, small_run, judge_name="other", **options)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "share of the judge's readable votes" in card
        assert "consensus: first wrong step: mc error judge same" in card
        words = shlex.split(report["command"])
        for option in ("--consensus", "--judge_name", "--disagreement", "--threshold", "--after_first_error"):
            assert option in words
        files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert main([*words[1:], "--overwrite", "--num_proc", "1"]) == 0
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files


class TestFaults:
    def test_stale_verdicts(self, tmp_path, small_run):
        write_verdicts(small_run, {("p", ("0" * 16,)): [0]})
        with pytest.raises(ValueError, match=r"problem 'p': the verdict on the steps .* matches no solution.*judge"):
            build(tmp_path, small_run)
        write_verdicts(small_run, {("q", ("0" * 16,)): [0]})
        with pytest.raises(ValueError, match="problem 'q' has verdicts, but is not in the run"):
            build(tmp_path, small_run)

    def test_missing_shards(self, tmp_path, small_run):
        """Verdicts on problems of a shard that is not in the folder are not stale."""
        summary = {"problems": {"done": 1}, "failed_requests": 0, "solutions": {}, "log_bytes": 3}
        write_json(small_run / "summary-00000-of-00002.json", summary)
        for kind, suffix in (("log", "jsonl"), ("nodes", "parquet")):
            (small_run / f"{kind}-00000-of-00001.{suffix}").rename(small_run / f"{kind}-00000-of-00002.{suffix}")
        (small_run / "summary-00000-of-00001.json").unlink()
        with open(small_run / "judges" / "judge" / "verdicts.jsonl", "a") as file:
            line = '{"prompt": "p", "completions": ["s"], "labels": [1], "problem_id": "q", "node_ids": ["1"], "judge_votes": [0]}'
            file.write(line + "\n")
        rows, report = build(tmp_path, small_run)
        assert len(rows) == 1 and "1 shards are missing" in " ".join(report["warnings"])

    def test_two_verdicts_for_a_solution(self, tmp_path, small_run):
        path = small_run / "judges" / "judge" / "verdicts.jsonl"
        path.write_text(path.read_text() * 2)
        with pytest.raises(ValueError, match="two verdicts for the same solution of problem 'p'"):
            build(tmp_path, small_run)

    def test_no_verdicts(self, tmp_path, small_run):
        (small_run / "judges" / "judge" / "verdicts.jsonl").write_text("")
        with pytest.raises(ValueError, match="has no verdicts. Run `trl-hrm judge"):
            build(tmp_path, small_run)
        with pytest.raises(FileNotFoundError, match="Run `trl-hrm judge"):
            build(tmp_path, small_run, judge_name="other")
        with pytest.raises(ValueError, match="is not the folder of a run"):
            build(tmp_path, small_run / "nodes-00000-of-00001.parquet")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"consensus": True, "hnc": True}, "does not support `hnc`"),
            ({"consensus": True, "view": "sft"}, "does not support `view='sft'`"),
            ({"consensus": True, "format": "openr"}, "does not support `format='openr'`"),
            ({"consensus": True, "disagreement": "weight", "balance": 3}, "both write `label_weights`"),
            ({"consensus": True, "after_first_error": "label", "view": "orm"}, "only the last step has a label"),
            ({"consensus": True, "judge_name": "../judge"}, "`judge_name` is '../judge'"),
            ({"judge_name": "other"}, "no effect without `consensus`"),
            ({"disagreement": "weight"}, "no effect without `consensus`"),
            ({"after_first_error": "label"}, "no effect without `consensus`"),
            ({"threshold": 0.5}, "`threshold` is 0.5, but has no effect"),
            ({"threshold": 1.0, "labels": "hard"}, "`threshold`"),
        ],
    )
    def test_options_that_do_not_combine(self, options, message):
        with pytest.raises(ValueError, match=message):
            ExportConfig(inputs=["run"], output_dir="out", **options)


def test_runs_with_the_same_problems(tmp_path):
    """Verdicts belong to the run that was judged, and node ids of another run would be stale."""
    trees = {}
    for seed, name in enumerate(("one", "two")):
        trees[name], _ = random_run(tmp_path / name, seed, 10)
    rows, report = build(tmp_path, tmp_path / "one", tmp_path / "two")
    alone = [build(tmp_path, tmp_path / name) for name in trees]
    assert rows == alone[0][0] + alone[1][0]
    facts = report["facts"]["consensus"]
    assert facts["solutions"] == sum(report["facts"]["consensus"]["solutions"] for _, report in alone)
    assert len({judge["verdicts"] for judge in facts["judges"].values()}) == 2
    assert report["warnings"] == []
    for name in trees:
        manifest = {"identity": {"judge": "one"}, "template": {"name": name}}
        write_json(tmp_path / name / "judges" / "judge" / "manifest.json", manifest)
    _, report = build(tmp_path, tmp_path / "one", tmp_path / "two")
    assert [judge["template"] for judge in report["facts"]["consensus"]["judges"].values()] == ["one", "two"]
    assert "or with different templates" in report["warnings"][0]
    for name in trees:
        write_json(tmp_path / name / "judges" / "judge" / "manifest.json", {"identity": {"judge": name}})
    _, report = build(tmp_path, tmp_path / "one", tmp_path / "two")
    assert report["facts"]["consensus"]["judges"][str(tmp_path / "one")]["identity"] == {"judge": "one"}
    assert "judged by different models" in report["warnings"][0]


def test_balance_with_consensus(tmp_path, judged_run):
    rows, report = build(tmp_path, judged_run[0], balance=2)
    labels = [label for row in rows for label in row["labels"] if label is not None]
    counts = Counter(label >= 0.5 for label in labels)
    assert 0.7 < counts[True] / counts[False] < 1.4
    for row in rows:
        assert all(
            (label is None) == (weight == 0) for label, weight in zip(row["labels"], row["label_weights"], strict=True)
        )


def test_processes_change_nothing(tmp_path, judged_run, monkeypatch):
    from trl_hrm.search import nodes

    monkeypatch.setattr(nodes, "GROUP_NODES", 100)
    trees, votes = judged_run[1:]
    run = write_run(tmp_path / "run", trees)
    write_verdicts(run, votes)
    alone = build(tmp_path, run, view="hrm")
    assert build(tmp_path, run, view="hrm", num_proc=2) == alone


def test_verdicts_of_the_command(tmp_path, judged_run, monkeypatch):
    """`trl-hrm judge` and the export must mean the same by a solution, also where siblings are equal or an end is blank."""

    def write(prompt: str, rng: random.Random) -> str:
        numbers = re.findall(r"^Step (\d+): ", prompt.partition("# Solution")[2], re.MULTILINE)
        return f"\\boxed{{{rng.choice(['-1', *numbers])}}}"

    trees = judged_run[1][:50]
    tree = empty_tree("blank")
    for parent, place, text in ((ROOT, 0, "one"), (0, 0, ""), (0, 1, "two"), (0, 2, "")):
        add_node(tree, parent, place, text)
    for i, correct in ((1, True), (2, False), (3, True)):
        end(tree.nodes[i], correct)
    run = write_run(tmp_path / "run", [*trees, tree])
    monkeypatch.setattr(JudgeConfig, "load_engine", lambda self, shard=None: Judge(write))
    monkeypatch.setattr(JudgeConfig, "model_identity", lambda self: {"weights": "w"})
    judge(JudgeConfig(input=str(run), judge="random", engine="transformers", num_votes=1, max_solutions=10_000))
    rows, report = build(tmp_path, run, disagreement="weight")
    facts = report["facts"]["consensus"]
    assert facts["not_compared"]["without_verdict"] == 0 and facts["compared"] > 30
    assert facts["judges"][str(run)]["identity"] == {"judge": {"weights": "w"}}
    [blank] = [row for row in rows if row["problem_id"] == "blank"]
    assert blank["completions"] == ["one", "two"] and blank["labels"] == pytest.approx([2 / 3, 0])
