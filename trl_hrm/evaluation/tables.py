"""
Compare the results of several runs with the numbers in a table of a paper. A layout describes the table:

```yaml
title: "HRM, table 3: accuracy of Qwen2.5-Math-72B-Instruct on PRM800K"
source: https://huggingface.co/papers/2503.13551
unit: share
num_problems: 90
points_in: columns
points: [2, 4]
series:
  - label: ORM
    results: table3-orm
    curve: best_of_n/last
    paper: [0.622, 0.677]
```
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from ..io import read_json, read_yaml, shown
from ..pages.page import Table, code, markdown
from ..pages.pictures import MARKERS, Picture, band_picture, draw, legend, shown_label
from ..schema import OTHER_DATASET, Count, check_json, from_json
from ..terminal import one_line
from .results import RESULTS, Results, estimate_words, load_results


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..pages.pictures import Theme

STATE = "trainer_state.json"
UNITS = {"share": (1, 3), "percent": (100, 1)}  # factor and number of decimals
MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class Series:
    """
    A line of numbers in a table: a row if the points are the columns, otherwise a column.

    Args:
        label (`str` or `list[str]`):
            Title, or titles from the outer to the inner heading.
        results (`str` or `dict[str, str]`):
            Output folder of a run, below the folder of all runs, or one folder per point. The key `"N"` stands for all points that are
            numbers. Points that are not in the dictionary are empty.
        curve (`str` or `dict[str, str]`, *optional*):
            Curve in the `results.json` of the run, such as `best_of_n/min`, or one curve per point. Not needed for the logs of a
            training.
        paper (`list[float | None]`, *optional*):
            Number of the paper for each point. `None` where it has none.
    """

    label: str | list[str]
    results: str | dict[str, str]
    curve: str | dict[str, str] = ""
    paper: list[float | None] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Titles from the outer to the inner heading."""
        return [self.label] if isinstance(self.label, str) else self.label

    def at(self, name: Literal["results", "curve"], point: str) -> str | None:
        """Return the folder or the curve of a point, or `None`."""
        value = getattr(self, name)
        return value if isinstance(value, str) else value.get(point, value.get("N") if point.isdecimal() else None)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """
    Layout of a table.

    Args:
        title (`str`):
            Title of the table.
        source (`str`):
            Source of the paper's numbers, such as its URL.
        points (`list[int | str]`):
            With `kind="accuracy"`, the values of N. A name, such as `"Top1@acc"`, stands for N = 1. With `kind="training"`, the logged
            metrics, such as `"kl"`.
        series (`list[Series]`):
            Lines of numbers.
        kind (`str`, *optional*, defaults to `"accuracy"`):
            `"accuracy"` reads the curves in the `results.json` of each run, `"training"` the logs in its `trainer_state.json`.
        unit (`str`, *optional*, defaults to `"share"`):
            How accuracies are printed: `"share"` (0.722) or `"percent"` (72.2). The numbers of the paper have the same unit.
        points_in (`str`, *optional*, defaults to `"columns"`):
            Whether the points are `"columns"` or `"rows"`.
        num_problems (`int` or `dict[str, int]`, *optional*):
            Number of problems in the paper, or one number per outer heading of the series. Results on another number are marked.
        notes (`list[str]`, *optional*):
            Sentences below the table.

    Raises:
        `ValueError`: If a series has not one number of the paper per point, or names a point that does not exist.
    """

    title: str
    source: str
    points: list[int | str]
    series: list[Series]
    kind: Literal["accuracy", "training"] = "accuracy"
    unit: Literal["share", "percent"] = "share"
    points_in: Literal["columns", "rows"] = "columns"
    num_problems: Count | dict[str, Count] | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.kind == "training" and (self.unit != "share" or self.num_problems is not None):
            raise ValueError("`unit` and `num_problems` have no effect with `kind: training`. Remove them.")
        if isinstance(self.num_problems, dict):
            unknown = set(self.num_problems) - {series.labels[0] for series in self.series}
            if unknown:
                raise ValueError(f"`num_problems` has {sorted(unknown)}, expected first labels of the series.")
        names = [str(point) for point in self.points]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`points` is {shown(self.points, 200)}. It must have at least one point, each once.")
        if not self.series:
            raise ValueError("`series` is empty. It must have at least one series.")
        for i, series in enumerate(self.series):
            if series.paper and len(series.paper) != len(names):
                raise ValueError(
                    f"`series[{i}].paper` has {len(series.paper)} numbers, expected one for each of the {len(names)} points."
                )
            for key in ("results", "curve"):
                value = getattr(series, key)
                unknown = set(value) - {*names, "N"} if isinstance(value, dict) else ()
                if unknown:
                    raise ValueError(
                        f"`series[{i}].{key}` has the points {sorted(unknown)}, which are not in `points`."
                    )
            if self.kind == "training" and series.curve:
                raise ValueError(f"`series[{i}].curve` has no effect with `kind: training`. Remove it.")
            if self.kind == "accuracy" and not series.curve:
                raise ValueError(
                    f"`series[{i}].curve` is missing. Set the name of a curve in {RESULTS}, such as best_of_n/min."
                )


