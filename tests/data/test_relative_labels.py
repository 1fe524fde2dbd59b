"""Progress and ratio labels: values by hand, undefined labels, merged steps and the telescoping property."""

import json
import random
from collections import Counter
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from trl_hrm import BuildStepwiseConfig, build_stepwise
from trl_hrm.data.export import export
from trl_hrm.data.export_config import ExportConfig
from trl_hrm.data.hierarchy import hrm_view
from trl_hrm.data.step_labels import compressed, label_steps
from trl_hrm.search.compression import count_moves
from trl_hrm.search.nodes import write_nodes
from trl_hrm.search.tree import ROOT, SearchTree
from trl_hrm.search.values import make_label
from trl_hrm.step_tree import StepTree

from ..search.random_trees import add_node, add_rollout, empty_tree, end, full_tree, random_tree, rollout_tree


def config_of(**options) -> ExportConfig:
    return ExportConfig(inputs=["none"], output_dir="out", **options)


def build(tmp_path, source, **options) -> tuple[list[dict], dict]:
    options = {"test_size": 0, "num_proc": 1, "overwrite": True} | options
    report = export(ExportConfig(inputs=str(source), output_dir=str(tmp_path / "out"), **options))
    return pq.read_table(tmp_path / "out" / "data" / "train-00000-of-00001.parquet").to_pylist(), report


@pytest.mark.parametrize(
    ("p", "before", "progress", "ratio"),
    [
        (0.75, 0.25, 0.75, 1.0),
        (0.25, 0.5, 0.375, 0.5),
        (0.5, 0.5, 0.5, 1.0),
        (2 / 3, 2 / 3, 0.5, 1.0),  # exactly 0.5, so that it counts as right and has the same bin for all scores
        (0.0, 1.0, 0.0, 0.0),
        (1.0, 0.0, 1.0, None),
        (0.0, 0.0, 0.5, None),
        (0.5, None, None, None),
    ],
)
def test_values(p, before, progress, ratio):
    assert make_label(p, "progress", before=before) == progress
    assert make_label(p, "ratio", before=before) == ratio


@pytest.fixture
def tree() -> SearchTree:
    """
    Return a tree with the MC scores: prompt 3/8, a 3/4, b 1/2 (after a), c 1 (after b), d 0 (after b), e 1 (after a), f 0, g 0
    (after f).
    """
    tree = empty_tree("p")
    for parent, place, text in (
        *((ROOT, 0, "a"), (0, 0, "b"), (1, 0, "c"), (1, 1, "d"), (0, 1, "e"), (ROOT, 1, "f")),
        (5, 0, "g"),
    ):
        add_node(tree, parent, place, text)
    for i, correct in ((2, True), (3, False), (4, True), (6, False)):
        end(tree.nodes[i], correct)
    return tree


