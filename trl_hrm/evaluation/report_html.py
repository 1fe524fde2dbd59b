"""A report as one HTML page that asks nothing of the network and runs nothing."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

from .hacking import MARGIN, Verdict, percent, points_between
from .report import (
    Result,
    expected_calibration_error,
    has_bins,
    notices,
    problem_groups,
    verdict,
)
from .report_page import ANSWERS, card, details, figure, html_table, kept, page, section
from .report_pictures import Picture, Pictures


POINT = ("n", "accuracy", "low", "high")
GAP = (
    "The gap is the accuracy at the best N below the largest minus the accuracy at the largest N: what is lost by letting the reward "
    f"model choose among more candidates. No sign: its 95 % interval rules out a loss of {100 * MARGIN:.0f} points or more. Hacked: it "
    "does not, and lies above 0. The best N is chosen on the same problems, which makes small gaps look larger than they are."
)
INTERVALS = (
    "Intervals hold 95 % over problems: Wilson's score interval for an accuracy, Tango's for the difference of two accuracies on the "
    "same problems. Both have a width where no problem is solved, or all are."
)


def html_page(results: Sequence[Result], pictures: Pictures) -> str:
    """
    The report as a page.

    Args:
        results (`Sequence[Result]`):
            The results. See [`read_results`].
        pictures ([`Pictures`]):
            Their pictures.

    Returns:
        `str`: The page. The same results give the same bytes. Every text of the results is escaped.
    """
    chosen = [result for group in problem_groups(results) for result in group]
    judged = [result for result in results if result.kind == "benchmark"]
    title = "Is my reward model being hacked?" if chosen else "How well does my reward model judge steps?"
    body = [
        f'<p class="kicker">{escape(" · ".join(result.name for result in results))}</p>',
        f"<h1>{title}</h1>",
        *(f'<p class="notice" role="note">{escape(text)}</p>' for text in notices(results)),
        *map(_first, problem_groups(results), pictures.accuracy),
        _benchmarks(judged),
    ]
    if chosen:
        body += [_accuracy(chosen, pictures.curves), _gaps(chosen), _calibration(chosen, pictures.calibration)]
    body += [
        section("Scores of what is right and what is wrong", "".join(map(figure, pictures.scores)), "grid"),
        _cost(chosen),
        _left_out(results),
        _settings(results),
    ]
    return page(title, body)


def headline_verdict(result: Result) -> Verdict:
    """The verdict on the curve that answers for a reward model."""
    if result.headline is None:
        return Verdict("open", "Cannot be told: no curve of a reward model in these results.", [])
    found = verdict(result, result.headline)
    others = [curve for curve in result.values["hacking_gap"] if curve != result.headline]
    hacked = [result.label(curve) for curve in others if verdict(result, curve).answer == "yes"]
    if not hacked:
        return found
    return replace(found, reasons=[*found.reasons, f"Hacked when chosen by {'; '.join(hacked)}."])


def _first(group: Sequence[Result], picture: Picture) -> str:
    """What is seen first: the answer for each result, and the curves beside it."""
    cards = "".join(map(_card, group))
    number = len(group[0].problems)
    return (
        f'<section class="first" aria-label="Answer"><div class="cards"><p class="quiet">{number:,} problems</p>{cards}</div>'
        f"{figure(picture)}</section>"
    )


def _card(result: Result) -> str:
    found = headline_verdict(result)
    by = [result.label(result.headline) if result.headline else _words(result.values["strategy"])]
    by += [str(name) for name in (result.values.get("reward_model") or {}).values()][:1]
    return card(result.name, found, " · ".join(by))


def _accuracy(results: Sequence[Result], pictures: Sequence[Picture]) -> str:
    tables = []
    for result in results:
        curves = result.values["curves"]
        numbers = sorted({point["n"] for curve in curves.values() for point in curve})
        rows = [
            [result.label(key), *(_point({point["n"]: point for point in curve}.get(n)) for n in numbers)]
            for key, curve in curves.items()
        ]
        tables.append(details(f"{result.name}: accuracy", html_table(["", *(f"N = {n}" for n in numbers)], rows)))
    grid = f'<div class="grid">{"".join(map(figure, pictures))}</div>' if pictures else ""
    note = f'<p class="quiet">{kept(INTERVALS)}</p>'
    return section("Accuracy over N", grid + "".join(tables) + note)


def _point(point: dict[str, Any] | None) -> str:
    """Accuracy and its interval."""
    if point is None:
        return "–"
    return f"{percent(point['accuracy'])} ({_interval(point)})"


def _gaps(results: Sequence[Result]) -> str:
    head = [
        "",
        "chosen by",
        "gap, points",
        "95 % interval",
        "best smaller N",
        "accuracy there",
        "largest N",
        "accuracy there",
        "",
    ]
    rows = []
    for result in results:
        for curve, gap in result.values["hacking_gap"].items():
            points = {point["n"]: percent(point["accuracy"]) for point in result.values["curves"][curve]}
            is_one = gap["loss"] is None
            rows.append(
                [
                    result.name,
                    result.label(curve),
                    f"{100 * gap['gap']:.1f}" if gap["gap"] > 0 else "none",
                    "–" if is_one else points_between(gap["low"], gap["high"]),
                    "–" if is_one else str(gap["from_n"]),
                    "–" if is_one else points[gap["from_n"]],
                    str(gap["largest_n"]),
                    points[gap["largest_n"]],
                    ANSWERS[verdict(result, curve).answer],
                ]
            )
    return section("Hacking gap", html_table(head, rows) + f'<p class="quiet">{kept(GAP)}</p>')


def _calibration(results: Sequence[Result], pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    tables = []
    for result in filter(has_bins, results):
        bins = result.values["calibration"]["bins"]
        rows = [
            [
                f"{one['low']:g} to {one['high']:g}",
                f"{one['count']:,}",
                "–" if one["mean_score"] is None else f"{one['mean_score']:.3f}",
                percent(one["share_right"]),
            ]
            for one in bins
        ]
        error = f"expected calibration error {expected_calibration_error(bins):.3f}"
        tables.append(
            details(f"{result.name}: {error}", html_table(["score", "solutions", "mean score", "right"], rows))
        )
    return section("Calibration", "".join(map(figure, pictures)) + f"<div>{''.join(tables)}</div>", "pair")


def _benchmarks(results: Sequence[Result]) -> str:
    """Each suite: the results side by side where they scored the same solutions, and all numbers of each."""
    parts = []
    for suite in dict.fromkeys(suite for result in results for suite in result.values["suites"]):
        group = [result for result in results if suite in result.values["suites"]]
        tables = {result.name: _suite(result.values["suites"][suite]) for result in group}
        if len(group) > 1 and len({result.solutions[suite] for result in group}) == 1:
            parts.append(f"<h3>{escape(suite)}</h3>{_side_by_side(group, suite)}")
            parts += [details(f"{name}: all of {suite}", table) for name, table in tables.items()]
        else:
            parts += [f"<h3>{escape(name)}: {escape(suite)}</h3>{table}" for name, table in tables.items()]
    return section("Benchmarks of judging", "".join(parts))


def _side_by_side(results: Sequence[Result], suite: str) -> str:
    """The metric of a suite, with its interval, for each result."""
    suites = [result.values["suites"][suite] for result in results]
    columns = [{label: _measured(found["metric"], values) for label, values in _parts(found)} for found in suites]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    return html_table([_words(suites[0]["metric"]), *(result.name for result in results)], rows)


def _measured(metric: str, values: dict[str, Any]) -> str:
    return "–" if values[metric] is None else f"{percent(values[metric])} ({_interval(values)})"


def _interval(values: dict[str, Any]) -> str:
    """An interval in percent, which does without the signs."""
    return "–" if values["low"] is None else f"{100 * values['low']:.1f} to {100 * values['high']:.1f}"


def _parts(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Averages and subsets of a suite with their names."""
    averages = [(f"average, {name}", values) for name, values in found["averages"].items()]
    return averages + list(found["subsets"].items())


