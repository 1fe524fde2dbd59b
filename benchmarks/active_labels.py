"""
Errors of step labels after more rollouts for a finished run: where labels are uncertain, or the same number for each, at equal tokens.

```bash
python benchmarks/active_labels.py --output_dir outputs/active-labels --docs docs/evidence.md
```

1. Simulation. Labels with known probabilities, of which k rollouts each are known. More rollouts are distributed by `allocate`, and drawn.
2. Exact world. A policy that writes the solutions of the demo's arithmetic problems, with mistakes and corrections, has exact values of its steps.
   `trl-hrm annotate --search rollouts` and `--more_from` sample from it.
3. Small policy. The same with the language model of the demo, which is trained first. The values are estimated with 128 other rollouts per label.

`uniform` gets as many tokens as `uncertain`, exactly up to one request in the simulation and within a few percent in the runs, where it gets as many
rollouts as are expected to have the same tokens. All labels that more rollouts can change are measured. If the study is interrupted, the same command resumes it. The results are printed and saved as `results.md`,
`results.json` and `active-labels.png`; `--docs` replaces their section of a page, and its picture.
"""

import argparse
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from common import save_section, version_words, versions

from trl_hrm import AnnotateConfig, ExportConfig, annotate
from trl_hrm.data.step_labels import label_steps
from trl_hrm.demo.over_seeds import Spread, spread
from trl_hrm.demo.pipeline import POLICY, SEARCH
from trl_hrm.demo.policy import solution_text, train_policy
from trl_hrm.demo.world import ANSWER, MODULUS, STEP, Problem, different_problems
from trl_hrm.io import read_json, write_json
from trl_hrm.pages.page import Table
from trl_hrm.pages.pictures import MARKERS, Picture, draw, legend
from trl_hrm.search.engines.base import ScriptedEngine
from trl_hrm.search.more_rollouts import WHERE, FinishedRun, allocate
from trl_hrm.search.nodes import read_totals, read_trees
from trl_hrm.search.run_folder import node_files
from trl_hrm.search.tree import SearchTree
from trl_hrm.search.values import LeafCounts


HEADING = "## Active labelling"
PICTURE = "images/active-labels.png"  # in the folder of the page
MULTIPLES = (1, 2, 4)  # of the first rollouts, for the rollouts that are added
UNIT = 4  # rollouts per request
NUM_LABELS = 1000  # of a simulation
STEP_TOKENS, MAX_STEPS = 50, 8  # of a simulation
SLIP_RATE, CORRECTION_RATE = 0.25, 0.5
NUM_SOLUTIONS = 4  # of the runs
NUM_REFERENCE = 128  # rollouts per label for the values of the small policy
ERRORS = {
    "absolute": "absolute error",
    "squared": "squared error",
    "hard": "wrong at p > 0.5",
    "positive": "wrong at p > 0",
}


def errors_of(labels: np.ndarray, values: np.ndarray, noise: np.ndarray | float = 0.0) -> dict[str, float]:
    """
    Return the mean errors of labels.

    Args:
        labels (`np.ndarray`):
            Labels, shape `(N,)`.
        values (`np.ndarray`):
            True probabilities, or unbiased estimates of them, shape `(N,)`.
        noise (`np.ndarray`, *optional*):
            Variances of the estimates. They are subtracted from the squared errors.
    """
    return {
        "absolute": float(np.abs(labels - values).mean()),
        "squared": float(((labels - values) ** 2 - noise).mean()),
        "hard": float(((labels > 0.5) != (values > 0.5)).mean()),
        "positive": float(((labels > 0) != (values > 0)).mean()),
    }


# 1. Simulation


