"""
Read and write search trees as Parquet files, with one row per problem and its nodes as a list of structs.

In addition to the fields of [`Node`], each node has `parent_id`, `depth`, `num_tokens` and its leaf counts. Each row has the problem,
its leaf counts, and the numbers of generated and cached tokens. Scores are not stored. They are computed from the counts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..io import replacing, shown
from .outcomes import NUM_SHOWN
from .tree import ROOT, Finish, Node, Problem, Role, SearchTree, Status, Thinking, walk
from .values import leaf_counts


THINKING = b"thinking"  # key in the metadata of a file. Missing if the steps have no thinking
GROUP_NODES = 1 << 14  # minimum number of nodes per row group

NODE_TYPES = {
    "node_id": pa.string(),
    "parent": pa.int32(),
    "child_index": pa.int32(),
    "round": pa.int32(),
    "token_ids": pa.list_(pa.int32()),
    "text": pa.string(),
    "tail": pa.int32(),
    "role": pa.string(),
    "num_cached": pa.int32(),
    "seed": pa.int64(),
    "finish": pa.string(),
    "stop_reason": pa.string(),
    "is_final": pa.bool_(),
    "answer": pa.string(),
    "correct": pa.bool_(),
    "weight": pa.float64(),
    "cuts": pa.list_(pa.int32()),
    "merged_from": pa.list_(pa.string()),
    "value": pa.float64(),
}
DERIVED_TYPES = {
    "parent_id": pa.string(),
    "depth": pa.int32(),
    "num_tokens": pa.int32(),
    "leaves_correct": pa.int32(),
    "leaves_answered": pa.int32(),
    "leaves_unresolved": pa.int32(),
}
TOTALS = (
    "num_nodes",
    "num_tokens",
    "num_cached",
    "leaves_correct",
    "leaves_answered",
    "leaves_unresolved",
    "leaves_ungraded",
)
SCHEMA = pa.schema(
    {
        "problem_id": pa.string(),
        "prompt": pa.string(),
        "answer": pa.string(),
        "status": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        **{name: pa.int64() for name in TOTALS},
        "nodes": pa.list_(pa.struct(NODE_TYPES | DERIVED_TYPES)),
    }
)

NULLABLE = ("stop_reason", "answer", "correct", "merged_from", "value")
WORDS = {"role": get_args(Role), "finish": get_args(Finish), "status": get_args(Status)}
REMEDY = "Delete the file. It is written again from the log of its folder when the folder is read."


def write_nodes(trees: Iterable[SearchTree], path: str | Path) -> None:
    """
    Write trees to a Parquet file. The file is written completely or not at all. Only a few trees are in memory at a time.

    Args:
        trees (`Iterable[SearchTree]`):
            Trees, one per problem.
        path (`str` or `Path`):
            Path of the file. An existing file is replaced.
    """
    with (
        replacing(path, "wb") as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        thinking = None
        for group in _groups(trees):
            for tree in group:
                thinking = thinking or tree.thinking
                if tree.thinking != thinking:
                    raise ValueError(
                        f"{path}: problem {shown(tree.problem.problem_id)} has thinking {tree.thinking}, but the problems before it "
                        f"have thinking {thinking}. Write them to separate files."
                    )
            writer.write_table(_table(group), row_group_size=len(group))
        if thinking not in (None, "left_out"):
            writer.add_key_value_metadata({THINKING.decode(): thinking})


def read_trees(path: str | Path, token_ids: bool = True) -> Iterator[SearchTree]:
    """
    Read the trees in a file written by [`write_nodes`].

    Args:
        path (`str` or `Path`):
            Path of the file.
        token_ids (`bool`, *optional*, defaults to `True`):
            Whether to read token ids. Without them, reading is faster and the lists are empty.

    Raises:
        `ValueError`: If the file is not a Parquet file of search trees, or is damaged. The message names the file and, where there is
            one, the problem and the node.
    """
    check_problems(path)
    with open_nodes(path) as file:
        for group in range(file.num_row_groups):
            yield from read_group(file, path, group, token_ids)


def open_nodes(path: str | Path) -> pq.ParquetFile:
    """Open a file written by [`write_nodes`]."""
    try:
        with _damaged(path):
            file = pq.ParquetFile(path, page_checksum_verification=True)
    except ValueError:
        with open(path, "rb") as opened:
            head = opened.read(64)
        if head.startswith(b"\x1f\x8b") or head.lstrip()[:1] in (b"{", b"["):  # JSON, possibly compressed with gzip
            raise ValueError(
                f"{path} is a JSON file, expected the output folder of a search or a Parquet file of search trees. For trees of "
                "openr (`question`, `final_answer` and `reasoning_steps`), use --format openr."
            ) from None
        if not head.startswith(b"PAR1"):
            raise ValueError(
                f"{path} is not a Parquet file: it starts with {shown(head[:8])}, expected search trees written by `trl-hrm annotate`."
            ) from None
        raise
    if not file.schema_arrow.equals(SCHEMA):
        names = file.schema_arrow.names
        found = f"the columns {shown(names, 200)}" if names != SCHEMA.names else "other types of columns"
        raise ValueError(f"{path} has {found}, expected search trees written by this version of `trl-hrm annotate`.")
    return file


@contextmanager
def _damaged(path: str | Path) -> Iterator[None]:
    """Context manager that names the file in the errors of Arrow about damaged bytes."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the operating system, such as a missing file
            raise
        raise ValueError(
            f"{path}: the file is damaged ({shown(' '.join(str(error).split()), 160)[1:-1]}). {REMEDY}"
        ) from None


