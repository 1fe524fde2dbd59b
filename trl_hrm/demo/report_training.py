"""The sections of the demo's report on training, on a tree, and on what was made at what cost."""

import statistics
from collections.abc import Sequence
from typing import Any

from ..evaluation.hacking import percent
from ..evaluation.report_page import details, figure, html_table
from ..evaluation.report_pictures import Picture
from .claims import accuracy_of, compared
from .hacking import titles
from .over_seeds import interval, signed
from .report_parts import beside, grid, note, numbers, paragraph, shares
from .report_pictures import REDUCTIONS, comparison_name, eta_name, run_name
from .report_tree import step_text


def self_training(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    found = data["self_training"]
    settings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in found["runs"]:
        reduction = REDUCTIONS[run["kl_reduction"]] if run["kl_coef"] else ""
        settings.setdefault((run_name(run), reduction), []).append(run)
    reference = accuracy_of(found["reference_accuracy"])
    rows = [["before", "", "", "–", "–", percent(reference), f"{found['reference_accuracy']['num_samples']:,}"]]
    rows += [[*setting, *_of_runs(runs)] for setting, runs in settings.items()]
    right = {setting: statistics.fmean(_right(runs)) for setting, runs in settings.items()}
    best = max(right, key=right.__getitem__)
    words = (
        f"Trained on {found['num_trajectories']:,} of its own solutions of high value, {found['num_different']:,} of them different, the "
        f"policy goes from {percent(reference)} to {percent(right[best])} right at most, with {best[0]}"
        f"{best[1] and f', KL {best[1]}'}."
    )
    explained = (
        "Figure 4 of the HRM paper. Summed over a solution, as in the paper, KL stands against a language-model loss per token, so that "
        "the same λ brakes harder the longer solutions are; the mean over tokens puts both on one scale. KL is measured the same way in "
        "all, and drawn from the first step that has any. Of several runs: means, and from the lowest to the highest."
    )
    head = ["", "KL in the loss", "runs", "LM loss at the end", "KL at the end", "right", "samples"]
    return paragraph(words) + grid(pictures) + html_table(head, rows) + note(explained)


def _of_runs(runs: Sequence[dict[str, Any]]) -> list[str]:
    """How many runs of one setting there are, and what they came to."""
    last = [run["curve"][-1] for run in runs]
    return [
        str(len(runs)),
        numbers([point["lm_loss"] for point in last], ".4f"),
        numbers([point["kl"] for point in last], ".3g"),
        shares(_right(runs)),
        f"{sum(run['accuracy']['num_samples'] for run in runs):,}",
    ]


def _right(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [accuracy_of(run["accuracy"]) for run in runs]


def eta(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    found = sorted(data["eta"], key=lambda one: one["mean_label"])
    rows = [
        [
            eta_name(one),
            f"{one['mean_label']:.3f}",
            numbers(one["auroc"], ".3f"),
            *map(shares, zip(*one["accuracy"], strict=True)),
        ]
        for one in found
    ]
    last = {eta_name(one): [accuracy[-1] for accuracy in one["accuracy"]] for one in found}
    best = max(last, key=lambda name: statistics.fmean(last[name]))
    words = (
        f"The highest mean accuracy at N = {data['n'][-1]}, {percent(statistics.fmean(last[best]))}, is that with these labels: {best}. "
        "Chosen by best-of-N. Whether it is above the others is judged among the claims."
    )
    head = ["labels", "mean label", "AUROC, first error", *(f"N = {n}" for n in data["n"])]
    return beside(pictures, paragraph(words)) + html_table(head, rows)


def hnc(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    found = data["hnc"]
    if found is None:
        return paragraph("Not measured in this profile: it takes several seeds. Run `trl-hrm demo --profile full`.")
    names = titles(data)
    rows = [
        [comparison_name(names, one), *(_measured(point) for point in one["difference"])]
        for one in found["comparisons"]
    ]
    above = [
        one
        for one in found["comparisons"]
        if compared(one["difference"][-1]).is_settled and one["difference"][-1]["low"] > 0
    ]
    trained = "; ".join(f"{names.get(name, name)} {number:,}" for name, number in found["rows"].items())
    words = (
        f"At N = {found['n'][-1]}, {len(above)} of {len(found['comparisons'])} differences are above 0 by their interval over "
        f"{len(found['seeds'])} seeds. Trees trained on, where equal steps are one: {trained}."
    )
    head = ["difference, points", *(f"N = {n}" for n in found["n"])]
    each = details("Each seed", _each_difference(found, names))
    return beside(pictures, paragraph(words)) + html_table(head, rows) + each


def _measured(point: dict[str, Any]) -> str:
    return f"{signed(100 * point['mean'])} ({interval(compared(point))})"


def _each_difference(found: dict[str, Any], names: dict[str, str]) -> str:
    rows = [
        [
            f"{comparison_name(names, one)}, seed {seed}",
            *(signed(100 * point["per_seed"][i]) for point in one["difference"]),
        ]
        for one in found["comparisons"]
        for i, seed in enumerate(found["seeds"])
    ]
    return html_table(["points", *(f"N = {n}" for n in found["n"])], rows)


def tree(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    nodes = data["tree"]["nodes"]
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
    words = f"{data['tree']['problem']} {number} of {len(nodes)} steps shown take an error back."
    head = ["step", "after", "text", "kind", "value", "n", "answer"]
    return (
        paragraph(words)
        + "".join(figure(one, "wide") for one in pictures)
        + note("In a box: the step, its mean MC value, and n, how often it was sampled there.")
        + details("The same as a table", html_table(head, rows, style="words"))
    )


def made(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    """Data sets and reward models."""
    datasets = [
        [one["name"], one["what"], f"{one['rows']:,}", f"{one['labels']:,}", f"{one['mean_label']:.3f}"]
        for one in data["datasets"]
    ]
    models = [
        [
            one["title"],
            one["labels"],
            one["data"],
            f"{one['rows']:,}",
            ", ".join(map(str, one["seeds"])),
            numbers(one["auroc"], ".3f"),
            numbers(one["first_error_auroc"], ".3f"),
            numbers(one["seconds"], ".1f"),
        ]
        for one in data["models"]
    ]
    problems, policy = data["problems"], data["policy"]
    sight = "never without a slip" if policy["sight"] is None else f"slips {policy['sight']:.1f} times as often"
    words = (
        f"{problems['policy']:,} problems train the policy, {problems['train']:,} the reward models, {problems['test']:,} test them. "
        f"The policy is right in {percent(policy['accuracy'])} of {policy['num_solutions']:,} solutions; it slips in "
        f"{percent(policy['slip_rate'])} of its steps, and corrects {percent(policy['correction_rate'])} of its slips and "
        f"{percent(policy['spurious_rate'])} of its right steps ({sight})."
    )
    return (
        paragraph(words)
        + html_table(["data set", "what", "rows", "labels", "mean label"], datasets, style="words")
        + "<h3>Reward models</h3>"
        + html_table(
            ["", "labels", "data", "rows", "seeds", "AUROC", "AUROC, first error", "seconds"], models, style="words"
        )
        + note("AUROC on held-out judged steps: all, and first errors against right steps.")
    )


def cost(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
    rows = [[one["name"], f"{one['seconds']:,.1f}", one["did"]] for one in data["stages"]]
    rows.append(["all", f"{data['total_seconds']:,.1f}", ""])
    longest = max(data["stages"], key=lambda one: one["seconds"])
    machine = data["machine"]
    words = (
        f"{data['total_seconds'] / 60:,.1f} minutes on {machine['cores']} cores ({machine['processor']}); the longest stage is "
        f"{longest['name']}, {longest['seconds']:,.1f} seconds."
    )
    return paragraph(words) + html_table(["stage", "seconds", "what it did"], rows, style="words")


def again(data: dict[str, Any], pictures: Sequence[Picture]) -> str:
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
    words = "The command below makes all of this again. Another number of threads or another version may change the last digits."
    return paragraph(words) + html_table(["what", "here"], rows, style="words")
