"""
Show the search tree of a problem, in the terminal and as a self-contained HTML page.

```bash
trl-hrm inspect runs/mcts
trl-hrm inspect runs/mcts --problem 17
trl-hrm inspect runs/mcts --all
trl-hrm inspect math-aps-tree.jsonl --format openr --problem 0 --html tree.html
```
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..config import COUNT, SEED, Config
from ..io import shown
from ..terminal import plain, say


if TYPE_CHECKING:
    from ..search.inspection import Inspection
    from ..search.log import EventLog
    from ..search.tree import SearchTree


@dataclass(kw_only=True)
class InspectConfig(Config):
    """
    Configuration of [`inspect_tree`].

    Args:
        input (`str`):
            Folder of `trl-hrm annotate`, finished or running, or one of its Parquet files of nodes. With `format="openr"`, a JSON
            Lines file.
        format (`str`, *optional*, defaults to `"run"`):
            Format of the input: `"run"` or `"openr"`.
        problem (`list[str]`, *optional*):
            Problems to show: ids, or positions counted from 0. By default, all problems are listed.
        all (`bool`, *optional*, defaults to `False`):
            Whether to save a page for every problem.
        html (`str`, *optional*):
            Output file for the HTML page. By default, it is named after the problem and saved in `inspect/` of the run's folder, or in
            the working directory for other inputs. For several problems: output folder for their pages and `index.html`, by default
            `inspect/` of the run's folder or of the working directory.
        depth (`int`, *optional*):
            Number of levels to print. By default, as many as fit in 100 lines.
        breadth (`int`, *optional*, defaults to `8`):
            Maximum number of lines to print below a node.
        rollouts (`bool`, *optional*, defaults to `False`):
            Whether to print every rollout. By default, the rollouts of a node are summarised in one line.
        estimator, truncated (*optional*):
            Same as in [`ExportConfig`]: how MC scores are estimated, and how solutions without an answer count. Trees of openr have
            recorded scores.
        hnc, hnc_rule, hnc_probability, hnc_min_children, hnc_passes, hnc_seed (*optional*):
            Same as in [`ExportConfig`]: whether to show the tree after node compression, and its options. With the options of an
            export, the tree is the one in its rows.

    Raises:
        `ValueError`: If an option is out of range, or has no effect with the other options.
    """

    input: str = field(
        metadata={
            "help": "Folder of `trl-hrm annotate`, finished or running, or one of its Parquet files of nodes. With --format "
            "openr, a JSON Lines file.",
            "metavar": "RUN",
            "positional": True,
        }
    )
    format: Literal["run", "openr"] = field(default="run", metadata={"help": "Format of the input."})
    problem: list[str] | None = field(
        default=None,
        metadata={
            "help": "Problems to show: ids, or positions counted from 0 (default: list all problems). Pages of several problems have "
            "links to the previous and the next one."
        },
    )
    all: bool = field(default=False, metadata={"help": "Save a page for every problem."})
    html: str | None = field(
        default=None,
        metadata={
            "help": "Output file for the HTML page (default: named after the problem, in inspect/ of the run's folder, or "
            "in the working directory for other inputs). For several problems: output folder for their pages and index.html "
            "(default: inspect/).",
            "metavar": "FILE|FOLDER",
        },
    )
    depth: int | None = field(
        default=None,
        metadata={"help": "Number of levels to print (default: as many as fit in 100 lines).", "range": COUNT},
    )
    breadth: int = field(
        default=8, metadata={"help": "Maximum number of lines to print below a node.", "range": COUNT}
    )
    rollouts: bool = field(
        default=False,
        metadata={"help": "Print every rollout. By default, the rollouts of a node are summarised in one line."},
    )
    estimator: Literal["child_mean", "leaf_share"] = field(
        default="child_mean",
        metadata={
            "help": "Estimator of the MC score. child_mean: mean over the children of a step, recursively. leaf_share: share of "
            "correct leaves below a step."
        },
    )
    truncated: Literal["drop", "wrong"] = field(
        default="drop",
        metadata={"help": "How to count a solution without an answer: drop ignores it, wrong counts it as wrong."},
    )
    hnc: bool = field(default=False, metadata={"help": "Show the tree after node compression."})
    hnc_rule: Literal["per_parent", "per_child"] = field(
        default="per_parent",
        metadata={
            "help": "How the child that moves is drawn, for --hnc. per_parent: one draw per node and, if it succeeds, one child, "
            "uniformly. per_child, as in the authors' code: one draw per child, in order, until one succeeds."
        },
    )
    hnc_probability: float = field(
        default=0.5,
        metadata={"help": "Probability that a draw succeeds, for --hnc.", "advanced": True, "range": "[0, 1]"},
    )
    hnc_min_children: int = field(
        default=4,
        metadata={
            "help": "Minimum number of children of a node for one of them to be merged, for --hnc.",
            "advanced": True,
            "range": "[2, inf)",
        },
    )
    hnc_passes: int = field(
        default=1,
        metadata={"help": "Number of compression passes, for --hnc.", "advanced": True, "range": "[1, 1000]"},
    )
    hnc_seed: int = field(
        default=42, metadata={"help": "Random seed of the compression, for --hnc.", "advanced": True, "range": SEED}
    )

    def __post_init__(self):
        super().__post_init__()
        defaults = {field.name: field.default for field in fields(self)}
        if self.all and self.problem is not None:
            raise ValueError("`all` shows every problem, so `problem` has no effect. Remove one of them.")
        for name in ("html", "depth", "breadth", "rollouts", "hnc"):
            if self.problem is None and not self.all and getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}` has no effect without `problem`. Set `problem`, or remove `{name}`.")
        for name in ("depth", "breadth", "rollouts") if self.shows_several else ():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"`{name}` has no effect with several problems, whose trees are not printed. Set one `problem`, or remove `{name}`."
                )
        for name in ("hnc_rule", "hnc_probability", "hnc_min_children", "hnc_passes", "hnc_seed"):
            if not self.hnc and getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}` has no effect without `hnc`. Set `hnc`, or remove `{name}`.")
        for name in ("estimator", "truncated"):
            if self.format == "openr" and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but openr files contain values, not outcomes to estimate them from. Remove `{name}`."
                )

    @property
    def shows_several(self) -> bool:
        """Whether pages of several problems are saved."""
        return self.all or (self.problem is not None and len(self.problem) > 1)


class Entry(NamedTuple):
    """A problem of a run: its position in the input, its id, and a function that reads its tree."""

    place: int
    problem_id: str
    read: "Callable[[], SearchTree]"


def inspect_tree(config: InspectConfig) -> None:
    """
    Print the problems of a run, or print the tree of one problem and save it as an HTML page, or save pages of several problems with
    links between them.

    Args:
        config ([`InspectConfig`]):
            The run, and how much of it to show.

    Raises:
        `FileNotFoundError`: If the run does not exist.
        `OSError`: If a page cannot be written.
        `ValueError`: If the run does not have a problem, or the same problem is given twice.
    """
    import shutil
    import sys

    from ..io import replacing
    from ..pages.page import claimed_page
    from ..search.inspection import render_tree
    from ..search.inspection_text import format_tree, problem_lines
    from ..search.values import mc_scores
    from ..terminal import has_color

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # solutions can contain characters that the terminal cannot encode
    screen = {
        "width": shutil.get_terminal_size((120, 24)).columns,
        "color": has_color(),
    }
    with ExitStack() as files:
        entries = _entries(config.input, config.format, files)
        if config.shows_several:
            _write_pages(config, entries, files)
            return
        if config.problem is None:
            trees = ((entry.place, entry.read()) for entry in entries)
            rows = ((place, tree, mc_scores(tree, config.estimator, config.truncated)[-1]) for place, tree in trees)
            for line in problem_lines(rows, **screen):
                print(line)  # noqa: T201
            return
        entry = _find(entries, config.problem[0], config.input)
        inspection = _inspect(entry.read(), config)
    file = _page_path(config.input, config.html, entry.problem_id)
    # of `all`, whose page of the problem is replaced
    has_list = config.html is None and (file.parent / "index.html").exists()
    with claimed_page(file, "html") as target:
        text = format_tree(inspection, depth=config.depth, breadth=config.breadth, rollouts=config.rollouts, **screen)
        print(text)  # noqa: T201
        with replacing(target) as page:
            page.write(render_tree(inspection, {"index": "index.html"} if has_list else {}))
    say(f"\nPage: {plain(str(file))}")


def _write_pages(config: InspectConfig, entries: Iterator[Entry], files: ExitStack) -> None:
    """Save the pages of several problems, and then the page that lists them, in a folder."""
    from ..io import claimed_folder, replacing
    from ..pages.page import claimed_page, render
    from ..search.inspection import render_tree

    if config.problem is not None:
        known = list(entries)
        entries = iter([_find(iter(known), one, config.input) for one in config.problem])
    folder = Path(config.html or (Path(config.input) if Path(config.input).is_dir() else Path()) / "inspect")
    files.enter_context(claimed_folder(folder, "html"))
    rows: list[dict[str, Any]] = []
    previous, current = None, next(entries, None)
    while current is not None:
        following = next(entries, None)
        names = {"previous": previous, "next": following}
        links = {
            name: _page_path("", None, entry.problem_id).name for name, entry in names.items() if entry is not None
        }
        inspection = _inspect(current.read(), config)
        file = _page_path("", None, current.problem_id).name
        if any(row["file"] == file for row in rows):
            raise ValueError(
                f"{config.input}: problem {shown(current.problem_id)} is there twice. Its pages would replace each other."
            )
        with claimed_page(folder / file, "html") as target, replacing(target) as page:
            page.write(render_tree(inspection, links | {"index": "index.html"}))
        rows.append(
            {
                "place": current.place,
                "file": file,
                "problem": inspection.tree.problem,
                "status": inspection.tree.status.replace("_", " "),
                "score": inspection.scores[-1],
                "counts": inspection.counts[-1],
                "num_nodes": inspection.totals["num_nodes"],
            }
        )
        previous, current = current, following
    with claimed_page(folder / "index.html", "html") as target, replacing(target) as page:
        page.write(render("problems.html.jinja", title=f"Search trees of {config.input}", rows=rows))
    say(f"Pages of {len(rows):,} problems: {plain(str(folder / 'index.html'))}")


def _entries(name: str, format: str, files: ExitStack) -> Iterator[Entry]:
    """
    Yield the problems of the input.

    Problems of a run come from its logs, which exist as soon as it starts. Trees are read only when needed.
    """
    from ..data.tree_files import OpenrFiles
    from ..search.log import EventLog
    from ..search.nodes import read_trees

    path = Path(name)
    if path.is_dir():
        logs = [files.enter_context(EventLog(log)) for log in sorted(path.glob("log-*.jsonl"))]
        if format == "openr" or not logs:
            expected = (
                "a JSON Lines file of openr" if format == "openr" else "a folder of `trl-hrm annotate` (log-*.jsonl)"
            )
            raise FileNotFoundError(f"{name} is a folder without search logs. Expected {expected}.")
        found = [
            Entry(problem.position, problem_id, partial(_read, log, problem_id))
            for log in logs
            for problem_id, problem in log.problems.items()
        ]
        yield from sorted(found, key=lambda entry: (entry.place, entry.problem_id))
        return
    if format == "openr":
        source = OpenrFiles([name])
        trees = (tree for chunk in source.chunks() for _, _, tree in source.read(chunk))
    else:
        trees = read_trees(path)
    for place, tree in enumerate(trees):
        yield Entry(place, tree.problem.problem_id, lambda tree=tree: tree)


def _read(log: "EventLog", problem_id: str) -> "SearchTree":
    return log.read(problem_id).tree.canonical()


def _find(entries: Iterator[Entry], problem: str, name: str) -> Entry:
    """Return the problem with this id or, if no id matches, at this position."""
    at_place, number, examples = None, 0, []
    for entry in entries:
        if entry.problem_id == problem:
            return entry
        if str(entry.place) == problem:
            at_place = entry
        number += 1
        examples = examples or [entry.problem_id]
    if at_place is None:
        known = f" such as {shown(examples[0])}" if examples else ""
        raise ValueError(
            f"{name}: problem {shown(problem)} is not among its {number} problems. Set `problem` to an id{known} or to a position, or "
            "omit it to list all problems."
        )
    return at_place


def _inspect(tree: "SearchTree", config: InspectConfig) -> "Inspection":
    from ..data.step_labels import compressed
    from ..search.compression import count_moves
    from ..search.inspection import Inspection
    from ..search.nodes import tree_totals
    from ..search.values import leaf_counts, mc_scores

    totals = tree_totals(tree)  # before compression, whose new nodes repeat tokens
    counted = {"drop": "dropped", "wrong": "counted as wrong"}[config.truncated]
    basis = f"{config.estimator.replace('_', ' ')}, solutions without an answer {counted}"
    if config.format == "openr":
        basis = "recorded in the source"
    if config.hnc:
        tree = compressed(tree, config)
        # the count first, because a narrow terminal cuts the line
        basis += (
            f"; node compression moved {count_moves(tree)} nodes ({config.hnc_rule}, seed {config.hnc_seed}, probability "
            f"{config.hnc_probability:g}, at least {config.hnc_min_children} children, passes: {config.hnc_passes})"
        )
    scores = mc_scores(tree, config.estimator, config.truncated)
    return Inspection(tree, scores, leaf_counts(tree), totals, run=config.input, basis=basis)


def _page_path(name: str, html: str | None, problem_id: str) -> Path:
    """Return the path of the page. If the id is not a valid file name, a hash keeps the path unique."""
    import re

    from ..search.tree import make_id

    if html is not None:
        return Path(html)
    safe = re.sub(r"[^\w-]+", "_", problem_id, flags=re.ASCII)[:60]
    if safe != problem_id or safe == "index":  # the page that lists the problems
        safe += f"-{make_id(problem_id)[:8]}"
    return (Path(name) / "inspect" if Path(name).is_dir() else Path()) / f"{safe}.html"
