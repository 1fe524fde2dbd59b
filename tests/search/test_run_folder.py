"""Convert logs to node files without losing nodes or keeping old ones."""

import json

import pytest

from trl_hrm.io import write_json
from trl_hrm.search.nodes import read_trees as read_nodes
from trl_hrm.search.run_folder import finish_shard, node_files, read_manifest, read_summary
from trl_hrm.search.tree import SearchTree

from .scripted import SEARCHES, FaultyEngine, make_problems, read_trees, run_scripted


def stored(folder) -> list[SearchTree]:
    return [tree for file in node_files(folder) for tree in read_nodes(file)]


@pytest.mark.parametrize("name", list(SEARCHES))
def test_nodes_equal_the_log(tmp_path, name):
    """Compare each field of each node. Problems keep their given order."""
    run_scripted(tmp_path, SEARCHES[name], make_problems(8), max_in_flight=40)
    found = stored(tmp_path)
    assert {tree.problem.problem_id: tree for tree in found} == read_trees(tmp_path)
    assert [tree.problem.problem_id for tree in found] == [f"p{i:03d}" for i in range(8)]


def test_a_log_that_has_grown_is_read_again(tmp_path):
    """Otherwise the export of a resumed run would silently contain only its first part."""
    run_scripted(tmp_path, problems=make_problems(2))
    assert len(stored(tmp_path)) == 2
    (nodes,) = node_files(tmp_path)
    before = nodes.stat().st_mtime_ns
    assert node_files(tmp_path) == [nodes] and nodes.stat().st_mtime_ns == before
    run_scripted(tmp_path, problems=make_problems(5))
    assert len(stored(tmp_path)) == 5


def test_unfinished_problems_are_counted_not_stored(tmp_path):
    progress = run_scripted(tmp_path, engine=FaultyEngine(0.3), max_failures=50, problem_attempts=1)
    summary = finish_shard(tmp_path, 0, 1)
    assert summary["problems"] == dict(progress.closed) and summary["problems"]["error"] >= 2
    assert summary["failed_requests"] == progress.num_failures
    assert len(stored(tmp_path)) == progress.closed["done"]
    log = next(tmp_path.glob("log-*"))
    log.write_bytes(b"".join(line for line in log.read_bytes().splitlines(keepends=True) if b'"close"' not in line))
    assert stored(tmp_path) == [] and read_summary(tmp_path)["problems"] == {"open": 6}


def test_missing_shards_are_reported(tmp_path):
    for shard in (0, 2):
        run_scripted(tmp_path, problems=make_problems(2), shard=(shard, 4))
        finish_shard(tmp_path, shard, 4)
    found = read_summary(tmp_path)
    assert (found["problems"], found["failed_requests"], found["shards_missing"]) == ({"done": 4}, 0, 2)


def test_no_run(tmp_path):
    for read in (node_files, read_manifest):
        with pytest.raises(FileNotFoundError, match="--output_dir of trl-hrm annotate"):
            read(tmp_path)


def test_json_is_complete_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1} and len(list(tmp_path.iterdir())) == 1
