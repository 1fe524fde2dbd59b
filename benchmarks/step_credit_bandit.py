"""
Policies trained with each step credit on solutions whose true value is known, by a reward model that can be exploited.

```bash
python benchmarks/step_credit_bandit.py --output_dir outputs/step-credit --docs docs/evidence.md
```

A solution needs three steps. At each position, the policy chooses a needed step, a wrong step or padding, and after each step whether to stop. It
does not see whether a step was right. A solution is right if all needed steps are done without an error and the policy stopped by itself. The
reward model knows this only in part: it prefers padding to needed steps, and misses some errors.

The policy is a table of logits, trained by REINFORCE with the advantages of `trl_hrm.step_credit`, which are combined with the outcome reward as
in `StepGRPOTrainer`. As for tokens, the decision to stop gets the advantage of the step before it. Accuracy, length and scores are expected values,
computed from the probabilities of the policy without sampling.

The results are printed and saved as `results.md`, `results.json` and `step-credit-padding.png`; `--docs` replaces their section of a page, and its picture.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from common import save_section, version_words, versions

from trl_hrm.io import write_json
from trl_hrm.pages.page import Table
from trl_hrm.pages.pictures import MARKERS, Picture, draw, legend
from trl_hrm.step_credit import clip_delta, min_form, progress, step_sum


HEADING = "## Step credits and padding"
PICTURE = "images/step-credit-padding.png"  # in the folder of the page
NEEDED, WRONG, PADDING = range(3)
START = (0.60, 0.15, 0.25)  # probabilities of the three kinds before training
START_STOP = (0.1, 0.5)  # probability of stopping after a step before all needed steps are done, and after that
NUM_GROUPS, GROUP_SIZE = 8, 8  # per update
LEARNING_RATE, NUM_UPDATES, EVALUATE_EVERY = 1.0, 500, 25


@dataclass(frozen=True)
class World:
    """
    The problem and its reward model.

    Args:
        reward_model (`str`, *optional*, defaults to `"correctness"`):
            `"correctness"` scores each step alone: `good` if it looks right, `bad` if it has an error, `padding` if it is
            padding. `"value"` scores the solution so far: 0.4, plus 0.15 for each needed step that was tried, plus 0.05 for each
            padding step, and 0.1 after an error.
        num_needed (`int`, *optional*, defaults to `3`):
            Number of needed steps. A needed step after them changes nothing.
        max_steps (`int`, *optional*, defaults to `8`):
            Number of steps after which a solution is cut off.
        slip (`float`, *optional*, defaults to `0.05`):
            Probability that a needed step has an error.
        missed (`float`, *optional*, defaults to `0.1`):
            Probability that the reward model does not see an error.
        good (`float`, *optional*, defaults to `0.8`), bad (`float`, *optional*, defaults to `0.2`), padding (`float`, *optional*, defaults to `0.95`):
            Scores of the correctness model.
        noise (`float`, *optional*, defaults to `0.05`):
            Standard deviation of the noise of each score.
        cut_off_counts (`bool`, *optional*, defaults to `False`):
            Whether a solution that was cut off is right if its steps are.
    """

    reward_model: str = "correctness"
    num_needed: int = 3
    max_steps: int = 8
    slip: float = 0.05
    missed: float = 0.1
    good: float = 0.8
    bad: float = 0.2
    padding: float = 0.95
    noise: float = 0.05
    cut_off_counts: bool = False

    def score(self, is_padding, is_error, num_tried, num_padding, was_error):
        """
        Return the scores of steps without noise, for arrays or single values. `is_error` and `was_error` are errors that the
        reward model sees, in this step and up to this step.
        """
        if self.reward_model == "value":
            return np.where(was_error, 0.1, 0.4 + 0.15 * num_tried + 0.05 * num_padding)
        return np.where(is_padding, self.padding, np.where(is_error, self.bad, self.good))

    @property
    def optimum(self) -> float:
        """Highest accuracy: the needed steps, then stop."""
        return (1 - self.slip) ** self.num_needed


@dataclass(frozen=True)
class Policy:
    """
    Logits, given the position L and the number of needed steps W that were tried.

    Args:
        kinds (`np.ndarray`):
            Logits of the kinds of a step, shape `(L, W, 3)`.
        stop (`np.ndarray`):
            Logits of stopping after a step, shape `(L, W)`. Not used at the last position.
    """

    kinds: np.ndarray
    stop: np.ndarray

    @classmethod
    def start(cls, world: World) -> "Policy":
        """Return the policy before training."""
        shape = (world.max_steps, world.num_needed + 1)
        early, late = (np.log(p / (1 - p)) for p in START_STOP)
        stop = np.full(shape, early)
        stop[:, -1] = late
        return cls(np.broadcast_to(np.log(START), (*shape, 3)).copy(), stop)

    def kind_probs(self) -> np.ndarray:
        weights = np.exp(self.kinds - self.kinds.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def stop_probs(self) -> np.ndarray:
        return 1 / (1 + np.exp(-self.stop))


@dataclass(frozen=True)
class Samples:
    """
    N sampled solutions of at most L steps. Entries after the end of a solution are not used.

    Args:
        lengths (`np.ndarray`):
            Number of steps, shape `(N,)`.
        kinds, before, after (`np.ndarray`):
            Kind of each step, and the number of needed steps tried before and after it, shape `(N, L)`.
        scores (`np.ndarray`):
            Scores of the reward model, shape `(N, L)`.
        is_right (`np.ndarray`):
            Whether each solution is right, shape `(N,)`.
    """

    lengths: np.ndarray
    kinds: np.ndarray
    before: np.ndarray
    after: np.ndarray
    scores: np.ndarray
    is_right: np.ndarray


def sample(policy: Policy, world: World, number: int, generator: np.random.Generator) -> Samples:
    """Sample solutions and their scores."""
    shape = (number, world.max_steps)
    kinds, before, after, scores = (np.zeros(shape, dtype) for dtype in (int, int, int, float))
    tried, num_padding, lengths = (np.zeros(number, int) for _ in range(3))
    has_error, was_seen, is_running = np.zeros(number, bool), np.zeros(number, bool), np.ones(number, bool)
    kind_probs, stop_probs = policy.kind_probs(), policy.stop_probs()
    for j in range(world.max_steps):
        before[:, j] = tried
        kind = (generator.random((number, 1)) > kind_probs[j, tried].cumsum(-1)[:, :2]).sum(-1)
        is_wrong = (kind == WRONG) | ((kind == NEEDED) & (generator.random(number) < world.slip))
        is_seen = is_wrong & (generator.random(number) >= world.missed)
        tried = np.minimum(tried + (kind != PADDING), world.num_needed)
        num_padding += kind == PADDING
        was_seen |= is_seen
        kinds[:, j], after[:, j] = kind, tried
        scores[:, j] = world.score(kind == PADDING, is_seen, tried, num_padding, was_seen)
        lengths += is_running
        has_error |= is_wrong & is_running
        if j + 1 < world.max_steps:
            is_running &= generator.random(number) >= stop_probs[j, tried]
    scores += world.noise * generator.standard_normal(shape)
    is_done = after[np.arange(number), lengths - 1] == world.num_needed
    is_right = is_done & ~has_error & (~is_running | world.cut_off_counts)
    return Samples(lengths, kinds, before, after, scores, is_right)


def expected(policy: Policy, world: World) -> dict[str, float]:
    """
    Compute the expected accuracy, number of steps, number of padding steps, and score per step of a policy.

    The states after j steps are (needed steps tried, padding steps, has an error, has an error that the reward model saw).
    """
    kind_probs, stop_probs = policy.kind_probs(), policy.stop_probs()
    states = {(0, 0, False, False): 1.0}
    accuracy = length = padding = total_score = 0.0
    for j in range(world.max_steps):
        after: dict[tuple, float] = defaultdict(float)
        for (tried, num_padding, has_error, was_seen), weight in states.items():
            needed, wrong, pad = weight * kind_probs[j, tried]
            error = wrong + needed * world.slip
            outcomes = (
                (NEEDED, False, False, needed * (1 - world.slip)),
                (WRONG, True, False, error * world.missed),
                (WRONG, True, True, error * (1 - world.missed)),
                (PADDING, False, False, pad),
            )
            for kind, is_wrong, is_seen, p in outcomes:
                state = (
                    min(tried + (kind != PADDING), world.num_needed),
                    num_padding + (kind == PADDING),
                    has_error or is_wrong,
                    was_seen or is_seen,
                )
                after[state] += p
                length += p
                padding += p * (kind == PADDING)
                total_score += p * float(world.score(kind == PADDING, is_seen, state[0], state[1], state[3]))
        states = {}
        is_last = j + 1 == world.max_steps
        for state, weight in after.items():
            stop = 1.0 if is_last else stop_probs[j, state[0]]
            if state[0] == world.num_needed and not state[2] and (world.cut_off_counts or not is_last):
                accuracy += weight * stop
            states[state] = weight * (1 - stop)
    return {"accuracy": accuracy, "length": length, "padding": padding, "score": total_score / length}


def normalised(rewards: np.ndarray) -> np.ndarray:
    """Return the advantages of GRPO for one group of rewards."""
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)


def unsigned_min_form(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the advantages of `min_form` without its map from [0, 1] to [-1, 1], with the same weights."""
    return min_form([[(1 + reward) / 2 for reward in steps] for steps in rewards], temperature=0.025)


