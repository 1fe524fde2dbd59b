"""Recompute the example of docs/search.md. An error on the page would teach the wrong formula."""

import math
from fractions import Fraction
from pathlib import Path

import pytest

from trl_hrm.search.compression import choose_moves, move_up
from trl_hrm.search.tree import ROOT, Node, Problem, SearchTree
from trl_hrm.search.values import entropy_label, make_label, mc_scores


DOCS = Path(__file__).resolve().parents[2] / "docs" / "search.md"
A, B, C, B1, B2, B3 = range(6)


def example() -> SearchTree:
    """Return the tree of the page."""
    outcomes = [(ROOT, True), (ROOT, None), (ROOT, False), (B, True), (B, False), (B, None)]
    outcomes += [(B3, True), (B3, True), (B3, None)]
    tree = SearchTree(Problem("p", "?", "7"))
    for i, (parent, correct) in enumerate(outcomes):
        cut_off = i == len(outcomes) - 1
        node = Node(str(i), parent, i, 0, [i], f"step {i}", is_final=correct is not None, correct=correct)
        node.answer = None if correct is None else "7" if correct else "8"
        node.finish = "length" if cut_off else "stop"
        tree.nodes.append(node)
    return tree


def root_score(scores: list[float]) -> float:
    return sum(scores[i] for i in (A, B, C)) / 3


@pytest.mark.parametrize(
    ("estimator", "truncated", "b3", "b"),
    [
        ("child_mean", "drop", Fraction(1), Fraction(2, 3)),
        ("child_mean", "wrong", Fraction(2, 3), Fraction(5, 9)),
        ("leaf_share", "drop", Fraction(1), Fraction(3, 4)),
        ("leaf_share", "wrong", Fraction(2, 3), Fraction(3, 5)),
    ],
)
def test_scores(estimator, truncated, b3, b):
    scores = mc_scores(example(), estimator, truncated)
    assert scores[B3] == pytest.approx(float(b3), abs=1e-12) and scores[B] == pytest.approx(float(b), abs=1e-12)
    if estimator == "child_mean":
        assert root_score(scores) == pytest.approx(5 / 9 if truncated == "drop" else 14 / 27, abs=1e-12)


def test_labels():
    assert f"{entropy_label(2 / 3, 2):.3f}" == "0.830" and f"{entropy_label(2 / 3, -2):.3f}" == "0.430"
    assert make_label(2 / 3, "hard") == 1
    assert f"{entropy_label(4 / 16, 1):.3f}" == "0.357"
    text = DOCS.read_text(encoding="utf-8")
    for shown in ("0.830", "0.430", "0.357", f"{math.expm1(2):.3f}"):
        assert shown in text


def test_compression():
    """The table of the page. Its three choices must have the mean score of B in the whole tree."""
    left = []
    for child, score in ((B1, 1), (B2, 0), (B3, 1)):
        view = move_up(example(), [child])
        left.append(mc_scores(view)[B])
        assert mc_scores(view)[child] == score
        assert view.step_text(child, ", then ") == f"step {B}, then step {child}"
        assert view.nodes[child].parent == ROOT
    assert left == pytest.approx([1 / 2, 1, 1 / 2]) and sum(left) / 3 == pytest.approx(2 / 3, abs=1e-12)
    # with the default of 4 children no node of the page loses one, so the page sets `--hnc_min_children 3`
    assert choose_moves(example(), (0,), 1.0, 4) == []
    assert {move for seed in range(30) for move in choose_moves(example(), (seed,), 1.0, 3)} >= {B1, B2, B3}