def check_problems(path: str | Path) -> None:
    """
    Check the problems in a file written by [`write_nodes`], without their nodes.

    Raises:
        `ValueError`: If the file is damaged, or a problem occurs twice.
    """
    with open_nodes(path) as file:
        rows = _read(file, path, ["problem_id", "status"])
    for name, count in Counter(rows["problem_id"].to_pylist()).items():
        if count > 1:
            raise ValueError(f"{path}: problem {shown(name)} occurs {count} times, expected once. {REMEDY}")


def _read(file: pq.ParquetFile, path: str | Path, columns: list[str], group: int | None = None) -> pa.Table:
    """Read and check columns of the problems, of one row group or of all."""
    with _damaged(path):
        rows = file.read(columns) if group is None else file.read_row_group(group, columns)
        rows.validate(full=True)
    expected = file.metadata.num_rows if group is None else file.metadata.row_group(group).num_rows
    if rows.num_rows != expected:
        raise ValueError(f"{path}: found {rows.num_rows} problems, expected {expected}. {REMEDY}")
    for name in rows.column_names:
        if rows[name].null_count:
            raise ValueError(f"{path}: `{name}` is null for problem {rows[name].is_null().index(True)}. {REMEDY}")
        if name in WORDS:
            _check_words(rows[name].combine_chunks(), name, f"{path}: ")
        if name in TOTALS and rows.num_rows and pc.min(rows[name]).as_py() < 0:
            raise ValueError(f"{path}: `{name}` is {pc.min(rows[name])} for a problem, expected at least 0. {REMEDY}")
    return rows


def _check_words(values: pa.Array, name: str, where: str) -> None:
    known = pc.is_in(values, pa.array(WORDS[name]))
    if (place := known.index(False).as_py()) >= 0:
        raise ValueError(
            f"{where}`{name}` is {shown(values[place].as_py())}, expected one of {', '.join(WORDS[name])}. {REMEDY}"
        )


def read_group(file: pq.ParquetFile, path: str | Path, group: int, token_ids: bool = True) -> Iterator[SearchTree]:
    """Read the trees in one row group. See [`read_trees`]."""
    names = [field.name for field in fields(Node) if token_ids or field.name != "token_ids"]
    columns = ["problem_id", "prompt", "answer", "status", "prompt_ids", "num_nodes"]
    rows = _read(file, path, [*columns, *(f"nodes.list.element.{name}" for name in names)], group)
    nodes = rows["nodes"].combine_chunks()
    _check_nodes(rows, nodes, names, path)
    starts = nodes.offsets.to_pylist()
    flat = nodes.values
    values = {name: flat.field(name).to_pylist() for name in names}
    values["cuts"] = list(map(tuple, values["cuts"]))
    values["merged_from"] = [None if ids is None else tuple(ids) for ids in values["merged_from"]]
    if not token_ids:
        values["token_ids"] = [[] for _ in range(len(flat))]
    thinking = (file.metadata.metadata or {}).get(THINKING, b"left_out").decode()
    if thinking not in get_args(Thinking):
        raise ValueError(
            f"{path}: `thinking` is {shown(thinking)}, expected one of {', '.join(get_args(Thinking))}. {REMEDY}"
        )
    made = list(map(Node, *(values[field.name] for field in fields(Node))))
    for row, problem in enumerate(rows.select(columns).to_pylist()):
        yield SearchTree(
            Problem(problem["problem_id"], problem["prompt"], problem["answer"]),
            made[starts[row] : starts[row + 1]],
            problem["prompt_ids"],
            problem["status"],
            thinking,
        )