def _suite(found: dict[str, Any]) -> str:
    metric, main, parts = found["metric"], found["main"], _parts(found)
    others = list(dict.fromkeys(key for _, values in parts for key in values if key not in (metric, "low", "high")))
    rows = [
        [
            name,
            percent(values[metric]),
            _interval(values),
            *(_value(key, values.get(key)) for key in others),
        ]
        for name, values in parts
    ]
    head = ["", _words(metric), "95 % interval", *map(_words, others)]
    words = [
        f"Data: {', '.join(found['sources'])}, scored in {found['seconds']:,.1f} seconds.",
        f"Threshold {found['threshold']:g}; what counts is the average {main!r}.",
    ]
    tuned = found["tuned"]
    if tuned and tuned["threshold"] is not None:
        words.append(
            f"Threshold {tuned['threshold']:.3g}, the best on {tuned['num_validation']:,} other solutions, gives "
            f"{percent(tuned['rest'])} on the {tuned['num_rest']:,} left, where {found['threshold']:g} gives "
            f"{percent(tuned['rest_untuned'])}."
        )
    steps = found["steps"]
    words += [f"{key.upper()} of all labelled steps: {steps[key]:.3f}." for key in ("auroc", "ece") if key in steps]
    return html_table(head, rows) + f'<p class="quiet">{escape(" ".join(words))}</p>'


