"""
Credit assignments of step rewards in GRPO against each other and against outcome rewards, on the problems of the demo.

```bash
python benchmarks/step_credit_study.py --output_dir outputs/step-credit --docs docs
```

One policy is trained from scratch on solutions with errors and corrections. One reward model is trained from it with `HRMRewardTrainer` on
the HRM view of other solutions whose steps are labelled by the checker. Every arm then trains this policy with GRPO, with the same problems,
steps, completions and learning rate, and with several seeds:

- outcome only: TRL's `GRPOTrainer` with a reward of 1 for a correct answer
- outcome and process: `StepGRPOTrainer` with the same outcome reward and the reward model, one arm per `step_credit`. Both have weight 1. With
  the credit `outcome`, a completion has one process reward, the minimum of its step scores
- process only: the same without the outcome reward, where errors of the reward model can be exploited

All arms are measured on the same held-out problems with the same random numbers: accuracy, length, errors, corrections, process reward, and
the reward of a perfect checker, which is the process reward that a reward model without errors would give.

The design was fixed before the first run of the study. The learning rate is the best one of three for the outcome-only arm with seed 100, which the
study does not use: its training accuracy was 99.7 % after 30 steps at 3e-4, 98.4 % after 100 steps at 1e-4 and 97.2 % after 100 steps at
5e-5. The credit `outcome` without outcome reward was run for 60 steps at 1e-4 with seed 100 to measure the time of a step. The study was run
twice: `min_form` was corrected during the first run. The design is the same, except that the second run also counts wrong operations, because
some policies of the first run had learned them. Policy and reward model have the sizes of the demo. All other settings are defaults.

If the study is interrupted, the same command resumes it. The results are printed and saved as `results.md` and `results.json`; `--docs` replaces
their section of `evidence.md` and their picture.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from common import replace_section, version_words, versions

from trl_hrm import StepReward
from trl_hrm.data.build_config import BuildStepwiseConfig
from trl_hrm.data.stepwise import build_stepwise
from trl_hrm.demo.jobs import make_policy, make_world
from trl_hrm.demo.over_seeds import interval, signed, spread
from trl_hrm.demo.pipeline import DATASET, reward_job
from trl_hrm.demo.policy import policy_rates, solution_text
from trl_hrm.demo.profiles import FULL, RewardModel
from trl_hrm.demo.runner import Runner
from trl_hrm.demo.world import ANSWER, NAMES, STEP, Problem, judge
from trl_hrm.grading.extraction import extract_answer
from trl_hrm.intervals import difference_interval
from trl_hrm.io import read_json, read_json_lines, write_json
from trl_hrm.pages.numbers import points_between
from trl_hrm.pages.page import Table, code
from trl_hrm.pages.pictures import MARKERS, THEMES, new_figure, style_axes
from trl_hrm.search.engines.base import Sample
from trl_hrm.search.engines.transformers import TransformersEngine
from trl_hrm.search.open_tree import request_seed
from trl_hrm.step_credit import CREDITS
from trl_hrm.step_metrics import auroc
from trl_hrm.trainer.reward_hacking_callback import compare as compare_evaluations


if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADING = "## Credit for steps in RL"
PICTURE = "images/step-credit.png"  # in the folder of the page
READING = """
What helped: the outcome reward. No process reward improved on it. Together with it, one reward per completion and `step_sum` slowed learning
down, and `clip_delta` was better than one reward per completion during training. At the end, no difference from outcome only or from one
reward per completion is settled.

What failed: the process reward alone. All credits were hacked. Accuracy rises in the first 5 to 10 steps, and then falls while the process
reward rises. `step_sum` and `progress` lost accuracy fastest. At the end, no difference from one reward per completion is settled, because
the seeds differ much.

Why: the reward model has learned that corrections are a good sign, because every correction in its training data is right. Policies learn to
write corrections after right steps. With the outcome reward, these repeat the right value, and cost tokens but little accuracy. Without it,
they become wrong, and the policies apply other operations than those of the problem, which never occur in the training data of the reward
model. `clip_delta` with the outcome reward writes no additional corrections: scores above 0.5 give no bonus, and most steps of correct
solutions have them already.