UNSIGNED = "min_form, rewards 0 to 1"
CREDITS: dict[str, Callable[[Sequence[Sequence[float]]], list[list[float]]]] = {
    "step_sum": step_sum,
    "min_form": min_form,
    UNSIGNED: unsigned_min_form,
    "progress": progress,
    "clip_delta": clip_delta,
}


def group_advantages(
    scores: Sequence[Sequence[float]], is_right: np.ndarray, credit: str, outcome_weight: float, weight: float
) -> list[list[float]]:
    """Return the advantages of all steps of a group, combined as in `StepGRPOTrainer`."""
    rewards = outcome_weight * is_right
    if credit == "outcome":  # the aggregated score is one more reward
        rewards = rewards + weight * np.array([min(steps) for steps in scores])
    outcome = normalised(rewards)
    if credit not in CREDITS:
        return [[value] * len(steps) for value, steps in zip(outcome, scores, strict=True)]
    return [
        [value + weight * one for one in steps] for value, steps in zip(outcome, CREDITS[credit](scores), strict=True)
    ]


def train(
    world: World, credit: str, outcome_weight: float, weight: float, seed: int, num_updates: int = NUM_UPDATES
) -> list[dict[str, float]]:
    """Train a policy, and return its expected values every `EVALUATE_EVERY` updates, before the first and after the last."""
    generator = np.random.default_rng(seed)
    policy = Policy.start(world)
    points = [{"update": 0, **expected(policy, world)}]
    for update in range(1, num_updates + 1):
        found = sample(policy, world, NUM_GROUPS * GROUP_SIZE, generator)
        advantages = np.zeros(found.scores.shape)
        for start in range(0, len(found.lengths), GROUP_SIZE):
            group = range(start, start + GROUP_SIZE)
            scores = [found.scores[i, : found.lengths[i]].tolist() for i in group]
            is_right = found.is_right[start : start + GROUP_SIZE]
            for i, steps in zip(
                group, group_advantages(scores, is_right, credit, outcome_weight, weight), strict=True
            ):
                advantages[i, : len(steps)] = steps
        ascend(policy, found, advantages)
        if update % EVALUATE_EVERY == 0 or update == num_updates:
            points.append({"update": update, **expected(policy, world)})
    return points


