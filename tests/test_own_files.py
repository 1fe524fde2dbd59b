"""Files that the package wrote are checked when they are read: seeded mutations of each kind, and damaged bytes of node files."""

import random
from pathlib import Path

import pytest

from trl_hrm.search import nodes
from trl_hrm.search.nodes import read_totals, read_trees, read_unreadable_references, write_nodes

from .mutations import kinds_of
from .own_files import KINDS, good, mutated, outcome_of
from .search.random_trees import random_tree, rollout_tree


def check_mutations(name: str, number: int, folder: Path) -> None:
    """Each mutation is an error that names the file in one line, or is accepted with values of the usual types."""
    rng, known, refused = random.Random(name), kinds_of(good(name)[1]), 0
    for i in range(number):
        what, records = mutated(name, rng, folder / str(i))
        outcome = outcome_of(KINDS[name], folder / str(i), good(name)[2], known, records)
        assert outcome in ("clean", "equal", "other"), f"{what}: {outcome}"
        refused += outcome == "clean"
    assert refused > number / 10  # of a build report, most keys are not read


@pytest.mark.parametrize("name", KINDS)
def test_mutations(tmp_path, name):
    check_mutations(name, 25, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_mutations(tmp_path, name):
    check_mutations(name, 300, tmp_path)


def check_bytes(number: int, path: Path) -> None:
    """Damaged bytes of a node file are an error, or change nothing that is read."""
    rng = random.Random(0)
    write_nodes([rng.choice([random_tree, rollout_tree])(rng, f"p{i}") for i in range(12)], path)

    def read():
        return list(read_trees(path)), read_totals([path]), read_unreadable_references([path])

    whole, expected, refused = path.read_bytes(), read(), 0
    for _ in range(number):
        damaged = bytearray(whole)
        place = (
            len(whole) - 1 - rng.randrange(6000 if rng.random() < 0.5 else len(whole))
        )  # half of them in the footer
        kind = rng.randrange(4)
        if kind == 0:
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damaged[place:]
        elif kind == 2:
            del damaged[place : place + rng.randrange(1, 50)]
        else:
            damaged[place:place] = rng.randbytes(rng.randrange(1, 50))
        path.write_bytes(damaged)
        try:
            found = read()
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 600
        else:
            assert found == expected
    assert refused > number / 2


def test_damaged_bytes_of_node_files(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "GROUP_NODES", 200)
    check_bytes(60, tmp_path / "nodes.parquet")


@pytest.mark.slow
def test_many_damaged_bytes_of_node_files(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "GROUP_NODES", 200)
    check_bytes(1500, tmp_path / "nodes.parquet")
