"""Exports of searched trees: labels compared with a slow reference, splits, compression, balance, solutions, openr."""

import gzip
import json
import random
import shlex
import shutil
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from trl_hrm.cli import main
from trl_hrm.data.export import export as export_trees
from trl_hrm.data.export import parse_search_tree
from trl_hrm.data.export_config import ExportConfig
from trl_hrm.data.problems import problem_split
from trl_hrm.data.step_labels import keep_chances, label_cells, label_steps, sft_rows, thin_labels, unite_steps
from trl_hrm.data.tree_files import OpenrFiles
from trl_hrm.search import nodes
from trl_hrm.search.compression import compress, count_moves, move_up
from trl_hrm.search.nodes import read_trees, write_nodes
from trl_hrm.search.outcomes import describe_outcomes
from trl_hrm.search.policies import FullTree
from trl_hrm.search.run_folder import check_manifest, finish_shard, node_files, read_summary, summary_warnings
from trl_hrm.search.steps import RULES
from trl_hrm.search.tree import ROOT, Problem, SearchTree
from trl_hrm.search.values import make_label
from trl_hrm.step_tree import StepTree

from ..fakes import byte_level
from ..helpers import HEADS, tiny_model
from ..search.random_trees import (
    add_node,
    empty_tree,
    end,
    full_tree,
    random_tree,
    rollout_tree,
    slow_leaves,
    slow_score,
)
from ..search.scripted import FINAL, PROMPT, SEARCHES, ExactGrader, make_problems, run_scripted
from ..search.scripted import read_trees as read_scripted
from ..trainer.kl_training import make_kl_trainer


NAMES = ("mc_correct", "mc_total", "mc_unresolved")


@pytest.fixture
def node_file(tmp_path, monkeypatch) -> str:
    """Return a file of 60 trees of steps and of rollouts, in many row groups."""
    monkeypatch.setattr(nodes, "GROUP_NODES", 200)
    rng = random.Random(0)
    trees = [rng.choice([random_tree, random_tree, rollout_tree])(rng, f"p{i}") for i in range(60)]
    write_nodes(trees, tmp_path / "nodes.parquet")
    return str(tmp_path / "nodes.parquet")


def export(
    tmp_path: Path, source: str | list[str], format: str = "run", **options
) -> tuple[list[dict], list[dict], dict]:
    """Return the rows of the train split, of the test split, and the report."""
    output = tmp_path / "out"
    options = {"test_size": 0.3, "num_proc": 1, "overwrite": True} | options
    report = export_trees(ExportConfig(inputs=source, format=format, output_dir=str(output), **options))
    splits = {path.name.split("-")[0]: pq.read_table(path).to_pylist() for path in (output / "data").iterdir()}
    return splits["train"], splits.get("test", []), report


def slow_steps(tree: SearchTree, config: ExportConfig) -> dict[tuple, tuple]:
    """
    Return the score, the counts of right, answered and unresolved leaves, and whether a solution ends there, by the texts from
    the first step on. Nodes with the same texts above are one step.
    """
    groups = defaultdict(list)
    for i, node in enumerate(tree.nodes):
        if node.role != "rollout":
            apart = config.view in ("orm", "sft")
            key = tuple(
                (tree.step_text(j, config.merge_separator), tree.nodes[j].num_merged, apart and tree.nodes[j].is_final)
                for j in tree.path(i)
            )
            groups[key].append(i)
    found = {}
    for key, group in groups.items():
        leaves = {i: slow_leaves(tree, i) for i in group}
        counted = ("right", "wrong") if config.truncated == "drop" else ("right", "wrong", "unresolved")
        known = []
        for i in group:
            score = slow_score(tree, i, config.estimator, config.truncated)
            if score is not None:
                num_leaves = sum(leaf in counted for leaf in leaves[i])
                known.append((score, num_leaves if config.estimator == "leaf_share" else tree.nodes[i].weight))
        score = sum(s * n for s, n in known) / sum(n for _, n in known) if known else None
        below = [leaf for i in group for leaf in leaves[i]]
        counts = (below.count("right"), below.count("right") + below.count("wrong"), below.count("unresolved"))
        num_leaves = sum(leaf in counted for leaf in below)
        final = any(tree.nodes[i].is_final for i in group)
        kept = score is not None and num_leaves >= config.min_leaves
        label = make_label(score, config.labels, config.eta) if kept else None
        found[tuple(part[:2] for part in key) if not apart else key] = (label, counts, final)
    return found


def slow_rows(tree: SearchTree, config: ExportConfig, beside: SearchTree | None = None) -> Counter:
    """
    Count everything that the rows of a tree should contain: (texts and merges on the path, label, counts). Flat rows that the
    tree `beside` also has do not count as rows of a view.
    """
    steps = slow_steps(tree, config)
    texts = {key: tuple(part[:2] for part in key) for key in steps}
    said = Counter()
    inner = {key[:-1] for key in steps}
    known = set()
    if beside is not None:
        others = slow_steps(beside, config)
        inner_others = {key[:-1] for key in others}
        known = {said_on_path(key, others, config) for key in others.keys() - inner_others}
    if config.view in ("tree", "hrm"):
        for key, (label, counts, _) in steps.items():
            said[texts[key], label, counts] += 1
    if config.view == "hrm":
        for key, (label, counts, _) in steps.items():
            if label is not None and len(key) > 1 and key[-2][1] + key[-1][1] <= 2:
                pair = (config.merge_separator.join((key[-2][0], key[-1][0])), 2)
                if (texts[key][:-2] + (pair,), label) not in {(path, known) for path, known, _ in said}:
                    said[texts[key][:-2] + (pair,), label, counts] += 1
    if config.view == "prm":
        for leaf in steps.keys() - inner:
            path = [leaf[: end + 1] for end in range(len(leaf))]
            is_new = said_on_path(leaf, steps, config) not in known
            if is_new and any(steps[key][0] is not None for key in path):
                said.update((texts[key], steps[key][0], steps[key][1]) for key in path)
    if config.view == "orm":
        for leaf in steps.keys() - inner:
            is_new = said_on_path(leaf, steps, config) not in known
            if is_new and steps[leaf][2] and steps[leaf][0] is not None:
                path = [leaf[: end + 1] for end in range(len(leaf))]
                said.update((texts[key], steps[key][0] if key == leaf else None, steps[key][1]) for key in path)
    return said


def said_on_path(leaf: tuple, steps: dict[tuple, tuple], config: ExportConfig) -> tuple:
    """Return the content of a flat row without counts: texts, merges and labels."""
    path = [leaf[: end + 1] for end in range(len(leaf))]
    labels = [steps[key][0] if config.view == "prm" or key == leaf else None for key in path]
    return tuple((*key[-1][:2], label) for key, label in zip(path, labels, strict=True))


def said_by(rows: list[dict]) -> Counter:
    said = Counter()
    for row in rows:
        tree = StepTree.from_row(row)
        merged = tree.num_merged or [1] * len(tree.labels)
        for i, label in enumerate(tree.labels):
            path = tuple((tree.completions[j], merged[j]) for j in tree.path(i))
            said[path, label, tuple(tree.step_columns[name][i] for name in NAMES)] += 1
    return said


def rounded(said: Counter) -> Counter:
    found = Counter()
    for (path, label, counts), number in said.items():
        found[path, None if label is None else round(label, 6), counts] += number
    return found


OPTIONS = [
    {"labels": "soft"},
    {"labels": "soft", "truncated": "wrong"},
    {"labels": "hard", "estimator": "leaf_share"},
    {"labels": "entropy", "eta": 2.0},
    {"labels": "entropy", "eta": -1.0, "estimator": "leaf_share", "truncated": "wrong"},
    {"labels": "soft", "min_leaves": 3},
]