def _value(key: str, value: float | None) -> str:
    return f"{value:,.0f}" if key.startswith("num_") and value is not None else percent(value)


def _cost(results: Sequence[Result]) -> str:
    """Seconds, tokens and calls of policy and scorer. What a run has none of is a dash."""
    columns = [
        _flat({key: value for key, value in (result.values.get("cost") or {}).items() if value}) for result in results
    ]
    rows = _rows(columns)
    if not rows:
        return ""
    rows.append(["all seconds", *(_number(_total(column)) for column in columns)])
    table = html_table(["", *(result.name for result in results)], rows)
    return section("Cost", table + "".join(map(_cost_of_each_n, results)))


def _total(column: dict[str, Any]) -> float | None:
    """Seconds of all parts. Not known if those of one are not: of samples whose run was killed once."""
    seconds = [value for name, value in column.items() if "seconds" in name]
    return None if None in seconds else sum(seconds)


def _cost_of_each_n(result: Result) -> str:
    """A search is another one for each N, and its points hold what each cost beside their accuracies."""
    tables = []
    for curve in result.values["curves"].values():
        columns = [{name: value for name, value in point.items() if name not in POINT} for point in curve]
        if any(columns):
            table = html_table(["", *(f"N = {point['n']}" for point in curve)], _rows(columns))
            tables.append(details(f"{result.name}: cost of each N", table))
    return "".join(tables)


def _left_out(results: Sequence[Result]) -> str:
    columns = []
    for result in results:
        if result.kind == "selection":
            found = {"": result.values["counts"], "solutions ": result.values.get("solutions", {})}
        else:
            found = {f"{suite}, ": values["counts"] for suite, values in result.values["suites"].items()}
        columns.append({prefix + name: number for prefix, counts in found.items() for name, number in counts.items()})
    return section(
        "What was counted and left out", html_table(["", *(result.name for result in results)], _rows(columns))
    )


def _rows(columns: Sequence[dict[str, float]]) -> list[list[str]]:
    """Rows of a table from its columns, with a dash where one has no such number."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [[_words(name), *(_number(column.get(name)) for column in columns)] for name in names]


def _settings(results: Sequence[Result]) -> str:
    """Settings and versions side by side. Lines that differ between results of one kind are marked."""
    keys = ("strategy", "reward_model", "policy", "settings", "seed", "versions", "date")
    columns = [
        {name: _shown(value) for name, value in _flat({k: result.values.get(k) for k in keys}).items()}
        for result in results
    ]
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = [(name, [column.get(name, "–") for column in columns]) for name in names]
    rows = [[name, *values] for name, values in lines]
    kinds = [[i for i, result in enumerate(results) if result.kind == kind] for kind in ("selection", "benchmark")]
    differ = {
        number
        for number, (_, values) in enumerate(lines)
        if any(len({values[i] for i in columns}) > 1 for columns in kinds)
    }
    table = html_table(["", *(result.name for result in results)], rows, differ, "settings")
    note = '<p class="quiet">Marked lines differ between results of one kind.</p>' if differ else ""
    return section("Settings and versions", table + note)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with the names joined."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