def ascend(policy: Policy, found: Samples, advantages: np.ndarray) -> None:
    """Change the logits along the policy gradient. Advantages after the end of a solution must be 0."""
    kind_probs, stop_probs = policy.kind_probs(), policy.stop_probs()
    rate = LEARNING_RATE / len(found.lengths)
    for j in range(advantages.shape[1]):
        value, before, after = advantages[:, j], found.before[:, j], found.after[:, j]
        change = np.eye(3)[found.kinds[:, j]] - kind_probs[j, before]
        np.add.at(policy.kinds[j], before, rate * value[:, None] * change)
        if j + 1 < advantages.shape[1]:
            stops = found.lengths == j + 1
            np.add.at(policy.stop[j], after, rate * value * (stops - stop_probs[j, after]))


# name: world, weight of the outcome reward, weight of the process reward
MAIN = "process weight 1"
SETTINGS: dict[str, tuple[World, float, float]] = {
    MAIN: (World(), 1.0, 1.0),
    "process weight 0.25": (World(), 1.0, 0.25),
    "process weight 2": (World(), 1.0, 2.0),
    "no outcome reward": (World(), 0.0, 1.0),
    "padding scores 0.85": (World(padding=0.85), 1.0, 1.0),
    "30 % of errors missed": (World(missed=0.3), 1.0, 1.0),
    "needed steps fail in 30 %": (World(slip=0.3), 1.0, 1.0),
    "cut-off solutions count": (World(cut_off_counts=True), 1.0, 1.0),
    "value model": (World(reward_model="value"), 1.0, 1.0),
    "value model, no outcome reward": (World(reward_model="value"), 0.0, 1.0),
}
OUTCOME_ONLY = "outcome reward only"
MEASURES = {
    "accuracy": "accuracy, %",
    "length": "steps",
    "padding": "padding steps",
    "score": "score per step",
}