@pytest.mark.parametrize(
    ("view", "options"),
    [(view, options) for view in ("tree", "hrm", "prm", "orm") for options in OPTIONS[: 5 if view == "orm" else 6]],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_every_label_matches_the_stored_nodes(tmp_path, node_file, view, options):
    """A label shifted to a neighbour, or taken from the uncompressed tree, would train just as well."""
    train, test, report = export(tmp_path, node_file, view=view, hnc=True, hnc_min_children=2, **options)
    config = ExportConfig(inputs=["none"], output_dir="out", view=view, hnc=True, hnc_min_children=2, **options)
    rows = defaultdict(list)
    for split, found in (("train", train), ("test", test)):
        for row in found:
            rows[row["problem_id"], row["source"], split].append(row)
    expected = {}
    for tree in read_trees(node_file):
        split = problem_split(tree.problem.prompt, 0.3, 42)
        views = {"tree": tree}
        if split == "train":
            views["hnc"] = compress(tree, 42, 0.5, 2, 1)
        for source, seen in views.items():
            said = slow_rows(seen, config, None if source == "tree" else tree)
            moved = source == "tree" or count_moves(seen)
            if moved and any(label is not None for _, label, _ in said):
                expected[tree.problem.problem_id, source, split] = said
    assert expected.keys() == rows.keys()
    for key, said in expected.items():
        assert rounded(said_by(rows[key])) == rounded(said), key
    sources = Counter(source for _, source, _ in expected)
    assert sources["hnc"] > 10 and sources["tree"] > 30
    assert report["labelled_steps"] == sum(
        n for said in expected.values() for (_, label, _), n in said.items() if label is not None
    )


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_labels_to_the_last_digit(options):
    """Before they are stored in single precision, labels must match the definition to 1e-12."""
    rng = random.Random(1)
    config = ExportConfig(inputs=["none"], output_dir="out", **options)
    num_labels = 0
    for i in range(40):
        tree = rng.choice([random_tree, rollout_tree])(rng, f"{i}")
        judged, _ = label_steps(tree, config, Counter())
        expected = slow_steps(tree, config)
        assert len(expected) == len(judged.labels)
        for step, label in enumerate(judged.labels):
            known = expected[tuple((judged.completions[j], 1) for j in judged.path(step))][0]
            assert label == (None if known is None else pytest.approx(known, abs=1e-12))
            num_labels += label is not None
    assert num_labels > 30


@pytest.mark.parametrize("view", ["tree", "hrm", "prm"])
def test_nodes_and_counts_of_a_step(tmp_path, node_file, view):
    """The columns must lead back to the search: to a node with that text and those leaves."""
    train, _, _ = export(tmp_path, node_file, view=view, test_size=0)
    found = {tree.problem.problem_id: tree for tree in read_trees(node_file)}
    num_single = 0
    for row in train:
        tree = found[row["problem_id"]]
        index = {node.node_id: i for i, node in enumerate(tree.nodes)}
        assert row["answer"] == "7" and row["prompt"] == tree.problem.prompt
        num_merged = row.get("num_merged") or [1] * len(row["labels"])
        for text, merged, node_id in zip(row["completions"], num_merged, row["node_ids"], strict=True):
            last = tree.step_text(index[node_id])
            assert text == last if merged == 1 else text.endswith(f"\n{last}")
            num_single += merged == 1
    assert num_single > 500


def test_leaves_of_a_step_are_the_sums_over_its_children(tmp_path):
    """The same must hold in the rows if no two siblings are equal."""
    rng = random.Random(0)
    write_nodes([full_tree(rng, f"{i}") for i in range(5)], tmp_path / "nodes.parquet")
    train, _, _ = export(tmp_path, str(tmp_path / "nodes.parquet"), test_size=0, labels="hard")
    for row in train:
        for i, label in enumerate(row["labels"]):
            below = [j for j, parent in enumerate(row["parents"]) if parent == i]
            for name in NAMES:
                assert not below or row[name][i] == sum(row[name][j] for j in below)
            assert label == (row["mc_correct"][i] > 0)
        assert sum(row["mc_total"]) == 3 * 27


def test_truncated_differs_only_where_a_leaf_is_unresolved(tmp_path, node_file):
    rows = {
        truncated: export(tmp_path, node_file, test_size=0, truncated=truncated)[0] for truncated in ("drop", "wrong")
    }
    differing = 0
    by_id = {row["problem_id"]: row for row in rows["wrong"]}
    for row in rows["drop"]:
        other = by_id[row["problem_id"]]
        for a, b, unresolved in zip(row["labels"], other["labels"], row["mc_unresolved"], strict=True):
            assert a == b or unresolved > 0
            differing += a != b
    assert differing > 30


class TestUniting:
    def test_equal_siblings(self):
        """Taking only the first of two equal siblings would hide the leaves of the other."""
        tree = SearchTree(Problem("p", "p?", "7"), status="done")
        for parent, place, text in (
            (ROOT, 0, "a"),
            (ROOT, 1, "a "),
            (0, 0, "b"),
            (0, 1, "c"),
            (1, 0, "b"),
            (1, 1, "b"),
            (1, 2, "d"),
        ):
            add_node(tree, parent, place, text)
        for i, correct in ((2, True), (3, False), (4, True), (5, False), (6, False)):
            end(tree.nodes[i], correct)
        notes = Counter()
        judged, members = label_steps(tree, ExportConfig(inputs=["none"], output_dir="out"), notes)
        assert judged.completions == ["a", "b", "c", "d"]
        assert judged.parents == [-1, 0, 0, 0]
        assert members == [[0, 1], [2, 4, 5], [3], [6]]
        assert judged.labels == pytest.approx([(1 / 2 + 1 / 3) / 2, 2 / 3, 0, 0])
        assert judged.step_columns["mc_correct"] == [2, 2, 0, 0]
        assert judged.step_columns["mc_total"] == [5, 3, 1, 1]
        assert notes["equal_siblings_united"] == 3
        judged, _ = label_steps(
            tree, ExportConfig(inputs=["none"], output_dir="out", estimator="leaf_share"), Counter()
        )
        assert judged.labels == pytest.approx([2 / 5, 2 / 3, 0, 0])

    def test_no_bias(self):
        """
        A right branch that ends at once has one leaf, and a wrong one that continues has three. Weighted by leaves, the label of
        two equal siblings would average 0.435 over all outcomes, which looks as plausible as the correct 0.5.
        """
        labels = {"child_mean": [], "leaf_share": []}
        for outcomes in product((True, False), repeat=4):
            tree = empty_tree()
            for first in (0, 1):
                add_node(tree, ROOT, first, "same")
                above = len(tree.nodes) - 1
                for place, correct in enumerate(outcomes[2 * first : 2 * first + 2]):
                    add_node(tree, above, place, f"{first} {place}")
                    if correct:
                        end(tree.nodes[-1], True)
                        continue
                    inner = len(tree.nodes) - 1
                    for leaf in range(3):
                        add_node(tree, inner, leaf, f"wrong {leaf}")
                        end(tree.nodes[-1], False)
            for estimator, found in labels.items():
                judged, members = label_steps(
                    tree, ExportConfig(inputs=["none"], output_dir="out", estimator=estimator), Counter()
                )
                assert len(members[0]) == 2
                found.append(judged.labels[0])
        assert sum(labels["child_mean"]) / 16 == pytest.approx(1 / 2)
        shares = [n / (n + 3 * (4 - n)) * ways for n, ways in enumerate((1, 4, 6, 4, 1))]
        assert sum(labels["leaf_share"]) == pytest.approx(sum(shares))

    def test_sample_counts_by_its_weight(self):
        """A sample that represents siblings skipped by a budget must count for them too."""
        tree = empty_tree()
        for place, (weight, correct) in enumerate(((3.0, True), (1.0, False))):
            add_node(tree, ROOT, place, "same")
            tree.nodes[-1].weight = weight
            add_node(tree, len(tree.nodes) - 1, 0, f"last {place}")
            end(tree.nodes[-1], correct)
        assert label_steps(tree, ExportConfig(inputs=["none"], output_dir="out"), Counter())[0].labels[0] == 3 / 4

    def test_uniting_comes_after_compression_and_scores(self):
        """If equal children were united first, they would count as one draw, and compression would use the wrong N."""
        tree = full_tree(random.Random(0), num_children=4, depth=2)
        for node in tree.nodes:
            if node.parent == 0:
                node.text = "same"
        judged, _ = label_steps(tree, ExportConfig(inputs=["none"], output_dir="out"), Counter())
        assert len(judged.completions) == len(tree.nodes) - 3
        assert count_moves(compress(tree, 0, probability=1)) == 4

    def test_blank_steps(self):
        """A blank step cannot be judged, and later steps have lost their history."""
        tree = SearchTree(Problem("p", "p?", "7"), status="done")
        for parent, text in ((ROOT, "a"), (ROOT, " "), (1, "b"), (2, "c")):
            add_node(tree, parent, 0, text)
        notes = Counter()
        assert unite_steps(tree, notes).texts == ["a"]
        assert notes == {"blank_steps": 1, "steps_after_blank_ones": 2}


class TestBlankEnds:
    """The policy writes a blank line, which ends a step, and then EOS."""

    @pytest.fixture
    def tree(self) -> SearchTree:
        """Return two steps. The second is followed by two blank ends and one wrong answer."""
        tree = empty_tree()
        for parent, place, text in ((ROOT, 0, "one"), (0, 0, "two"), (1, 0, ""), (1, 1, "no, three"), (1, 2, "")):
            add_node(tree, parent, place, text)
        for i, correct in ((2, True), (3, False), (4, True)):
            end(tree.nodes[i], correct)
        return tree

    def test_steps(self, tree):
        """The step must keep its MC score, to which the blank ends contribute."""
        notes = Counter()
        judged, _ = label_steps(tree, ExportConfig(inputs=["none"], output_dir="out"), notes)
        assert judged.completions == ["one", "two", "no, three"]
        assert judged.labels == pytest.approx([2 / 3, 2 / 3, 0])
        assert judged.step_columns["mc_total"] == [3, 3, 1]
        assert notes == {"blank_ends": 2}

    def test_solutions(self, tree):
        """Treated as blank steps, they would not be solutions, and only the wrong one would be left."""
        judged, members = label_steps(tree, ExportConfig(inputs=["none"], output_dir="out", view="orm"), Counter())
        assert judged.completions == ["one", "two", "two", "no, three"]
        assert judged.parents == [-1, 0, 0, 1]
        assert judged.labels == [None, None, 1, 0]
        assert members == [[0], [1], [2, 4], [3]]
        (solution,) = sft_rows(tree, ExportConfig(inputs=["none"], output_dir="out", view="sft"), Counter())
        assert solution.completions == [tree.text(2)]
        assert solution.labels == pytest.approx([2 / 3])
        assert (solution.extra["mc_correct"], solution.extra["mc_total"]) == (2, 3)

    def test_step_with_only_blank_ends(self, tree):
        """Such a step does not continue. Otherwise a path without an end would be counted as skipped."""
        del tree.nodes[3]
        judged, members = label_steps(tree, ExportConfig(inputs=["none"], output_dir="out", view="orm"), Counter())
        assert judged.completions == ["one", "two"]
        assert judged.labels == [None, 1]
        assert members == [[0], [2, 3]]

    def test_from_a_search(self, tmp_path):
        """A policy with its own format writes blank lines as steps."""

        def write(prefix: str, rng: random.Random) -> str:
            whole = f"One.\n\nTwo.\n\n\\boxed{{{rng.choice((7, 8))}}}\n\n"
            return whole[len(prefix.rsplit("Question:", 1)[1].split("\n\n", 1)[1]) :]

        search = FullTree(RULES["blank_line"], FINAL, num_children=2, max_depth=5, max_step_tokens=60)
        run_scripted(tmp_path / "run", search, make_problems(3), script=write)
        finish_shard(tmp_path / "run", 0, 1)
        (file,) = map(str, node_files(tmp_path / "run"))
        orm, _, report = export(tmp_path, file, view="orm", test_size=0)
        assert report["notes"]["blank_ends"] == 3 * 16 and "left_out_paths" not in report["notes"]
        assert {(row["completions"][-1], row["labels"][-1]) for row in orm} == {("\\boxed{7}", 1), ("\\boxed{8}", 0)}
        sft, _, _ = export(tmp_path, file, view="sft", test_size=0)
        assert {row["completion"] for row in sft} == {"One.\n\nTwo.\n\n\\boxed{7}\n\n"}

    def test_compression(self, tmp_path):
        """A moved blank end gives no merged step, so it is not counted, and a row for it would be a copy of the tree."""
        trees = []
        for number in range(40):
            tree = empty_tree(f"p{number}")
            for first in range(4):
                add_node(tree, ROOT, first, f"one {first}")
                above = len(tree.nodes) - 1
                for second in range(4 if number % 2 else 1):
                    add_node(tree, above, second, f"It is {second}.")
                    last = len(tree.nodes) - 1
                    for third in range(4):  # the same answer after the same step
                        add_node(tree, last, third, "")
                        end(tree.nodes[-1], second % 2 == 0)
            trees.append(tree)
        write_nodes(trees, tmp_path / "nodes.parquet")
        source, options = str(tmp_path / "nodes.parquet"), {"hnc": True, "test_size": 0}
        train, _, report = export(tmp_path, source, **options)
        merged = [sum(count > 1 for count in row["num_merged"]) for row in train if row["source"] == "hnc"]
        assert report["notes"]["hnc_moved_nodes"] == sum(merged) > 20 and min(merged) > 0
        assert report["notes"]["hnc_trees_without_a_move"] == len(trees) - len(merged) >= 20
        assert export(tmp_path, source, view="sft", **options)[2]["notes"]["hnc_moved_nodes"] == sum(merged)

    def test_move_of_a_blank_end_next_to_other_steps(self, tree):
        """It changes at most labels. If it changes none, the row would be a copy."""
        config = ExportConfig(
            inputs=["none"], output_dir="out", hnc=True, hnc_probability=1.0, hnc_min_children=2, test_size=0.0
        )
        found = Counter()
        for seed in range(40):
            for correct in (False, True):  # of the step next to the blank ends, which are right
                end(tree.nodes[3], correct)
                notes = Counter()
                rows = parse_search_tree(tree, "", notes, replace(config, hnc_seed=seed))
                merged = [sum(count > 1 for count in row.num_merged) for row in rows[1:]]
                assert notes["hnc_moved_nodes"] == sum(merged)
                assert notes["hnc_trees_without_a_move"] == 2 - len(rows)
                assert all((row.completions, row.labels) != (rows[0].completions, rows[0].labels) for row in rows[1:])
                found[correct, *merged] += 1
        assert found.keys() == {(False, 0), (False, 1), (True,), (True, 1)}


class TestCompression:
    def test_test_problems_are_never_compressed(self, tmp_path, node_file):
        train, test, report = export(tmp_path, node_file, hnc=True, hnc_min_children=2)
        assert {row["source"] for row in test} == {"tree"}
        sources = Counter(row["source"] for row in train)
        assert sources["hnc"] > 10
        assert sources["tree"] == sources["hnc"] + report["notes"]["hnc_trees_without_a_move"]
        assert not {row["problem_id"] for row in train} & {row["problem_id"] for row in test}
        merged = [sum(count > 1 for count in row["num_merged"]) for row in train if row["source"] == "hnc"]
        assert min(merged) > 0

    def test_trees_are_the_same_with_and_without(self, tmp_path, node_file):
        alone, _, _ = export(tmp_path, node_file)
        beside, _, _ = export(tmp_path, node_file, hnc=True, hnc_min_children=2)
        beside = [row for row in beside if row["source"] == "tree"]
        assert [row["labels"] for row in beside] == [row["labels"] for row in alone]

    @pytest.mark.parametrize("view", ["prm", "orm"])
    def test_flat_rows_are_not_copies(self, tmp_path, node_file, view):
        """Otherwise a path far from every merged node would count twice."""
        train, _, report = export(tmp_path, node_file, view=view, hnc=True, hnc_min_children=2, test_size=0)
        said = defaultdict(list)
        for row in train:
            what = (row["problem_id"], tuple(row["completions"]), tuple(row["labels"]), tuple(row["num_merged"]))
            said[what].append(row["source"])
        assert all(sorted(set(sources)) != ["hnc", "tree"] for sources in said.values())
        views = [compress(tree, 42, 0.5, 2, 1) for tree in read_trees(node_file)]
        steps = [
            label_steps(seen, ExportConfig(inputs=["none"], output_dir="out", view=view, hnc=True), Counter())[0]
            for seen in views
            if count_moves(seen)
        ]
        num_paths = sum(len(tree.leaves()) for tree in steps)
        kept = [row for row in train if row["source"] == "hnc"]
        merged = [max(row["num_merged"]) > 1 for row in kept]
        assert any(merged) and all(merged) == (view == "orm")
        assert len(kept) <= num_paths - report["notes"]["hnc_paths_as_in_the_tree"] < num_paths

    def test_options_reach_it(self, tmp_path, node_file):
        moved = {}
        for name, options in {
            "all": {"hnc_probability": 1.0, "hnc_min_children": 2},
            "few": {"hnc_probability": 0.2, "hnc_min_children": 2},
            "large": {"hnc_probability": 1.0, "hnc_min_children": 4},
            "twice": {"hnc_probability": 1.0, "hnc_min_children": 2, "hnc_passes": 2},
        }.items():
            moved[name] = export(tmp_path, node_file, hnc=True, **options)[2]["notes"]["hnc_moved_nodes"]
        assert (
            moved["few"] < moved["large"] < moved["all"] < moved["twice"]
            or moved["large"] < moved["few"] < moved["all"]
        )
        one, two = (export(tmp_path, node_file, hnc=True, hnc_min_children=2, hnc_seed=seed)[0] for seed in (1, 2))
        assert [row["node_ids"] for row in one] != [row["node_ids"] for row in two]

    @pytest.mark.parametrize("view", ["tree", "sft"])
    def test_nothing_to_merge(self, tmp_path, view):
        """The rows are then those without `hnc`. A tree of three children per node has no node of the default four."""
        write_nodes([full_tree(random.Random(i), f"p{i}") for i in range(9)], tmp_path / "nodes.parquet")
        source, options = str(tmp_path / "nodes.parquet"), {"hnc": True, "view": view, "test_size": 0}
        train, _, report = export(tmp_path, source, **options)
        warning = report["warnings"][-1]
        assert warning.startswith("`hnc` is set, but no step was merged.") and "hnc_min_children=4" in warning
        assert {row["source"] for row in train} == {"tree"}
        _, _, report = export(tmp_path, source, hnc_min_children=3, **options)
        assert not any("no step was merged" in warning for warning in report["warnings"])


class TestBalance:
    @pytest.mark.parametrize("view", ["tree", "hrm", "prm"])
    def test_bins(self, tmp_path, node_file, view):
        """Bins must have about equal size, weights must account for dropped rows, and test rows must not change."""
        full, full_test, _ = export(tmp_path, node_file, view=view)
        train, test, report = export(tmp_path, node_file, view=view, balance=2)
        before = Counter(min(int(y * 2), 1) for row in full for y in row["labels"] if y is not None)
        after = Counter(min(int(y * 2), 1) for row in train for y in row["labels"] if y is not None)
        least = min(before.values())
        assert max(before.values()) > 1.3 * least
        for number in (0, 1):
            assert after[number] == pytest.approx(least, rel=0.2)
            bin_name = f"labels from {number / 2:.3g} to {(number + 1) / 2:.3g}"
            stated = report["facts"]["balance"][bin_name]
            assert stated == {"before": before[number], "chance_to_stay": pytest.approx(least / before[number])}
        for row in train:
            for label, weight in zip(row["labels"], row["label_weights"], strict=True):
                bin_of = None if label is None else min(int(label * 2), 1)
                assert weight == pytest.approx(0 if label is None else before[bin_of] / least)
        assert [row["labels"] for row in test] == [row["labels"] for row in full_test]
        assert [row["label_weights"] for row in test] == [
            [float(y is not None) for y in row["labels"]] for row in test
        ]

    def test_weights_recover_the_counts(self, tmp_path, node_file):
        """Horvitz-Thompson: averaged over seeds, the weighted row counts equal the original counts."""
        full, _, _ = export(tmp_path, node_file, test_size=0)
        trees = [StepTree.from_row(row) for row in full]
        right = sum(y > 0.9 for tree in trees for y in tree.labels if y is not None)
        estimates = []
        for seed in range(30):
            estimate = 0.0
            for tree in trees:
                copy = StepTree(
                    tree.prompt, tree.completions, list(tree.labels), tree.parents, None, dict(tree.step_columns)
                )
                chances = {(0,): 1.0, (1,): 0.5, (2,): 1.0, (3,): 0.25}
                thin_labels(copy, label_cells(copy, 4), chances, seed)
                weights = copy.step_columns["label_weights"]
                estimate += sum(w for y, w in zip(copy.labels, weights, strict=True) if y is not None and y > 0.9)
            estimates.append(estimate)
        assert sum(estimates) / len(estimates) == pytest.approx(right, rel=0.1)
        assert len(set(estimates)) > 10

    @pytest.mark.parametrize("view", ["tree", "hrm", "prm"])
    def test_cells_of_value_and_depth(self, tmp_path, node_file, view):
        """Within each depth, bins must have about equal size, and the report must state every cell."""
        options = {"view": view, "hnc": True, "hnc_min_children": 2, "hnc_rule": "per_child", "test_size": 0}
        full, _, _ = export(tmp_path, node_file, **options)
        train, _, report = export(tmp_path, node_file, balance=2, balance_by="value_and_depth", **options)

        def cells(rows: list[dict]) -> Counter:
            found = Counter()
            for row in rows:
                tree = StepTree.from_row(row)
                for step, label in enumerate(tree.labels):
                    if label is not None:
                        found[sum(tree.num_merged[i] for i in tree.path(step)), min(int(label * 2), 1)] += 1
            return found

        before, after = cells(full), cells(train)
        least = {depth: min(before[depth, i] for i in (0, 1) if before[depth, i]) for depth, _ in before}
        chances = {cell: max(least[cell[0]] / count, 0.1) for cell, count in before.items()}
        assert len(least) == 4 and min(chances.values()) < 0.8
        for (depth, number), count in before.items():
            name = f"depth {depth}, labels from {number / 2:.3g} to {(number + 1) / 2:.3g}"
            stated = report["facts"]["balance"][name]
            assert stated == {"before": count, "chance_to_stay": pytest.approx(chances[depth, number])}
            kept = chances[depth, number] * count
            assert after[depth, number] == pytest.approx(kept, rel=0.35, abs=6)
        assert sum(cell["before"] for cell in report["facts"]["balance"].values()) == sum(before.values())
        for row in train:
            tree = StepTree.from_row(row)
            for step, (label, weight) in enumerate(zip(tree.labels, tree.step_columns["label_weights"], strict=True)):
                depth = sum(tree.num_merged[i] for i in tree.path(step))
                expected = 0 if label is None else 1 / chances[depth, min(int(label * 2), 1)]
                assert weight == pytest.approx(expected)
        assert "--balance 2 --balance_by value_and_depth" in report["command"]

    def test_chances_by_hand(self):
        """Each depth has its own smallest bin. A rare bin removes at most nine tenths of the others."""
        counts = {(1, 0): 4, (1, 1): 8, (2, 0): 1, (2, 1): 50, (3, 1): 7}
        assert keep_chances(counts) == {(1, 0): 1, (1, 1): 0.5, (2, 0): 1, (2, 1): 0.1, (3, 1): 1}
        assert keep_chances({(0,): 1, (1,): 50, (3,): 2}) == {(0,): 1, (1,): 0.02, (3,): 0.5}
        assert keep_chances({}) == {}

    def test_cells_by_hand(self):
        """A merged step has the depth of its last step, so a label has one cell in all views."""
        tree = StepTree(
            "p", ["a", "b", "a b", "c", "b c"], [0.0, 0.5, 1.0, None, 0.49], [-1, 0, -1, 1, 0], [1, 1, 2, 1, 2]
        )
        assert label_cells(tree, 2) == [(0,), (1,), (1,), None, (0,)]
        assert label_cells(tree, 4, "value_and_depth") == [(1, 0), (2, 2), (2, 3), None, (3, 1)]

    def test_weights_recover_the_counts_of_every_cell(self):
        """Horvitz-Thompson per cell: averaged over seeds, the sum of the weights is the number of labels."""
        rng = random.Random(0)
        trees = [
            label_steps(random_tree(rng, f"{i}"), ExportConfig(inputs=["none"], output_dir="out"), Counter())[0]
            for i in range(40)
        ]
        cells = [label_cells(tree, 2, "value_and_depth") for tree in trees]
        counts = Counter(cell for found in cells for cell in found if cell)
        chances = keep_chances(counts)
        totals, seeds = Counter(), 60
        for seed in range(seeds):
            for tree, own in zip(trees, cells, strict=True):
                copy = replace(tree, labels=list(tree.labels), step_columns=dict(tree.step_columns))
                thin_labels(copy, own, chances, seed)
                for cell, weight in zip(own, copy.step_columns["label_weights"], strict=True):
                    if cell:
                        totals[cell] += weight
        for cell, count in counts.items():
            error = (count * (1 / chances[cell] - 1) / seeds) ** 0.5
            assert totals[cell] / seeds == pytest.approx(count, abs=4 * error + 1e-9)

    def test_shared_step_is_kept_or_dropped_once(self, tmp_path, node_file):
        """If each row were sampled separately, a step shared by all paths would almost always remain in one."""
        train, _, _ = export(tmp_path, node_file, view="prm", balance=2, test_size=0)
        fates = defaultdict(set)
        for row in train:
            for node_id, label in zip(row["node_ids"], row["labels"], strict=True):
                fates[node_id].add(label)
        assert all(len(labels) == 1 for labels in fates.values())
        assert sum(labels == {None} for labels in fates.values()) > 50


class TestSolutions:
    def test_rows(self, tmp_path, node_file):
        """Rows must be whole right solutions, exactly as written, with the lowest score on the path."""
        train, _, report = export(tmp_path, node_file, view="sft", test_size=0)
        config = ExportConfig(inputs=["none"], output_dir="out", view="sft")
        expected = Counter()
        for tree in read_trees(node_file):
            steps = slow_steps(tree, config)
            for key in steps:
                nodes = [
                    i
                    for i, node in enumerate(tree.nodes)
                    if node.role != "rollout"
                    and node.is_final
                    and node.correct
                    and tuple((tree.step_text(j), 1, tree.nodes[j].is_final) for j in tree.path(i)) == key
                ]
                if nodes:
                    path = [steps[key[: end + 1]] for end in range(len(key))]
                    scored = [(round(score, 6), counts) for score, counts, _ in path if score is not None]
                    lowest, counts = min(scored, key=lambda step: step[0])  # the first of equal scores
                    expected[tree.problem.prompt, tree.text(nodes[0]), lowest, counts[:2]] += 1
        found = Counter(
            (row["prompt"], row["completion"], round(row["mc_score"], 6), (row["mc_correct"], row["mc_total"]))
            for row in train
        )
        assert found == expected
        assert len(train) > 50
        assert set(train[0]) == {
            "prompt",
            "completion",
            "mc_score",
            "problem",
            "problem_id",
            "answer",
            "estimator",
            "truncated",
            "label_kind",
            "eta",
            "mc_correct",
            "mc_total",
            "node_id",
        }
        card = DatasetCard.load(tmp_path / "out" / "README.md").text
        assert "| `mc_total` | int32 | number of leaves with an answer" in card
        chosen, _, report = export(tmp_path, node_file, view="sft", test_size=0, min_mc_score=0.5)
        assert chosen == [row for row in train if row["mc_score"] >= 0.5]
        below = [row for row in train if row["mc_score"] < 0.5]
        assert report["notes"]["solutions_below_min_score"] == len(below) > 0
        kept = {row["problem_id"] for row in chosen}  # a problem without solutions is dropped and counted
        lost = {row["problem_id"] for row in below} - kept
        assert report["dropped"]["no_solution_with_min_score"] == len(lost) > 0
        assert report["dropped"]["no_right_solution"] == 60 - len(kept) - len(lost) > 0

    @pytest.mark.parametrize("min_score", [0.0, 0.4])
    def test_top_k(self, tmp_path, node_file, min_score):
        """Compare with sorting by hand. Taking the first solutions, or a wrong order of ties, would look correct."""
        all_rows, _, _ = export(tmp_path, node_file, view="sft", test_size=0, min_mc_score=min_score)
        rows, _, report = export(tmp_path, node_file, view="sft", test_size=0, min_mc_score=min_score, max_solutions=2)
        place = {node.node_id: i for tree in read_trees(node_file) for i, node in enumerate(tree.nodes)}
        for row, after in zip(all_rows, all_rows[1:], strict=False):
            assert row["problem_id"] != after["problem_id"] or place[row["node_id"]] < place[after["node_id"]]
        expected, num_ties = [], 0
        for name in dict.fromkeys(row["problem_id"] for row in all_rows):
            group = [(place, row) for place, row in enumerate(all_rows) if row["problem_id"] == name]
            group.sort(key=lambda pair: (-pair[1]["mc_score"], -pair[1]["mc_total"], pair[0]))
            expected += [row for _, row in sorted(group[:2], key=lambda pair: pair[0])]
            num_ties += len(group) > 2 and group[1][1]["mc_score"] == group[2][1]["mc_score"]
        assert rows == expected and num_ties > 2
        assert report["notes"]["solutions_beyond_top_k"] == len(all_rows) - len(rows) > 10
        assert "--max_solutions 2" in report["command"]
        assert report["facts"]["labels"]["max_solutions"] == 2

    def test_every_solution_is_counted(self, tmp_path, node_file):
        """This includes problems without rows: found = rows + duplicates + below the minimum score + beyond top_k."""
        train, _, report = export(tmp_path, node_file, view="sft", test_size=0, min_mc_score=0.4, max_solutions=1)
        found = 0
        for tree in read_trees(node_file):
            found += sum(node.role != "rollout" and node.is_final and bool(node.correct) for node in tree.nodes)
        notes = report["notes"]
        assert notes["solutions_found"] == found
        parts = [
            notes[name] for name in ("duplicate_solutions", "solutions_below_min_score", "solutions_beyond_top_k")
        ]
        assert min(parts) > 0
        assert found == len(train) + sum(parts)

    def test_equal_texts_with_different_steps(self):
        """A token across a border moves the cut. Training on both copies would count the solution twice."""
        tree = empty_tree()
        for parent, place, text in ((ROOT, 0, "a b"), (ROOT, 1, "a"), (1, 0, " b")):
            add_node(tree, parent, place, "")
            tree.nodes[-1].text = text
        end(tree.nodes[0], True)
        end(tree.nodes[2], True)
        notes = Counter()
        (solution,) = sft_rows(tree, ExportConfig(inputs=["none"], output_dir="out", view="sft"), notes)
        assert solution.extra["node_id"] == tree.nodes[0].node_id
        assert notes["solutions_found"] == 2 and notes["duplicate_solutions"] == 1

    def test_equal_texts_have_the_highest_score(self):
        """Otherwise the order of equal solutions would decide whether they are kept."""
        for order in (0, 1):
            tree = empty_tree()
            for place, pieces in enumerate((("a b",), ("a", " b"))[:: 1 - 2 * order]):
                parent = ROOT
                for piece in pieces:
                    add_node(tree, parent, place if parent == ROOT else 0, "")
                    tree.nodes[-1].text = piece
                    parent = len(tree.nodes) - 1
                end(tree.nodes[parent], True)
            (above,) = [i for i, node in enumerate(tree.nodes) if node.text == "a"]
            add_node(tree, above, 1, " c")
            end(tree.nodes[-1], False)
            notes = Counter()
            (solution,) = sft_rows(
                tree, ExportConfig(inputs=["none"], output_dir="out", view="sft", min_mc_score=0.75), notes
            )
            assert (solution.completions, solution.labels) == (["a b"], [1.0])
            assert notes["duplicate_solutions"] == 1

    def test_steps_without_rollouts(self, tmp_path):
        """Without rollouts only the last step has a score, 1 if right, so a minimum score keeps everything."""
        search = replace(SEARCHES["rollouts"], num_completions=0)
        run_scripted(tmp_path / "run", search, make_problems(4))
        check_manifest(tmp_path / "run", {"prompt": asdict(PROMPT)})
        options = {"view": "sft", "test_size": 0}
        rows, _, report = export(tmp_path, str(tmp_path / "run"), min_mc_score=0.9, **options)
        number = report["notes"]["solutions_with_unlabelled_steps"]
        assert number == sum(row["completion"].count("# Step") > 1 for row in rows) > 0
        (warning,) = report["warnings"]
        assert warning.startswith(f"{number} of the solutions have steps without an MC score. min_mc_score=0.9")
        assert not export(tmp_path, str(tmp_path / "run"), **options)[2]["warnings"]
        run_scripted(tmp_path / "full_tree", SEARCHES["full_tree"], make_problems(4))
        check_manifest(tmp_path / "full_tree", {"prompt": asdict(PROMPT)})
        _, _, report = export(tmp_path, str(tmp_path / "full_tree"), min_mc_score=0.5, **options)
        assert "solutions_with_unlabelled_steps" not in report["notes"] and not report["warnings"]

    def test_scores_are_not_rounded(self, tmp_path, node_file):
        """Rounded to 32 bits, a score of 0.8 is above 0.8, and a score of 0.9 is below 0.9."""
        train, _, _ = export(tmp_path, node_file, view="sft", test_size=0)
        scores = set()
        for tree in read_trees(node_file):
            config = ExportConfig(inputs=["none"], output_dir="out", view="sft")
            scores |= {solution.labels[0] for solution in sft_rows(tree, config, Counter())}
        assert {row["mc_score"] for row in train} == scores and len(scores) > 10

    def test_no_right_solution(self, tmp_path):
        tree = full_tree(random.Random(0))
        for node in tree.nodes:
            node.correct = False if node.is_final else None
        write_nodes([tree], tmp_path / "nodes.parquet")
        with pytest.raises(ValueError, match="no_right_solution: 1"):
            export(tmp_path, str(tmp_path / "nodes.parquet"), view="sft", test_size=0)


class TestCompressedSolutions:
    """`--view sft --hnc`: the texts of the tree, with the higher of the scores in the tree and in the compressed tree."""

    OPTIONS = {"view": "sft", "hnc": True, "hnc_min_children": 2, "hnc_rule": "per_child"}

    @pytest.mark.parametrize("prefixes", [False, True])
    def test_rows(self, tmp_path, node_file, prefixes):
        options = self.OPTIONS | ({"prefixes": True, "min_mc_score": 0.5} if prefixes else {})
        alone = {name: value for name, value in options.items() if not name.startswith("hnc")}
        train, test, report = export(tmp_path, node_file, **options)
        plain, plain_test, plain_report = export(tmp_path, node_file, **alone)
        united = [found["notes"]["equal_siblings_united"] for found in (report, plain_report)]
        assert united[0] == united[1] > 0  # the view is no row, so its nodes are not counted
        config = ExportConfig(inputs=["none"], output_dir="out", **options)
        low = replace(config, min_mc_score=1e-9)
        expected, raised = {}, 0
        for tree in read_trees(node_file):
            if problem_split(tree.problem.prompt, 0.3, 42) == "test":
                continue
            views = [tree, compress(tree, 42, 0.5, 2, 1, "per_child")]
            scores = [
                {row.completions[0].strip(): row.labels[0] for row in sft_rows(view, low, Counter())} for view in views
            ]
            for text in scores[0] | scores[1]:
                score = max(found[text] for found in scores if text in found)
                if score >= config.min_mc_score:
                    expected[tree.problem.prompt, text] = score
                    raised += score > scores[0].get(text, -1)
        assert {(row["prompt"], row["completion"].strip()): row["mc_score"] for row in train} == expected
        assert len(train) == len(expected) > 40
        assert Counter(row["source"] for row in train)["hnc"] == raised == report["notes"]["hnc_raised_scores"] > 3
        assert {row["source"] for row in test} == {"tree"} and len(test) == len(plain_test) > 10
        texts = {(row["prompt"], row["completion"]) for row in plain}
        assert texts <= {(row["prompt"], row["completion"]) for row in train}
        assert report["notes"]["hnc_moved_nodes"] > 10
        assert report["facts"]["labels"]["hnc_rule"] == "per_child"
        assert "--hnc --hnc_rule per_child --hnc_min_children 2" in report["command"]

    def test_by_hand(self):
        """The moved child skips its parent, whose other children are wrong, so the solution has a higher lowest score."""
        tree = empty_tree()
        for parent, place, text in ((ROOT, 0, "one"), (0, 0, "two"), (0, 1, "no"), (0, 2, "bad")):
            add_node(tree, parent, place, text)
        for i, correct in ((1, True), (2, False), (3, False)):
            end(tree.nodes[i], correct)
        config = ExportConfig(inputs=["none"], output_dir="out", view="sft", hnc=True, min_mc_score=0.5)
        notes = Counter()
        assert sft_rows(tree, config, notes) == []
        assert notes["solutions_below_min_score"] == 1
        notes = Counter()
        (row,) = sft_rows(tree, config, notes, move_up(tree, [1]))
        assert (row.completions, row.labels, row.extra["source"]) == ([tree.text(1)], [1.0], "hnc")
        assert row.extra["node_id"] == tree.nodes[1].node_id
        assert (notes["solutions_found"], notes["duplicate_solutions"], notes["hnc_raised_scores"]) == (1, 0, 1)


class TestPrefixes:
    """`--view sft --prefixes`: the text up to every step whose own score reaches the minimum."""

    @pytest.mark.parametrize("least", [0.3, 0.95])
    def test_rows(self, tmp_path, node_file, least):
        train, _, report = export(tmp_path, node_file, view="sft", prefixes=True, min_mc_score=least, test_size=0)
        config = ExportConfig(inputs=["none"], output_dir="out", view="sft")
        expected, num_steps = {}, 0
        for tree in read_trees(node_file):
            steps = slow_steps(tree, config)
            for i, node in enumerate(tree.nodes):
                key = tuple((tree.step_text(j), 1, tree.nodes[j].is_final) for j in tree.path(i))
                if node.role == "rollout" or not all(part[0] for part in key):
                    continue
                score, counts, _ = steps[key]
                num_steps += score is not None
                if score is not None and score >= least - 1e-9:
                    found = expected.setdefault((tree.problem.prompt, tree.text(i).strip()), (0.0, False, None))
                    expected[tree.problem.prompt, tree.text(i).strip()] = max(
                        found, (score, node.is_final, counts[:2])
                    )
        found = {
            (row["prompt"], row["completion"].strip()): (
                row["mc_score"],
                row["is_complete"],
                (row["mc_correct"], row["mc_total"]),
            )
            for row in train
        }
        assert len(found) == len(train) == len(expected)
        assert found.keys() == expected.keys()
        for key, (score, is_complete, counts) in expected.items():
            assert found[key] == (pytest.approx(score), is_complete, counts)
        notes = report["notes"]
        complete = sum(row["is_complete"] for row in train)
        assert 20 < complete == notes["complete_solutions"] < len(train) - 10
        assert notes["prefixes_found"] == num_steps
        assert num_steps == len(train) + notes["duplicate_prefixes"] + notes["prefixes_below_min_score"]

    def test_whole_solutions_are_among_them(self, tmp_path, node_file):
        """A right solution has the MC score 1 at its end, so it is a row, whatever the scores before."""
        whole, _, _ = export(tmp_path, node_file, view="sft", test_size=0)
        train, _, _ = export(tmp_path, node_file, view="sft", prefixes=True, min_mc_score=0.95, test_size=0)
        complete = {(row["prompt"], row["completion"]) for row in train if row["is_complete"]}
        whole = {(row["prompt"], row["completion"]) for row in whole}
        assert complete <= whole and len(complete) > 50
        assert len(whole - complete) == 1  # two equal texts with different grades

    def test_the_dataset_says_what_its_rows_are(self, tmp_path, node_file):
        options = {"view": "sft", "prefixes": True, "min_mc_score": 0.5, "test_size": 0}
        train, _, report = export(tmp_path, node_file, **options)
        card = DatasetCard.load(tmp_path / "out" / "README.md").text
        assert "Each row is the text from the start of a solution to one of its steps" in card
        assert "| `is_complete` | bool | whether the solution ends with the step" in card
        unfinished = sum(not row["is_complete"] for row in train)
        (warning,) = [line for line in report["warnings"] if "is_complete" in line]
        assert warning.startswith(f"{unfinished} of {len(train)} rows end before the end of the solution")
        assert "trl-hrm kl-self" in warning
        assert "--prefixes --min_mc_score 0.5" in report["command"]
        assert report["facts"]["labels"]["rows"] == "prefixes"

    def test_most_rows_per_problem(self, tmp_path, node_file):
        options = {"view": "sft", "prefixes": True, "min_mc_score": 0.3, "test_size": 0}
        train, _, report = export(tmp_path, node_file, max_solutions=3, **options)
        found, _, _ = export(tmp_path, node_file, **options)
        assert max(Counter(row["problem_id"] for row in train).values()) == 3
        assert report["notes"]["prefixes_beyond_top_k"] == len(found) - len(train) > 20

    def test_no_prefix_reaches_the_minimum(self, tmp_path):
        tree = full_tree(random.Random(0))
        for node in tree.nodes:
            node.correct = False if node.is_final else None
        good = full_tree(random.Random(1), "good")
        write_nodes([tree, good], tmp_path / "nodes.parquet")
        options = {"view": "sft", "prefixes": True, "min_mc_score": 0.5, "test_size": 0}
        train, _, report = export(tmp_path, str(tmp_path / "nodes.parquet"), **options)
        assert {row["problem_id"] for row in train} == {"good"}
        assert report["dropped"] == {"no_prefix_with_min_score": 1}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"view": "sft", "prefixes": True}, "`min_mc_score` is 0, so every step would become a row"),
            ({"prefixes": True, "min_mc_score": 0.5}, "`prefixes` is True, but has no effect with `view='tree'`"),
            ({"balance_by": "value_and_depth"}, "has no effect without `balance`"),
            ({"hnc_rule": "per_child"}, "`hnc_rule` is 'per_child', but has no effect without `hnc`"),
            ({"view": "sft", "balance": 2}, "`labels`, `min_leaves` and `balance` have no effect"),
        ],
    )
    def test_options_that_would_be_ignored(self, options, message):
        with pytest.raises(ValueError, match=message):
            ExportConfig(inputs=["none"], output_dir="out", **options)