class TestByHand:
    def test_progress(self, tree):
        labelled, _ = label_steps(tree, config_of(labels="progress"), Counter())
        assert labelled.completions == ["a", "b", "c", "d", "e", "f", "g"]
        assert labelled.step_columns["mc_scores"] == [3 / 4, 1 / 2, 1, 0, 1, 0, 0]
        assert labelled.extra["prompt_mc_score"] == 3 / 8
        assert labelled.labels == [11 / 16, 3 / 8, 3 / 4, 1 / 4, 5 / 8, 5 / 16, 1 / 2]

    def test_ratio(self, tree):
        notes = Counter()
        labelled, _ = label_steps(tree, config_of(labels="ratio"), notes)
        assert labelled.labels == [1, pytest.approx(2 / 3), 1, 0, 1, 0, None]
        assert notes == {"labels_after_mc_score_0": 1}

    def test_merged_steps(self, tmp_path, tree):
        """A merged step compares its end with the score before it. The label of its last step would be wrong."""
        write_nodes([tree], tmp_path / "nodes.parquet")
        [row], report = build(tmp_path, tmp_path / "nodes.parquet", labels="progress", view="hrm", max_merge=3)
        merged = dict(zip(row["completions"][7:], row["labels"][7:], strict=True))
        assert merged == {
            "a\nb": 9 / 16,  # 3/8 to 1/2
            "b\nc": 5 / 8,  # 3/4 to 1
            "a\nb\nc": 13 / 16,  # 3/8 to 1
            "b\nd": 1 / 8,
            "a\nb\nd": 5 / 16,
            "a\ne": 13 / 16,
            "f\ng": 5 / 16,
        }
        assert row["mc_scores"] == [3 / 4, 1 / 2, 1, 0, 1, 0, 0, 1 / 2, 1, 1, 0, 0, 1, 0]
        assert row["prompt_mc_score"] == 3 / 8 and row["label_kind"] == "progress"
        card = (tmp_path / "out" / "README.md").read_text()
        assert "0.5 for no change" in card and "MC score before its first step" in card
        [row], report = build(tmp_path, tmp_path / "nodes.parquet", labels="ratio", view="hrm")
        merged = dict(zip(row["completions"][7:], row["labels"][7:], strict=True))
        # f g is not merged, since g has no label
        assert merged == {"a\nb": 1, "b\nc": 1, "b\nd": 0, "a\ne": 1}
        assert report["notes"]["labels_after_mc_score_0"] == 1

    def test_a_given_prefix(self):
        """The first step has no score before it: the policy never sampled from the prompt."""
        tree = empty_tree("p")
        for parent, text in ((ROOT, "given"), (0, "own")):
            add_node(tree, parent, 0, text)
        tree.nodes[0].role = "given"
        end(tree.nodes[1], True)
        notes = Counter()
        labelled, _ = label_steps(tree, config_of(labels="progress"), notes)
        assert labelled.labels == [None, 0.5] and notes == {"labels_without_mc_score_before": 1}

    def test_scores_on_too_few_leaves(self, tree):
        """A score that is too uncertain for a label is too uncertain to compare with."""
        notes = Counter()
        labelled, _ = label_steps(tree, config_of(labels="progress", min_leaves=2), notes)
        assert labelled.labels == [11 / 16, 3 / 8, None, None, None, None, None]
        assert labelled.step_columns["mc_scores"] == [3 / 4, 1 / 2, None, None, None, None, None]
        assert notes == {"labels_on_too_few_leaves": 5}

    def test_merged_step_after_an_unknown_score(self):
        """`b` has no score, so `c` has no label, but the step of all three would have one. It is a step without a label, too."""
        tree = StepTree("p", ["a", "b", "c"], [0.6, None, None], [-1, 0, 1])
        tree.step_columns["mc_scores"] = [0.7, None, 0.9]
        tree.extra = {"label_kind": "progress", "prompt_mc_score": 0.5}
        assert hrm_view(tree, max_merge=3).completions == ["a", "b", "c"]

    def test_merged_step_without_label(self):
        """From 0 to 1/2 and to 1/4: the ratio is defined for the last step, but not for both."""
        tree = StepTree("p", ["a", "b"], [None, 0.5], [-1, 0])
        tree.step_columns["mc_scores"] = [0.5, 0.25]
        tree.extra = {"label_kind": "ratio", "prompt_mc_score": 0.0}
        notes = Counter()
        assert hrm_view(tree, notes=notes).completions == ["a", "b"]
        assert notes == {"merged_steps_without_label": 1}


@pytest.mark.parametrize("estimator", ["child_mean", "leaf_share"])
def test_progress_telescopes(estimator):
    """The advantages of a path add up to the score at its end minus the score of the prompt, and of a merged step, too."""
    rng = random.Random(0)
    config = config_of(labels="progress", estimator=estimator)
    num_paths = num_merged = 0
    for i in range(60):
        tree, _ = label_steps(rng.choice([random_tree, rollout_tree, full_tree])(rng, f"p{i}"), config, Counter())
        tree.extra["label_kind"] = "progress"
        scores = tree.step_columns["mc_scores"]
        for step in range(len(tree.labels)):
            labels = [tree.labels[j] for j in tree.path(step)]
            if None not in labels:
                advantage = sum(2 * label - 1 for label in labels)
                assert advantage == pytest.approx(scores[step] - tree.extra["prompt_mc_score"], abs=1e-12)
                num_paths += 1
        merged = hrm_view(tree, " | ", max_merge=4)
        size = len(tree.labels)
        place = {tuple(tree.completions[j] for j in tree.path(i)): i for i in range(size)}
        for step in range(size, len(merged.labels)):
            texts = [part for j in merged.path(step) for part in merged.completions[j].split(" | ")]
            parts = [place[tuple(texts[: k + 1])] for k in range(len(texts))][-merged.num_merged[step] :]
            labels = [tree.labels[j] for j in parts]
            if None not in labels:
                advantage = sum(2 * label - 1 for label in labels)
                assert 2 * merged.labels[step] - 1 == pytest.approx(advantage, abs=1e-12)
                num_merged += 1
    assert num_paths > 500 and num_merged > 500


@pytest.mark.parametrize("labels", ["progress", "ratio"])
def test_merging_rows_later_is_the_same(tmp_path, labels):
    """`--view hrm` must give the same rows from a search and from rows of the view `tree`, and must not add them twice."""
    rng = random.Random(1)
    write_nodes([random_tree(rng, f"p{i}") for i in range(20)], tmp_path / "nodes.parquet")
    at_once, report = build(tmp_path, tmp_path / "nodes.parquet", labels=labels, view="hrm")
    assert report["labels"]["train"]["merged"]
    for view in ("tree", "hrm"):
        rows, _ = build(tmp_path, tmp_path / "nodes.parquet", labels=labels, view=view)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        build_stepwise(
            BuildStepwiseConfig(
                inputs=str(tmp_path / "rows.jsonl"),
                output_dir=str(tmp_path / view),
                view="hrm",
                test_size=0,
                num_proc=1,
            )
        )
        later = pq.read_table(tmp_path / view / "data" / "train-00000-of-00001.parquet").to_pylist()
        for one, other in zip(later, at_once, strict=True):
            assert {name: one[name] for name in other} == other


