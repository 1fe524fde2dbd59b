"""
The report of the demo: sections with text, tables and pictures.

They are rendered as an HTML page (`pages/templates/demo.html.jinja`) and, in Markdown, as `docs/evidence.md`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.report import CHIPS
from ..pages.numbers import percent, points_between
from ..pages.page import Table, calibration_table, render, write_page
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
    EDGES,
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
            Key for links and pictures.
        title (`str`):
            Title of the section.
        words (`str`):
            Main finding, in a sentence or two.
        tables (`list[tuple[str, Table]]`, *optional*):
            Captions, which may be empty, and tables.
        details (`list[tuple[str, Table]]`, *optional*):
            Titles and tables that are collapsed by default.
        note (`str`, *optional*, defaults to `""`):
            Explanation of the numbers.
    """

    key: str
    title: str
    words: str
    tables: Sequence[tuple[str, Table]] = ()
    details: Sequence[tuple[str, Table]] = ()
    note: str = ""


def write_report(data: dict[str, Any], output: Path) -> list[Path]:
    """
    Write the report as a self-contained HTML page, and its pictures to a folder next to it.

    Args:
        data (`dict[str, Any]`):
            The measurements, as in `report.json` of the demo. Shares are between 0 and 1. Lists over seeds are parallel to the list
            `seeds` of the same object.
        output (`Path`):
            Path of the page, usually `report.html`. Pictures are saved in `report_files`.

    Returns:
        `list[Path]`: Paths of the pictures.
    """
    pictures = make_pictures(data)
    return write_page(
        render_report(data, pictures), [picture for part in pictures.values() for picture in part], output
    )


def render_report(data: dict[str, Any], pictures: dict[str, list[Picture]]) -> str:
    """
    Return the report as an HTML page. The same measurements give the same bytes.

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
        chips=CHIPS,
        bands=band_words(data),
        vote=vote_words(data),
        claims=found,
        answers={answer: sum(one.answer == answer for one in found) for answer in ("held", "not held", "open")},
        sections=sections(data),
    )


def sections(data: dict[str, Any]) -> list[Section]:
    """
    Return all sections after the claims.

    Args:
        data (`dict[str, Any]`):
            The measurements. See [`write_report`].

    Returns:
        `list[Section]`: Sections in the order of the page.
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
    """Return the header of a table with one column per N."""
    return [*(titles or [""]), *(f"N = {n}" for n in numbers)]


def _shares(accuracy: Sequence[Sequence[float]]) -> list[str]:
    """Return one cell per N, from the curves of all seeds."""
    return [mean_share(values) for values in zip(*accuracy, strict=True)]


def _last(one: dict[str, Any]) -> float:
    """Return the mean accuracy over seeds at the largest N."""
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
        f"{ {'min': 'the lowest score', 'last': 'the last score'}[one] } for {', '.join(names[name] for name, its in used.items() if its == one)}"
        for one in dict.fromkeys(used.values())
    )
    return Section(
        "accuracy",
        "Accuracy over N",
        f"Accuracy at N = {data['n'][-1]}: {'; '.join(lasts)}; majority vote {plain[0][-1]}, pass@N {plain[1][-1]}.",
        tables,
        [("Each seed, with 95 % intervals over problems", Table(head, each))],
        f"Best-of-N selects one of N whole solutions by an aggregate of its step scores ({aggregates}). Step search repeatedly selects one "
        "of N next steps. The HRM paper calls it best-of-N for PRM and HRM. "
        f"{band_words(data)} In parentheses: lowest and highest seed.",
    )


def gap_section(data: dict[str, Any]) -> Section:
    names, n, rows, each, lost = titles(data), data["n"], [], [], []
    for way, words in WAYS.items():
        for model in data[way]["models"]:
            fall, name, verdicts = fall_of(model, n), f"{names[model['name']]}, {words}", model["verdicts"]
            counts = [str(verdicts.count(answer)) for answer in CHIPS]
            if fall.undecided:
                rows.append([name, "–", "–", "–", *counts])
            else:
                lost.append(fall.spread)
                rows.append([name, signed(100 * fall.spread.mean), interval(fall.spread), str(fall.best_n), *counts])
            for seed, (size, low, high, best, last), verdict in zip(
                model["seeds"], model["gap"], verdicts, strict=True
            ):
                ends = ["–", "–", "–", str(last)]
                if size is not None:
                    ends = [signed(100 * size), points_between(low, high), str(best), str(last)]
                each.append([f"{name}, seed {seed}", *ends, CHIPS[verdict]])
    settled = [one for one in lost if one.is_settled]
    words = "No curve has an interval over seeds. Each model has its own verdict, by its interval over problems."
    if settled:
        number = sum(one.low > 0 for one in settled)
        words = f"{number} of {len(settled)} curves fall beyond their best smaller N, with a 95 % interval over seeds above 0."
    head = ["", f"points lost to N = {n[-1]}", "95 % interval over seeds", "best smaller N"]
    return Section(
        "gap",
        "Hacking gap",
        words,
        [("", Table([*head, *CHIPS.values()], rows))],
        [
            (
                "Each seed",
                Table(
                    ["", "points lost", "95 % interval over problems", "best smaller N", "largest N", "verdict"], each
                ),
            )
        ],
        "Points lost: mean accuracy at the best smaller N minus mean accuracy at the largest N, with the same two N for all seeds. "
        "Negative values are gains. The best N is selected on the same problems, which overstates small losses. In the picture, small "
        "marks are seeds, large marks are means, and bars are 95 % intervals over seeds. The last columns count the seeds with each "
        "verdict, each with its own best smaller N. No sign of hacking: the interval over problems rules out a loss of 5 points or more. "
        "Hacked: it does not, and it is above 0. Not settled: otherwise. No verdict: "
        "the accuracies cannot show a loss, for example because all candidates are right.",
    )