Not tested: other weights and learning rates, a KL penalty, a reward model that is trained again on solutions of the new policy, and problems
that the policy cannot solve with greedy decoding, where an outcome reward is rare and a process reward could help more.
"""
NUM_TRAIN, NUM_RATED = 1200, 300  # problems of GRPO, and problems with labelled solutions for the reward model
NUM_SAMPLES = 8  # solutions per held-out problem and measurement
MEASURED_AT = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # shares of the training steps
SPANS = (1, 2)  # single steps and pairs, as the reward model was trained
MAX_TOKENS = 96  # more than twice the length of a solution of the policy before training
SAMPLE_SEED = 12345  # of held-out solutions, the same for all arms and seeds
GRPO = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": MAX_TOKENS,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 5,
    "disable_tqdm": True,
}
TITLES = {
    "outcome": "scalar",  # one reward per completion
    "step_sum": "step_sum",
    "min_form": "min_form",
    "progress": "progress",
    "clip_delta": "clip_delta",
}


@dataclass(frozen=True)
class Arm:
    """
    Rewards of a training.

    Args:
        credit (`str`, *optional*):
            Credit assignment of the process reward. `None`: no process reward.
        has_outcome (`bool`, *optional*, defaults to `True`):
            Whether correct answers are rewarded.
    """

    credit: str | None
    has_outcome: bool = True

    @property
    def title(self) -> str:
        if self.credit is None:
            return "outcome only"
        return f"outcome + {TITLES[self.credit]}" if self.has_outcome else f"{TITLES[self.credit]} only"


ARMS = (
    {"outcome_only": Arm(None)}
    | {f"outcome+{credit}": Arm(credit) for credit in CREDITS}
    | {credit: Arm(credit, has_outcome=False) for credit in CREDITS}
)
STEP_CREDITS = [credit for credit in CREDITS if credit != "outcome"]
COMPARISONS = {  # both sides of each difference
    "outcome and process against outcome only": [(f"outcome+{credit}", "outcome_only") for credit in CREDITS],
    "outcome and process, step credits against scalar": [
        (f"outcome+{credit}", "outcome+outcome") for credit in STEP_CREDITS
    ],
    "process only against outcome only": [(credit, "outcome_only") for credit in CREDITS],
    "process only, step credits against scalar": [(credit, "outcome") for credit in STEP_CREDITS],
}
MEASURES = {"last": "at the end", "training": "mean over training"}


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(args.output_dir)
    for name in ("measures", "runs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with Runner(folder, args.num_workers) as runner:
        run_stages(runner, folder, args)
    results = collect(folder, args.arms, args.seeds) | {
        "settings": vars(args),
        "date": str(date.today()),
        "minutes": sum(stage["seconds"] for stage in runner.stages) / 60,
        "versions": versions(),
    }
    write_json(folder / "results.json", results)
    section = report(results)
    (folder / "results.md").write_text(section, encoding="utf-8")
    figure = draw(results)
    figure.savefig(folder / "curves.png", metadata={"Software": None})
    if args.docs:
        page = Path(args.docs, "evidence.md")
        page.write_text(replace_section(page.read_text(encoding="utf-8"), section, HEADING), encoding="utf-8")
        figure.savefig(Path(args.docs, PICTURE), metadata={"Software": None})
    print(section)


def run_stages(runner: Runner, folder: Path, args: argparse.Namespace) -> None:
    """Run the stages of the study in order."""

    def at(path: str) -> str:
        return str(folder / path)

    # `held-out.jsonl` has labelled solutions of problems that occur nowhere else. They train the reward model
    sizes = {"num_train": NUM_TRAIN, "num_test": args.num_test, "num_starts": 1, "num_judged": NUM_RATED}
    runner.run("world", {"world": partial(make_world, at("world"), **sizes, seed=args.seed)}, lambda: "problems")
    policy = partial(make_policy, at("world"), at("policy"), steps=args.policy_steps, seed=args.seed)
    runner.run("policy", {"policy": policy}, lambda: f"{args.policy_steps} steps")
    config = BuildStepwiseConfig(
        inputs=[at("world/held-out.jsonl")], view="hrm", output_dir=at("datasets/rated"), **DATASET
    )
    runner.run("dataset", {"rated": partial(build_stepwise, config)}, lambda: f"{NUM_RATED} problems")
    model = RewardModel("hrm", "HRM", "hard", "rated", (args.seed,), args.reward_steps, is_merged=True)
    job = reward_job(folder, model, "hrm", args.seed)
    runner.run("reward-model", {"hrm": job}, lambda: f"{args.reward_steps} steps")
    before = partial(
        measure_before, at("policy"), at("models/hrm"), at("world/test.jsonl"), output=at("measures/before.json")
    )
    runner.run("before", {"before": before}, lambda: describe_before(folder))
    jobs = {
        f"{name}-{seed}": partial(
            train_arm,
            at("policy"),
            at("models/hrm"),
            at("world/train.jsonl"),
            at("world/test.jsonl"),
            name=name,
            seed=seed,
            max_steps=args.max_steps,
            output=at(f"runs/{name}-{seed}.json"),
        )
        for seed in args.seeds
        for name in args.arms
    }
    runner.run("training", jobs, lambda: f"{len(jobs)} policies, {args.max_steps} steps")


def measure_before(policy: str, reward_model: str, test: str, output: str) -> None:
    """Measure the policy before training, and the reward model on the steps of its solutions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    held_out = HeldOut(AutoTokenizer.from_pretrained(policy), StepReward(reward_model, spans=SPANS), test)
    model = AutoModelForCausalLM.from_pretrained(policy)
    found = held_out.measure(model, greedy=True)
    if not any(found["right"]):
        raise ValueError("The policy solves none of the held-out problems. Use more --policy_steps.")
    scored = [
        (problem, one) for problem, one in zip(held_out.prompts, held_out.reward.scored, strict=True) if one.scores
    ]
    right = [step.on_track for problem, one in scored for step in judge(Problem.parse(problem), one.steps)]
    flat = [score for _, one in scored for score in one.scores]
    found["auroc"] = auroc(np.array(flat), np.array(right))
    found["needless"] = reward_needless_corrections(held_out)
    write_json(Path(output), found)