def test_unfinished_problems_have_no_rows(tmp_path):
    """A problem skipped by a filter has rollouts. As labels they would say that every step is right."""
    rng = random.Random(0)
    trees = [rollout_tree(rng, f"{i}") for i in range(4)]
    for tree, status in zip(trees, ("done", "always_solved", "error", "open"), strict=True):
        tree.status = status
    write_nodes(trees, tmp_path / "nodes.parquet")
    train, _, report = export(tmp_path, str(tmp_path / "nodes.parquet"), test_size=0)
    assert {row["problem_id"] for row in train} == {"0"}
    assert report["dropped"] == {"always_solved": 1, "error": 1, "open": 1}


def test_too_few_leaves(tmp_path, node_file):
    """One leaf is a coin toss. The report must show how many such steps became context."""
    before, _, _ = export(tmp_path, node_file, test_size=0)
    after, _, report = export(tmp_path, node_file, test_size=0, min_leaves=4)
    kept = {row["problem_id"]: row for row in after}
    num_lost = 0
    for row in before:
        expected = [label if total >= 4 else None for label, total in zip(row["labels"], row["mc_total"], strict=True)]
        if row["problem_id"] in kept:
            assert kept[row["problem_id"]]["labels"] == expected
            num_lost += sum(label is not None for label in row["labels"]) - sum(y is not None for y in expected)
        else:
            assert not any(label is not None for label in expected)
    assert report["notes"]["labels_on_too_few_leaves"] == num_lost > 0
    assert report["dropped"]["no_labelled_step"] == 60 - len(kept) > 0


