"""
Accuracy of a policy without a reward model: greedy decoding, pass@N and majority vote, and the paired difference of two policies on
the same problems.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..intervals import difference_interval
from ..io import replacing, write_json
from ..pages.numbers import percent, points_between
from ..pages.page import Table, markdown
from ..pages.pictures import MARKERS, Picture, Theme, band_picture, draw, legend, shown_label
from ..search.outcomes import describe_outcomes
from ..terminal import one_line
from .best_of_n import collect_results
from .curves import NUM_DRAWS, ScoredProblem, curve_with_gap, make_curves
from .results import Results
from .saved_results import curve_label


if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLES, GREEDY = "samples", "greedy"  # run folders of the solutions, in the folder of the results
PICTURE = "accuracy.png"
COMPARISON = ("comparison.md", "comparison.json", "comparison.png")  # of several policies
LOST = {
    "error": "failed requests",
    "prompt_too_long": "a prompt that is too long",
}  # problems without solutions, by status


@dataclass(frozen=True)
class PolicyResults:
    """
    Results of one policy.

    Args:
        policy (`str`):
            Path or Hub id of the policy.
        name (`str`):
            Short name of the policy for tables and pictures.
        results ([`~evaluation.results.Results`]):
            Results of the samples. The curve `greedy` has one point.
        greedy_solutions (`dict[str, int]`):
            Number of greedy solutions by outcome. See [`~search.outcomes.count_outcomes`].
        values (`dict[str, dict[str, float]]`):
            For each problem whose solutions are all graded, its value of each measure, in `[0, 1]`. See [`measures`].
    """

    policy: str
    name: str
    results: Results
    greedy_solutions: dict[str, int]
    values: dict[str, dict[str, float]]


def collect_policy(
    policy: str,
    folder: Path,
    sample_parts: Sequence[Path],
    greedy_parts: Sequence[Path],
    settings: dict[str, Any],
    n: Sequence[int],
    seed: int,
) -> PolicyResults:
    """
    Compute the results of a policy from its graded solutions. [`~evaluation.best_of_n.finish_results`] writes them.

    Args:
        policy (`str`):
            Path or Hub id of the policy.
        folder (`Path`):
            Folder of the results, with the run folders `samples` and `greedy`.
        sample_parts (`Sequence[Path]`), greedy_parts (`Sequence[Path]`):
            Files of the finished parts. See [`~evaluation.best_of_n.wait_for_parts`].
        settings (`dict[str, Any]`):
            Settings that affect the numbers, saved in the results.
        n (`Sequence[int]`):
            Numbers of solutions, at most the number of samples of a problem.
        seed (`int`):
            Seed of the subsets of samples that vote. See [`make_curves`].

    Raises:
        `ValueError`: If no graded problem is left.
    """
    shared = {
        "reward_model": None,
        "settings": settings,
        "aggregates": (),
        "num_draws": NUM_DRAWS,
        "seed": seed,
        "counts": Counter(),
        "sampled": True,
        "strategy": "evaluate",
    }
    results, samples = collect_results(folder, sample_parts, folder / SAMPLES, n=n, **shared)
    greedy, decoded = collect_results(folder / GREEDY, greedy_parts, folder / GREEDY, n=[1], **shared)
    results.curves = {"greedy": greedy.curves["pass_at_n"], **results.curves}
    if "majority_vote" not in results.curves:  # no solution has an answer, so all are wrong
        wrong = np.zeros((len(results.n), results.num_problems))
        results.curves["majority_vote"], _ = curve_with_gap("majority_vote", wrong, results.n)
    results.counts |= {f"greedy_{name}": count for name, count in greedy.counts.items()}
    results.warnings += [f"Greedy decoding: {warning}" for warning in greedy.warnings]
    results.warnings += [*_lost_problems("samples", results), *_lost_problems("a greedy solution", greedy)]
    first, second = results.cost["policy"], greedy.cost["policy"]
    results.cost = {
        "policy": {key: None if None in (first[key], second[key]) else first[key] + second[key] for key in first},
        "rest_seconds": results.cost["rest_seconds"] + greedy.cost["rest_seconds"],
    }
    name = Path(policy).resolve().name if Path(policy).is_dir() else policy
    values = problem_values(samples, decoded, n, seed)
    return PolicyResults(policy, one_line(name, 40), results, greedy.solutions, values)


def _lost_problems(kind: str, results: Results) -> list[str]:
    """Return a warning if problems have no solutions, and are therefore missing in the accuracies."""
    lost = {reason: results.counts.get(f"problems_{status}") for status, reason in LOST.items()}
    if not any(lost.values()):
        return []
    reasons = ", ".join(f"{count:,} with {reason}" for reason, count in lost.items() if count)
    warning = f"{sum(filter(None, lost.values())):,} problems without {kind} do not count: {reasons}."
    if results.counts.get("problems_error"):
        warning += " Run the same command with --overwrite to retry failed requests. Finished samples are kept."
    return [warning]


def measures(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Mapping[str, float]]:
    """
    Return the points of the curves `greedy`, `pass_at_n` (from N = 1) and `majority_vote` by the names of the measures, such as
    `pass@1` and `majority@8`. A majority of one solution is that solution, so only `pass@1` is returned for N = 1.
    """
    found = {"greedy": curves["greedy"][0], "pass@1": curves["pass_at_n"][0]}
    for curve, name in (("majority_vote", "majority"), ("pass_at_n", "pass")):
        found |= {f"{name}@{point['n']}": point for point in curves.get(curve, ()) if point["n"] > 1}
    return found


def problem_values(
    samples: Sequence[ScoredProblem], greedy: Sequence[ScoredProblem], n: Sequence[int], seed: int
) -> dict[str, dict[str, float]]:
    """
    Return the value of each measure for each problem, without problems in which a sample or the greedy solution has no grade.

    Args:
        samples (`Sequence[ScoredProblem]`):
            Problems with their samples.
        greedy (`Sequence[ScoredProblem]`):
            Problems with one greedy solution each.
        n, seed:
            See [`collect_policy`].
    """
    decoded = {problem.problem_id: problem.correct[0] for problem in greedy}
    values = {}
    for problem in samples:
        if decoded.get(problem.problem_id) is None or None in problem.correct:
            continue
        curves = make_curves([problem], n, seed=seed).curves
        if "majority_vote" not in curves:  # no solution has an answer
            curves["majority_vote"] = [{"n": number, "accuracy": 0.0} for number in sorted(set(n))]
        curves["greedy"] = [{"n": 1, "accuracy": float(decoded[problem.problem_id])}]
        values[problem.problem_id] = {name: point["accuracy"] for name, point in measures(curves).items()}
    return values


def compare_policies(first: PolicyResults, other: PolicyResults) -> dict[str, Any]:
    """
    Return the differences `other - first` of all measures, over the problems that are graded for both.

    Returns:
        `dict[str, Any]`: `num_problems`, and `differences` with the `difference` of each measure in `[-1, 1]` and the bounds `low` and
        `high` of its 95 % interval. See [`~intervals.difference_interval`]. Without a common problem, `differences` is empty.
    """
    common = [problem_id for problem_id in first.values if problem_id in other.values]
    differences = {}
    for name in measures(first.results.curves) if common else ():
        paired = np.array([other.values[one][name] - first.values[one][name] for one in common])
        low, high = difference_interval(paired)
        differences[name] = {"difference": float(paired.mean()), "low": low, "high": high}
    return {"num_problems": len(common), "differences": differences}


def comparison_of(policies: Sequence[PolicyResults]) -> dict[str, Any]:
    """Return the differences of all policies to the first one: the content of `comparison.json`. See [`compare_policies`]."""
    first, *others = policies
    return {"first": first.policy, "policies": {one.policy: compare_policies(first, one) for one in others}}


def format_policies(
    policies: Sequence[PolicyResults], comparison: Mapping[str, Any] | None = None, markdown: bool = False
) -> str:
    """
    Return a table with the accuracy of each policy and, for several policies, the differences to the first one. Numbers are in percent
    and in percentage points, with 95 % intervals.

    Args:
        policies (`Sequence[PolicyResults]`):
            Results of the policies.
        comparison (`Mapping[str, Any]`, *optional*):
            See [`comparison_of`].
        markdown (`bool`, *optional*, defaults to `False`):
            Whether to return a Markdown table instead of text columns.
    """
    compared = list(comparison["policies"].values()) if comparison else []
    columns = [
        {name: _cell(point, "accuracy") for name, point in measures(one.results.curves).items()} for one in policies
    ]
    head = ["accuracy, %", *(one.name for one in policies)]
    for one, found in zip(policies[1:], compared, strict=True):
        columns.append({name: _cell(point, "difference") for name, point in found["differences"].items()})
        head.append("difference" if len(compared) == 1 else f"difference of {one.name}")
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    if markdown:
        return Table(head, rows).markdown()
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in (head, *rows))


def _cell(point: Mapping[str, float], key: str) -> str:
    value = round(100 * point[key], 1) + 0.0  # no negative zero
    sign = "+" if key == "difference" and value else ""
    return f"{value:{sign}.1f} ({points_between(point['low'], point['high'])})".replace("-", "−")


def notes_of(policies: Sequence[PolicyResults], comparison: Mapping[str, Any] | None = None) -> list[str]:
    """Return lines with the numbers of problems and the outcomes of the solutions of each policy, and all warnings."""
    lines = []
    for one in policies:
        name = "" if len(policies) == 1 else f"{one.name}: "
        lines.append(f"{name}{one.results.num_problems:,} problems, {describe_outcomes(one.results.solutions)}")
        lines.append(f"{name}greedy decoding, {describe_outcomes(one.greedy_solutions)}")
        lines += [f"warning: {name}{one_line(warning)}" for warning in one.results.warnings]
    for one, found in zip(policies[1:], comparison["policies"].values() if comparison else (), strict=True):
        total = max(policies[0].results.num_problems, one.results.num_problems)
        lines.append(
            f"{one.name}: the difference to {policies[0].name} is over the {found['num_problems']:,} of {total:,} problems in which all "
            "solutions of both are graded"
        )
    return lines


def write_curves(policy: PolicyResults, path: Path) -> None:
    """Draw pass@N and majority vote over N, with greedy decoding as a baseline."""
    found = policy.results.curves
    curves = [(curve_label(key), found[key]) for key in ("pass_at_n", "majority_vote") if key in found]
    title = "Accuracy over the number of solutions N, with 95 % intervals"
    greedy = [{**found["greedy"][0], "n": n} for n in policy.results.n]  # a line over all N
    picture = band_picture(path.stem, title, curves, [(curve_label("greedy"), greedy)])
    with replacing(path, "wb") as file:
        file.write(picture.images["light"])


def write_comparison(policies: Sequence[PolicyResults], comparison: dict[str, Any], folder: Path) -> None:
    """Write `comparison.png`, `comparison.json` and `comparison.md`. See [`comparison_of`] and [`format_policies`]."""
    page, values, picture = COMPARISON
    with replacing(folder / picture, "wb") as file:
        file.write(comparison_picture(policies).images["light"])
    write_json(folder / values, comparison)
    table = format_policies(policies, comparison, markdown=True)
    notes = "\n".join(f"- {markdown(note)}" for note in notes_of(policies, comparison))
    with replacing(folder / page) as file:
        file.write(f"# Comparison of policies\n\n{table}\n\n![Accuracy of each policy]({picture})\n\n{notes}\n")


def comparison_picture(policies: Sequence[PolicyResults]) -> Picture:
    """Draw the accuracy of each policy with its interval: greedy decoding, pass@1, and both curves at the largest N."""
    points = [measures(one.results.curves) for one in policies]
    largest = max(point["n"] for point in points[0].values())
    names = [name for name, point in points[0].items() if name in ("greedy", "pass@1") or point["n"] == largest]

    def paint(axes: "Axes", theme: Theme) -> None:
        for number, (one, found) in enumerate(zip(policies, points, strict=True)):
            shown = [(i, found[name]) for i, name in enumerate(names) if name in found]
            places = [i + 0.5 * ((number + 0.5) / len(policies) - 0.5) for i, _ in shown]
            values = [100 * point["accuracy"] for _, point in shown]
            lengths = [
                [100 * abs(point["accuracy"] - point[bound]) for _, point in shown] for bound in ("low", "high")
            ]
            style = {"color": theme.curves[number % len(theme.curves)], "marker": MARKERS[number % len(MARKERS)]}
            axes.errorbar(places, values, lengths, linestyle="none", capsize=3, label=shown_label(one.name), **style)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylim(-2, 102)
        axes.set_ylabel("accuracy, %")
        legend(axes, theme)

    texts = []
    for one, found in zip(policies, points, strict=True):
        values = [f"{name} {percent(point['accuracy'])}" for name, point in found.items() if name in names]
        texts.append(f"{one.name}: {', '.join(values)}")
    return draw(
        "comparison",
        "Accuracy of each policy, with 95 % intervals",
        "; ".join(texts),
        paint,
        2.75 + 0.17 * len(policies),
    )