def _check_nodes(rows: pa.Table, nodes: pa.ListArray, names: list[str], path: str | Path) -> None:
    """Raise `ValueError` unless the nodes of each problem form a tree with values in range."""
    flat, starts = nodes.values, nodes.offsets.to_numpy()
    row = np.repeat(np.arange(len(nodes)), np.diff(starts))
    place = np.arange(len(flat)) - starts[row]  # of each node in its tree
    columns = {name: flat.field(name) for name in names}

    def refuse(wrong: np.ndarray, name: str, expected: str) -> None:
        """Raise an error about the first node for which `wrong` is true."""
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(
                f"{path}, problem {shown(rows['problem_id'][int(row[i])].as_py())}, node {place[i]}: `{name}` is "
                f"{shown(columns[name][i].as_py())}, expected {expected}. {REMEDY}"
            )

    def refuse_problems(wrong: np.ndarray, found: str) -> None:
        if wrong.any():
            name = rows["problem_id"][int(wrong.argmax())].as_py()
            raise ValueError(f"{path}, problem {shown(name)}: {found}. {REMEDY}")

    def numbers(name: str) -> np.ndarray:
        return columns[name].to_numpy(zero_copy_only=False)

    refuse_problems(rows["num_nodes"].to_numpy() != np.diff(starts), "`num_nodes` is not the number of its nodes")
    refuse_problems(_with_negative(rows["prompt_ids"].combine_chunks()), "`prompt_ids` has an invalid token id")
    if flat.null_count:
        raise ValueError(f"{path}: a node is null. {REMEDY}")
    for name, column in columns.items():
        if name not in NULLABLE and column.null_count:
            refuse(column.is_null().to_numpy(zero_copy_only=False), name, "a value")
    parent = numbers("parent")
    refuse((parent < ROOT) | (parent >= place), "parent", "-1 or the index of an earlier node")
    ids = columns["node_id"].dictionary_encode().indices.to_numpy() + row * len(flat)
    repeated = np.ones(len(flat), bool)
    repeated[np.unique(ids, return_index=True)[1]] = False
    refuse(repeated, "node_id", "an id that no earlier node has")
    for name in ("child_index", "num_cached", "seed", "tail"):
        refuse(numbers(name) < 0, name, "at least 0")
    weight, value = numbers("weight"), numbers("value")
    refuse(~((weight >= 1) & (weight < np.inf)), "weight", "a number of at least 1")
    has_value = columns["value"].is_valid().to_numpy(zero_copy_only=False)
    refuse(has_value & ~((value >= 0) & (value <= 1)), "value", "a number from 0 to 1, or null")
    for name in ("role", "finish"):
        known = pc.is_in(columns[name], pa.array(WORDS[name])).to_numpy(zero_copy_only=False)
        refuse(~known, name, f"one of {', '.join(WORDS[name])}")
    if "token_ids" in columns:
        refuse(_with_negative(columns["token_ids"]), "token_ids", "whole numbers of at least 0")
    end = pc.utf8_length(columns["text"]).to_numpy() - numbers("tail")  # of the step in the text
    refuse(end < 0, "tail", "at most the number of characters of `text`")
    refuse(_with_negative(columns["cuts"], end), "cuts", "ascending positions in `text`")
    pairs = columns["merged_from"]
    is_pair = pc.fill_null(pc.equal(pc.list_value_length(pairs), 2), True).to_numpy(zero_copy_only=False)
    refuse(~is_pair | _with_null(pairs), "merged_from", "the ids of two nodes, or null")


def _with_null(lists: pa.ListArray) -> np.ndarray:
    """Return whether each list has a null."""
    found = np.zeros(len(lists), bool)
    found[pc.list_parent_indices(lists).to_numpy()[lists.flatten().is_null().to_numpy(zero_copy_only=False)]] = True
    return found


def _with_negative(lists: pa.ListArray, end: np.ndarray | None = None) -> np.ndarray:
    """Return whether each list has a negative number or a null or, with `end`, does not ascend up to its end."""
    owner, values = pc.list_parent_indices(lists).to_numpy(), lists.flatten().fill_null(-1).to_numpy()
    wrong = values < 0
    if end is not None and len(values):
        wrong |= values > end[owner]
        wrong[1:] |= (np.diff(values) < 0) & (np.diff(owner) == 0)
    found = np.zeros(len(lists), bool)
    found[owner[wrong]] = True
    return found