def reward_needless_corrections(held_out: "HeldOut") -> dict[str, float]:
    """Return the mean process reward of right solutions, without and with corrections that repeat a right step."""
    problems = [Problem.parse(row["problem"]) for row in held_out.problems]
    found = {}
    for name, places in (("none", ()), ("first", (0,)), ("every", range(len(NAMES)))):
        texts = []
        for problem in problems:
            values, steps = problem.values(), []
            for i in range(len(NAMES)):
                steps.append(problem.step(i, values[i]))
                if i in places:
                    steps.append(problem.step(i, values[i], correction=True))
            texts.append(solution_text([*steps, f"# Answer\n{values[-1]}"]))
        found[name] = fmean(held_out.reward([problem.text() for problem in problems], texts))
    return found


def describe_before(folder: Path) -> str:
    found = read_json(folder / "measures" / "before.json")
    return f"accuracy {fmean(found['right']):.0%}, AUROC of step scores {found['auroc']:.2f}"


def train_arm(
    policy: str, reward_model: str, train: str, test: str, name: str, seed: int, max_steps: int, output: str
) -> None:
    """Train the policy with the rewards of an arm, and write its measurements during training."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trl_hrm import StepGRPOConfig, StepGRPOTrainer

    began = time.process_time()
    arm, tokenizer, reward = ARMS[name], AutoTokenizer.from_pretrained(policy), StepReward(reward_model, spans=SPANS)
    held_out, curve = HeldOut(tokenizer, reward, test), []
    places = {round(share * max_steps) for share in MEASURED_AT}

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step in places:
                is_last = state.global_step == max_steps
                curve.append({"step": state.global_step, **held_out.measure(model, greedy=is_last)})

    rows = [{"prompt": row["problem"], "answer": row["answer"]} for row in read_problems(train)]
    with tempfile.TemporaryDirectory() as folder:
        settings = {**GRPO, "output_dir": folder, "max_steps": max_steps, "seed": seed}
        inputs = {
            "model": policy,
            "reward_funcs": [accuracy] if arm.has_outcome else None,
            "train_dataset": Dataset.from_list(rows),
            "processing_class": tokenizer,
            "callbacks": [Measure()],
        }
        if arm.credit is None:
            trainer = GRPOTrainer(args=GRPOConfig(**settings), **inputs)
        else:
            trainer = StepGRPOTrainer(
                args=StepGRPOConfig(step_credit=arm.credit, **settings), step_reward=reward, **inputs
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "entropy" in entry]
    seconds = time.process_time() - began
    write_json(Path(output), {"arm": name, "seed": seed, "cpu_seconds": seconds, "curve": curve, "log": log})


def accuracy(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 for each completion with the correct answer, otherwise 0. A reward function of TRL."""
    return [float(is_right(text, expected)) for text, expected in zip(completions, answer, strict=True)]


