"""The row format: its errors, and that chains and trees hold the same data."""

import json
import random

import numpy as np
import pytest

from trl_hrm.step_tree import StepTree


ROW = {"prompt": "1+2+3?", "completions": ["1+2=3.", "3+3=6.", "3+3=7."], "labels": [True, 1, 0.25]}


def paths(tree: StepTree) -> dict[tuple[str, ...], float | None]:
    """Return each label by the texts from the first step on, which does not depend on the order of the steps."""
    return {tuple(tree.completions[j] for j in tree.path(i)): label for i, label in enumerate(tree.labels)}


def random_tree(rng: random.Random) -> StepTree:
    """Return a tree whose siblings have different texts, with soft, hard and missing labels."""
    size = rng.randint(1, 30)
    parents = [rng.randint(-1, i - 1) for i in range(size)]
    labels = [rng.choice([None, 0.0, 0.25, 0.5, 1.0]) for _ in range(size)]
    return StepTree("p", [f"step {i % 7} {i}" for i in range(size)], labels, parents)


class TestFromRow:
    def test_labels_of_every_kind(self):
        """Casting the column to one type would turn 0.25 into `True`, or null into 0."""
        tree = StepTree.from_row(ROW | {"labels": [True, None, 0.25]})
        assert tree.labels == [1.0, None, 0.25]
        assert [type(label) for label in tree.labels] == [float, type(None), float]

    def test_no_parents_is_a_chain(self):
        assert StepTree.from_row(ROW).parents == [-1, 0, 1]
        assert StepTree.from_row(ROW | {"parents": None}).parents == [-1, 0, 1]

    def test_other_columns_are_kept(self):
        tree = StepTree.from_row(ROW | {"parents": [-1, 0, 0], "answer": "6"})
        assert tree.extra == {"answer": "6"}
        assert StepTree.from_row(tree.to_row()) == tree

    def test_columns_with_one_entry_per_step(self):
        """In `extra`, they would not fit the steps of a chain. A column with a single number is not such a column."""
        tree = StepTree.from_row(ROW | {"mc_total": [4, 2, None], "mc_correct": 3, "node_ids": None})
        assert tree.step_columns == {"mc_total": [4, 2, None]}
        assert tree.extra == {"mc_correct": 3, "node_ids": None}
        assert StepTree.from_row(tree.to_row()) == tree
        assert tree.take([1, 2]).step_columns == {"mc_total": [2, None]}

    @pytest.mark.parametrize(
        "given",
        [
            {"labels": np.array([1, 0, 1], dtype=np.float32), "parents": np.array([-1, 0, 0])},
            {"labels": [np.bool_(True), np.float64(0), np.int64(1)], "parents": [np.int64(-1), np.int32(0), 0]},
            {
                "completions": np.array(["a", "b", "c"], dtype=object),
                "labels": np.array([1, None, 1], dtype=object),
                "mc_total": np.array([4, 2, 1]),
            },
        ],
    )
    def test_numpy_values(self, given):
        """Tables of pandas have them. As an array, `mc_total` would be a column of the row and not of its steps."""
        plain = {
            name: [getattr(one, "tolist", lambda one=one: one)() for one in column] for name, column in given.items()
        }
        tree = StepTree.from_row(ROW | {"completions": ["a", "b", "c"]} | given)
        assert tree == StepTree.from_row(ROW | {"completions": ["a", "b", "c"]} | plain)
        assert json.loads(json.dumps(tree.to_row())) == tree.to_row()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"mc_total": [1, 1]}, "column `mc_total` has 2 entries and `completions` has 3; expected one per step"),
            ({"labels": [True, True]}, "column `labels` has 2 entries and `completions` has 3; expected one per step"),
            ({"parents": [-1]}, "column `parents` has 1 entries and `completions` has 3"),
            ({"num_merged": [1, 1]}, "column `num_merged` has 2 entries"),
            ({"labels": [1, 1, 1.5]}, "`labels[2]` is 1.5, expected a boolean, a probability in [0, 1], or null"),
            ({"labels": [1, 1, -1]}, "`labels[2]` is -1, expected"),
            ({"labels": [1, 1, float("nan")]}, "`labels[2]` is nan, expected"),
            ({"labels": [1, 1, 10**400]}, "`labels[2]` is 1000"),
            ({"labels": [1, 1, "+"]}, "`labels[2]` is '+', expected"),
            ({"labels": "+++"}, "column `labels` is a str, expected a list"),
            (
                {"parents": [-1, 2, 0]},
                "`parents[1]` is 2, expected -1 (the prompt) or the index of a step before step 1",
            ),
            ({"parents": [-1, 1, 0]}, "`parents[1]` is 1, expected"),
            ({"parents": [-2, 0, 0]}, "`parents[0]` is -2, expected"),
            ({"parents": [-1, 0, True]}, "`parents[2]` is True, expected"),
            ({"num_merged": [1, 1, 0]}, "`num_merged[2]` is 0, expected 1 for a single step"),
            ({"completions": ["a", " \n", "c"]}, "`completions[1]` is ' \\n', expected a non-empty step text"),
            ({"completions": ["a", None, "c"]}, "`completions[1]` is None, expected a non-empty step text"),
            ({"prompt": " "}, "column `prompt` holds ' ', expected a non-empty string"),
            ({"prompt": 3}, "column `prompt` holds 3, expected a non-empty string"),
        ],
    )
    def test_faults_are_named(self, change, message):
        with pytest.raises(ValueError) as error:
            StepTree.from_row(ROW | change, "rows.jsonl:7")
        assert str(error.value).startswith("rows.jsonl:7: ")
        assert message in str(error.value)

    @pytest.mark.parametrize("name", ["prompt", "completions", "labels"])
    def test_missing_column(self, name):
        with pytest.raises(ValueError, match=f"rows.jsonl:7: column `{name}`"):
            StepTree.from_row({key: value for key, value in ROW.items() if key != name}, "rows.jsonl:7")