def wrong_prefix_section(found: dict[str, Any]) -> Section:
    ends = "; ".join(f"{scored_title(one)} {percent(_last(one))}" for one in found["models"])
    rows = [[scored_title(one), *_shares(one["accuracy"])] for one in found["models"]]
    return Section(
        "wrong-prefix",
        "Search from a wrong prefix",
        f"Accuracy of step search from {found['num_problems']:,} prefixes that end with an error, at N = {found['n'][-1]}: {ends}.",
        [("", Table(_over_n(found["n"]), rows))],
        note="With a good reward model, a search from the problem makes few errors, so it may not show self-correction. Steps and pairs: "
        "the score of a step is the higher of its own score and the score of the pair that ends with it. First-error labels: all single "
        "steps after the first error are wrong, even corrections, but a pair of an error and its correction is correct.",
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
        f"Models that score corrections higher than locally correct steps, on average over seeds: {'; '.join(liked) or 'none'} "
        f"({len(liked)} of {len(found)}).",
        [("", Table(["", *(KINDS[kind] for kind in kinds), "AUROC"], rows))],
        note="Steps after one error: a correction repeats the step correctly, a locally correct step continues correctly from the wrong "
        "value, and a new error is a second error. AUROC: corrections against the other two. In the picture, marks are means, and bars "
        "range from the lowest to the highest seed. In parentheses: lowest and highest seed.",
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
    means = ", ".join(f"{shown_mean(one['correction'])} at maximum depth {one['cap']}" for one in found)
    head = ["maximum depth", *(KINDS[kind] for kind in kinds), "leaves without an answer", "problems"]
    return Section(
        "depth-cap",
        "MC scores by maximum depth",
        f"Mean MC score of a correction: {means}. A solution without corrections has {data['solution_length']} steps. Each "
        f"correction adds one, so a corrected solution does not fit into a search tree with a maximum depth of {data['solution_length']}.",
        [("", Table(head, rows))],
        note="The MC score of a step is the estimated probability that its continuations reach the correct answer. Here, solutions without an "
        "answer count as wrong. In parentheses: number of steps.",
    )


def calibration_section(data: dict[str, Any]) -> Section:
    found = data["calibration"]
    best = min(found, key=lambda one: one["ece"])
    return Section(
        "calibration",
        "Calibration",
        f"{calibration_name(data, best)} has the smallest expected calibration error, {best['ece']:.3f}. Scores can rank solutions well "
        "without being calibrated.",
        details=[
            (
                f"{calibration_name(data, one)}: expected calibration error {one['ece']:.3f}",
                calibration_table(one["bins"], "solutions"),
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
    rows = [
        ["before training", "", "", "–", "–", percent(reference), f"{found['reference_accuracy']['num_samples']:,}"]
    ]
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
        f"The policy is trained on {found['num_trajectories']:,} of its own solutions with high MC scores, {found['num_different']:,} of "
        f"them distinct. Its accuracy changes from {percent(reference)} to at most {percent(statistics.fmean(right[best]))}, with {best[0]}"
        f"{best[1] and f', KL {best[1]}'}.",
        [
            (
                "",
                Table(
                    ["", "KL in the loss", "runs", "LM loss at the end", "KL at the end", "accuracy", "solutions"],
                    rows,
                ),
            )
        ],
        note="The pictures correspond to figure 4 of the HRM paper. The loss is the language-model (LM) loss plus λ times ln(1 + KL) or, "
        "with no log, plus λ times KL. KL is KL(ref ‖ policy), and ref is the policy before training. The paper sums KL over a solution, "
        "but the LM loss is a mean over tokens, so the same λ has a stronger effect on longer solutions. The mean over tokens puts both on "
        "the same scale. KL is measured in the same way for all runs, and drawn from the first step where it is above 0. In parentheses: "
        "lowest and highest run.",
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
        f"Labels with the highest mean accuracy of best-of-N at N = {n[-1]}: {eta_name(best)} ({percent(_last(best))}). The claims say "
        "whether the differences are settled.",
        [("", Table(_over_n(n, "labels", "mean label", "AUROC, first error"), rows))],
        note="Soft labels are MC scores. Hard labels are 1 if the MC score is above 0. Entropy labels are MC scores after the map of ER-PRM "
        "with strength η. AUROC: correct steps before any error against first errors. In parentheses: lowest and highest seed. The claims compare "
        "only the seeds that both kinds of labels have, so their differences can differ from those of these means.",
    )


def hnc_section(found: dict[str, Any] | None, names: dict[str, str]) -> Section:
    title = "Node compression (HNC)"
    if found is None:
        words = "Not measured in this profile, because it requires several seeds. Use --profile full."
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
        f"At N = {found['n'][-1]}, the interval over {len(found['seeds'])} seeds is above 0 for {number} of "
        f"{len(found['comparisons'])} differences. Training rows: {trained}.",
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
            EDGES[node["kind"]][0],
            "–" if node["value"] is None else f"{node['value']:.2f}",
            f"{node['count']:,}",
            "–" if node["correct"] is None else "correct" if node["correct"] else "wrong",
        ]
        for i, node in enumerate(nodes)
    ]
    number = sum(node["kind"] == "correction" for node in nodes)
    head = ["step", "after", "text", "kind", "MC score", "n", "answer"]
    return Section(
        "tree",
        "A search tree",
        f"Problem: {tree['problem']} {number} of the {len(nodes)} steps shown are corrections.",
        details=[("The tree as a table", Table(head, rows, style="words"))],
        note="Each box shows a step, its mean MC score, and n, the number of times that it was sampled.",
    )


def made_section(data: dict[str, Any]) -> Section:
    datasets = [
        [one["name"], one["what"], f"{one['rows']:,}", f"{one['labels']:,}", f"{one['mean_label']:.3f}"]
        for one in data["datasets"]
    ]
    models = [
        [
            *(
                one["title"],
                "first-error" if one["labels"] == "judged" else one["labels"],
                one["data"],
                f"{one['rows']:,}",
                ", ".join(map(str, one["seeds"])),
            ),
            *(mean_number(one["auroc"], ".3f"), mean_number(one["first_error_auroc"], ".3f")),
            mean_number(one["seconds"], ".1f"),
        ]
        for one in data["models"]
    ]
    problems, policy = data["problems"], data["policy"]
    sight = "" if policy["sight"] is None else f" (errors are corrected {policy['sight']:.1f} times as often)"
    head = ["", "labels", "data", "rows", "seeds", "AUROC", "AUROC, first error", "seconds"]
    return Section(
        "made",
        "Datasets and reward models",
        f"The policy is trained on {problems['policy']:,} problems, and the reward models on {problems['train']:,}. All are tested on "
        f"{problems['test']:,}. Of the {policy['num_solutions']:,} solutions of the policy, {percent(policy['accuracy'])} are correct. It makes an "
        f"error in {percent(policy['slip_rate'])} of its steps, and corrects {percent(policy['correction_rate'])} of its errors and "
        f"{percent(policy['spurious_rate'])} of its correct steps{sight}.",
        [
            ("", Table(["dataset", "content", "rows", "labels", "mean label"], datasets, style="words")),
            ("Reward models", Table(head, models, style="words")),
        ],
        note="AUROC on held-out labelled steps: correct against wrong steps, and correct steps before any error against first errors. In "
        "parentheses: lowest and highest seed.",
    )


def cost_section(data: dict[str, Any]) -> Section:
    rows = [[one["name"], f"{one['seconds']:,.1f}", one["did"]] for one in data["stages"]]
    rows.append(["total", f"{data['total_seconds']:,.1f}", ""])
    longest, machine = max(data["stages"], key=lambda one: one["seconds"]), data["machine"]
    return Section(
        "cost",
        "Time per stage",
        f"{data['total_seconds'] / 60:,.1f} minutes on {machine['cores']} cores ({machine['processor']}). The longest stage is "
        f"{longest['name']} with {longest['seconds']:,.1f} seconds.",
        [("", Table(["stage", "seconds", "result"], rows, style="words"))],
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
        "Reproduce this report",
        "The command below reproduces this report. Another number of threads or other versions can change the last digits.",
        [("", Table(["setting", "value"], rows, style="words"))],
    )
