"""Views of a step tree, compared with the papers' tables and worked examples."""

import random

import pytest

from trl_hrm import StepFormat
from trl_hrm.data.hierarchy import hrm_view, orm_view, prm_view
from trl_hrm.scoring.scoring_config import ScoringConfig
from trl_hrm.scoring.tree_scorer import merged_runs
from trl_hrm.step_tree import StepTree


POSITIVE, NEUTRAL, NEGATIVE = 1.0, 0.0, 0.0  # neutral="negative", as in the paper's Table 2


@pytest.mark.parametrize(
    ("previous", "current", "merged"),
    [
        (POSITIVE, POSITIVE, 1.0),
        (POSITIVE, NEUTRAL, 0.0),
        (POSITIVE, NEGATIVE, 0.0),
        (NEUTRAL, POSITIVE, 1.0),
        (NEGATIVE, POSITIVE, 1.0),
        (NEUTRAL, NEGATIVE, 0.0),
        (NEGATIVE, NEGATIVE, 0.0),
        (None, POSITIVE, 1.0),
        (None, NEGATIVE, 0.0),
    ],
)
def test_table_2(previous, current, merged):
    """The label of a pair is its second step's label, so a corrected error counts as correct."""
    view = hrm_view(StepTree("p", ["s1", "s2"], [previous, current], [-1, 0]))
    assert view.completions == ["s1", "s2", "s1\ns2"]
    assert view.labels == [previous, current, merged]
    assert view.parents == [-1, 0, -1]
    assert view.num_merged == [1, 1, 2]


def test_unlabelled_steps_are_not_merged():
    """A merged step without a label would only be context that nothing follows."""
    view = hrm_view(StepTree("p", ["s1", "s2", "s3"], [1.0, None, 0.0], [-1, 0, 1]))
    assert view.completions[3:] == ["s2\ns3"]
    assert (view.labels[3:], view.parents[3:]) == ([0.0], [0])


def test_siblings_and_depth():
    """The parent of a pair is the grandparent. A wrong parent would skip or repeat a step in the history."""
    tree = StepTree("p", ["a", "b", "c", "d"], [1.0, 0.0, 1.0, 0.5], [-1, 0, 0, 2])
    view = hrm_view(tree, merge_separator=" | ")
    assert view.completions[4:] == ["a | b", "a | c", "c | d"]
    assert view.labels[4:] == [0.0, 1.0, 0.5]
    assert view.parents[4:] == [-1, -1, 0]


def test_longer_runs():
    view = hrm_view(StepTree("p", ["a", "b", "c"], [1.0, 0.0, 1.0], [-1, 0, 1]), max_merge=3)
    merged = list(zip(view.completions, view.labels, view.parents, view.num_merged, strict=True))[3:]
    assert merged == [("a\nb", 0.0, -1, 2), ("b\nc", 1.0, 0, 2), ("a\nb\nc", 1.0, -1, 3)]


def test_superset():
    """D_HRM = D_PRM ∪ pairs: the original steps stay in place, with one pair per labelled later step."""
    rng = random.Random(0)
    for _ in range(100):
        size = rng.randint(1, 20)
        labels = [rng.choice([None, 0.0, 1.0]) for _ in range(size)]
        tree = StepTree("p", [f"s{i}" for i in range(size)], labels, [rng.randint(-1, i - 1) for i in range(size)])
        view = hrm_view(tree)
        view.validate()
        assert view.completions[:size] == tree.completions
        assert view.labels[:size] == tree.labels
        assert view.parents[:size] == tree.parents
        later = [i for i in range(size) if tree.labels[i] is not None and tree.parents[i] != -1]
        assert view.completions[size:] == [f"s{tree.parents[i]}\ns{i}" for i in later]


def test_errors():
    with pytest.raises(ValueError, match="`max_merge` is 1"):
        hrm_view(StepTree("p", ["a", "b"], [1.0, 1.0], [-1, 0]), max_merge=1)


@pytest.mark.parametrize("max_merge", [2, 3, 4])
def test_view_of_a_view(max_merge):
    """D_HRM is a union. Merging merged steps again must not repeat a step or treat a run of three as a pair."""
    rng = random.Random(0)
    for _ in range(50):
        size = rng.randint(1, 15)
        labels = [rng.choice([None, 0.0, 1.0]) for _ in range(size)]
        parents = [rng.randint(-1, i - 1) for i in range(size)]
        tree = StepTree(
            "p", [f"s{i}" for i in range(size)], labels, parents, step_columns={"mc_total": [*range(size)]}
        )
        view = hrm_view(tree, max_merge=max_merge)
        assert max(view.num_merged) <= max_merge
        assert hrm_view(view, max_merge=max_merge) == view


def test_merged_steps_with_children():
    """After node compression, `max_merge` must count original steps, or pairs would become runs of three."""
    tree = StepTree("p", ["a\nb", "c", "d"], [0.5, 1.0, 0.0], [-1, 0, 1], num_merged=[2, 1, 1])
    view = hrm_view(tree)
    assert (view.completions[3:], view.parents[3:], view.num_merged[3:]) == (["c\nd"], [0], [2])
    view = hrm_view(tree, max_merge=3)
    assert view.completions[3:] == ["a\nb\nc", "c\nd"]
    assert (view.labels[3:], view.parents[3:], view.num_merged[3:]) == ([1.0, 0.0], [-1, 0], [3, 2])


