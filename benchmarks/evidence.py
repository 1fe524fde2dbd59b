"""
Write docs/evidence.md from the folder of a demo: its tables, its pictures and what it says of the papers' claims.

    trl-hrm demo --profile full --output_dir outputs/evidence
    python benchmarks/evidence.py outputs/evidence

No number of the page is written by hand.
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from trl_hrm.demo.claims import claims
from trl_hrm.demo.hacking import vote_words
from trl_hrm.evaluation.hacking import percent


ROOT = Path(__file__).resolve().parents[1]
PICTURES = "images/evidence"
INTRODUCTION = """# Evidence

What the two papers claim, and what is seen of it on a small world of arithmetic, from the policy to the curves. This page is written by
`benchmarks/evidence.py` from what `trl-hrm demo` measured; [the demo](demo.md) says what its stages are. It is one small
world with one policy: what holds here may not hold elsewhere, and nothing here is a number of the papers.
"""
NEEDS_GPU = """## What would need a GPU

- Real text: a policy that solves GSM8K or MATH, trees of its solutions, reward models of 1.5 billion parameters and more. Without it nothing
  can be said of the numbers in the papers' tables.
- Reward models at convergence on far more problems. Where a claim is open here, it is mostly for want of seeds or of training.
- The same world with a policy and reward models of some million parameters: no GPU was at hand when this page was made.
"""


def main(args: argparse.Namespace) -> None:
    folder, docs = Path(args.demo), Path(args.docs)
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    target = docs / PICTURES
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / "report_files", target)
    names = {path.stem for path in target.iterdir()}
    (docs / "evidence.md").write_text(page(data, names), encoding="utf-8")
    print(f"{docs / 'evidence.md'}: {len(names)} pictures in {target}.")


def page(data: dict[str, Any], pictures: set[str]) -> str:
    """The page as Markdown."""

    def shown(name: str, alt: str) -> str:
        return f"![{alt}]({PICTURES}/{name}.png)" if name in pictures else ""

    parts = [
        INTRODUCTION,
        header(data),
        "## What holds of the papers' claims",
        claims_table(data),
        vote_words(data),
        shown("accuracy", "Accuracy over N of ORM, PRM, HRM and HRM with HNC, beside majority vote and pass@N"),
        "## Accuracy over N",
        "Mean over reward-model seeds ± their standard deviation, in percent.",
        "### Best of N whole solutions",
        accuracy_table(data, data["best_of_n"]["models"], vote=True),
        "### Search step by step, N next steps (what the HRM paper calls best-of-N for PRM and HRM)",
        accuracy_table(data, data["step_search"]["models"]),
        shown("gap", "Points lost from the best N to the largest"),
        "## Search from a wrong prefix",
        f"{data['wrong_prefix']['num_problems']} problems whose solution begins with a slip; the search starts after it.",
        wrong_prefix_table(data),
        shown("wrong-prefix", "Accuracy of searches that begin after a slip"),
        "## Scores after an error",
        "Mean score of what may follow a slip: a step that takes it back, one that goes on rightly from it, one that slips again; "
        "AUROC of the first against the two others.",
        kinds_table(data),
        shown("step-kinds", "Scores of corrections, locally right steps and new errors"),
        "## Values by depth cap",
        f"Mean MC scores of steps in searches of that many steps at most, where what has no answer counts as wrong. A solution without "
        f"corrections has {data['solution_length']} steps.",
        values_table(data),
        shown("depth-cap", "Mean values of steps by kind and depth cap"),
        "## Node compression",
        hnc_table(data),
        "## Entropy labels",
        eta_table(data),
        shown("eta", "Best-of-N accuracy by label"),
        "## Calibration",
        table(
            ["reward model", "seed", "expected calibration error"],
            [[title(data, c["name"]), str(c["seed"]), f"{c['ece']:.3f}"] for c in data["calibration"]],
        ),
        shown("calibration", "Share of right solutions over score"),
        "## Self-training",
        self_training_text(data),
        self_training_table(data),
        *(
            shown(name, "Figure 4 of the HRM paper, here: loss and KL over steps")
            for name in sorted(pictures)
            if name.startswith("lambda")
        ),
        "## A tree",
        shown("tree", "A part of a search tree with a correction in it"),
        "## What it cost",
        table(
            ["stage", "seconds", "what it did"],
            [[s["name"], f"{s['seconds']:.0f}", s["did"].replace("|", "/")] for s in data["stages"]],
        ),
        NEEDS_GPU,
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def header(data: dict[str, Any]) -> str:
    machine, versions = data["machine"], ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    policy, problems = data["policy"], data["problems"]
    sight = (
        "no right step is corrected"
        if policy["sight"] is None
        else f"slips are corrected {policy['sight']:.0f} times as often as right steps"
    )
    return (
        f"`{data['command']}`, {data['date']}, {data['total_seconds'] / 60:.0f} minutes on {machine['cores']} cores ({machine['processor']}), "
        f"Python {machine['python']}, {versions}. Seed of world and policy {data['seed']}; {problems['train']} problems searched, "
        f"{problems['test']} solved. The policy: {percent(policy['accuracy'])} right, {percent(policy['slip_rate'])} of its steps slip, "
        f"{percent(policy['correction_rate'])} of the slips are corrected by the next step; {sight}."
    )


def claims_table(data: dict[str, Any]) -> str:
    rows = [[one.paper, one.words, f"**{one.answer}**", one.here] for one in claims(data)]
    return table(["paper", "claim", "here", "what was seen"], rows)


def accuracy_table(data: dict[str, Any], models: Sequence[dict[str, Any]], vote: bool = False) -> str:
    rows = [
        [
            title(data, m["name"]),
            str(len(m["seeds"])),
            *(mean_sd(column) for column in zip(*m["accuracy"], strict=True)),
        ]
        for m in models
    ]
    if vote:
        rows += [
            [name.replace("_", " "), "", *map(percent, data["best_of_n"][name])]
            for name in ("majority_vote", "pass_at_n")
        ]
    return table(["reward model", "seeds", *(f"N = {n}" for n in data["n"])], rows)


def wrong_prefix_table(data: dict[str, Any]) -> str:
    found = data["wrong_prefix"]
    rows = [
        [
            one["title"],
            spans(one),
            str(len(one["seeds"])),
            *(mean_sd(column) for column in zip(*one["accuracy"], strict=True)),
        ]
        for one in found["models"]
    ]
    return table(["reward model", "scored", "seeds", *(f"N = {n}" for n in found["n"])], rows)


def kinds_table(data: dict[str, Any]) -> str:
    names = ("correction", "locally_right", "new_error", "auroc")
    rows = [
        [one["title"], spans(one), *(mean_sd(one[name], scale=1, digits=2) for name in names)]
        for one in data["step_kinds"]
    ]
    return table(["reward model", "scored", "correction", "locally right", "new error", "AUROC"], rows)


def values_table(data: dict[str, Any]) -> str:
    names = ("correction", "locally_right", "first_error", "right")

    def cell(value: dict[str, Any]) -> str:
        return "–" if value["mean"] is None else f"{value['mean']:.3f} ({value['count']:,})"

    rows = [
        [str(one["cap"]), *(cell(one[name]) for name in names), percent(one["unfinished"]), str(one["num_problems"])]
        for one in data["values_by_cap"]
    ]
    return table(
        ["cap", "correction", "locally right after an error", "first error", "right", "without an answer", "problems"],
        rows,
    )


def hnc_table(data: dict[str, Any]) -> str:
    if data["hnc"] is None:
        return "Not measured by this profile."
    found = data["hnc"]
    counts = ", ".join(f"{name} {rows:,}" for name, rows in found["rows"].items())
    text = (
        f"Differences in step search, paired by seed ({len(found['seeds'])} seeds), in points, with their 95 % t intervals. Rows of the data "
        f"sets: {counts}; the control has those of a second search of the same problems. Equal steps of a problem are one when they are trained on, so that equal rows are not equally "
        "many steps."
    )
    rows = [
        [
            f"{title(data, one['a'])} − {title(data, one['b'])}",
            str(one["steps"]),
            *(f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]" for d in one["difference"]),
        ]
        for one in found["comparisons"]
    ]
    return f"{text}\n\n" + table(["", "steps", *(f"N = {n}" for n in found["n"])], rows)


def eta_table(data: dict[str, Any]) -> str:
    rows = [
        [
            one["labels"],
            "" if one["eta"] is None else f"{one['eta']:g}",
            f"{one['mean_label']:.3f}",
            str(len(one["seeds"])),
            mean_sd(one["auroc"], scale=1, digits=2),
            *(mean_sd(column) for column in zip(*one["accuracy"], strict=True)),
        ]
        for one in data["eta"]
    ]
    return table(
        ["labels", "η", "mean label", "seeds", "AUROC of first errors", *(f"N = {n}" for n in data["n"])], rows
    )


def self_training_text(data: dict[str, Any]) -> str:
    found = data["self_training"]
    before = found["reference_accuracy"]
    return (
        f"On {found['num_trajectories']:,} solutions, {found['num_different']:,} different; {percent(before['num_right'] / before['num_samples'])} "
        "right before. LM loss in nats per token, KL(reference ‖ policy) in nats per solution, both on held-out solutions at the end."
    )


def self_training_table(data: dict[str, Any]) -> str:
    settings: dict[tuple, list[dict[str, Any]]] = {}
    for run in data["self_training"]["runs"]:
        settings.setdefault((run["kl_coef"], run["kl_scaling"], run["kl_reduction"]), []).append(run)
    rows = []
    for (coef, scaling, reduction), runs in settings.items():
        last = [run["curve"][-1] for run in runs]
        right = [run["accuracy"]["num_right"] / run["accuracy"]["num_samples"] for run in runs]
        rows.append(
            [
                f"{coef:g}",
                scaling or "",
                reduction or "",
                str(len(runs)),
                mean_sd([x["lm_loss"] for x in last], 1, 4),
                mean_sd([x["kl"] for x in last], 1, 4),
                mean_sd(right),
            ]
        )
    return table(["λ", "scaling", "reduction", "seeds", "LM loss", "KL", "right, %"], rows)


def title(data: dict[str, Any], name: str) -> str:
    return next(model["title"] for model in data["models"] if model["name"] == name)


def spans(one: dict[str, Any]) -> str:
    return "one step" if one["spans"] == [1] else "pairs too"


def mean_sd(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation."""
    mean = f"{scale * fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * stdev(values):.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("demo", help="folder of trl-hrm demo")
    parser.add_argument("--docs", default=str(ROOT / "docs"), help="folder to write evidence.md and its pictures to")
    main(parser.parse_args())
