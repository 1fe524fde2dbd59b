"""Compute the results of a benchmark from step scores: metrics, intervals, and a threshold tuned on held-out problems."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.problems import group_equal, problem_key, problem_split
from ...intervals import bootstrap_sums, percentile_interval
from ...pages.page import Table
from ...scoring.generative_scorer import format_judge_cost
from ...step_metrics import step_metrics
from ...terminal import one_line
from .suite import Solution, Suite


INTERVALS = {  # saved in `results.json`
    "confidence": 0.95,
    "method": "Bayesian bootstrap over problems with Jeffreys' prior on the accuracy of each kind",
}
NUM_SHOWN = 5  # maximum number of solutions listed by `format_results`


def measure(
    suite: Suite,
    solutions: Sequence[Solution],
    scores: Sequence[Sequence[float] | None],
    threshold: float = 0.5,
    validation_size: float = 0.2,
    seed: int = 42,
    num_unjudged: int = 0,
) -> dict[str, Any]:
    """
    Measure how well step scores find the wrong steps of a suite.

    Args:
        suite ([`Suite`]):
            Suite to evaluate.
        solutions (`Sequence[Solution]`):
            Solutions of the suite.
        scores (`Sequence[Sequence[float] | None]`):
            Step scores of each solution in `[0, 1]`. `None` for solutions that could not be scored, which only count
            in `num_not_scored`.
        threshold (`float`, *optional*, defaults to `0.5`):
            Steps with a score below the threshold are classified as wrong.
        validation_size (`float`, *optional*, defaults to `0.2`):
            Share of problems used to tune the threshold. With 0, it is not tuned.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the validation split and of the intervals.
        num_unjudged (`int`, *optional*, defaults to `0`):
            Number of solutions without scores that are not too long, but without a readable verdict of a judge.

    Returns:
        `dict[str, Any]`: A dictionary with the keys

        - `metric`, `main`: names of the main metric and of the main average.
        - `subsets`, `averages`: metrics of each subset and average, `None` if undefined, with the bounds `low` and
          `high` of the 95 % interval of `metric`. See [`~intervals.bootstrap_sums`].
        - `threshold`: the given threshold.
        - `tuned`: results with the tuned threshold. See [`tune`].
        - `steps`: [`step_metrics`] of all labelled steps at the given threshold.
        - `counts`: numbers of solutions, of scored solutions, of solutions that were too long, and of solutions without a
          readable verdict of a judge.
        - `too_long`: subset, id and location of each solution that was not scored. A subset counts them as `num_not_scored`.

    Raises:
        `ValueError`: If an option is out of range or no solution was scored.
    """
    check_options(threshold, validation_size)
    pairs = list(zip(solutions, scores, strict=True))
    scored = [(solution, values) for solution, values in pairs if values is not None]
    too_long = [solution for solution, values in pairs if values is None]
    if not scored and num_unjudged:
        raise ValueError(
            f"{suite.name}: none of the {len(pairs)} solutions has a readable verdict of the judge for every step. Look at its responses, in "
            "the log of the judge. If they are cut off, set a higher `judge_max_tokens`. If they have another form, use another template."
        )
    if not scored:
        raise ValueError(
            f"{suite.name}: all {len(pairs)} solutions have more tokens than the model supports. Use a model with more positions."
        )
    subsets = list(dict.fromkeys(one.subset for one in solutions))  # also subsets without a scored solution
    tallies = _tallies(suite, scored, threshold, subsets)
    metrics = suite.summarize({name: values.sum(axis=0) for name, values in tallies.items()})
    drawn = {
        kind: suite.summarize(bootstrap_sums(tallies, suite.outcomes, seed, shared=kind == "averages"))[kind]
        for kind in metrics
    }
    for kind, parts in metrics.items():
        for name, found in parts.items():
            low, high = percentile_interval(found[suite.metric], drawn[kind][name][suite.metric])
            numbers = {key: int(value) if key.startswith("num_") else _number(value) for key, value in found.items()}
            parts[name] = numbers | {"low": low, "high": high}
    for name, part in metrics["subsets"].items():
        part["num_not_scored"] = sum(one.subset == name for one in too_long)
    labelled = [
        (score, label)
        for solution, values in scored
        for score, label in zip(values, solution.labels, strict=True)
        if label is not None
    ]
    return {
        "metric": suite.metric,
        "main": suite.main,
        "threshold": threshold,
        **metrics,
        "tuned": tune(suite, scored, threshold, validation_size, seed) if validation_size else None,
        "steps": step_metrics(*np.array(labelled, dtype=float).T, threshold),
        "counts": {
            "num_solutions": len(pairs),
            "num_scored": len(scored),
            "num_too_long": len(too_long) - num_unjudged,
            **({"num_without_verdict": num_unjudged} if num_unjudged else {}),
        },
        "too_long": [{"subset": one.subset, "id": one.id, "where": one.where} for one in too_long],
    }


def check_options(threshold: float, validation_size: float) -> None:
    """Raise `ValueError` if an option of [`measure`] is out of range."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` is {threshold}. It must be a number from 0 to 1.")
    if not 0 <= validation_size < 1:
        raise ValueError(f"`validation_size` is {validation_size}. It must be at least 0 and below 1.")


