"""Store trees as Parquet: round trips, derived columns, and files that are complete or absent."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_hrm.search import nodes
from trl_hrm.search.compression import compress
from trl_hrm.search.nodes import read_totals, read_trees, write_nodes
from trl_hrm.search.tree import ROOT, Problem, SearchTree
from trl_hrm.search.values import leaf_counts

from .random_trees import random_tree, rollout_tree


def many_trees(number: int) -> list[SearchTree]:
    rng = random.Random(0)
    trees = []
    for i in range(number):
        tree = rng.choice([random_tree, rollout_tree])(rng, f"{i}")
        tree = compress(tree, i, min_children=2)
        for node in tree.nodes[::3]:
            node.value = rng.random()
        trees.append(tree)
    return [*trees, SearchTree(Problem("empty", "Nothing?", ""), [], [], "always_solved")]


@pytest.mark.parametrize("group", [1, 50, 1 << 14])
def test_round_trip(tmp_path, monkeypatch, group):
    """A null could come back as NaN or an empty list, and a tree could get its neighbour's nodes."""
    monkeypatch.setattr(nodes, "GROUP_NODES", group)
    trees = many_trees(30)
    write_nodes(iter(trees), tmp_path / "nodes.parquet")
    found = list(read_trees(tmp_path / "nodes.parquet"))
    assert found == trees
    assert all(type(node.cuts) is tuple for tree in found for node in tree.nodes)
    light = list(read_trees(tmp_path / "nodes.parquet", token_ids=False))
    assert all(node.token_ids == [] for tree in light for node in tree.nodes)
    assert [[node.text for node in tree.nodes] for tree in light] == [[n.text for n in tree.nodes] for tree in trees]
    assert [path.name for path in tmp_path.iterdir()] == ["nodes.parquet"]
    assert (pq.ParquetFile(tmp_path / "nodes.parquet").num_row_groups > 5) == (group < 1000)


def test_columns_for_other_readers(tmp_path):
    """Readers without this package need parents by id, depths and leaf counts."""
    trees = many_trees(10)
    write_nodes(trees, tmp_path / "nodes.parquet")
    rows = pq.read_table(tmp_path / "nodes.parquet").to_pylist()
    for row, tree in zip(rows, trees, strict=True):
        assert (row["problem_id"], row["answer"], row["status"]) == (
            tree.problem.problem_id,
            tree.problem.answer,
            tree.status,
        )
        counts = leaf_counts(tree)
        for i, node in enumerate(row["nodes"]):
            parent = tree.nodes[i].parent
            assert node["parent_id"] == (None if parent == ROOT else tree.nodes[parent].node_id)
            assert node["depth"] == tree.depth(i)
            assert node["num_tokens"] == len(node["token_ids"])
            found = (node["leaves_correct"], node["leaves_answered"], node["leaves_unresolved"])
            assert found == counts[i]
        if all(node.role == "step" for node in tree.nodes):
            assert (row["leaves_correct"], row["leaves_answered"], row["leaves_unresolved"]) == counts[ROOT]


def test_totals(tmp_path):
    """Tokens of a rollout are billed once, not again for the steps that it was cut into."""
    rng = random.Random(0)
    trees = [rollout_tree(rng, f"{i}") for i in range(5)]
    write_nodes(trees[:2], tmp_path / "a.parquet")
    write_nodes(trees[2:], tmp_path / "b.parquet")
    totals = read_totals([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    rollouts = [node for tree in trees for node in tree.nodes if node.role == "rollout"]
    assert totals["problems"] == 5
    assert totals["num_tokens"] == sum(len(node.token_ids) for node in rollouts) > 0
    assert totals["num_cached"] == sum(node.num_cached for node in rollouts) > 0
    assert totals["leaves_correct"] == sum(node.correct is True for node in rollouts)
    assert totals["leaves_answered"] == sum(node.correct is not None for node in rollouts)
    assert totals["leaves_unresolved"] == sum(node.answer is None for node in rollouts)
    assert totals["leaves_ungraded"] == sum(n.answer is not None and n.correct is None for n in rollouts) > 0
    assert totals["num_nodes"] == sum(len(tree.nodes) for tree in trees) > len(rollouts)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "nodes.parquet"
    write_nodes(many_trees(2), path)
    before = path.read_bytes()

    def failing():
        yield from many_trees(3)
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        write_nodes(failing(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["nodes.parquet"]


def test_other_files(tmp_path):
    (tmp_path / "text.parquet").write_text("hello, this is no Parquet file")
    with pytest.raises(ValueError, match="text.parquet"):
        list(read_trees(tmp_path / "text.parquet"))
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other.parquet .*\['prompt'\]"):
        list(read_trees(tmp_path / "other.parquet"))
    write_nodes([], tmp_path / "empty.parquet")
    assert list(read_trees(tmp_path / "empty.parquet")) == []