def test_rows_without_scores_are_refused():
    """The label of the last step would be a wrong label of the merged step."""
    tree = StepTree("p", ["a", "b"], [0.75, 0.5], [-1, 0], extra={"label_kind": "progress"})
    with pytest.raises(ValueError, match="`mc_scores` or `prompt_mc_score` is missing"):
        hrm_view(tree)
    assert hrm_view(replace(tree, extra={})).labels == [0.75, 0.5, 0.5]


def test_rows_of_two_runs(tmp_path):
    """The mean of two labels has no scores that a merged step could be compared by. Equal rows have."""

    def row(label, scores):
        return {
            "prompt": "p",
            "completions": ["a", "b"],
            "labels": [0.5, label],
            "parents": [-1, 0],
            "mc_scores": scores,
            "prompt_mc_score": 0.5,
            "label_kind": "progress",
        }

    rows = [row(0.75, [0.5, 1.0]), row(0.25, [0.5, 0.0])]
    options = {"view": "hrm", "test_size": 0, "num_proc": 1}
    for name, given in (("equal", [rows[0], rows[0]]), ("different", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in given))
    equal = BuildStepwiseConfig(inputs=str(tmp_path / "equal.jsonl"), output_dir=str(tmp_path / "equal"), **options)
    assert build_stepwise(equal)["labels"]["train"]["merged"] == {"0.75": 1}
    other = BuildStepwiseConfig(
        inputs=str(tmp_path / "different.jsonl"), output_dir=str(tmp_path / "other"), **options
    )
    with pytest.raises(ValueError, match="different labels of the kind 'progress'"):
        build_stepwise(other)
    assert not (tmp_path / "other").exists()


def test_with_compression():
    """A step that compression merges with its parent is compared with the grandparent."""
    rng = random.Random(2)
    config = config_of(labels="progress", hnc=True, hnc_probability=1.0, hnc_min_children=2)
    num_merged = 0
    for i in range(20):
        view = compressed(full_tree(rng, f"p{i}"), config)
        assert count_moves(view)
        tree, _ = label_steps(view, config, Counter())
        scores = tree.step_columns["mc_scores"]
        for step, parent in enumerate(tree.parents):
            before = tree.extra["prompt_mc_score"] if parent == -1 else scores[parent]
            assert tree.labels[step] == (1 + scores[step] - before) / 2
            num_merged += tree.num_merged[step] > 1
    assert num_merged > 50


def test_openr_records_the_score_of_the_problem(tmp_path):
    """The mean over the children of an OmegaPRM tree is biased, because the search selects them."""
    record = {"question": "1+2?", "final_answer": "3", "question_id": 0}
    leaves = [{"text": f"It is \\boxed{{{n}}}.", "mc_value": float(n == 3), "children": []} for n in (3, 4)]
    record["reasoning_steps"] = {"text": "1+2?", "mc_value": 0.25, "children": leaves}
    (tmp_path / "trees.jsonl").write_text(json.dumps(record) + "\n")
    [row], _ = build(tmp_path, tmp_path / "trees.jsonl", format="openr", labels="progress")
    assert row["prompt_mc_score"] == 0.25 and row["labels"] == [0.875, 0.375]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view": "orm"}, "has labels of whole solutions"),
        ({"view": "hrm", "balance": 2}, "balanced by the wrong label"),
        ({"view": "sft"}, "without step labels"),
        ({"eta": 1.0}, "no effect with `labels="),
    ],
)
@pytest.mark.parametrize("labels", ["progress", "ratio"])
def test_options_that_do_not_combine(labels, options, message):
    with pytest.raises(ValueError, match=message):
        config_of(labels=labels, **options)


def test_balance(tmp_path):
    rng = random.Random(3)
    write_nodes([full_tree(rng, f"p{i}", depth=2) for i in range(60)], tmp_path / "nodes.parquet")
    rows, _ = build(tmp_path, tmp_path / "nodes.parquet", labels="progress", balance=2)
    counts = Counter(label >= 0.5 for row in rows for label in row["labels"] if label is not None)
    assert 0.8 < counts[True] / counts[False] < 1.25


def test_rollouts_of_a_step_estimate_its_progress():
    """In a run of solutions with rollouts, the score of the prompt comes from the solutions."""
    rng = random.Random(4)
    tree = empty_tree("p")
    add_rollout(tree, rng, ROOT, 0)
    end(tree.nodes[-1], True)
    add_rollout(tree, rng, ROOT, 1)
    end(tree.nodes[-1], False)
    add_node(tree, ROOT, 0, "a", role="segment")
    for place in range(4):
        add_node(tree, 2, place, "the rest", role="rollout")
        end(tree.nodes[-1], place == 0)
    labelled, _ = label_steps(tree, config_of(labels="progress"), Counter())
    assert labelled.labels == [3 / 8] and labelled.extra["prompt_mc_score"] == 1 / 2