def draw_values(rng: np.random.Generator, remaining: np.ndarray) -> np.ndarray:
    """
    Draw the probabilities of steps with a number of remaining steps. The more steps remain, the more often the probability is uniform
    on [0, 1]. The others are exactly 0 (40 %) or 1 (25 %), or close to 0 or 1 (Beta(1, 8) and Beta(8, 1), 17.5 % each).
    """
    size = len(remaining)
    ends = np.stack([np.zeros(size), np.ones(size), rng.beta(1, 8, size), rng.beta(8, 1, size)])
    kind = rng.choice(4, size, p=(0.4, 0.25, 0.175, 0.175))
    return np.where(rng.random(size) < 0.05 * remaining, rng.random(size), ends[kind, np.arange(size)])


def simulate(num_first: int, seed: int) -> dict[str, Any]:
    """Return the errors of labels of `num_first` rollouts each, and after more of them. See [`measure_run`]."""
    rng = np.random.default_rng([1, seed, num_first])
    remaining = rng.integers(1, MAX_STEPS + 1, NUM_LABELS)
    values, tokens = draw_values(rng, remaining), STEP_TOKENS * remaining
    right = rng.binomial(num_first, values)
    counts = [LeafCounts(int(one), num_first, 0) for one in right]
    keys = [f"{i:04d}" for i in rng.permutation(NUM_LABELS)]
    found: dict[str, Any] = {"labels": NUM_LABELS, "tokens": int(num_first * tokens.sum())}
    found["before"] = errors_of(right / num_first, values)

    def sampled(units: list[int]) -> dict[str, float]:
        more = UNIT * np.array(units)
        labels = (right + rng.binomial(more, values)) / (num_first + more)
        return errors_of(labels, values) | {"tokens": int((more * tokens).sum()), "samples": int(more.sum())}

    for multiple in MULTIPLES:
        num_units = multiple * num_first * NUM_LABELS // UNIT
        units = allocate(counts, keys, num_units, UNIT)
        most = UNIT * (np.array(units) * tokens).sum()
        low, high = 0, num_units * MAX_STEPS  # of `uniform` with at most as many tokens
        while low < high:
            middle = (low + high + 1) // 2
            even = np.array(allocate(counts, keys, middle, UNIT, "uniform"))
            low, high = (middle, high) if UNIT * (even * tokens).sum() <= most else (low, middle - 1)
        even = allocate(counts, keys, low, UNIT, "uniform")
        found[str(multiple)] = {"uncertain": sampled(units), "uniform": sampled(even)}
    return found


# 2. Exact world


@dataclass(frozen=True)
class State:
    """
    State of an unfinished solution.

    Args:
        done (`int`):
            Number of operations that were tried.
        value (`int`):
            Running value.
        before (`int`, *optional*):
            Running value before the last step, if the last step is a slip that the next step may correct.
    """

    done: int
    value: int
    before: int | None = None


def read_state(problem: Problem, text: str) -> State:
    """Return the state after the steps in a text."""
    state = State(0, problem.start)
    for correction, name, seen, _, _, result in STEP.findall(text):
        if correction:
            state = State(state.done, int(result))
        else:
            state = State("abcd".index(name) + 1, int(result), state.value if int(seen) != state.value else None)
    return state


def write_on(prefix: str, rng: random.Random) -> str:
    """Continue a solution as [`~demo.world.solve`] writes it."""
    question, end, written = prefix.partition(f"Work modulo {MODULUS}.")
    problem = Problem.parse(question + end)
    state, steps = read_state(problem, written), []
    done, value, before = state.done, state.value, state.before
    while True:
        if before is not None and rng.random() < CORRECTION_RATE:
            value = problem.apply(before, done - 1)
            steps.append(problem.step(done - 1, before, correction=True))
        before = None
        if done == len(problem.operations):
            return solution_text([*steps, f"# Answer\n{value}"])
        seen = value
        if rng.random() < SLIP_RATE:
            before = value
            seen = rng.choices([other for other in range(MODULUS) if other != value])[0]
        steps.append(problem.step(done, seen))
        value, done = problem.apply(seen, done), done + 1