@pytest.mark.parametrize("view", ["hrm", "sft"])
def test_number_of_processes_does_not_matter(tmp_path, node_file, view):
    found = []
    options = {"hnc": True, "hnc_min_children": 2, "balance": 3} if view == "hrm" else {}
    for num_proc in (1, 2):
        export(tmp_path, node_file, view=view, num_proc=num_proc, **options)
        found.append({path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()})
    assert found[0] == found[1]


def test_dataset_loads(tmp_path, node_file):
    _, _, report = export(tmp_path, node_file, view="hrm", hnc=True)
    dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(dataset[name]) for name in dataset} == report["rows"]
    assert StepTree.from_row(dataset["train"][0]).step_columns.keys() == {*NAMES, "node_ids"}


# Counts of each file: nodes with the root, depth, and answers that are right and wrong
OPENR = {
    "openr": ([12, 4, 5], [3, 2, 2], [{True: 4, False: 2}, {True: 2}, {True: 1, False: 1}]),
    "math-aps-tree": ([143, 90, 24], [4, 3, 3], [{True: 135, False: 2}, {True: 82}, {True: 17}]),
}


class TestOpenr:
    @pytest.fixture
    def file(self, openr) -> str:
        return str(openr)

    def test_trees(self, file):
        """Compare counts with the file, including roots. Recorded values must not change."""
        source = OpenrFiles([file])
        trees = [tree for chunk in source.chunks() for _, _, tree in source.read(chunk)]
        sizes, depths, answers = OPENR[Path(file).stem]
        assert [len(tree.nodes) + 1 for tree in trees] == sizes
        assert [max(tree.depth(i) for i in range(len(tree.nodes))) for tree in trees] == depths
        assert [Counter(node.correct for node in tree.nodes if node.is_final) for tree in trees] == answers
        with open(file) as lines:
            roots = [json.loads(line)["reasoning_steps"] for line in lines]
        for tree, root in zip(trees, roots, strict=True):
            assert len({node.node_id for node in tree.nodes}) == len(tree.nodes)
            pending, index = list(reversed(root["children"])), 0
            while pending:
                found = pending.pop()
                assert (tree.nodes[index].value, tree.step_text(index)) == (found["mc_value"], found["text"].strip())
                pending += reversed(found["children"])
                index += 1
            assert all(
                tree.text(i).startswith(tree.text(node.parent))
                for i, node in enumerate(tree.nodes)
                if node.parent != ROOT
            )

    def test_export(self, tmp_path, file):
        train, _, report = export(tmp_path, file, format="openr", test_size=0)
        assert len(train) == 3
        assert {row["estimator"] for row in train} == {"recorded"}
        for tree, row in zip(OpenrFiles([file]).read(OpenrFiles([file]).chunks()[0]), train, strict=True):
            first = next(i for i, node in enumerate(tree[2].nodes) if 0 < node.value < 1)
            assert row["labels"][row["completions"].index(tree[2].step_text(first))] == pytest.approx(
                tree[2].nodes[first].value
            )
        solutions, _, report = export(tmp_path, file, format="openr", view="sft", test_size=0)
        assert all("\\boxed" in row["completion"] for row in solutions)
        assert all(row["prompt"] == row["problem"] for row in solutions)
        assert "openr files do not record the prompt of the policy" in report["warnings"][0]

    def test_faults(self, tmp_path):
        good = {
            "question": "1+2?",
            "final_answer": "3",
            "reasoning_steps": {"text": "1+2?", "mc_value": 1, "children": []},
        }
        for change, message in (
            ({"question": None}, "rows.jsonl:1: `question` is None, expected a string"),
            ({"reasoning_steps": {"text": "x"}}, r"rows.jsonl:1: a step has the keys \['text'\], expected an object"),
            (
                {"reasoning_steps": {"text": "x", "mc_value": 2, "children": []}},
                "`mc_value` is 2, expected a number from 0 to 1",
            ),
            (
                {"reasoning_steps": [{"solution_prefix": "1+2?", "mc_value": 1}]},
                "expected a tree. This is openr's flat file",
            ),
        ):
            (tmp_path / "rows.jsonl").write_text(json.dumps(good | change) + "\n")
            with pytest.raises(ValueError, match=message):
                export(tmp_path, str(tmp_path / "rows.jsonl"), format="openr")
        with pytest.raises(ValueError, match="`min_leaves` is 2"):
            export(tmp_path, str(tmp_path / "rows.jsonl"), format="openr", min_leaves=2)

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
    def test_missing_format_option_is_named(self, tmp_path, name):
        """ "No Parquet file" would make the user convert the file."""
        row = {"question": "1+2?", "final_answer": "3", "reasoning_steps": {"text": "", "mc_value": 1, "children": []}}
        data = json.dumps([row] if name.endswith("json") else row).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        with pytest.raises(ValueError, match=f"{name} .*--format openr"):
            export(tmp_path, str(tmp_path / name))

    def test_arrays_and_other_columns(self, tmp_path, file):
        rows = [json.loads(line) for line in open(file, encoding="utf-8")]
        renamed = [{"q": row.pop("question"), "a": {"gold": row.pop("final_answer")}, **row} for row in rows]
        (tmp_path / "array.json").write_text(json.dumps(renamed, indent=1))
        columns = {"question": "q", "final_answer": "a.gold"}
        found, *_ = export(tmp_path, str(tmp_path / "array.json"), format="openr", test_size=0, columns=columns)
        assert found == export(tmp_path, file, format="openr", test_size=0)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "er"}, "`labels` is 'er'"),
        ({"labels": "entropy"}, "`eta` is None.*labels='entropy'"),
        ({"labels": "entropy", "eta": float("nan")}, "`eta` is nan"),
        ({"eta": 2.0}, "`eta` is 2.0, but has no effect with `labels='soft'`"),
        ({"estimator": "mean"}, "`estimator` is 'mean'.*child_mean, leaf_share"),
        ({"truncated": "keep"}, "`truncated` is 'keep'.*drop, wrong"),
        ({"min_leaves": 0}, "`min_leaves` is 0"),
        ({"balance": 1}, "`balance` is 1"),
        ({"hnc_min_children": 1}, "`hnc_min_children` is 1"),
        ({"min_mc_score": 0.5}, "`min_mc_score` is 0.5, but has no effect with `view='tree'`"),
        ({"min_mc_score": 1.5, "view": "sft"}, "`min_mc_score` is 1.5"),
        ({"max_solutions": 4}, "`max_solutions` is 4, but has no effect with `view='tree'`"),
        ({"max_solutions": 0, "view": "sft"}, "`max_solutions` is 0"),
        ({"view": "sft", "labels": "hard"}, "view='sft'.*labels"),
        ({"view": "flat"}, "`view` is 'flat'"),
        ({"view": "prm", "max_merge": 5}, "`max_merge` is 5, but has no effect with `view='prm'`"),
        ({"view": "sft", "max_merge": 3}, "`max_merge` is 3, but has no effect with `view='sft'`"),
        ({"merge_separator": " | "}, "`merge_separator` is ' | ', but has no effect with `view='tree'`"),
        ({"view": "sft", "hnc": True, "merge_separator": "x"}, "`merge_separator` is 'x'.*`view='sft'`"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ExportConfig(inputs=["none"], output_dir="out", **options)


def test_options_of_merged_steps():
    """They apply to the view with merged steps and, for the separator, to node compression."""
    options = {"inputs": ["none"], "output_dir": "out"}
    config = ExportConfig(view="hrm", max_merge=3, merge_separator=" | ", **options)
    assert replace(config) == config
    for view in ("tree", "prm", "orm"):
        config = ExportConfig(view=view, hnc=True, merge_separator=" | ", **options)
        assert replace(config) == config


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """Return a run of a scripted policy as left by `trl-hrm annotate`, with one unfinished problem."""
    folder = tmp_path / "run"
    run_scripted(folder, SEARCHES["full_tree"], make_problems(8))
    manifest = {"engine": {"engine": "scripted", "model": "tiny|model"}, "search": SEARCHES["full_tree"].describe()}
    manifest |= {"prompt": asdict(PROMPT)}
    check_manifest(folder, manifest | {"grader": {"grader": "exact", "version": "1.0"}, "seed": 42, "num_shards": 1})
    finish_shard(folder, 0, 1)
    summary = json.loads((folder / "summary-00000-of-00001.json").read_text())
    summary["problems"]["error"] = 2
    (folder / "summary-00000-of-00001.json").write_text(json.dumps(summary))
    return folder


def test_export_of_a_run(tmp_path, monkeypatch, capsys, run_folder):
    """Check the command: every label against the run's log, the facts on the card, and the command that repeats it."""
    monkeypatch.chdir(tmp_path)
    options = "--labels entropy --eta 2 --view hrm --hnc --hnc_min_children 2 --test_size 0.3 --num_proc 1"
    assert main(["export", "run", *options.split(), "--output_dir", "out"]) == 0
    printed = capsys.readouterr().out
    assert "warning: run: 2 problems have failed requests and are dropped" in printed
    report = json.loads((tmp_path / "out" / "build_report.json").read_text())
    trees = list(read_scripted(run_folder).values())
    config = ExportConfig(
        inputs=["run"], output_dir="out", view="hrm", labels="entropy", eta=2.0, hnc=True, hnc_min_children=2
    )
    rows = pq.read_table(tmp_path / "out" / "data" / "train-00000-of-00001.parquet").to_pylist()
    num_trees = 0
    for tree in trees:
        found = [row for row in rows if row["problem_id"] == tree.problem.problem_id and row["source"] == "tree"]
        if found:
            num_trees += 1
            assert rounded(said_by(found)) == rounded(slow_rows(tree, config))
            assert (found[0]["label_kind"], found[0]["eta"], found[0]["estimator"]) == ("entropy", 2.0, "child_mean")
    assert num_trees == sum(row["source"] == "tree" for row in rows) > 3

    tokens = sum(len(node.token_ids) for tree in trees for node in tree.nodes)
    leaves = Counter(leaf for tree in trees for leaf in slow_leaves(tree, ROOT))
    facts = report["facts"]
    assert facts["search"]["tokens_generated"] == tokens
    outcomes = describe_outcomes(read_summary(run_folder)["solutions"])
    assert facts["outcomes"] == {"run": outcomes} and f"\nrun: {outcomes}\n" in printed
    assert facts["search"]["share_unresolved"] == pytest.approx(leaves["unresolved"] / leaves.total())
    assert facts["run"]["share_of_problems_with_errors"] == pytest.approx(2 / 10)
    judged = [steps for tree in trees for steps in slow_steps(tree, config).values() if steps[0] is not None]
    assert facts["yield"]["labels_per_token"] == pytest.approx(len(judged) / tokens)
    on_two = sum(counts[1] >= 2 for _, counts, _ in judged)
    assert 0 < on_two < len(judged)
    assert facts["yield"]["labels_on_2_leaves_per_token"] == pytest.approx(on_two / tokens)
    card = DatasetCard.load(tmp_path / "out" / "README.md").text
    for line in (
        f"| outcomes: run | {outcomes} |",
        "| labels: eta | 2 |",
        "| run: engine: model | `tiny\\|model` |",
        "| run: grader: version | 1.0 |",
        "| run: search: max sequences | 4,096 |",
        "| run: problems: error | 2 |",
        f"| search: tokens generated | {tokens:,} |",
    ):
        assert line in card

    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    program, *again = shlex.split(report["command"])
    assert program == "trl-hrm"
    assert main([*again, "--overwrite"]) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_export_repeats_the_warnings_of_annotate(tmp_path, capsys):
    """The output and the report must name the option to change, its value, and the unreadable references."""
    search = FullTree(RULES["step_header"], FINAL, num_children=3, max_depth=1, max_step_tokens=60)
    folder, ends = tmp_path / "run", ("# Answer\n\n7\n# END!", "# Step 2\n", "# Step 2\n")
    problems = make_problems(6) + [(6 + i, Problem(f"q{i}", f"{i}?", "??")) for i in range(2)]
    manifest = {"prompt": asdict(PROMPT), "search": search.describe(), "extractors": ["marker"]}
    check_manifest(folder, manifest)
    script = lambda prefix, rng: f"# Step 1\nGo.\n\n{rng.choice(ends)}"  # noqa: E731
    run_scripted(folder, search, problems, script, grader=ExactGrader(unreadable=("??",)))
    summary = finish_shard(folder, 0, 1)
    expected = summary_warnings(summary, manifest)
    assert len(expected) == 2 and "Raise --max_depth (now 1)" in expected[1] and "q0 ('??'), q1 ('??')" in expected[0]
    for view in ("prm", "sft"):
        assert (
            main(["export", str(folder), "--view", view, "--output_dir", str(tmp_path / view), "--num_proc", "1"]) == 0
        )
        printed = capsys.readouterr().out
        report = json.loads((tmp_path / view / "build_report.json").read_text())
        assert report["dropped"]["ungradable"] == 2
        for warning in expected:
            assert f"{folder}: {warning}" in report["warnings"] and f"warning: {folder}: {warning}" in printed
        assert f"{folder}: {describe_outcomes(summary['solutions'])}" in printed
    # also if no row is left, because the run is the cause, not the file format
    nothing = ["--view", "prm", "--min_leaves", "99"]
    assert main(["export", str(folder), *nothing, "--output_dir", str(tmp_path / "none"), "--num_proc", "1"]) != 0
    assert f"{folder}: {expected[1]}" in capsys.readouterr().err
    nodes = str(folder / "nodes-00000-of-00001.parquet")
    assert main(["export", nodes, "--view", "prm", "--output_dir", str(tmp_path / "bare"), "--num_proc", "1"]) == 0
    assert f"warning: {expected[0]}" in capsys.readouterr().out  # a node file has the problems but no settings


def test_options_that_contradict_each_other(tmp_path, capsys, run_folder):
    for words, message in (
        (["--eta", "2"], "`eta` is 2.0, but has no effect with `labels='soft'`"),
        (["--labels", "entropy"], "`eta` is None. `labels='entropy'` requires"),
        (["--view", "sft", "--balance", "2"], "`view='sft'` writes solutions without step labels"),
    ):
        assert main(["export", str(run_folder), "--output_dir", str(tmp_path / "out"), *words]) == 1
        assert f"error: {message}" in capsys.readouterr().err


def other_run(folder: Path, copy_name: str, **prompt) -> str:
    """Return a copy of a run whose policy had another prompt."""
    copy = folder.with_name(copy_name)
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"prompt": asdict(replace(PROMPT, **prompt))}))
    return str(copy)


