"""Search trees as a source of records: the Parquet files of a run, read a row group at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..search.nodes import open_nodes, read_group
from ..search.run_folder import summary_warnings
from ..search.tree import SearchTree
from .sources import Address


class NodeFiles:
    """
    Files that [`write_nodes`] wrote, with `chunks` and `read` as [`JsonLines`] has them. A record is a [`SearchTree`] without token ids.

    Args:
        files (`Sequence[str]`):
            Paths of the files.

    Raises:
        `FileNotFoundError`: If a path is not a file.
        `ValueError`: If a file holds no search trees.
    """

    def __init__(self, files: Sequence[str]):
        self.files = [str(file) for file in files]
        for file in self.files:
            if not Path(file).is_file():
                raise FileNotFoundError(
                    f"{file}: there is no such file; expected the folder of a search, or a file of search trees from it."
                )
            open_nodes(file).close()

    def chunks(self) -> list[dict[str, int]]:
        """One dict per row group: number of the `file`, number of the `group`."""
        return [
            {"file": number, "group": group}
            for number, file in enumerate(self.files)
            for group in range(_num_groups(file))
        ]

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, SearchTree]]:
        """Yield `(where, address, tree)` for each tree of the row group, `where` being file and problem."""
        name = self.files[chunk["file"]]
        with open_nodes(name) as file:
            for row, tree in enumerate(read_group(file, chunk["group"], token_ids=False)):
                where = f"{name}, problem {tree.problem.problem_id!r}"
                yield where, Address(chunk["file"], chunk["group"], row), tree


def run_warnings(runs: dict[str, dict[str, Any]]) -> list[str]:
    """
    Return warnings about problems that are missing from the node files of runs, and those of [`summary_warnings`].

    Args:
        runs (`dict[str, dict[str, Any]]`):
            Manifest and summary of each run in one, by its folder. See [`read_manifest`] and [`read_summary`].
    """
    warnings = []
    for name, run in runs.items():
        for status, words in (("error", "have failed requests"), ("open", "are not searched to the end")):
            if count := run["problems"].get(status):
                warnings.append(
                    f"{name}: {count} problems {words} and are left out. Start trl-hrm annotate again to complete them."
                )
        if run["shards_missing"]:
            warnings.append(
                f"{name}: {run['shards_missing']} shards are not in the folder, so their problems are left out."
            )
        warnings += [f"{name}: {warning}" for warning in summary_warnings(run, run)]
    return warnings


def _num_groups(name: str) -> int:
    with open_nodes(name) as file:
        return file.num_row_groups