def exact_value(problem: Problem, state: State) -> float:
    """Return the probability that [`write_on`] ends with the right answer."""
    if state.before is not None:
        corrected = State(state.done, problem.apply(state.before, state.done - 1))
        kept = State(state.done, state.value)
        return CORRECTION_RATE * exact_value(problem, corrected) + (1 - CORRECTION_RATE) * exact_value(problem, kept)
    if state.done == len(problem.operations):
        return float(state.value == problem.values()[-1])
    after = [State(state.done + 1, problem.apply(seen, state.done), state.value) for seen in range(MODULUS)]
    slips = sum(exact_value(problem, after[seen]) for seen in range(MODULUS) if seen != state.value) / (MODULUS - 1)
    right = exact_value(problem, State(state.done + 1, problem.apply(state.value, state.done)))
    return (1 - SLIP_RATE) * right + SLIP_RATE * slips


class WorldConfig(AnnotateConfig):
    """[`AnnotateConfig`] whose policy is [`write_on`]. It has one token per character."""

    def load_engine(self, shard: Any = None) -> ScriptedEngine:
        return ScriptedEngine(write_on)

    def model_identity(self) -> dict[str, Any]:
        return {}


# Runs


def open_steps(tree: SearchTree) -> list[tuple[tuple[str, ...], float]]:
    """Return the texts of the steps up to each label that more rollouts can change, and the label of an export."""
    labelled, _ = label_steps(tree, ExportConfig(inputs=["run"], output_dir="dataset"), Counter())
    paths = [tuple(labelled.completions[i] for i in labelled.path(step)) for step in range(len(labelled.labels))]
    return [
        (path, label)
        for path, label in zip(paths, labelled.labels, strict=True)
        if label is not None and not ANSWER.search(path[-1])
    ]


def read_labels(run: Path) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return the labels of a run that more rollouts can change, by problem and steps."""
    trees = (tree for file in node_files(run) for tree in read_trees(file, token_ids=False))
    return {(tree.problem.prompt, path): label for tree in trees for path, label in open_steps(tree)}


def num_tokens(run: Path) -> int:
    return read_totals(node_files(run))["num_tokens"]


@dataclass(frozen=True)
class Study:
    """
    Runs of a policy.

    Args:
        kind (`type[AnnotateConfig]`):
            Config of the runs. With [`WorldConfig`], the values of the steps are known.
        policy (`str`):
            Policy of the runs.
        num_problems (`int`), num_completions (`int`):
            Number of problems, and number of rollouts per step of the first run.
        multiples (`tuple[int, ...]`):
            Numbers of rollouts to add, as multiples of the first rollouts.
    """

    kind: type[AnnotateConfig]
    policy: str
    num_problems: int
    num_completions: int
    multiples: tuple[int, ...]

    def annotate(self, folder: Path, **settings: Any) -> Path:
        engine = POLICY if self.kind is WorldConfig else SEARCH
        annotate(self.kind(policy=self.policy, output_dir=str(folder), **settings, **engine))
        return folder


def make_run(study: Study, folder: Path, seed: int) -> None:
    """Sample solutions of random problems, and rollouts from their steps."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = different_problems(random.Random(seed), study.num_problems)
    rows = [{"problem": problem.text(), "answer": str(problem.values()[-1])} for problem in problems]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"num_solutions": NUM_SOLUTIONS, "num_completions": study.num_completions, "max_solution_tokens": 128}
    problems_file = str(folder / "problems.jsonl")
    study.annotate(folder / "first", problems=problems_file, search="rollouts", seed=seed, **settings)


def make_more(study: Study, folder: Path, name: str, where: str, number: int, seed: int) -> Path:
    """Continue the run of a folder with more rollouts."""
    settings = {"more_from": str(folder / "first"), "where": where, "more_samples": number, "num_completions": UNIT}
    return study.annotate(folder / name, seed=seed, **settings)