class TestPrompts:
    """Trained on the bare problem, a policy would not learn to follow the instructions of its prompt."""

    def test_plain(self, tmp_path, run_folder):
        train, test, report = export(tmp_path, str(run_folder), view="sft")
        for row in train + test:
            assert row["prompt"] == PROMPT.text(row["problem"]) != row["problem"]
            assert row["completion"].startswith("# Step 1\n") and row["completion"].endswith("# END!")
        assert {row["problem"] for row in train + test} == {f"What is {i} - {i} + 7?" for i in range(8)}
        assert not [warning for warning in report["warnings"] if "prompt" in warning]

    @pytest.mark.parametrize("system_prompt", [None, "Be brief."])
    def test_chat(self, tmp_path, run_folder, system_prompt):
        folder = other_run(run_folder, "chat", style="chat", system_prompt=system_prompt)
        plain, plain_test, _ = export(tmp_path, str(run_folder), view="sft")
        train, test, _ = export(tmp_path, folder, view="sft")
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        for row, other in zip(train, plain, strict=True):  # the split is by problem
            assert row["prompt"] == [*system, {"role": "user", "content": other["prompt"]}]
            assert row["completion"] == [{"role": "assistant", "content": other["completion"]}]
            assert row["problem"] == other["problem"]
        assert [row["problem_id"] for row in test] == [row["problem_id"] for row in plain_test]
        dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
        assert dataset["train"][0]["prompt"] == train[0]["prompt"]
        card = DatasetCard.load(tmp_path / "out" / "README.md").text
        assert "the prompt of the policy: text, or messages for its chat template" in card

    def test_unknown_prompt(self, tmp_path, run_folder):
        """If prompts are missing or differ, the bare problem is used with a warning."""
        (file,) = map(str, node_files(run_folder))
        other = other_run(run_folder, "other", template="Solve: {question}")
        for sources, reason in (
            ([file], f"because {file} does not record the prompt of the policy"),
            ([other, file], f"because {file} does not record the prompt of the policy"),
            ([str(run_folder), other], f"{run_folder} and {other} used different prompts"),
        ):
            train, _, report = export(tmp_path, sources, view="sft")
            assert all(row["prompt"] == row["problem"] for row in train)
            (warning,) = [warning for warning in report["warnings"] if "bare problem" in warning]
            assert reason in warning
        again = other_run(run_folder, "again", name="renamed", final_stops=("x",))  # the same prompt
        train, _, _ = export(tmp_path, [str(run_folder), again], view="sft")
        assert all(row["prompt"] != row["problem"] for row in train)
        _, _, report = export(tmp_path, file)
        assert not report["warnings"]  # step labels use the problem, whatever the prompt

    def test_texts_and_messages(self, tmp_path, run_folder):
        chat = other_run(run_folder, "chat", style="chat")
        other = other_run(run_folder, "other", template="Solve: {question}")
        with pytest.raises(ValueError, match="plain, .*chat"):
            export(tmp_path, [str(run_folder), other, chat], view="sft")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_training_on_prefixes(tmp_path, run_folder, style):
    """From the run to the labels of the trainer: the text of every row, and an end only where the solution ends."""
    folder = str(run_folder) if style == "plain" else other_run(run_folder, "chat", style="chat")
    rows, _, report = export(
        tmp_path, folder, view="sft", prefixes=True, min_mc_score=0.6, max_solutions=4, test_size=0
    )
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
    model = tiny_model(HEADS["lm"], vocab_size=len(tokenizer))
    trainer = make_kl_trainer(
        tmp_path / "model",
        load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")),
        model=model,
        max_length=None,
        trainer_args={"processing_class": tokenizer},
    )
    found = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in trainer.train_dataset]
    texts = [row["completion"] if style == "plain" else row["completion"][0]["content"] for row in rows]
    ends = ["<|end|>" if row["is_complete"] else "" for row in rows]
    assert found == [text + end for text, end in zip(texts, ends, strict=True)]
    assert 0 < report["notes"]["complete_solutions"] == sum(map(bool, ends)) < len(rows)


