"""Table and picture of `lambda_study.py`, created from its JSON output."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import version_words


if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLORS = {"log1p": "tab:blue", "none": "tab:orange", None: "0.55"}
NAMES = {"log1p": "λ·ln(1 + KL)", "none": "λ·KL", None: "λ = 0"}


class Setting(NamedTuple):
    """Weight of the KL term and its scaling. The scaling is `None` for λ = 0."""

    kl_coef: float
    kl_scaling: str | None


def header(result: dict[str, Any]) -> str:
    args = result["settings"]
    versions = version_words(result["versions"])
    return (
        f"python {result['python']}, {versions}, {result['cores']} cores, {result['date']}\n"
        f"{args['max_steps']} steps of {args['batch_size']} solutions, learning rate {args['learning_rate']:g}, "
        f"seeds {', '.join(map(str, args['seeds']))}; measured on {result['num_held_out_trajectories']:,} correct solutions of "
        f"{result['num_held_out_problems']:,} held-out problems"
    )


def table(result: dict[str, Any]) -> str:
    """Return a table with one row per setting: means over seeds with minimum and maximum, and accuracy over the samples of all seeds."""
    lines = [
        "| λ | KL term | LM loss at the end | KL at the end, nats per solution | accuracy (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    before = [run["curve"][0] for run in result["runs"]]
    lines.append(f"| before |  | {over_seeds(before, 'lm_loss')} | 0 | {pooled_accuracy(result['seeds'])} |")
    for setting, runs in by_setting(result).items():
        last = [run["curve"][-1] for run in runs]
        name = NAMES[setting.kl_scaling] if setting.kl_coef else ""
        cells = [
            f"{setting.kl_coef:g}",
            name,
            over_seeds(last, "lm_loss"),
            over_seeds(last, "kl"),
            pooled_accuracy(runs),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_setting(result: dict[str, Any]) -> dict[Setting, list[dict]]:
    """Group the runs by setting, over all seeds."""
    found: dict[Setting, list[dict]] = {}
    for one in result["runs"]:
        found.setdefault(Setting(one["kl_coef"], one["kl_scaling"]), []).append(one)
    return found


def over_seeds(points: list[dict[str, float]], name: str) -> str:
    values = [point[name] for point in points]
    mean, least, most = statistics.fmean(values), min(values), max(values)
    return f"{mean:.4f}" if least == most else f"{mean:.4f} ({least:.4f} to {most:.4f})"


def pooled_accuracy(parts: Iterable[dict]) -> str:
    found = [part["accuracy"] for part in parts]
    return shown_accuracy({name: sum(one[name] for one in found) for name in ("num_right", "num_samples")})


def shown_accuracy(found: dict[str, int]) -> str:
    """
    Format the share of right samples with its 95 % Wilson interval.

    The interval only covers sampling on these problems, and is conservative, because samples are independent given the problem.
    """
    n, share, z = found["num_samples"], found["num_right"] / found["num_samples"], 1.96
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    return f"{share:.1%} ({centre - half:.1%} to {centre + half:.1%}, n = {n:,})"


def draw(result: dict[str, Any], path: Path) -> "Figure":
    """Draw figure 4 of the HRM paper: one column per λ, with log-KL above and language-model loss below. All panels include λ = 0."""
    from matplotlib.figure import Figure

    found = by_setting(result)
    lambdas = sorted({setting.kl_coef for setting in found} - {0}) or [0]
    figure = Figure(figsize=(3.4 * len(lambdas) + 0.8, 6), layout="constrained", dpi=110)
    panels = figure.subplots(2, len(lambdas), sharex=True, sharey="row", squeeze=False)
    for column, kl_coef in zip(panels.T, lambdas, strict=True):
        drawn = {setting: runs for setting, runs in found.items() if setting.kl_coef in (0, kl_coef)}
        column[0].set_title(f"λ = {kl_coef:g}")
        for panel, name in zip(column, ("log_kl", "lm_loss"), strict=True):
            for setting, runs in drawn.items():
                draw_runs(panel, runs, name, setting)
            panel.grid(alpha=0.3)
        column[1].set_xlabel("optimizer step")
    # KL is 0 at the start, which a log scale cannot show
    panels[0, 0].set_yscale("log")
    panels[0, 0].set_ylim(bottom=0.7 * min(point["log_kl"] for run in result["runs"] for point in run["curve"][1:]))
    panels[0, 0].set_ylabel("mean ln(1 + KL(ref ‖ policy))\nKL in nats per solution")
    panels[1, 0].set_ylabel("language-model loss\nnats per token")
    lines = {line.get_label(): line for panel in panels.flat for line in panel.lines if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path)
    return figure


def draw_runs(panel, runs: list[dict], name: str, setting: Setting) -> None:
    """Draw the mean over seeds and, if there are several, a thin line per seed."""
    color = COLORS[setting.kl_scaling]
    steps = [point["step"] for point in runs[0]["curve"]]
    values = [[point[name] for point in run["curve"]] for run in runs]
    if len(runs) > 1:
        for one in values:
            panel.plot(steps, one, color=color, linewidth=0.7, alpha=0.5)
    mean = [statistics.fmean(point) for point in zip(*values, strict=True)]
    style = "--" if setting.kl_scaling == "none" else "-"  # keeps overlapping lines distinguishable
    panel.plot(steps, mean, color=color, linewidth=1.6, linestyle=style, label=NAMES[setting.kl_scaling])