class TestChains:
    def test_chains_of_a_small_tree(self):
        tree = StepTree("p", ["a", "b", "c", "d"], [1.0, None, 0.0, 0.5], [-1, 0, 0, -1], extra={"answer": "6"})
        assert tree.leaves() == [1, 2, 3]
        chains = [(chain.completions, chain.labels, chain.parents, chain.extra) for chain in tree.chains()]
        assert chains == [
            (["a", "b"], [1.0, None], [-1, 0], {"answer": "6"}),
            (["a", "c"], [1.0, 0.0], [-1, 0], {"answer": "6"}),
            (["d"], [0.5], [-1], {"answer": "6"}),
        ]

    def test_round_trip(self):
        """A lost step, or one moved to another parent, would be trained after a wrong prefix without an error."""
        rng = random.Random(0)
        for _ in range(200):
            tree = random_tree(rng)
            joined, contradictions = StepTree.from_chains(tree.chains())
            joined.validate()
            assert contradictions == 0
            assert len(joined.completions) == len(tree.completions)
            assert paths(joined) == paths(tree)

    def test_same_text_after_different_steps_stays_apart(self):
        """Joining by text alone would give a step a wrong prefix."""
        joined, _ = StepTree.from_chains(
            [StepTree("p", ["a", "c"], [1.0, 1.0], [-1, 0]), StepTree("p", ["b", "c"], [0.0, 0.0], [-1, 0])]
        )
        assert paths(joined) == {("a",): 1.0, ("a", "c"): 1.0, ("b",): 0.0, ("b", "c"): 0.0}

    def test_contradicting_labels_are_averaged_and_counted(self):
        chains = [StepTree("p", ["a", "b"], labels, [-1, 0]) for labels in ([1.0, None], [0.0, 1.0], [1.0, 1.0])]
        joined, contradictions = StepTree.from_chains(chains)
        assert joined.labels == [pytest.approx(2 / 3), 1.0]
        assert contradictions == 1

    def test_merged_step_is_not_joined_with_a_single_one_of_the_same_text(self):
        """A single step may contain the merge separator, but it must not get the merged step's label."""
        merged = StepTree("p", ["a\nb"], [0.0], [-1], num_merged=[2])
        single = StepTree("p", ["a\nb"], [1.0], [-1])
        joined, contradictions = StepTree.from_chains([merged, single])
        assert (joined.labels, joined.num_merged, contradictions) == ([0.0, 1.0], [2, 1], 0)

    def test_columns_of_joined_steps(self):
        """A step keeps its values, whichever chain it came from. A chain may lack a column."""
        first = StepTree("p", ["a", "b"], [1.0, 0.0], [-1, 0], step_columns={"mc_total": [8, 4]})
        second = StepTree(
            "p", ["a", "c"], [1.0, 0.0], [-1, 0], step_columns={"mc_total": [9, 2], "node_ids": ["x", "y"]}
        )
        joined, _ = StepTree.from_chains([first, second])
        assert joined.completions == ["a", "b", "c"]
        assert joined.step_columns == {"mc_total": [8, 4, 2], "node_ids": [None, None, "y"]}
        joined.validate()

    def test_weights_of_joined_labels(self):
        """With the weight of the first row, the label of `b` would not be trained: the first row has no label there."""
        rows = [
            ROW | {"completions": ["a", "b"], "labels": [1, None], "label_weights": [0.5, 0]},
            ROW | {"completions": ["a", "b"], "labels": [0.5, 0.25], "label_weights": [1.5, 2]},
            ROW | {"completions": ["a", "c"], "labels": [None, None], "label_weights": [None, 0]},
        ]
        joined, contradictions = StepTree.from_chains(map(StepTree.from_row, rows))
        assert joined.labels == [(0.5 + 0.75) / 2, 0.25, None] and contradictions == 1
        assert joined.step_columns == {"label_weights": [1, 2, 0]}

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (None, "in.jsonl:2: 1 of the 2 rows of this problem have a list `label_weights`"),
            ([-1.0], r"in.jsonl:2: `label_weights\[0\]` is -1.0"),
        ],
    )
    def test_weights_that_cannot_be_joined(self, weights, message):
        row = {"prompt": "p", "completions": ["a"], "labels": [1]}
        rows = [row | {"label_weights": [2.0]}, row | {"label_weights": weights}]
        with pytest.raises(ValueError, match=message):
            StepTree.from_chains(map(StepTree.from_row, rows), "in.jsonl:2")

    def test_a_column_that_the_first_row_lacks(self):
        """A null of the first row must not replace the values of the others."""
        row = {"prompt": "p", "completions": ["a"], "labels": [1]}
        rows = [row | {"mc_total": None}, row | {"completions": ["b"], "mc_total": [3]}]
        joined, _ = StepTree.from_chains(map(StepTree.from_row, rows))
        assert joined.to_row()["mc_total"] == [None, 3]

    def test_nothing_to_join(self):
        with pytest.raises(ValueError, match="`trees` is empty"):
            StepTree.from_chains([])

    def test_different_prompts(self):
        with pytest.raises(ValueError, match="different prompts"):
            StepTree.from_chains([StepTree("p", ["a"], [1.0], [-1]), StepTree("q", ["a"], [1.0], [-1])])