def main(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    results = {
        "runs": {setting: train_all(setting, args.seeds) for setting in SETTINGS},
        "optima": {setting: world.optimum for setting, (world, _, _) in SETTINGS.items()},
        "seeds": args.seeds,
        "date": str(date.today()),
        "minutes": (time.perf_counter() - start) / 60,
        "versions": versions(),
    }
    write_json(folder / "results.json", results)
    image = length_picture(results["runs"][MAIN]).images["light"]
    (folder / "step-credit-padding.png").write_bytes(image)
    if args.docs:
        Path(args.docs).with_name("images").joinpath(Path(PICTURE).name).write_bytes(image)
    save_section(folder, report(results), args.docs, HEADING)


def train_all(
    setting: str, seeds: Sequence[int], num_updates: int = NUM_UPDATES
) -> dict[str, list[list[dict[str, float]]]]:
    """Train with every credit in a setting. Return the points of [`train`] for each credit and seed."""
    world, outcome_weight, weight = SETTINGS[setting]
    names = [*([OUTCOME_ONLY] if outcome_weight else []), "outcome", *CREDITS]
    return {name: [train(world, name, outcome_weight, weight, seed, num_updates) for seed in seeds] for name in names}


def last(points: list[list[dict[str, float]]], measure: str) -> list[float]:
    """Return a measure after training, one value per seed. Shares are in percent."""
    return [(100 if measure == "accuracy" else 1) * run[-1][measure] for run in points]


def report(results: dict[str, Any]) -> str:
    """Return the section of `docs/evidence.md`."""
    seeds, runs = results["seeds"], results["runs"]
    versions = version_words(results["versions"])
    start = runs[MAIN]["outcome"][0][0]
    rows = []
    for name, points in runs[MAIN].items():
        cells = []
        for measure in MEASURES:
            values, digits = last(points, measure), 1 if measure == "accuracy" else 2
            cells.append(
                f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
            )
        rows.append([f"`{name}`" if name in ("outcome", *CREDITS) else name, *cells])
    titles = {name: f"`{name}`" if name in ("outcome", *CREDITS) else name for name in runs[MAIN]}
    varied = []
    for setting, found in runs.items():
        cells = [outcome_cell(found[name]) if name in found else "–" for name in titles]
        varied.append([setting, f"{100 * results['optima'][setting]:.0f} / {World().num_needed}", *cells])
    world = World()
    parts = [
        HEADING,
        "Policies trained with each [step credit](step_reward.md) in a world where the true value of every solution is known, by "
        f"`benchmarks/step_credit_bandit.py`, which has the command. A solution needs {world.num_needed} steps, and is cut off after "
        f"{world.max_steps}. At each position, the policy chooses a needed step (wrong in {100 * world.slip:.0f} %), a wrong step or "
        "padding, and after each step whether to stop. The solution is right if all needed steps are done without an error and it was not "
        f"cut off. The reward model scores padding {world.padding}, correct steps {world.good}, and errors {world.bad}. It misses "
        f"{100 * world.missed:.0f} % of the errors. The value model scores the solution so far, and padding raises its score by 0.05 per step.",
        f"{results['date']}, {results['minutes']:.0f} minutes on a shared machine, {versions}. Seeds {min(seeds)} to {max(seeds)}, {NUM_UPDATES} "
        f"updates with {NUM_GROUPS} groups of {GROUP_SIZE} solutions. Accuracies, lengths and scores are computed exactly from the "
        f"probabilities of the policy. Before training, {100 * start['accuracy']:.1f} % are right with {start['length']:.2f} steps.",
        "Outcome reward and process reward, both with weight 1. Mean over seeds (lowest to highest):",
        Table(["credit", *MEASURES.values()], rows).markdown(),
        f"![Steps per solution during training]({PICTURE})",
        "Accuracy in percent / steps, mean over seeds, in other settings. Accuracies that differ by more than 5 points between seeds have "
        "their range in brackets:",
        Table(["setting", "optimum", *titles.values()], varied).markdown(),
        READING.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def outcome_cell(points: list[list[dict[str, float]]]) -> str:
    """Format accuracy and length."""
    accuracies = last(points, "accuracy")
    spread = f" ({min(accuracies):.0f} to {max(accuracies):.0f})" if max(accuracies) - min(accuracies) > 5 else ""
    return f"{statistics.fmean(accuracies):.0f}{spread} / {statistics.fmean(last(points, 'length')):.1f}"


def length_picture(runs: dict[str, list[list[dict[str, float]]]]) -> Picture:
    """Draw the number of steps over training, mean over seeds."""
    curves = {name: points for name, points in runs.items() if name != OUTCOME_ONLY}

    def means(points: list[list[dict[str, float]]]) -> list[float]:
        return [statistics.fmean(run[i]["length"] for run in points) for i in range(len(points[0]))]

    def paint(axes, theme):
        updates = [point["update"] for point in next(iter(runs.values()))[0]]
        axes.axhline(World().num_needed, color=theme.quiet, linestyle=":", linewidth=1.2, label="needed steps")
        for (name, points), color, marker in zip(curves.items(), theme.curves, MARKERS, strict=False):
            axes.plot(
                updates,
                means(points),
                color=color,
                marker=marker,
                markersize=3,
                markevery=4,
                linewidth=1.6,
                label=name,
            )
        axes.set_ylim(0, World().max_steps)
        axes.set_xlabel("updates")
        axes.set_ylabel("steps per solution")
        legend(axes, theme)

    ends = "; ".join(f"{name}: {means(points)[-1]:.1f}" for name, points in curves.items())
    return draw("step-credit", "Steps per solution during training", f"Steps after training. {ends}", paint, 3.4)


READING = """
- `step_sum` is exploited by adding steps. A padding step scores above the mean of the group, so it adds to the sum. Accuracy does not show it
  until padding replaces the needed steps.
- `min_form` and `clip_delta` are not exploited by adding steps, as long as there is an outcome reward and needed steps mostly succeed: a
  padding step changes neither the lowest score nor a score below the threshold.
- Without an outcome reward, no credit learns to solve the problem. A single step has the best lowest score, which is what `outcome` and
  `min_form` learn. `clip_delta` cannot distinguish padding from needed steps, because both are above its threshold. `progress` with a value
  model comes closest.
- If needed steps often fail, a single padding step has a better lowest score than an honest attempt. `outcome` learns it in every seed, and
  `min_form` in some of them. `clip_delta` adds some padding, `progress` much.
- `progress` needs a value model. It does not look ahead, so it prefers padding if padding has the highest score, and adds it if the weight of
  the process reward is large.
- `min_form, rewards 0 to 1` omits the map of the rewards to −1 to 1. Every step then has a positive return, and with a larger weight the policy
  adds steps. `trl_hrm` uses the map.

This is one problem and a policy without a language model. It shows what each credit rewards, not how often a language model finds it.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument(
        "--output_dir", default="outputs/step-credit", help="folder of all results (default: outputs/step-credit)"
    )
    parser.add_argument("--docs", help="page whose section with these results is replaced (default: none)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the sampling (default: 0 to 4)"
    )
    main(parser.parse_args())
