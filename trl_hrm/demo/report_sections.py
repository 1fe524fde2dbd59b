"""The sections of the demo's report on choosing and scoring: a sentence on what is seen, pictures and tables."""

import statistics
from collections.abc import Sequence
from typing import Any

from ..evaluation.hacking import percent, points_between
from ..evaluation.report_page import ANSWERS, details, html_table
from ..evaluation.report_pictures import Picture
from .hacking import WAYS, beside_curves, fall_of, titles
from .over_seeds import interval, signed
from .report_parts import beside, grid, note, numbers, paragraph, shares
from .report_pictures import KINDS, band_words, calibration_name, scored_title, shown_mean


def accuracy(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    names, n = titles(data), data["n"]
    head = ["", *(f"N = {number}" for number in n)]
    plain = [[label, *(percent(point["accuracy"]) for point in curve)] for label, curve in beside_curves(data)]
    tables, each = [], []
    for way, words in WAYS.items():
        models = data[way]["models"]
        rows = [[names[model["name"]], *map(shares, zip(*model["accuracy"], strict=True))] for model in models]
        tables.append(f"<h3>By {words}</h3>{html_table(head, rows + plain)}")
        each += [
            [f"{names[model['name']]}, {words}, seed {seed}", *_with_intervals(values, intervals)]
            for model in models
            for seed, values, intervals in zip(model["seeds"], model["accuracy"], model["interval"], strict=True)
        ]
    n_last = n[-1]
    lasts = [
        f"{names[model['name']]} by {WAYS[way]} {percent(statistics.fmean(one[-1] for one in model['accuracy']))}"
        for way in WAYS
        for model in data[way]["models"]
    ]
    return (
        paragraph(f"At N = {n_last}: {'; '.join(lasts)}; majority vote {plain[0][-1]}, pass@N {plain[1][-1]}.")
        + grid(pictures)
        + "".join(tables)
        + note(
            f"Best-of-N chooses one of N whole solutions by an aggregate of the scores of its steps ({_aggregates(data)}); step search "
            " keeps the best of N next steps, which is what the HRM paper calls best-of-N for PRM and HRM. "
            f"{band_words(data)} In brackets: the lowest and the highest seed."
        )
        + details("Each seed, with 95 % intervals over problems", html_table(head, each))
    )


def _aggregates(data: dict[str, Any]) -> str:
    names, used = titles(data), data["best_of_n"]["aggregate"]
    words = {"min": "the lowest", "last": "the last"}
    return "; ".join(
        f"{words[one]} for {', '.join(names[name] for name, its in used.items() if its == one)}"
        for one in dict.fromkeys(used.values())
    )


def _with_intervals(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> list[str]:
    return [
        f"{percent(value)} ({100 * low:.1f} to {100 * high:.1f})"
        for value, (low, high) in zip(values, intervals, strict=True)
    ]


def gap(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    names, n, rows, each, lost = titles(data), data["n"], [], [], []
    for way, words in WAYS.items():
        for model in data[way]["models"]:
            fall, name, verdicts = fall_of(model, n), f"{names[model['name']]}, {words}", model["verdicts"]
            lost.append(fall.spread)
            counts = [str(verdicts.count(answer)) for answer in ANSWERS]
            rows.append([name, signed(100 * fall.spread.mean), interval(fall.spread), str(fall.best_n), *counts])
            each += [
                [
                    f"{name}, seed {seed}",
                    signed(100 * size),
                    points_between(low, high),
                    str(best),
                    str(last),
                    ANSWERS[verdict],
                ]
                for seed, (size, low, high, best, last), verdict in zip(
                    model["seeds"], model["gap"], verdicts, strict=True
                )
            ]
    settled = [one for one in lost if one.is_settled]
    words = "No curve has an interval over seeds: each model is judged by its own interval over problems, below."
    if settled:
        number = sum(one.low > 0 for one in settled)
        words = f"{number} of {len(settled)} curves fall beyond their best N by more than seeds explain."
    head = [
        "",
        f"points lost to N = {n[-1]}",
        "95 % over seeds",
        "from N =",
        *(f"seeds: {word}" for word in ANSWERS.values()),
    ]
    explained = (
        "Lost: mean accuracy at the best smaller N minus that at the largest, the same two N for all seeds; below 0 is a rise. The best "
        "N is chosen on the same problems, which makes small losses look larger than they are. In the picture: a small mark for each "
        "seed, a large one for the mean, a bar for its 95 % interval. In the table each seed is judged by its own loss from its own best "
        "smaller N: no sign where the interval over problems rules out a loss of 5 points or more, hacked where it does not and lies above 0."
    )
    of_seeds = html_table(["", "points lost", "95 % over problems", "from N =", "to N =", ""], each)
    return (
        beside(pictures, paragraph(words) + note(explained))
        + html_table(head, rows)
        + details("The loss of each seed", of_seeds)
    )


def wrong_prefix(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    found = data["wrong_prefix"]
    rows = [[scored_title(one), *map(shares, zip(*one["accuracy"], strict=True))] for one in found["models"]]
    ends = "; ".join(
        f"{scored_title(one)} {percent(statistics.fmean(accuracy[-1] for accuracy in one['accuracy']))}"
        for one in found["models"]
    )
    words = f"From {found['num_problems']:,} prefixes whose last step is wrong, at N = {found['n'][-1]}: {ends}."
    explained = (
        "A search from a clean start meets few errors where the reward model is good, and self-correction may not show. Pairs too: the higher of a step's own score "
        "and that of the pair that it ends."
    )
    table = html_table(["", *(f"N = {n}" for n in found["n"])], rows)
    return paragraph(words) + grid(pictures) + table + note(explained)


def step_kinds(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    found, kinds = data["step_kinds"], ("correction", "locally_right", "new_error")
    rows = [[scored_title(one), *(numbers(one[key]) for key in (*kinds, "auroc"))] for one in found]
    liked = [scored_title(one) for one in found if _likes_corrections(one)]
    words = (
        f"Score a correction above a locally right step that stays wrong, on average over seeds: {'; '.join(liked) or 'none'} "
        f"({len(liked)} of {len(found)})."
    )
    explained = (
        "After one wrong step: a correction takes it back; a locally right step calculates rightly from the wrong value; a new error is "
        "wrong once more. AUROC: corrections against the two others. Marks are means, bars go from the lowest seed to the "
        "highest."
    )
    table = html_table(["", *(KINDS[kind] for kind in kinds), "AUROC"], rows)
    return beside(pictures, paragraph(words) + note(explained)) + table


def _likes_corrections(one: dict[str, Any]) -> bool:
    return statistics.fmean(one["correction"]) > statistics.fmean(one["locally_right"])


def depth_cap(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    found, kinds = data["values_by_cap"], ("right", "first_error", "correction", "locally_right")
    rows = [
        [
            str(one["cap"]),
            *(f"{shown_mean(one[kind])} ({one[kind]['count']:,})" for kind in kinds),
            percent(one["unfinished"]),
            f"{one['num_problems']:,}",
        ]
        for one in found
    ]
    means = ", ".join(f"{shown_mean(one['correction'])} at cap {one['cap']}" for one in found)
    words = (
        f"Mean MC value of a correction: {means}. A solution has {data['solution_length']} steps, and a correction is one more, for "
        "which a tree that is cut off at that depth has no room."
    )
    head = ["depth cap", *(f"{KINDS[kind]} (steps)" for kind in kinds), "leaves without an answer", "problems"]
    return beside(pictures, paragraph(words)) + html_table(head, rows)


def calibration(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    tables = []
    for one in data["calibration"]:
        rows = [
            [
                f"{part['low']:g} to {part['high']:g}",
                f"{part['count']:,}",
                "–" if part["mean_score"] is None else f"{part['mean_score']:.3f}",
                percent(part["share_right"]),
            ]
            for part in one["bins"]
        ]
        title = f"{calibration_name(data, one)}: expected calibration error {one['ece']:.3f}"
        tables.append(details(title, html_table(["score", "solutions", "mean score", "right"], rows)))
    best = min(data["calibration"], key=lambda one: one["ece"])
    words = (
        f"The smallest expected calibration error is that of {calibration_name(data, best)}, {best['ece']:.3f}. A score is of use for "
        "ranking without meaning what it says: this is not about who chooses best."
    )
    return beside(pictures, paragraph(words) + "".join(tables))