@pytest.mark.parametrize("option", ["--min_mc_score", "--min_value"])
def test_least_score_on_the_command_line(tmp_path, run_folder, option):
    """Both spellings must work. An option that is parsed but ignored would keep every solution."""
    words = ["--view", "sft", option, "0.6", "--max_solutions", "3", "--test_size", "0", "--num_proc", "1"]
    assert main(["export", str(run_folder), "--output_dir", str(tmp_path / "out"), *words]) == 0
    rows = pq.read_table(tmp_path / "out" / "data" / "train-00000-of-00001.parquet").to_pylist()
    report = json.loads((tmp_path / "out" / "build_report.json").read_text())
    assert min(row["mc_score"] for row in rows) >= 0.6
    assert max(Counter(row["problem_id"] for row in rows).values()) == 3
    assert report["notes"]["solutions_below_min_score"] > 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert main([*shlex.split(report["command"])[1:], "--overwrite"]) == 0
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("num_proc", [1, 2])
def test_problems_of_several_trees(tmp_path, run_folder, num_proc):
    """Selecting the best of each tree, or a solution found by both trees, would give more rows than top_k."""
    shutil.copytree(run_folder, tmp_path / "again")
    run_scripted(tmp_path / "again", SEARCHES["full_tree"], make_problems(10))
    options = {"view": "sft", "test_size": 0, "max_solutions": 1, "num_proc": num_proc}
    one, _, report = export(tmp_path, str(run_folder), **options)
    assert "repeated_problems" not in report["notes"]
    both, _, report = export(tmp_path, [str(run_folder), str(tmp_path / "again")], **options)
    counts = Counter(row["problem_id"] for row in both)
    number = sum(count == 2 for count in counts.values())
    assert number == len(one) and len(counts) > number and max(counts.values()) == 2
    assert report["notes"]["repeated_problems"] == number
    (warning,) = [warning for warning in report["warnings"] if "several trees" in warning]
    assert warning.startswith(f"{number} problems have several trees")
    _, _, report = export(tmp_path, [str(run_folder), str(tmp_path / "again")])
    assert "repeated_problems" not in report["notes"]