def is_right(text: str, answer: str) -> bool:
    return extract_answer(text, ["marker"]) == answer


def is_operation(problem: Problem, step: str) -> bool:
    """Return whether a step applies an operation of the problem correctly, possibly to a wrong value."""
    found = STEP.fullmatch(step)
    return bool(found) and step == problem.step(NAMES.index(found[2]), int(found[3]), bool(found[1]))


def read_problems(path: str) -> list[dict[str, str]]:
    return [row for _, row in read_json_lines(Path(path), "Delete the output folder and run the study again.")]


class HeldOut:
    """
    Measurements on held-out problems.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        reward ([`StepReward`]):
            Process reward.
        test (`str`):
            JSON Lines file with `problem` and `answer`.
    """

    def __init__(self, tokenizer: Any, reward: StepReward, test: str):
        self.tokenizer = tokenizer
        self.reward = reward
        self.problems = read_problems(test)
        self.prompts = [row["problem"] for row in self.problems for _ in range(NUM_SAMPLES)]

    def sample(
        self, model: Any, temperature: float = 1.0, n: int = NUM_SAMPLES
    ) -> list[tuple[dict[str, str], Sample]]:
        """Return problems and `n` solutions of each. The random numbers only depend on the problem."""

        async def sample_all() -> list[list[Sample]]:
            engine = TransformersEngine(model, self.tokenizer, temperature, batch_size=256)
            prompts = [row["problem"] for row in self.problems]
            requests = [
                engine.sample(self.tokenizer.encode(prompt), n, [], MAX_TOKENS, request_seed(SAMPLE_SEED, prompt, 0))
                for prompt in prompts
            ]
            samples = await asyncio.gather(*requests)
            await engine.close()
            return samples

        was_training = model.training
        found = asyncio.run(sample_all())
        model.train(was_training)
        return [(row, one) for row, samples in zip(self.problems, found, strict=True) for one in samples]

    def measure(self, model: Any, greedy: bool = False) -> dict[str, Any]:
        """
        Return the measurements of a policy.

        Returns:
            `dict`: `right` and `process` (mean over the solutions of each problem: correct answers, and process rewards), and means
            over solutions: `checker` (process reward if every step on track had the score 1 and every other step 0), `num_steps`,
            `num_tokens`, `waits` (corrections), `unfinished` (cut off, or without an answer), `guarded` (rejected by a guard of the
            reward). `invalid` is the share of steps that do not apply an operation of the problem correctly to any value. `slips`, `corrected`
            and `spurious` are the rates of [`~demo.policy.PolicyRates`]. `example` is the most frequent solution of the
            first problem. With `greedy`, `greedy` is the accuracy of greedy decoding.
        """
        found = self.sample(model)
        texts, shape = [one.text for _, one in found], (len(self.problems), NUM_SAMPLES)
        process, scored = self.reward(self.prompts, texts), self.reward.scored
        worlds = [Problem.parse(problem) for problem in self.prompts]
        verdicts = [judge(problem, one.steps) for problem, one in zip(worlds, scored, strict=True)]
        perfect = [
            not one.guards and all(step.on_track for step in steps)
            for one, steps in zip(scored, verdicts, strict=True)
        ]
        invalid = [
            not is_operation(problem, step)
            for problem, one in zip(worlds, scored, strict=True)
            for step in one.steps
            if not ANSWER.fullmatch(step)
        ]
        right = [is_right(one.text, row["answer"]) for row, one in found]
        ended = [one.finish == "eos" and extract_answer(one.text, ["marker"]) is not None for _, one in found]
        rates = policy_rates(zip(worlds, texts, strict=True))
        measured = {
            "right": np.reshape(right, shape).mean(axis=1).tolist(),
            "process": np.reshape(process, shape).mean(axis=1).tolist(),
            "checker": fmean(perfect),
            "num_steps": fmean(len(one.steps) for one in scored),
            "num_tokens": fmean(len(one.token_ids) for _, one in found),
            "unfinished": 1 - fmean(ended),
            "guarded": self.reward.metrics["guarded"],
            "slips": rates.slip_rate,
            "corrected": rates.correction_rate,
            "spurious": rates.spurious_rate,
            "waits": fmean(text.count("Wait,") for text in texts),
            "invalid": fmean(invalid),
            "example": Counter(texts[:NUM_SAMPLES]).most_common(1)[0][0],
        }
        if greedy:
            solved = [is_right(one.text, row["answer"]) for row, one in self.sample(model, temperature=0.0, n=1)]
            measured["greedy"] = fmean(solved)
        return measured