@dataclass(frozen=True)
class Cell:
    """
    Number of a series at a point.

    Args:
        value (`float`, *optional*):
            Measured value, or `None` without a result.
        low, high (`float`, *optional*):
            Bounds of the 95 % interval of an accuracy, or smallest and largest value in the logs of a training.
        paper (`float`, *optional*):
            Number of the paper.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    paper: float | None = None


@dataclass(frozen=True)
class FilledTable:
    """
    A layout with its cells.

    Args:
        layout ([`Layout`]):
            The layout.
        cells (`list[list[Cell]]`):
            Cells of each series, one per point.
        found (`dict[str, str]`):
            Folders with results, and a line that describes each.
        missing (`dict[str, str]`):
            Folders without results, and the file that is missing.
        warnings (`list[str]`):
            Differences from the paper that prevent a comparison.
        logs (`list[dict[str, list[tuple[int, float]]]]`):
            For `kind="training"`, steps and values of each metric, per series.
    """

    layout: Layout
    cells: list[list[Cell]]
    found: dict[str, str]
    missing: dict[str, str]
    warnings: list[str]
    logs: list[dict[str, list[tuple[int, float]]]]


class TrainerState(TypedDict, total=False):
    """What is read of `trainer_state.json`."""

    log_history: list[dict[str, Any]]
    global_step: Count


def read_layout(path: str | Path) -> Layout:
    """
    Read the layout of a table from a YAML file.

    Raises:
        `ValueError`: If the file is not a valid layout. The message names the key.
    """
    return from_json(Layout, read_yaml(path), str(path), "`help(trl_hrm.evaluation.tables.Layout)` lists the keys.")


def fill_table(layout: Layout, runs: str | Path) -> FilledTable:
    """
    Read the results of a layout. Runs that are not finished leave their cells empty.

    Args:
        layout ([`Layout`]):
            Layout of the table.
        runs (`str` or `Path`):
            Folder of all runs.

    Raises:
        `FileNotFoundError`: If no run has results.
        `ValueError`: If a file is damaged, or results have no curve or metric of this name.
    """
    runs, name = Path(runs), RESULTS if layout.kind == "accuracy" else STATE
    folders = [
        folder for series in layout.series for point in layout.points if (folder := series.at("results", str(point)))
    ]
    loaded: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        path = runs / folder / name
        if not path.is_file():
            missing[folder] = str(path)
        else:
            loaded[folder] = load_results(path.parent) if layout.kind == "accuracy" else _read_logs(path)
    if not loaded:
        raise FileNotFoundError(
            f"{runs}: none of the {len(missing)} runs of the table has results. The first that is missing: "
            f"{next(iter(missing.values()))}. Run the commands that write them first, or set --runs."
        )
    cells, warnings, logs = [], [], []
    if layout.kind == "accuracy":
        old = [folder for folder, one in loaded.items() if one.strategy == "best_of_n" and not one.estimate]
        warnings += [f"{folder}: {estimate_words('best_of_n', {})}" for folder in old]
    for series in layout.series:
        row = []
        for i, point in enumerate(layout.points):
            folder = series.at("results", str(point))
            paper = series.paper[i] if series.paper else None
            if folder not in loaded:
                row.append(Cell(paper=paper))
            elif layout.kind == "accuracy":
                curve = series.at("curve", str(point))
                row.append(_accuracy(loaded[folder], curve, point, paper, layout.unit))
                if row[-1].value is None:
                    measured = ", ".join(str(one["n"]) for one in loaded[folder].curves[curve])
                    warnings.append(f"{folder} has {curve} at N = {measured} only. The other cells are empty.")
                warnings += _unequal_problems(layout, series, loaded[folder], folder)
            else:
                row.append(_logged(loaded[folder], str(point), paper, runs / folder / name))
        cells.append(row)
        if layout.kind == "training":
            of_points = {point: loaded.get(series.at("results", point), {}) for point in map(str, layout.points)}
            logs.append({point: log[point] for point, log in of_points.items() if point in log})
    describe = _describe_results if layout.kind == "accuracy" else _describe_logs
    found = {folder: describe(one) for folder, one in loaded.items()}
    return FilledTable(layout, cells, found, missing, list(dict.fromkeys(warnings)), logs)


def _accuracy(results: Results, curve: str | None, point: int | str, paper: float | None, unit: str) -> Cell:
    if curve not in results.curves:
        raise ValueError(
            f"{results.output_dir}: found the curves {', '.join(results.curves)}, expected {shown(curve)}. Run its command with the "
            "options of the table, or change `curve`."
        )
    n, (factor, _) = (point if isinstance(point, int) else 1), UNITS[unit]
    for one in results.curves[curve]:
        if one["n"] == n:
            return Cell(factor * one["accuracy"], factor * one["low"], factor * one["high"], paper)
    return Cell(paper=paper)


def _read_logs(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values of each logged metric."""
    state = read_json(path)
    check_json(state, TrainerState, path, "Train again.", more=True)
    logs: dict[str, list[tuple[int, float]]] = {}
    for entry in state.get("log_history", ()):
        if entry.get(OTHER_DATASET):
            continue
        for key, value in entry.items():
            if key not in ("step", "epoch") and isinstance(value, int | float) and "step" in entry:
                logs.setdefault(key, []).append((entry["step"], float(value)))
    return logs