def test_rebuild_with_a_value_that_looks_like_an_option(tmp_path, run_folder):
    words = ["--labels", "entropy", "--eta=-1e-05", "--test_size", "0", "--num_proc", "1"]
    assert main(["export", str(run_folder), "--output_dir", str(tmp_path / "out"), *words]) == 0
    report = (tmp_path / "out" / "build_report.json").read_text()
    assert main([*shlex.split(json.loads(report)["command"])[1:], "--overwrite"]) == 0
    assert (tmp_path / "out" / "build_report.json").read_text() == report


def test_several_runs(tmp_path, run_folder):
    """Each run keeps its facts, and their rows form one dataset."""
    shutil.copytree(run_folder, tmp_path / "again")
    folders = [str(run_folder), str(tmp_path / "again")]
    one, _, _ = export(tmp_path, folders[0], test_size=0)
    both, _, report = export(tmp_path, folders, test_size=0)
    assert both == one + one
    assert list(report["facts"]["runs"]) == folders


def test_an_input_given_twice(tmp_path, monkeypatch, run_folder):
    """A folder and one of its files, or two spellings of a path, would double every label."""
    (file,) = node_files(run_folder)
    monkeypatch.chdir(tmp_path)
    for names in (
        [run_folder, run_folder],
        [run_folder, file],
        [file, "run/../run/" + file.name],
        ["run", run_folder],
    ):
        with pytest.raises(ValueError, match="nodes-00000-of-00001.parquet: .*already"):
            export(tmp_path, [str(name) for name in names])
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="already .*rows.jsonl"):
        export(tmp_path, ["rows.jsonl", str(tmp_path / "rows.jsonl")], format="openr")


def test_inputs(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: file not found"):
        export(tmp_path, str(tmp_path / "nothing"))
    write_nodes([], tmp_path / "empty.parquet")
    for options in ({}, {"balance": 2}):
        with pytest.raises(ValueError, match="empty.parquet: no records found"):
            export(tmp_path, str(tmp_path / "empty.parquet"), **options)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="folder"):
        export(tmp_path, str(tmp_path / "folder"))