def collect(folder: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the measurements before training, and the curves of every arm, one per seed."""
    before = read_json(folder / "measures" / "before.json")
    runs = {name: [read_json(folder / "runs" / f"{name}-{seed}.json") for seed in seeds] for name in arms}
    return {
        "before": before,
        "curves": {name: [[{"step": 0, **before}, *run["curve"]] for run in found] for name, found in runs.items()},
        "cpu_minutes": sum(run["cpu_seconds"] for found in runs.values() for run in found) / 60,
    }


def accuracies(curves: Sequence[Sequence[dict[str, Any]]], measure: str) -> np.ndarray:
    """Return the accuracy at the end, or its mean over training (trapezoidal rule), of shape `(seeds, problems)`."""
    values = np.array([[point["right"] for point in curve] for curve in curves])  # (seeds, points, problems)
    if measure == "last":
        return values[:, -1]
    steps = [point["step"] for point in curves[0]]
    return np.trapezoid(values, steps, axis=1) / steps[-1]


@dataclass(frozen=True)
class Difference:
    """Difference of two arms in accuracy: mean, and 95 % intervals over problems and over seeds."""

    mean: float
    low: float
    high: float
    seeds: Any

    @property
    def direction(self) -> str:
        """`"above"` or `"below"` if neither interval contains 0, otherwise `""`."""
        if not self.seeds.is_settled:
            return ""
        lowest, highest = min(self.low, self.seeds.low), max(self.high, self.seeds.high)
        return "above" if lowest > 0 else "below" if highest < 0 else ""


def compare(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Compare two arms of shape `(seeds, problems)`, paired by seed and problem."""
    paired = ours - theirs
    low, high = difference_interval(paired.mean(axis=0))
    return Difference(float(paired.mean()), low, high, spread(paired.mean(axis=1).tolist()))


def hacking(curves: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """
    Compare the end of training with the best measurement before, as [`RewardHackingCallback`] does, on means over seeds.

    Returns:
        `dict`: See [`~trainer.reward_hacking_callback.compare`].
    """
    steps = [point["step"] for point in curves[0]]
    right, process = (
        np.array([[point[name] for point in curve] for curve in curves]).mean(axis=0) for name in ("right", "process")
    )  # (points, problems)
    points = [
        {"step": step, "accuracy": float(row.mean()), "outcomes": row, "process_rewards": rewards}
        for step, row, rewards in zip(steps, right, process, strict=True)
    ]
    best = max(points[:-1], key=lambda point: point["accuracy"])
    return compare_evaluations(best, points[-1], right[-1], process[-1], len(points) * (len(points) - 1) // 2)


def report(results: dict[str, Any]) -> str:
    """Return the section of `docs/evidence.md`."""
    curves, before, args = results["curves"], results["before"], results["settings"]
    seeds, num_problems = args["seeds"], len(before["right"])
    versions = version_words(results["versions"])
    parts = [
        HEADING,
        "Credit assignments of `StepGRPOTrainer` on the demo's problems, by `benchmarks/step_credit_study.py`, which has the command and the "
        f"design. A policy from scratch ({args['policy_steps']} steps) and one reward model (HRM view of labelled solutions of {NUM_RATED} "
        f"problems, {args['reward_steps']} steps, AUROC {before['auroc']:.2f} on the steps of this policy) are the same in all arms. Each arm "
        f"is {args['max_steps']} steps of GRPO with {GRPO['per_device_train_batch_size']} completions, learning rate "
        f'{GRPO["learning_rate"]:g}, seeds {", ".join(map(str, seeds))}. "outcome" rewards correct answers. Outcome and process '
        f'reward both have weight 1. "scalar" is the credit `outcome`, one process reward per completion. Measured on {num_problems} held-out problems, {NUM_SAMPLES} solutions of each.',
        f"{results['date']}, {results['minutes']:.0f} minutes in {args['num_workers']} processes with one thread on a shared machine, "
        f"{results['cpu_minutes']:.0f} minutes of CPU time for the {len(curves) * len(seeds)} trainings and their measurements, {versions}.",
        "Accuracy in percent, mean over seeds (lowest to highest). The hacking gap is the accuracy lost since the best measurement before the "
        "end, in points, with the interval of `RewardHackingCallback`, on means over seeds. The next column is the change of the process reward "
        "since then. Hacked is yes if accuracy has fallen and the process reward has risen, no if a loss of 5 points is excluded, and otherwise "
        "open:",
        accuracy_table(curves, before).markdown(),
        f"![Accuracy and process reward during training]({PICTURE})",
        'What the policies do at the end: steps, tokens and corrections ("Wait,") per solution. Rates in percent: steps that continue from a '
        "wrong value, steps that apply another operation than the problem's or calculate wrongly, steps with a wrong and with the right value that "
        "the next step corrects, solutions without an answer, and solutions that a guard rejects. The checker's reward is the process reward that a reward model without errors would give:",
        behaviour_table(curves, before).markdown(),
        "Differences of accuracy in points, paired by seed and problem. First the 95 % interval over problems, then the t interval over "
        f"{len(seeds)} seeds:",
        *comparison(curves),
        "The most frequent solution of a problem at the end (first seed):",
        examples_table(curves, before).markdown(),
        f"The process reward of right solutions of the held-out problems is {before['needless']['none']:.2f} on average. With a correction that "
        f"repeats the first step, it is {before['needless']['first']:.2f}, and with one after every step {before['needless']['every']:.2f}. A "
        "reward model without errors would give 1 to all of them. This was measured after the trainings, to explain them.",
        *([READING.strip()] if list(curves) == list(ARMS) else []),  # about the full study
        "All arms have the learning rate of the outcome-only arm, although the advantages of the credits differ in scale. There is one policy "
        "and one reward model, and the intervals do not cover their choice. The intervals of the differences do not correct for the number of "
        f"comparisons. The policy before training answers {100 * before['greedy']:.0f} % correctly with greedy decoding, so RL only has to "
        "remove errors of sampling here.",
    ]
    return "\n\n".join(parts) + "\n"


def over_seeds(values: Sequence[float], digits: int = 1) -> str:
    mean = f"{fmean(values):.{digits}f}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def accuracy_table(curves: dict[str, Any], before: dict[str, Any]) -> Table:
    rows = [
        ["before training", f"{100 * fmean(before['right']):.1f}", f"{100 * before['greedy']:.1f}", "", "", "", ""]
    ]
    for name, found in curves.items():
        gap = hacking(found)
        shares = {key: (100 * accuracies(found, key).mean(axis=1)).tolist() for key in MEASURES}
        rows.append(
            [
                ARMS[name].title,
                over_seeds(shares["last"]),
                over_seeds([100 * curve[-1]["greedy"] for curve in found]),
                over_seeds(shares["training"]),
                f"{signed(100 * gap['loss'])} ({points_between(gap['low'], gap['high'])}) since step {gap['from_step']}",
                signed(gap["rise"], 2),
                gap["answer"],
            ]
        )
    head = ["rewards", "at the end", "greedy", "mean over training", "hacking gap", "process reward", "hacked"]
    return Table(head, rows)


def behaviour_table(curves: dict[str, Any], before: dict[str, Any]) -> Table:
    shown: dict[str, Callable[[dict[str, Any]], float]] = {
        "steps": lambda point: point["num_steps"],
        "tokens": lambda point: point["num_tokens"],
        "corrections": lambda point: point["waits"],
        "wrong values": lambda point: 100 * point["slips"],
        "wrong operations": lambda point: 100 * point["invalid"],
        "corrected": lambda point: 100 * point["corrected"],
        "corrected if right": lambda point: 100 * point["spurious"],
        "no answer": lambda point: 100 * point["unfinished"],
        "guarded": lambda point: 100 * point["guarded"],
        "process reward": lambda point: fmean(point["process"]),
        "checker's reward": lambda point: point["checker"],
        "difference": lambda point: fmean(point["process"]) - point["checker"],
    }
    rows = []
    for title, ends in [
        ("before training", [before]),
        *((ARMS[name].title, [curve[-1] for curve in found]) for name, found in curves.items()),
    ]:
        means = {name: fmean(map(value, ends)) for name, value in shown.items()}
        difference = signed(means.pop("difference"), 2)
        digits = {"corrections": 2, "process reward": 2, "checker's reward": 2}
        rows.append([title, *(f"{value:.{digits.get(name, 1)}f}" for name, value in means.items()), difference])
    return Table(["rewards", *shown], rows)


def comparison(curves: dict[str, Any]) -> list[str]:
    """Return the table of differences, and what they settle."""
    rows: list[list[str]] = []
    verdicts: list[str] = []
    for title, pairs in COMPARISONS.items():
        kept = [(ours, theirs) for ours, theirs in pairs if ours in curves and theirs in curves]
        found = {
            measure: [
                compare(accuracies(curves[ours], measure), accuracies(curves[theirs], measure))
                for ours, theirs in kept
            ]
            for measure in MEASURES
        }
        for i, (ours, theirs) in enumerate(kept):
            differences = [found[measure][i] for measure in MEASURES]
            shown = [
                f"{signed(100 * one.mean)} ({points_between(one.low, one.high)}; {interval(one.seeds)})"
                for one in differences
            ]
            rows.append([f"{ARMS[ours].title} − {ARMS[theirs].title}", *shown])
        for measure, words in MEASURES.items() if kept else ():
            parts = []
            for direction, name in (("above", "higher"), ("below", "lower"), ("", "not settled")):
                credits = [
                    TITLES[ARMS[ours].credit]
                    for (ours, _), one in zip(kept, found[measure], strict=True)
                    if one.direction == direction
                ]
                parts += [f"{name}: {', '.join(credits)}"] if credits else []
            verdicts.append(f"- {title}, {words}: {'; '.join(parts)}")
    introduction = "A difference is settled if neither interval contains 0:"
    return [Table(["", *MEASURES.values()], rows).markdown(), introduction, "\n".join(verdicts)]


def examples_table(curves: dict[str, Any], before: dict[str, Any]) -> Table:
    def shown(text: str) -> str:
        return code(" / ".join(step.replace("\n", " ") for step in text.split("\n\n")))

    rows = [["before training", shown(before["example"])]]
    rows += [[ARMS[name].title, shown(found[0][-1]["example"])] for name, found in curves.items()]
    return Table(["rewards", "solution"], rows)


def draw(results: dict[str, Any]) -> "Figure":
    """Draw accuracy and process reward over training: one column with outcome reward and one without, mean and range over seeds."""
    theme, curves = THEMES["light"], results["curves"]
    columns = {
        "with outcome reward": [name for name in curves if ARMS[name].has_outcome],
        "process reward only": [name for name in curves if not ARMS[name].has_outcome],
    }
    styles = dict(zip([None, *CREDITS], zip(theme.curves, MARKERS, strict=False), strict=True))
    figure = new_figure()
    figure.set_size_inches(9, 6)
    figure.set_dpi(110)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, (title, names) in zip(panels.T, columns.items(), strict=True):
        for panel in column:
            style_axes(panel, theme)
        column[0].set_title(title, fontsize=10, color=theme.text)
        for name in names:
            (color, marker), steps = styles[ARMS[name].credit], [point["step"] for point in curves[name][0]]
            for panel, key, scale in zip(column, ("right", "process"), (100, 1), strict=True):
                values = scale * np.array([[fmean(point[key]) for point in curve] for curve in curves[name]])
                panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.12, linewidth=0)
                label = "no process reward" if ARMS[name].credit is None else TITLES[ARMS[name].credit]
                panel.plot(
                    steps, values.mean(axis=0), color=color, marker=marker, markersize=4, linewidth=1.8, label=label
                )
        column[1].set_xlabel("training step")
    panels[0, 0].set_ylabel("accuracy, %")
    panels[1, 0].set_ylabel("process reward")
    lines = {line.get_label(): line for panel in panels.flat for line in panel.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument(
        "--output_dir", default="outputs/step-credit", help="folder of all results (default: outputs/step-credit)"
    )
    parser.add_argument("--docs", help="folder of evidence.md, whose section is replaced (default: none)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to train (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of GRPO (default: 0 to 2)")
    parser.add_argument("--seed", type=int, default=42, help="seed of problems, policy and reward model (default: 42)")
    parser.add_argument("--max_steps", type=int, default=50, help="GRPO steps of each arm (default: 50)")
    parser.add_argument("--num_test", type=int, default=100, help="number of held-out problems (default: 100)")
    parser.add_argument(
        "--policy_steps",
        type=int,
        default=FULL.policy_steps,
        help=f"training steps of the policy (default: {FULL.policy_steps})",
    )
    parser.add_argument(
        "--reward_steps", type=int, default=150, help="training steps of the reward model (default: 150)"
    )
    parser.add_argument("--num_workers", type=int, default=2, help="number of parallel jobs (default: 2)")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