def tune(
    suite: Suite,
    scored: Sequence[tuple[Solution, Sequence[float]]],
    threshold: float,
    validation_size: float,
    seed: int,
) -> dict[str, Any]:
    """
    Tune the threshold on a validation split, and measure it on the rest.

    The candidates are `threshold` and the percentiles of the validation scores. The one with the highest main average
    of the main metric wins. Ties go to the candidate nearest to `threshold`, then to the smallest. All solutions of a
    problem are in the same split.

    Returns:
        `dict[str, Any]`: The best `threshold`, its main result on the `validation` split and on the `rest`, the result
        of the given threshold on the rest (`rest_untuned`), and the numbers of solutions. All but the numbers are
        `None` if the metric is undefined on the validation split.
    """
    parts: dict[str, list] = {"test": [], "train": []}
    for solution, values in scored:
        parts[problem_split(solution.origin, validation_size, seed)].append((solution, values))
    validation, rest = parts["test"], parts["train"]
    numbers = {"num_validation": len(validation), "num_rest": len(rest)}
    steps = [score for _, values in validation for score in values]
    tried = {threshold, *np.percentile(steps, range(1, 100)).tolist()} if steps else ()
    found = {one: _main(suite, validation, one) for one in sorted(tried)}
    found = {one: value for one, value in found.items() if not math.isnan(value)}
    if not found:
        return dict.fromkeys(("threshold", "validation", "rest", "rest_untuned")) | numbers
    best = max(found, key=lambda one: (found[one], -abs(one - threshold)))
    return {
        "threshold": best,
        "validation": found[best],
        "rest": _number(_main(suite, rest, best)),
        "rest_untuned": _number(_main(suite, rest, threshold)),
        **numbers,
    }


def _main(suite: Suite, scored: Sequence[tuple[Solution, Sequence[float]]], threshold: float) -> float:
    if not scored:
        return math.nan
    subsets = dict.fromkeys(solution.subset for solution, _ in scored)
    sums = {name: values.sum(axis=0) for name, values in _tallies(suite, scored, threshold, subsets).items()}
    return float(suite.summarize(sums)["averages"][suite.main][suite.metric])


def _tallies(
    suite: Suite,
    scored: Sequence[tuple[Solution, Sequence[float]]],
    threshold: float,
    subsets: Sequence[str],
) -> dict[str, np.ndarray]:
    """Return the tallies of each subset, summed per problem. Shape `(problems, 4)`."""
    problems = group_equal(problem_key(solution.origin) for solution, _ in scored)
    tallies = {name: np.zeros((len(problems), 4)) for name in subsets}
    for row, members in enumerate(problems):
        for i in members:
            solution, values = scored[i]
            tallies[solution.subset][row] += suite.tally(solution, values, threshold)
    return tallies


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