def _logged(logs: dict[str, list[tuple[int, float]]], metric: str, paper: float | None, path: Path) -> Cell:
    if metric not in logs:
        raise ValueError(f"{path}: found the metrics {', '.join(logs)}, expected {shown(metric)}. Change `points`.")
    values = [value for _, value in logs[metric]]
    return Cell(values[-1], min(values), max(values), paper)


def _unequal_problems(layout: Layout, series: Series, results: Results, folder: str) -> list[str]:
    expected = layout.num_problems
    if isinstance(expected, dict):
        expected = expected.get(series.labels[0])
    if expected is None or expected == results.num_problems:
        return []
    return [f"{folder} has {results.num_problems:,} problems, the paper {expected:,}."]


def _describe_results(results: Results) -> str:
    policy, model = (results.policy or {}).get("model"), (results.reward_model or {}).get("model")
    parts = [f"policy {markdown(str(policy))}"] if policy else []
    parts += [f"reward model {markdown(str(model))}"] if model else []
    parts += [f"{results.num_problems:,} problems", results.date[:10]]
    if results.warnings:
        count = len(results.warnings)
        parts.append(f"{f'{count} warnings, the first' if count > 1 else 'warning'}: {markdown(results.warnings[0])}")
    return "; ".join(parts)


def _describe_logs(logs: dict[str, list[tuple[int, float]]]) -> str:
    return f"{max((step for values in logs.values() for step, _ in values), default=0):,} steps"


def format_table(filled: FilledTable) -> str:
    """Return the table as Markdown, with aligned columns, and what it was made from."""
    layout = filled.layout
    points = [f"N={point}" if isinstance(point, int) else point for point in layout.points]
    titles = [" / ".join(series.labels) for series in layout.series]
    cells = [[_format_cell(cell, layout) for cell in row] for row in filled.cells]
    if layout.points_in == "columns":
        head, rows = ["", *points], [[title, *row] for title, row in zip(titles, cells, strict=True)]
    else:
        head, rows = (
            ["", *titles],
            [[point, *row] for point, row in zip(points, zip(*cells, strict=True), strict=True)],
        )
    lines = [f"# {markdown(layout.title)}", "", Table(head, rows).markdown(is_aligned=True), ""]
    if layout.kind == "accuracy":
        lines.append(
            f"Accuracy{' in percent' * (layout.unit == 'percent')}, its 95 % interval in brackets, and the paper's number in parentheses "
            f"({layout.source})."
        )
    else:
        lines.append(
            f"Last logged value, the range of all logged values in brackets, and the paper's number in parentheses ({layout.source})."
        )
    lines += [one_line(note) for note in layout.notes]
    both = [cell for row in filled.cells for cell in row if cell.value is not None and cell.paper is not None]
    if both and layout.kind == "accuracy":
        inside = sum(cell.low <= cell.paper <= cell.high for cell in both)
        lines.append(f"The interval contains the paper's number in {inside} of {len(both)} cells.")
    lines.append("")
    lines += [f"- warning: {one_line(warning)}" for warning in filled.warnings]
    lines += [f"- {code(folder)}: {line}" for folder, line in filled.found.items()]
    lines += [f"- {code(folder)}: no results, {code(path)} is missing" for folder, path in filled.missing.items()]
    return "\n".join(lines)