def read_totals(paths: Iterable[str | Path]) -> Counter:
    """Return the sums of `TOTALS` over all problems in the files, and the number of `"problems"`."""
    totals = Counter()
    for path in paths:
        check_problems(path)
        with open_nodes(path) as file:
            rows = _read(file, path, list(TOTALS))
        leaves = pc.add(rows["leaves_answered"], pc.add(rows["leaves_unresolved"], rows["leaves_ungraded"]))
        for less, more in ((rows["leaves_correct"], rows["leaves_answered"]), (leaves, rows["num_nodes"])):
            if not pc.all(pc.less_equal(less, more)).as_py() and rows.num_rows:
                raise ValueError(f"{path}: a problem has more leaves of a kind than leaves or nodes. {REMEDY}")
        totals["problems"] += rows.num_rows
        totals.update({name: sum(rows[name].to_pylist()) for name in TOTALS})
    return totals


def read_problem_tokens(paths: Iterable[str | Path]) -> list[int]:
    """Return the number of sampled tokens of each problem in the files."""
    tokens = []
    for path in paths:
        with open_nodes(path) as file:
            tokens += _read(file, path, ["num_tokens"])["num_tokens"].to_pylist()
    return tokens


def read_unreadable_references(paths: Iterable[str | Path]) -> tuple[int, list[dict[str, str]]]:
    """Return the number of problems with unreadable reference answers, and `problem_id` and `answer` of the first few."""
    found: list[dict[str, str]] = []
    for path in paths:
        with open_nodes(path) as file:
            rows = _read(file, path, ["problem_id", "answer", "status"])
        found += rows.filter(pc.equal(rows["status"], "ungradable")).drop_columns("status").to_pylist()
    return len(found), found[:NUM_SHOWN]


def tree_totals(tree: SearchTree) -> dict[str, int]:
    """Return the totals of one tree. Steps of split rollouts are not counted in addition to the rollout. Given steps are ignored."""
    counts, followed = leaf_counts(tree), {node.parent for node in tree.nodes}
    sampled = [node for node in tree.nodes if node.role not in ("segment", "given")]
    leaves = [counts[i] for i, node in enumerate(tree.nodes) if node.role != "segment" and i not in followed]
    return {
        "num_nodes": len(tree.nodes),
        "num_tokens": sum(len(node.token_ids) for node in sampled),
        "num_cached": sum(node.num_cached for node in sampled),
        "leaves_correct": sum(leaf.correct for leaf in leaves),
        "leaves_answered": sum(leaf.answered for leaf in leaves),
        "leaves_unresolved": sum(leaf.unresolved for leaf in leaves),
        "leaves_ungraded": sum(node.answer is not None and node.correct is None for node in sampled),
    }


def _groups(trees: Iterable[SearchTree]) -> Iterator[list[SearchTree]]:
    group: list[SearchTree] = []
    size = 0
    for tree in trees:
        group.append(tree)
        size += len(tree.nodes)
        if size >= GROUP_NODES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _table(trees: list[SearchTree]) -> pa.Table:
    flat = [node for tree in trees for node in tree.nodes]
    columns: dict[str, list[Any]] = {name: [getattr(node, name) for node in flat] for name in NODE_TYPES}
    columns |= {name: [] for name in DERIVED_TYPES}
    offsets, totals = [0], []
    for tree in trees:
        offsets.append(offsets[-1] + len(tree.nodes))
        totals.append(tree_totals(tree))
        for _, node, depth in walk(tree):
            columns["parent_id"].append(None if node.parent == ROOT else tree.nodes[node.parent].node_id)
            columns["depth"].append(depth)
            columns["num_tokens"].append(len(node.token_ids))
        for counts in leaf_counts(tree)[:-1]:
            columns["leaves_correct"].append(counts.correct)
            columns["leaves_answered"].append(counts.answered)
            columns["leaves_unresolved"].append(counts.unresolved)
    types = NODE_TYPES | DERIVED_TYPES
    nodes = pa.StructArray.from_arrays(
        [pa.array(columns[name], types[name]) for name in types], fields=[pa.field(*pair) for pair in types.items()]
    )
    rows = {
        "problem_id": [tree.problem.problem_id for tree in trees],
        "prompt": [tree.problem.prompt for tree in trees],
        "answer": [tree.problem.answer for tree in trees],
        "status": [tree.status for tree in trees],
        "prompt_ids": [tree.prompt_ids for tree in trees],
        **{name: [total[name] for total in totals] for name in TOTALS},
    }
    arrays = {name: pa.array(values, SCHEMA.field(name).type) for name, values in rows.items()}
    arrays["nodes"] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), nodes)
    return pa.table(arrays, schema=SCHEMA)
