"""Store trees as Parquet: round trips, derived columns, and files that are complete or absent."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_hrm.search import nodes
from trl_hrm.search.compression import compress
from trl_hrm.search.nodes import TOTALS, read_totals, read_trees, write_nodes
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


def edited(path, change) -> None:
    """Change the rows of a node file, and write it with the same schema."""
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, nodes.SCHEMA), path)


def node(**values):
    """Return a change of the third node of the second problem."""
    return lambda rows: rows[1]["nodes"][2].update(values)


FAULTS = {
    "value is NaN": (node(value=float("nan")), r"problem '1', node 2: `value` is nan, expected a number from 0 to 1, or null"),
    "value above 1": (node(value=2.0), "node 2: `value` is 2.0, expected a number from 0 to 1"),
    "value below 0": (node(value=-0.1), "node 2: `value` is -0.1"),
    "weight is NaN": (node(weight=float("nan")), "node 2: `weight` is nan, expected a number of at least 1"),
    "weight is infinite": (node(weight=float("inf")), "node 2: `weight` is inf"),
    "weight is negative": (node(weight=-1.0), "node 2: `weight` is -1.0"),
    "weight is null": (node(weight=None), "node 2: `weight` is None, expected a value"),
    "its own parent": (node(parent=2), "node 2: `parent` is 2, expected -1 or the index of an earlier node"),
    "a later parent": (node(parent=3), "node 2: `parent` is 3"),
    "a parent out of range": (node(parent=10**6), "node 2: `parent` is 1000000"),
    "a parent below the root": (node(parent=-2), "node 2: `parent` is -2"),
    "a cycle": (
        lambda rows: (rows[1]["nodes"][1].update(parent=2), rows[1]["nodes"][2].update(parent=1)),
        "node 1: `parent` is 2",
    ),
    "an id twice": (
        lambda rows: rows[1]["nodes"][2].update(node_id=rows[1]["nodes"][0]["node_id"]),
        "node 2: `node_id` is '.*', expected an id that no earlier node has",
    ),
    "an unknown role": (node(role="leaf"), "node 2: `role` is 'leaf', expected one of step, rollout, segment, given"),
    "an unknown finish": (node(finish="stopped"), "node 2: `finish` is 'stopped', expected one of stop, eos, length"),
    "a tail beyond the text": (node(tail=1000), "node 2: `tail` is 1000, expected at most the number of characters"),
    "a negative tail": (node(tail=-1), "node 2: `tail` is -1, expected at least 0"),
    "a negative seed": (node(seed=-1), "node 2: `seed` is -1"),
    "a negative count": (node(num_cached=-1), "node 2: `num_cached` is -1"),
    "a null text": (node(text=None), "node 2: `text` is None, expected a value"),
    "a null list": (node(cuts=None), "node 2: `cuts` is None, expected a value"),
    "a cut beyond the text": (node(cuts=[1000]), r"node 2: `cuts` is \[1000\], expected ascending positions"),
    "descending cuts": (node(cuts=[2, 1], tail=0), r"node 2: `cuts` is \[2, 1\]"),
    "a null cut": (node(cuts=[None]), r"node 2: `cuts` is \[None\]"),
    "a negative token id": (node(token_ids=[1, -1]), r"node 2: `token_ids` is \[1, -1\], expected whole numbers of at least 0"),
    "a null token id": (node(token_ids=[None]), r"node 2: `token_ids` is \[None\]"),
    "merged from one node": (node(merged_from=["a"]), r"node 2: `merged_from` is \['a'\], expected the ids of two nodes"),
    "merged from null": (node(merged_from=["a", None]), r"node 2: `merged_from` is \['a', None\]"),
    "a null node": (lambda rows: rows[1]["nodes"].__setitem__(2, None), "a node is null|`node_id` is None"),
    "null nodes": (lambda rows: rows[1].update(nodes=None), "`nodes` is null for problem 1"),
    "a node is missing": (lambda rows: rows[1]["nodes"].pop(), "problem '1': `num_nodes` is not the number of its nodes"),
    "a null prompt": (lambda rows: rows[1].update(prompt=None), "`prompt` is null for problem 1"),
    "a null answer": (lambda rows: rows[1].update(answer=None), "`answer` is null for problem 1"),
    "a negative prompt id": (lambda rows: rows[1].update(prompt_ids=[-5]), "problem '1': `prompt_ids` has an invalid token id"),
    "an unknown status": (lambda rows: rows[1].update(status="finished"), "`status` is 'finished', expected one of open, done"),
    "a problem twice": (lambda rows: rows.append(rows[1]), "problem '1' occurs 2 times, expected once"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), FAULTS.values(), ids=FAULTS)
def test_damaged_nodes(tmp_path, change, words):
    """An export would otherwise write labels that are NaN, or wrong, or never end. The message names problem and node."""
    path = tmp_path / "nodes.parquet"
    rng = random.Random(1)
    write_nodes([random_tree(rng, f"{i}") for i in range(3)], path)
    edited(path, lambda rows: None)
    assert len(list(read_trees(path))) == 3
    edited(path, change)
    with pytest.raises(ValueError, match=f"^{path}.*({words}).* Delete the file. It is written again from the log"):
        list(read_trees(path))


@pytest.mark.parametrize("name", TOTALS)
def test_damaged_totals(tmp_path, name):
    path = tmp_path / "nodes.parquet"
    write_nodes([random_tree(random.Random(1))], path)
    for value, words in ((-1, f"`{name}` is -1"), (None, f"`{name}` is null")):
        edited(path, lambda rows, value=value: rows[0].update({name: value}))
        with pytest.raises(ValueError, match=f"^{path}: {words} for .*problem.*Delete the file"):
            read_totals([path])


def test_files_that_hold_no_trees(tmp_path):
    """Each is one line that says what was found."""
    path = tmp_path / "nodes.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError, match=rf"{path} has the columns \['a'\], expected search trees"):
        list(read_trees(path))
    types = [field.with_type(pa.large_string()) if field.name == "prompt" else field for field in nodes.SCHEMA]
    pq.write_table(pa.schema(types).empty_table(), path)
    with pytest.raises(ValueError, match=f"{path} has other types of columns"):
        list(read_trees(path))
    for content, words in ((b"", "is not a Parquet file"), (b"PAR1", "damaged"), (b'{"question"', "is a JSON file")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}.*{words}"):
            list(read_trees(path))
    with pytest.raises(FileNotFoundError):
        list(read_trees(tmp_path / "none.parquet"))


def test_flipped_bits_of_values_are_found(tmp_path):
    """Without checksums, some of them would change labels without any error."""
    path = tmp_path / "nodes.parquet"
    write_nodes([random_tree(random.Random(1))], path)
    column = next(
        column
        for column in map(pq.ParquetFile(path).metadata.row_group(0).column, range(60))
        if column.path_in_schema == "nodes.list.element.correct"
    )
    whole = path.read_bytes()
    end = column.data_page_offset + column.total_compressed_size
    for place in range(end - 8, end):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"^{path}: the file is damaged .*Delete the file"):
            list(read_trees(path))