def _format_cell(cell: Cell, layout: Layout) -> str:
    def number(value: float) -> str:
        return f"{value:.{UNITS[layout.unit][1]}f}" if layout.kind == "accuracy" else f"{value:.4g}"

    text = MISSING if cell.value is None else f"{number(cell.value)} [{number(cell.low)}, {number(cell.high)}]"
    # the paper may have more decimals
    return text if cell.paper is None else f"{text} ({max(number(cell.paper), str(cell.paper), key=len)})"


def draw_table(filled: FilledTable) -> list[Picture]:
    """
    Draw a filled table: accuracy over N for each outer heading of the series, with the numbers of the paper as broken lines, or the
    metrics of a training over its steps. Series without results are not drawn.
    """
    if filled.layout.kind == "training":
        return [_metric_picture(filled, str(point)) for point in filled.layout.points]
    groups: dict[str, list[int]] = {}
    for i, series in enumerate(filled.layout.series):
        groups.setdefault(series.labels[0] if len(series.labels) > 1 else "", []).append(i)
    pictures = []
    for number, (heading, places) in enumerate(groups.items()):
        curves, colors = [], []
        for color, i in enumerate(places):
            series, factor = filled.layout.series[i], UNITS[filled.layout.unit][0]
            label = " / ".join(series.labels[1:] or series.labels)
            numbered = [
                (n, cell) for n, cell in zip(filled.layout.points, filled.cells[i], strict=True) if isinstance(n, int)
            ]
            points = [
                {"n": n, "accuracy": cell.value / factor, "low": cell.low / factor, "high": cell.high / factor}
                for n, cell in numbered
                if cell.value is not None
            ]
            of_paper = [{"n": n, "accuracy": cell.paper / factor} for n, cell in numbered if cell.paper is not None]
            drawn = [(label, points), (f"{label}, paper", of_paper)] if points else []
            curves += [one for one in drawn if one[1]]
            colors += [color for one in drawn if one[1]]
        if curves:
            title = f"{filled.layout.title}{f' ({heading})' if heading else ''}"
            pictures.append(band_picture(f"accuracy-{number + 1}", title, curves, (), colors))
    return pictures


def _metric_picture(filled: FilledTable, metric: str) -> Picture:
    """Draw a logged metric over the steps of each training, on a log scale if it spans more than two orders of magnitude."""
    lines = [
        (" / ".join(series.labels), logs[metric])
        for series, logs in zip(filled.layout.series, filled.logs, strict=True)
        if metric in logs
    ]
    values = [value for _, points in lines for _, value in points]

    def paint(axes: "Axes", theme: "Theme") -> None:
        for i, (label, points) in enumerate(lines):
            axes.plot(
                *zip(*points, strict=True),
                color=theme.curves[i % len(theme.curves)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=3,
                label=shown_label(label),
            )
        positive = [value for value in values if value > 0]
        if positive and max(positive) > 100 * min(positive):
            axes.set_yscale("log" if len(positive) == len(values) else "symlog")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(metric)
        legend(axes, theme)

    ends = "; ".join(f"{label}: {points[0][1]:.4g} to {points[-1][1]:.4g}" for label, points in lines)
    height = 2.75 + 0.17 * math.ceil(len(lines))
    return draw(
        metric.replace("/", "-"), f"{metric} over training", f"{metric} over optimizer steps. {ends}", paint, height
    )


def captions(pictures: Sequence[Picture], folder: str) -> str:
    """Return Markdown that shows the pictures in a folder."""
    return "\n\n".join(f"![{markdown(picture.title)}]({folder}/{picture.name}.png)" for picture in pictures)