def format_results(name: str, results: dict[str, Any]) -> str:
    """Return a text with the results of a suite: a table in percent, followed by remarks."""
    metric = results["metric"]
    columns = list(dict.fromkeys(key for part in results["subsets"].values() for key in part))
    others = [key for key in columns if key not in (metric, "low", "high")]
    cells = [[name, metric, "95 %", *others]]
    for kind in ("subsets", "averages"):
        for part, values in results[kind].items():
            label = one_line(part, 60) if kind == "subsets" else f"= {part}"
            interval = "-" if values["low"] is None else f"{_percent(values['low'])}–{_percent(values['high'])}"
            cells.append([label, _percent(values[metric]), interval])
            for key in others:
                is_number = key.startswith("num_") and values.get(key) is not None
                cells[-1].append(f"{values[key]:,.0f}" if is_number else _percent(values.get(key)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    counts, tuned, steps = results["counts"], results["tuned"], results["steps"]
    lines = [
        *table,
        f"threshold {results['threshold']:g}; {counts['num_scored']:,} of {counts['num_solutions']:,} solutions scored, "
        f"{counts['num_too_long']:,} dropped because they are too long for the model",
    ]
    if "cost" in results:
        cost = {name.removeprefix("judge_"): value for name, value in results["cost"].items()}
        lines.append(format_judge_cost(cost))
    passed_over = [
        name for name in counts if name not in ("num_solutions", "num_scored", "num_too_long") and counts[name]
    ]
    if passed_over:
        lines.append("counted: " + ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in passed_over))
    if results["too_long"]:
        places = [one["where"] for one in results["too_long"]]
        more = f" and {len(places) - NUM_SHOWN:,} more" if len(places) > NUM_SHOWN else ""
        reason = "not scored" if counts.get("num_without_verdict") else "too long"
        lines.append(one_line(f"{reason}: {', '.join(places[:NUM_SHOWN])}{more}"))
    undefined = [one_line(name, 60) for name, part in results["subsets"].items() if part[results["metric"]] is None]
    if undefined:
        lines.append(
            f"undefined for {', '.join(undefined)}: there are too few scored rows, or only rows with or without errors"
        )
    if "auroc" in steps:
        lines.append(f"all {steps['num_steps']:,} labelled steps: AUROC {steps['auroc']:.3f}, ECE {steps['ece']:.3f}")
    if tuned and tuned["threshold"] is None:
        lines.append(
            f"threshold not tuned: the metric is undefined on the {tuned['num_validation']:,} validation solutions"
        )
    elif tuned:
        lines.append(
            f"threshold {tuned['threshold']:.3g}, the best on {tuned['num_validation']:,} validation solutions "
            f"({_percent(tuned['validation'])}), gives {_percent(tuned['rest'])} on the other {tuned['num_rest']:,}, "
            f"where {results['threshold']:g} gives {_percent(tuned['rest_untuned'])}"
        )
    return "\n".join(lines)


def format_comparison(results: dict[str, dict[str, dict[str, Any]]], markdown: bool = False) -> str:
    """
    Return a table that compares reward models: the main metric of each suite in percent, with its 95 % interval, and the AUROC
    over its labelled steps.

    Args:
        results (`dict[str, dict[str, dict[str, Any]]]`):
            For each reward model, the results of [`measure`] for each suite.
        markdown (`bool`, *optional*, defaults to `False`):
            Whether to return a Markdown table instead of text columns.
    """
    suites = next(iter(results.values()))
    header = ["reward model"]
    for name, one in suites.items():
        header += [f"{name} {one['main']} {one['metric']}", "95 %", "AUROC", "not scored"]
    cells = [header]
    for model, found in results.items():
        cells.append([one_line(model, 60)])
        for one in found.values():
            main = one["averages"][one["main"]]
            interval = "-" if main["low"] is None else f"{_percent(main['low'])}–{_percent(main['high'])}"
            auroc = f"{one['steps']['auroc']:.3f}" if "auroc" in one["steps"] else "-"
            cells[-1] += [_percent(main[one["metric"]]), interval, auroc, f"{len(one['too_long']):,}"]
    if markdown:
        return Table(cells[0], cells[1:]).markdown()
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