def measure_run(study: Study, folder: Path, seed: int) -> dict[str, Any]:
    """
    Continue a run with both distributions, and return the errors of the labels.

    Returns:
        `dict[str, Any]`: Number of `labels`, number of `tokens` of the first run, and the errors of its labels (`before`). For each
        multiple of its rollouts, the errors of both distributions, and the numbers of `samples` and `tokens` that were added.
    """
    result = folder / "result.json"
    if result.exists():
        return read_json(result)
    make_run(study, folder, seed)
    first = read_labels(folder / "first")
    tokens = num_tokens(folder / "first")
    values, noise = true_values(study, folder, list(first), seed)

    def errors(run: Path) -> dict[str, float]:
        labels = read_labels(run)
        return errors_of(np.array([labels[key] for key in first]), values, noise)

    found: dict[str, Any] = {"labels": len(first), "tokens": tokens, "before": errors(folder / "first")}
    source = FinishedRun(folder / "first")
    rollouts = source.identity["samples"] - study.num_problems * NUM_SOLUTIONS
    expected = sum(label.tokens for label in source.labels) / len(source.labels)  # of a rollout of `uniform`
    for multiple in study.multiples:
        number, found[str(multiple)] = multiple * rollouts, {}
        for where in WHERE:
            run = make_more(study, folder, f"{where}-{multiple}", where, number, seed)
            spent = num_tokens(run) - tokens
            found[str(multiple)][where] = errors(run) | {"tokens": spent, "samples": number // UNIT * UNIT}
            number = round(spent / expected)
    write_json(result, found)
    return found


def true_values(
    study: Study, folder: Path, keys: list[tuple[str, tuple[str, ...]]], seed: int
) -> tuple[np.ndarray, np.ndarray | float]:
    """Return the true probability of each label, exactly or from other rollouts, and the variances of these values."""
    if study.kind is WorldConfig:
        problems = {prompt: Problem.parse(prompt) for prompt, _ in keys}
        states = [(problems[prompt], read_state(problems[prompt], "\n\n".join(path))) for prompt, path in keys]
        return np.array([exact_value(*one) for one in states]), 0.0
    number = NUM_REFERENCE * len(FinishedRun(folder / "first").labels)
    run = make_more(study, folder, "reference", "uniform", number, seed + 1000)
    right: dict[tuple[str, tuple[str, ...]], list[int]] = {key: [0, 0] for key in keys}
    for file in node_files(run):
        for tree in read_trees(file, token_ids=False):
            for node in tree.nodes:
                if node.role == "rollout" and node.round > 0 and node.correct is not None:
                    path = tuple(tree.step_text(i) for i in tree.path(node.parent))
                    one = right[tree.problem.prompt, path]
                    one[0], one[1] = one[0] + node.correct, one[1] + 1
    answered = np.array([right[key][1] for key in keys])
    values = np.array([right[key][0] for key in keys]) / answered
    return values, values * (1 - values) / (answered - 1)


# Report


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(args.output_dir)
    results: dict[str, Any] = {"date": str(date.today()), "versions": versions(), "settings": {}}
    results |= {"seeds": args.seeds, "policy_seeds": args.policy_seeds}
    for num_first in (4, 16):
        found = [simulate(num_first, seed) for seed in range(args.seeds)]
        results["settings"][f"simulation, {num_first} rollouts each"] = found
    for num_first, share, multiples in ((4, 1, MULTIPLES), (16, 3, MULTIPLES[:2])):
        study = Study(WorldConfig, "world", args.num_problems // share, num_first, multiples)
        found = [measure_run(study, folder / f"world-{num_first}-{seed}", seed) for seed in range(args.seeds)]
        results["settings"][f"exact world, {num_first} rollouts each"] = found
    if args.policy_seeds:
        policy = folder / "policy"
        if not (policy / "trained.json").exists():
            train_policy(policy, different_problems(random.Random(0), 6000), args.policy_steps)
            write_json(policy / "trained.json", {"steps": args.policy_steps})
        study = Study(AnnotateConfig, str(policy), args.num_problems // 2, 4, MULTIPLES[:2])
        found = [measure_run(study, folder / f"policy-{seed}", seed) for seed in range(args.policy_seeds)]
        results["settings"]["small policy, 4 rollouts each"] = found
    write_json(folder / "results.json", results)
    image = picture(results).images["light"]
    (folder / "active-labels.png").write_bytes(image)
    if args.docs:
        Path(args.docs).with_name("images").joinpath(Path(PICTURE).name).write_bytes(image)
    save_section(folder, report(results), args.docs, HEADING)


def difference(found: Sequence[dict[str, Any]], multiple: str, error: str) -> Spread:
    """Return `uncertain` minus `uniform` over seeds."""
    return spread([one[multiple]["uncertain"][error] - one[multiple]["uniform"][error] for one in found])


def mean(found: Sequence[dict[str, Any]], *keys: str) -> float:
    """Return the mean of a value over seeds."""
    values = []
    for one in found:
        for key in keys:
            one = one[key]
        values.append(one)
    return sum(values) / len(values)


def shown_spread(value: Spread, digits: int, factor: float = 1.0) -> str:
    """Format a mean with its interval."""
    numbers = [f"{factor * one:+.{digits}f}" for one in (value.mean, value.low, value.high) if one is not None]
    text = numbers[0] + (f" [{numbers[1]}, {numbers[2]}]" if len(numbers) == 3 else "")
    return text.replace("-", "−")


def report(results: dict[str, Any]) -> str:
    """Return the section of `docs/evidence.md`."""
    versions = version_words(results["versions"])
    parts = [
        HEADING,
        "Errors of soft and hard labels after [more rollouts](search.md#more-rollouts-for-a-finished-run) for a finished run, with "
        "`--where uncertain` and `--where uniform` at equal tokens, by `benchmarks/active_labels.py`, which has the command.",
        f"{results['date']}, {versions}. Mean over seeds: {results['seeds']} of the "
        f"simulations and of the exact world, {results['policy_seeds']} of the small policy. Errors are over the labels that more rollouts can "
        "change. Differences are `uncertain` minus `uniform`, with their 95 % intervals over seeds.",
        SETTINGS.strip(),
        f"![Root mean squared error of labels by added tokens]({PICTURE})",
    ]
    for setting, found in results["settings"].items():
        shown = [name for name in ERRORS if name != "positive" or setting.startswith("simulation")]
        rows = [["nothing", "", *cells(found, shown)]]
        for multiple in found[0]:
            if multiple.isdigit():
                added, per_label = (
                    mean(found, multiple, "uncertain", "tokens"),
                    mean(found, multiple, "uniform", "tokens"),
                )
                rows.append(
                    [
                        f"{multiple} × the rollouts, {added / mean(found, 'labels'):,.0f} tokens per label",
                        f"{100 * (added / per_label - 1):+.1f} %".replace("-", "−"),
                        *cells(found, shown, multiple),
                    ]
                )
        titles = [f"{ERRORS[name]}{', %' if name in ('hard', 'positive') else ''}" for name in shown]
        parts += [
            f"### {setting[0].upper()}{setting[1:]} ({mean(found, 'labels'):,.0f} labels, {len(found)} seeds)",
            Table(["added by `uncertain`", "tokens compared with `uniform`", *titles], rows).markdown(),
        ]
    return "\n\n".join([*parts, READING.strip()]) + "\n"


def cells(found: Sequence[dict[str, Any]], names: Sequence[str], multiple: str | None = None) -> list[str]:
    """Return the errors before, or both errors and their difference after a number of rollouts was added."""
    texts = []
    for name in names:
        factor, digits = (100, 2) if name in ("hard", "positive") else (1, 4)
        if multiple is None:
            texts.append(f"{factor * mean(found, 'before', name):.{digits}f}")
            continue
        both = [f"{factor * mean(found, multiple, where, name):.{digits}f}" for where in WHERE]
        texts.append(f"{both[0]}, {both[1]}: {shown_spread(difference(found, multiple, name), digits, factor)}")
    return texts


def picture(results: dict[str, Any]) -> Picture:
    """Draw the root mean squared error over the added tokens."""
    settings = results["settings"]

    def paint(axes, theme):
        for (name, found), color, marker in zip(settings.items(), theme.curves, MARKERS, strict=False):
            multiples = [multiple for multiple in found[0] if multiple.isdigit()]
            start = mean(found, "before", "squared") ** 0.5
            for where, style in (("uncertain", "-"), ("uniform", "--")):
                x = [0.0, *(mean(found, one, where, "tokens") / mean(found, "tokens") for one in multiples)]
                y = [start, *(mean(found, one, where, "squared") ** 0.5 for one in multiples)]
                axes.plot(
                    x,
                    y,
                    style,
                    color=color,
                    marker=marker,
                    markersize=4,
                    linewidth=1.6,
                    label=name if where == "uncertain" else None,
                )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("added tokens, as a multiple of the tokens of the first run")
        axes.set_ylabel("root mean squared error (dashed: uniform)")
        legend(axes, theme)

    ends = "; ".join(
        f"{name}: {mean(found, '2', 'uncertain', 'squared') ** 0.5:.3f} with uncertain and "
        f"{mean(found, '2', 'uniform', 'squared') ** 0.5:.3f} with uniform"
        for name, found in settings.items()
    )
    title = "Root mean squared error of labels by added tokens"
    return draw("active-labels", title, f"{title}. After twice the first rollouts, {ends}", paint, 3.8)


SETTINGS = f"""
- Simulations: {NUM_LABELS:,} labels with 4 or 16 rollouts each. The true probability is 0 or 1 for many steps, and between them the more often, the
  more steps remain. A remaining step costs {STEP_TOKENS} tokens, so a rollout of an uncertain step costs more.
- Exact world: `rollouts` runs of {NUM_SOLUTIONS} solutions and 4 or 16 rollouts per step, for arithmetic problems of the demo. The policy is
  a script that makes a mistake in {100 * SLIP_RATE:.0f} % of the steps and corrects {100 * CORRECTION_RATE:.0f} % of them, so that the true
  probabilities are known. A token is a character.
- Small policy: the same with the language model of the demo, which is trained on such solutions. The true probabilities are estimated with
  {NUM_REFERENCE} other rollouts per label. Their variance is subtracted from the squared errors. It is contained in the other errors.
"""
READING = """
How to read this:

- With 16 first rollouts, `uncertain` has smaller errors at equal tokens: a quarter less squared error in the simulation, and a tenth less in the
  exact world. There, two thirds of the probabilities are between 0.1 and 0.9, so most labels are uncertain and there is little to choose.
- With 4 first rollouts, the two distributions are nearly equal in the simulation and in the exact world. Four outcomes hardly show which labels
  are uncertain. The small policy has one larger difference, with five seeds and few labels.
- `p > 0` is the hard label of Math-Shepherd. It is wrong if no rollout found the right answer although one could. `uncertain` can be worse for
  it, because a step without a right outcome gets few rollouts.
- Both get one distribution of all rollouts. Several smaller rounds were not measured.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument(
        "--output_dir", default="outputs/active-labels", help="folder of all results (default: outputs/active-labels)"
    )
    parser.add_argument("--docs", help="page whose section with these results is replaced (default: none)")
    parser.add_argument(
        "--seeds", type=int, default=20, help="seeds of the simulation and the exact world (default: 20)"
    )
    parser.add_argument("--policy_seeds", type=int, default=5, help="seeds of the small policy (default: 5)")
    parser.add_argument(
        "--num_problems",
        type=int,
        default=24,
        help="problems of a run of the exact world with 4 rollouts (default: 24)",
    )
    parser.add_argument(
        "--policy_steps", type=int, default=1200, help="training steps of the small policy (default: 1200)"
    )
    main(parser.parse_args())
