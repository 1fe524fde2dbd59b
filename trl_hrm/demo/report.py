"""
The demo's report: what was measured, in sections of words, tables and pictures.

The same sections are a page (`pages/templates/demo.html.jinja`) and, in Markdown, `docs/evidence.md`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.report import CHIPS, calibration_table
from ..pages.numbers import percent, points_between
from ..pages.page import Table, render, write_page
from ..pages.pictures import Picture
from .claims import (
    WAYS,
    accuracy_of,
    baseline_curves,
    claims,
    compared,
    fall_of,
    headlines,
    titles,
    vote_words,
)
from .over_seeds import MIN_SEEDS, interval, mean_number, mean_share, signed
from .report_pictures import (
    KINDS,
    REDUCTIONS,
    band_words,
    calibration_name,
    comparison_name,
    eta_name,
    make_pictures,
    run_name,
    scored_title,
    shown_mean,
    step_text,
)
from .world import SIGHT


@dataclass(frozen=True)
class Section:
    """
    A section of the report.

    Args:
        key (`str`):
            What links to it and its pictures are called.
        title (`str`):
            Its title.
        words (`str`):
            What was seen, in a sentence or two.
        tables (`list[tuple[str, Table]]`, *optional*):
            Tables with their captions, which may be empty.
        details (`list[tuple[str, Table]]`, *optional*):
            Tables that are shown on request, with their titles.
        note (`str`, *optional*, defaults to `""`):
            How to read it.
    """

    key: str
    title: str
    words: str
    tables: Sequence[tuple[str, Table]] = ()
    details: Sequence[tuple[str, Table]] = ()
    note: str = ""


def write_report(data: dict[str, Any], output: Path) -> list[Path]:
    """
    Write the report as a page that asks nothing of the network, and its pictures into a folder next to it.

    Args:
        data (`dict[str, Any]`):
            The measurements, as `report.json` of the demo holds them. Shares are from 0 to 1, and lists of seeds are parallel to
            the `seeds` next to them.
        output (`Path`):
            The page, by convention `report.html`; its pictures go to `report_files`.

    Returns:
        `list[Path]`: The files of the pictures.
    """
    pictures = make_pictures(data)
    return write_page(
        render_report(data, pictures), [picture for part in pictures.values() for picture in part], output
    )


def render_report(data: dict[str, Any], pictures: dict[str, list[Picture]]) -> str:
    """
    The report as a page. The same measurements give the same bytes.

    Args:
        data (`dict[str, Any]`):
            The measurements. See [`write_report`].
        pictures (`dict[str, list[Picture]]`):
            See [`make_pictures`].
    """
    found = claims(data)
    return render(
        "demo.html.jinja",
        data=data,
        pictures=pictures,
        num_seeds=max(len(model["seeds"]) for way in WAYS for model in data[way]["models"]),
        sight=SIGHT,
        min_seeds=MIN_SEEDS,
        headlines=headlines(data),
        ways=WAYS,
        chips=CHIPS | {"no": "stable"},
        bands=band_words(data),
        vote=vote_words(data),
        claims=found,
        answers={answer: sum(one.answer == answer for one in found) for answer in ("held", "not held", "open")},
        sections=sections(data),
    )


def sections(data: dict[str, Any]) -> list[Section]:
    """
    All sections after the claims.

    Args:
        data (`dict[str, Any]`):
            The measurements. See [`write_report`].

    Returns:
        `list[Section]`: In the order of the page.
    """
    return [
        accuracy_section(data),
        gap_section(data),
        wrong_prefix_section(data["wrong_prefix"]),
        step_kinds_section(data["step_kinds"]),
        depth_cap_section(data),
        calibration_section(data),
        self_training_section(data["self_training"]),
        eta_section(data["eta"], data["n"]),
        hnc_section(data["hnc"], titles(data)),
        tree_section(data["tree"]),
        made_section(data),
        cost_section(data),
        again_section(data),
    ]


def _over_n(numbers: Sequence[int], *titles: str) -> list[str]:
    """Head of a table with a column for each N."""
    return [*(titles or [""]), *(f"N = {n}" for n in numbers)]


def _shares(accuracy: Sequence[Sequence[float]]) -> list[str]:
    """A cell for each N, from one curve for each seed."""
    return [mean_share(values) for values in zip(*accuracy, strict=True)]


def _last(one: dict[str, Any]) -> float:
    """Mean accuracy over seeds at the largest N."""
    return statistics.fmean(accuracy[-1] for accuracy in one["accuracy"])


def accuracy_section(data: dict[str, Any]) -> Section:
    names, head = titles(data), _over_n(data["n"])
    plain = [[label, *(percent(point["accuracy"]) for point in curve)] for label, curve in baseline_curves(data)]
    tables, each, lasts = [], [], []
    for way, words in WAYS.items():
        rows = []
        for model in data[way]["models"]:
            title = names[model["name"]]
            rows.append([title, *_shares(model["accuracy"])])
            lasts.append(f"{title} by {words} {percent(_last(model))}")
            for seed, values, intervals in zip(model["seeds"], model["accuracy"], model["interval"], strict=True):
                cells = [
                    f"{percent(value)} ({100 * low:.1f} to {100 * high:.1f})"
                    for value, (low, high) in zip(values, intervals, strict=True)
                ]
                each.append([f"{title}, {words}, seed {seed}", *cells])
        tables.append((f"By {words}", Table(head, rows + plain)))
    used = data["best_of_n"]["aggregate"]
    aggregates = "; ".join(
        f"{ {'min': 'the lowest', 'last': 'the last'}[one] } for {', '.join(names[name] for name, its in used.items() if its == one)}"
        for one in dict.fromkeys(used.values())
    )
    return Section(
        "accuracy",
        "Accuracy over N",
        f"At N = {data['n'][-1]}: {'; '.join(lasts)}; majority vote {plain[0][-1]}, pass@N {plain[1][-1]}.",
        tables,
        [("Each seed, with 95 % intervals over problems", Table(head, each))],
        f"Best-of-N chooses one of N whole solutions by an aggregate of the scores of its steps ({aggregates}); step search "
        "keeps the best of N next steps, which is what the HRM paper calls best-of-N for PRM and HRM. "
        f"{band_words(data)} In brackets: the lowest and the highest seed.",
    )


def gap_section(data: dict[str, Any]) -> Section:
    names, n, rows, each, lost = titles(data), data["n"], [], [], []
    for way, words in WAYS.items():
        for model in data[way]["models"]:
            fall, name, verdicts = fall_of(model, n), f"{names[model['name']]}, {words}", model["verdicts"]
            lost.append(fall.spread)
            counts = [str(verdicts.count(answer)) for answer in CHIPS]
            rows.append([name, signed(100 * fall.spread.mean), interval(fall.spread), str(fall.best_n), *counts])
            for seed, (size, low, high, best, last), verdict in zip(
                model["seeds"], model["gap"], verdicts, strict=True
            ):
                ends = [signed(100 * size), points_between(low, high), str(best), str(last)]
                each.append([f"{name}, seed {seed}", *ends, CHIPS[verdict]])
    settled = [one for one in lost if one.is_settled]
    words = "No curve has an interval over seeds: each model is judged by its own interval over problems, below."
    if settled:
        number = sum(one.low > 0 for one in settled)
        words = f"{number} of {len(settled)} curves fall beyond their best N by more than seeds explain."
    head = ["", f"points lost to N = {n[-1]}", "95 % over seeds", "from N ="]
    return Section(
        "gap",
        "Hacking gap",
        words,
        [("", Table([*head, *(f"seeds: {word}" for word in CHIPS.values())], rows))],
        [
            (
                "The loss of each seed",
                Table(["", "points lost", "95 % over problems", "from N =", "to N =", ""], each),
            )
        ],
        "Lost: mean accuracy at the best smaller N minus that at the largest, the same two N for all seeds; below 0 is a rise. The "
        "best N is chosen on the same problems, which makes small losses look larger than they are. In the picture: a small mark for "
        "each seed, a large one for the mean, a bar for its 95 % interval. In the table each seed is judged by its own loss from its "
        "own best smaller N: no sign where the interval over problems rules out a loss of 5 points or more, hacked where it does not "
        "and lies above 0.",
    )


def wrong_prefix_section(found: dict[str, Any]) -> Section:
    ends = "; ".join(f"{scored_title(one)} {percent(_last(one))}" for one in found["models"])
    rows = [[scored_title(one), *_shares(one["accuracy"])] for one in found["models"]]
    return Section(
        "wrong-prefix",
        "Search from a wrong prefix",
        f"From {found['num_problems']:,} prefixes whose last step is wrong, at N = {found['n'][-1]}: {ends}.",
        [("", Table(_over_n(found["n"]), rows))],
        note="A search from a clean start meets few errors where the reward model is good, and self-correction may not show. Pairs too: "
        "the higher of a step's own score and that of the pair that it ends.",
    )


def step_kinds_section(found: Sequence[dict[str, Any]]) -> Section:
    kinds = ("correction", "locally_right", "new_error")
    liked = [
        scored_title(one)
        for one in found
        if statistics.fmean(one["correction"]) > statistics.fmean(one["locally_right"])
    ]
    rows = [[scored_title(one), *(mean_number(one[key]) for key in (*kinds, "auroc"))] for one in found]
    return Section(
        "step-kinds",
        "Scores after an error",
        f"Score a correction above a locally right step that stays wrong, on average over seeds: {'; '.join(liked) or 'none'} "
        f"({len(liked)} of {len(found)}).",
        [("", Table(["", *(KINDS[kind] for kind in kinds), "AUROC"], rows))],
        note="After one wrong step: a correction takes it back; a locally right step calculates rightly from the wrong value; a new "
        "error is wrong once more. AUROC: corrections against the two others. Marks are means, bars go from the lowest seed to the "
        "highest.",
    )


def depth_cap_section(data: dict[str, Any]) -> Section:
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
    head = ["depth cap", *(f"{KINDS[kind]} (steps)" for kind in kinds), "leaves without an answer", "problems"]
    return Section(
        "depth-cap",
        "Values by depth cap",
        f"Mean MC value of a correction: {means}. A solution has {data['solution_length']} steps, and a correction is one more, for "
        "which a tree that is cut off at that depth has no room.",
        [("", Table(head, rows))],
    )


def calibration_section(data: dict[str, Any]) -> Section:
    found = data["calibration"]
    best = min(found, key=lambda one: one["ece"])
    return Section(
        "calibration",
        "Calibration",
        f"The smallest expected calibration error is that of {calibration_name(data, best)}, {best['ece']:.3f}. A score is of use for "
        "ranking without meaning what it says: this is not about who chooses best.",
        details=[
            (
                f"{calibration_name(data, one)}: expected calibration error {one['ece']:.3f}",
                calibration_table(one["bins"]),
            )
            for one in found
        ],
    )


def self_training_section(found: dict[str, Any]) -> Section:
    settings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in found["runs"]:
        reduction = REDUCTIONS[run["kl_reduction"]] if run["kl_coef"] else ""
        settings.setdefault((run_name(run), reduction), []).append(run)
    reference = accuracy_of(found["reference_accuracy"])
    rows = [["before", "", "", "–", "–", percent(reference), f"{found['reference_accuracy']['num_samples']:,}"]]
    right = {setting: [accuracy_of(run["accuracy"]) for run in runs] for setting, runs in settings.items()}
    for setting, runs in settings.items():
        last = [run["curve"][-1] for run in runs]
        loss = mean_number([point["lm_loss"] for point in last], ".4f")
        kl = mean_number([point["kl"] for point in last], ".3g")
        samples = f"{sum(run['accuracy']['num_samples'] for run in runs):,}"
        rows.append([*setting, str(len(runs)), loss, kl, mean_share(right[setting]), samples])
    best = max(right, key=lambda setting: statistics.fmean(right[setting]))
    return Section(
        "lambda",
        "Self-training and λ",
        f"Trained on {found['num_trajectories']:,} of its own solutions of high value, {found['num_different']:,} of them different, "
        f"the policy goes from {percent(reference)} to {percent(statistics.fmean(right[best]))} right at most, with {best[0]}"
        f"{best[1] and f', KL {best[1]}'}.",
        [("", Table(["", "KL in the loss", "runs", "LM loss at the end", "KL at the end", "right", "samples"], rows))],
        note="Figure 4 of the HRM paper. Summed over a solution, as in the paper, KL stands against a language-model loss per token, so "
        "that the same λ brakes harder the longer solutions are; the mean over tokens puts both on one scale. KL is measured the same "
        "way in all, and drawn from the first step that has any. Of several runs: means, and from the lowest to the highest.",
    )


def eta_section(found: Sequence[dict[str, Any]], n: Sequence[int]) -> Section:
    found = sorted(found, key=lambda one: one["mean_label"])
    rows = [
        [eta_name(one), f"{one['mean_label']:.3f}", mean_number(one["auroc"], ".3f"), *_shares(one["accuracy"])]
        for one in found
    ]
    best = max(found, key=_last)
    return Section(
        "eta",
        "Entropy labels and η",
        f"The highest mean accuracy at N = {n[-1]}, {percent(_last(best))}, is that with these labels: {eta_name(best)}. "
        "Chosen by best-of-N. Whether it is above the others is judged among the claims.",
        [("", Table(_over_n(n, "labels", "mean label", "AUROC, first error"), rows))],
    )


def hnc_section(found: dict[str, Any] | None, names: dict[str, str]) -> Section:
    title = "Node compression (HNC)"
    if found is None:
        words = "Not measured in this profile: it takes several seeds. Run `trl-hrm demo --profile full`."
        return Section("hnc", title, words)
    rows, each, number = [], [], 0
    for one in found["comparisons"]:
        name, last = comparison_name(names, one), compared(one["difference"][-1])
        number += last.is_settled and last.low > 0
        points = [(signed(100 * point["mean"]), interval(compared(point))) for point in one["difference"]]
        rows.append([name, *(f"{mean} ({ends})" for mean, ends in points)])
        for i, seed in enumerate(found["seeds"]):
            each.append([f"{name}, seed {seed}", *(signed(100 * point["per_seed"][i]) for point in one["difference"])])
    trained = "; ".join(f"{names.get(name, name)} {count:,}" for name, count in found["rows"].items())
    return Section(
        "hnc",
        title,
        f"At N = {found['n'][-1]}, {number} of {len(found['comparisons'])} differences are above 0 by their interval over "
        f"{len(found['seeds'])} seeds. Trees trained on, where equal steps are one: {trained}.",
        [("", Table(_over_n(found["n"], "difference, points"), rows))],
        [("Each seed", Table(_over_n(found["n"], "points"), each))],
    )


def tree_section(tree: dict[str, Any]) -> Section:
    nodes = tree["nodes"]
    rows = [
        [
            str(i),
            "problem" if node["parent"] < 0 else str(node["parent"]),
            step_text(node),
            node["kind"].replace("_", " "),
            "–" if node["value"] is None else f"{node['value']:.2f}",
            f"{node['count']:,}",
            "–" if node["correct"] is None else "right" if node["correct"] else "wrong",
        ]
        for i, node in enumerate(nodes)
    ]
    number = sum(node["kind"] == "correction" for node in nodes)
    head = ["step", "after", "text", "kind", "value", "n", "answer"]
    return Section(
        "tree",
        "A search tree",
        f"{tree['problem']} {number} of {len(nodes)} steps shown take an error back.",
        details=[("The same as a table", Table(head, rows, style="words"))],
        note="In a box: the step, its mean MC value, and n, how often it was sampled there.",
    )


def made_section(data: dict[str, Any]) -> Section:
    datasets = [
        [one["name"], one["what"], f"{one['rows']:,}", f"{one['labels']:,}", f"{one['mean_label']:.3f}"]
        for one in data["datasets"]
    ]
    models = [
        [
            *(one["title"], one["labels"], one["data"], f"{one['rows']:,}", ", ".join(map(str, one["seeds"]))),
            *(mean_number(one["auroc"], ".3f"), mean_number(one["first_error_auroc"], ".3f")),
            mean_number(one["seconds"], ".1f"),
        ]
        for one in data["models"]
    ]
    problems, policy = data["problems"], data["policy"]
    sight = "never without a slip" if policy["sight"] is None else f"slips {policy['sight']:.1f} times as often"
    head = ["", "labels", "data", "rows", "seeds", "AUROC", "AUROC, first error", "seconds"]
    return Section(
        "made",
        "Data sets and reward models",
        f"{problems['policy']:,} problems train the policy, {problems['train']:,} the reward models, {problems['test']:,} test them. "
        f"The policy is right in {percent(policy['accuracy'])} of {policy['num_solutions']:,} solutions; it slips in "
        f"{percent(policy['slip_rate'])} of its steps, and corrects {percent(policy['correction_rate'])} of its slips and "
        f"{percent(policy['spurious_rate'])} of its right steps ({sight}).",
        [
            ("", Table(["data set", "what", "rows", "labels", "mean label"], datasets, style="words")),
            ("Reward models", Table(head, models, style="words")),
        ],
        note="AUROC on held-out judged steps: all, and first errors against right steps.",
    )


def cost_section(data: dict[str, Any]) -> Section:
    rows = [[one["name"], f"{one['seconds']:,.1f}", one["did"]] for one in data["stages"]]
    rows.append(["all", f"{data['total_seconds']:,.1f}", ""])
    longest, machine = max(data["stages"], key=lambda one: one["seconds"]), data["machine"]
    return Section(
        "cost",
        "Cost of every stage",
        f"{data['total_seconds'] / 60:,.1f} minutes on {machine['cores']} cores ({machine['processor']}); the longest stage is "
        f"{longest['name']}, {longest['seconds']:,.1f} seconds.",
        [("", Table(["stage", "seconds", "what it did"], rows, style="words"))],
    )


def again_section(data: dict[str, Any]) -> Section:
    machine = data["machine"]
    rows = [
        ["command", data["command"]],
        ["profile", data["profile"]],
        ["seed", str(data["seed"])],
        ["date", data["date"]],
        ["processor", f"{machine['processor']}, {machine['cores']} cores"],
        ["python", machine["python"]],
        *([name, version] for name, version in data["versions"].items()),
    ]
    return Section(
        "again",
        "Run it again",
        "The command below makes all of this again. Another number of threads or another version may change the last digits.",
        [("", Table(["what", "here"], rows, style="words"))],
    )