def test_equal_steps_are_added_once():
    """The same pair from two equal branches counts once if the labels agree. Otherwise both labels stay."""
    tree = StepTree("p", ["a", "a", "b", "b", "c", "c"], [1.0, 1.0, 0.5, 0.5, 0.0, 1.0], [-1, -1, 0, 1, 0, 1])
    view = hrm_view(tree)
    assert list(zip(view.completions, view.labels, strict=True))[6:] == [("a\nb", 0.5), ("a\nc", 0.0), ("a\nc", 1.0)]


def test_other_columns_follow_the_last_step():
    """Counts of the first step with the label of the second would be wrong."""
    columns = {"mc_total": [8, 4, 2], "node_ids": ["x", "y", "z"]}
    view = hrm_view(StepTree("p", ["a", "b", "c"], [1.0, 0.0, 1.0], [-1, 0, 0], step_columns=columns))
    assert view.completions[3:] == ["a\nb", "a\nc"]
    assert view.step_columns == {"mc_total": [8, 4, 2, 4, 2], "node_ids": ["x", "y", "z", "y", "z"]}
    view.validate()


def test_prm_rows():
    tree = StepTree("p", ["a", "b", "c", "d"], [1.0, 0.0, None, None], [-1, 0, 0, -1])
    rows = [(row.completions, row.labels) for row in prm_view(tree)]
    assert rows == [(["a", "b"], [1.0, 0.0]), (["a", "c"], [1.0, None])]


def test_orm_rows():
    """A label on an earlier step would make it a process reward model."""
    tree = StepTree("p", ["a", "b done", "c", "d done"], [1.0, 0.0, 1.0, None], [-1, 0, 0, -1])
    assert [(row.completions, row.labels) for row in orm_view(tree)] == [
        (["a", "b done"], [None, 0.0]),
        (["a", "c"], [None, 1.0]),
    ]
    final = orm_view(tree, is_final=lambda text: text.endswith("done"))
    assert [row.completions for row in final] == [["a", "b done"]]
    assert tree.labels == [1.0, 0.0, 1.0, None]


def test_merged_thoughts():
    """The correction is merged with the whole thought before it, up to the mark before. Labels are those of the last step."""
    steps = ["add", "so 9", "Wait, no", "it is 8", "and 8", "Hmm, 7", "yes"]
    tree = StepTree("p", steps, [1.0, 0.0, 0.5, None, 0.25, 1.0, 0.75], [-1, 0, 1, 2, 3, 4, 5])
    view = hrm_view(tree, merge="thoughts")
    assert view.completions == [*steps, "add\nso 9\nWait, no", "Wait, no\nit is 8\nand 8\nHmm, 7"]
    assert (view.labels[7:], view.parents[7:], view.num_merged) == ([0.5, 1.0], [-1, 1], [*[1] * 7, 3, 4])
    assert hrm_view(view, merge="thoughts") == view
    bounded = hrm_view(tree, merge="thoughts", max_merge=2)
    assert bounded.completions[7:] == ["so 9\nWait, no", "and 8\nHmm, 7"] and bounded.parents[7:] == [0, 3]
    own = hrm_view(tree, merge="thoughts", thinking_marks=["yes"], merge_separator=" | ")
    assert own.completions[7:] == [" | ".join(steps)]
    assert hrm_view(tree) == hrm_view(tree, merge="pairs", max_merge=2)


def test_merged_thoughts_of_branches():
    """Each path has its own thoughts. A thought that is shared by two corrections is merged with each of them."""
    tree = StepTree("p", ["a", "Wait, b", "Wait, c", "d"], [1.0, 0.0, 1.0, 1.0], [-1, 0, 0, 2])
    view = hrm_view(tree, merge="thoughts")
    assert view.completions[4:] == ["a\nWait, b", "a\nWait, c"] and view.labels[4:] == [0.0, 1.0]


@pytest.mark.parametrize("seed", range(20))
def test_merged_thoughts_agree_with_the_scored_runs(seed):
    """One function decides both. Otherwise, models would be scored on runs that they were not trained on."""
    rng = random.Random(seed)
    texts = [rng.choice(("a", "b", "Wait, c", "Hmm", "So")) + f" {i}" for i in range(12)]
    tree = StepTree("p", texts, [1.0] * 12, [-1, *(rng.randrange(-1, i) for i in range(1, 12))])
    most = rng.randrange(2, 6)
    view = hrm_view(tree, merge="thoughts", max_merge=most)
    runs = merged_runs(tree.completions, tree.parents, ScoringConfig([1, "thought"]), StepFormat(max_thought=most))
    assert view.completions[12:] == ["\n".join(texts[i] for i in run) for run in runs]
    assert view.parents[12:] == [tree.parents[run[0]] for run in runs]


def test_an_unknown_kind_of_merging_raises():
    with pytest.raises(ValueError, match="`merge` is 'all'.*pairs, thoughts"):
        hrm_view(StepTree("p", ["a", "b"], [1.0, 1.0], [-1, 0]), merge="all")
