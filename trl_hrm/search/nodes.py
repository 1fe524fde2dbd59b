"""
Read and write search trees as Parquet files, with one row per problem and its nodes as a list of structs.

In addition to the fields of [`Node`], each node has `parent_id`, `depth`, `num_tokens` and its leaf counts. Each row has the problem,
its leaf counts, and the numbers of generated and cached tokens. Scores are not stored. They are computed from the counts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..io import replacing
from .outcomes import NUM_SHOWN
from .tree import ROOT, Node, Problem, SearchTree, walk
from .values import leaf_counts


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


def write_nodes(trees: Iterable[SearchTree], path: str | Path) -> None:
    """
    Write trees to a Parquet file. The file is written completely or not at all. Only a few trees are in memory at a time.

    Args:
        trees (`Iterable[SearchTree]`):
            Trees, one per problem.
        path (`str` or `Path`):
            Path of the file. An existing file is replaced.
    """
    with replacing(path, "wb") as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for group in _groups(trees):
            writer.write_table(_table(group), row_group_size=len(group))


def read_trees(path: str | Path, token_ids: bool = True) -> Iterator[SearchTree]:
    """
    Read the trees in a file written by [`write_nodes`].

    Args:
        path (`str` or `Path`):
            Path of the file.
        token_ids (`bool`, *optional*, defaults to `True`):
            Whether to read token ids. Without them, reading is faster and the lists are empty.

    Raises:
        `ValueError`: If the file is not a Parquet file of search trees.
    """
    with open_nodes(path) as file:
        for group in range(file.num_row_groups):
            yield from read_group(file, group, token_ids)


def open_nodes(path: str | Path) -> pq.ParquetFile:
    """Open a file written by [`write_nodes`]."""
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        with open(path, "rb") as opened:
            head = opened.read(64)
        if head.startswith(b"\x1f\x8b") or head.lstrip()[:1] in (b"{", b"["):  # JSON, possibly compressed with gzip
            raise ValueError(
                f"{path} is a JSON file, expected the output folder of a search or a Parquet file of search trees. For trees of "
                "openr (`question`, `final_answer` and `reasoning_steps`), use --format openr."
            ) from error
        raise ValueError(
            f"{path} is not a Parquet file ({error}), expected search trees written by `trl-hrm annotate`."
        ) from error
    if not file.schema_arrow.equals(SCHEMA):
        raise ValueError(
            f"{path} has the columns {file.schema_arrow.names}, expected search trees written by this version of `trl-hrm "
            "annotate`."
        )
    return file


def read_group(file: pq.ParquetFile, group: int, token_ids: bool = True) -> Iterator[SearchTree]:
    """Read the trees in one row group. See [`read_trees`]."""
    names = [field.name for field in fields(Node) if token_ids or field.name != "token_ids"]
    columns = ["problem_id", "prompt", "answer", "status", "prompt_ids"]
    rows = file.read_row_group(group, columns=[*columns, *(f"nodes.list.element.{name}" for name in names)])
    nodes = rows["nodes"].combine_chunks()
    starts = nodes.offsets.to_pylist()
    flat = nodes.values
    values = {name: flat.field(name).to_pylist() for name in names}
    values["cuts"] = list(map(tuple, values["cuts"]))
    values["merged_from"] = [tuple(ids) if ids else None for ids in values["merged_from"]]
    if not token_ids:
        values["token_ids"] = [[] for _ in range(len(flat))]
    made = list(map(Node, *(values[field.name] for field in fields(Node))))
    for row, problem in enumerate(rows.select(columns).to_pylist()):
        yield SearchTree(
            Problem(problem["problem_id"], problem["prompt"], problem["answer"]),
            made[starts[row] : starts[row + 1]],
            problem["prompt_ids"],
            problem["status"],
        )


def read_totals(paths: Iterable[str | Path]) -> Counter:
    """Return the sums of `TOTALS` over all problems in the files, and the number of `"problems"`."""
    totals = Counter()
    for path in paths:
        with open_nodes(path) as file:
            totals["problems"] += file.metadata.num_rows
            rows = file.read(columns=list(TOTALS))
            totals.update({name: sum(rows[name].to_pylist()) for name in TOTALS})
    return totals


def read_unreadable_references(paths: Iterable[str | Path]) -> tuple[int, list[dict[str, str]]]:
    """Return the number of problems with unreadable reference answers, and `problem_id` and `answer` of the first few."""
    found: list[dict[str, str]] = []
    for path in paths:
        with open_nodes(path) as file:
            rows = file.read(columns=["problem_id", "answer", "status"])
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
