"""
Labels for step reward models against each other at equal tokens, and reward models trained on outcomes alone, on the problems of the demo.

```bash
python benchmarks/labels_study.py --output_dir outputs/labels --docs docs
```

One policy is trained from scratch on solutions with errors and corrections. Each seed of the study has its own problems, samples, judge and
training. All reward models start from the policy, have its size, and are trained for the same number of steps, each on two rows of up to 1,024
tokens of packed problems.

Part `labels`: which labels teach most for the same number of sampled tokens.

- Monte Carlo arms spend all tokens on solutions and rollouts of `NUM_PROBLEMS` problems. This is the budget of a seed.
- Consensus arms use the same solutions and rollouts, and pay for the judge out of the same budget. They have as many of these problems as they
  can pay for, in the order of the file.
- Judge arms sample solutions without rollouts, and pay for the judge. They have as many problems as they can pay for.
- A vote of the judge costs as many tokens as the solution that it judges, and `VERDICT_TOKENS` for the verdict: it writes as much about each
  step as the step is long. A token of the judge costs as much as a token of the policy. Prompts cost nothing, as for rollouts, because they
  are read and not generated.

The judges are scripted. They know the first wrong step from the checker, and are wrong at a known rate. `independent` is misled by a share
`ERROR_RATE` of the solutions, whatever they contain, and then believes in a random other place. `lenient` overlooks a share `OVERLOOKED` of
the errors in solutions with a right answer, which Monte Carlo overlooks, too. Each of the `NUM_VOTES` votes states this belief with
probability `FAITHFUL`, otherwise a random other place.

After the first reward models of seed 0, two arms were added, which have no labels after the first wrong step, as consensus has none: without
them, the effect of the filter could not be told from the effect of these labels.

Part `outcomes`: ORM and implicit PRM, trained on the outcomes of the solutions of the Monte Carlo runs, next to PRM and HRM on the same trees
with Monte Carlo labels and with labels of the checker.

The rest of the design was fixed before the first run. Seed 100, which the study does not use, was used to choose the threshold 0.5, and the learning
rate of all reward models from two: 3e-4 had a higher AUROC of first errors than 1e-3 with soft Monte Carlo labels, with outcomes, and for the
implicit PRM (where β = 0.5 was worse than the default 0.05). The other settings are defaults or settings of the demo.

If the study is interrupted, the same command resumes it. The results are printed and saved as `results.md` and `results.json`; `--docs` replaces
their sections of `evidence.md` and their pictures.
"""

import argparse
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from common import replace_section, version_words, versions

from trl_hrm.data.build_config import BuildStepwiseConfig
from trl_hrm.data.stepwise import build_stepwise
from trl_hrm.data.verdicts import JUDGES as JUDGE_FOLDER
from trl_hrm.data.verdicts import NO_ERROR, VERDICTS, read_verdicts
from trl_hrm.demo.jobs import make_policy, make_world, measure_model, train
from trl_hrm.demo.over_seeds import interval, signed, spread
from trl_hrm.demo.pipeline import DATASET, REWARD, WHOLE_SOLUTIONS, describe_search, export_job, search_jobs
from trl_hrm.demo.policy import solution_text
from trl_hrm.demo.profiles import FULL
from trl_hrm.demo.runner import Runner
from trl_hrm.demo.world import Problem, judge
from trl_hrm.evaluation.results import load_results
from trl_hrm.io import dump_json, read_json, read_json_lines, write_json
from trl_hrm.pages.page import Table
from trl_hrm.pages.pictures import THEMES, new_figure, style_axes
from trl_hrm.scripts.best_of_n import BestOfNConfig, best_of_n
from trl_hrm.scripts.judge import JudgeConfig
from trl_hrm.scripts.judge import judge as write_verdicts
from trl_hrm.search.engines.base import CharTokenizer, ScriptedEngine
from trl_hrm.search.nodes import open_nodes
from trl_hrm.search.run_folder import node_files
from trl_hrm.search.tree import ROOT
from trl_hrm.step_format import StepFormat
from trl_hrm.step_tree import StepTree


if TYPE_CHECKING:
    from matplotlib.figure import Figure

REMEDY = "Delete the output folder and run the study again."
NUM_PROBLEMS = 80  # per seed, with rollouts after every step
NUM_WHOLE = 320  # per seed, with solutions only. More than the judge arms can pay for
NUM_SOLUTIONS, NUM_COMPLETIONS = 6, 6  # per problem, and rollouts per step
MAX_TOKENS = 96  # more than twice the length of a solution
NUM_HELD_OUT = 120  # problems with solutions for AUROC
NUM_CANDIDATES, SIZES = 32, (4, 16)  # solutions per test problem, and N of best-of-N
NUM_VOTES = 3
PROBLEM = re.compile(r"Start with .* modulo \d+\.")
NUMBERED_STEP = re.compile(r"^Step \d+: (.*(?:\n\d)?)", re.MULTILINE)  # an answer has two lines
VERDICT_TOKENS = 8
ERROR_RATE, FAITHFUL = 0.15, 0.9
OVERLOOKED, LENIENT_ERROR_RATE = 0.5, 0.03
LEARNING_RATE = 3e-4  # chosen with seed 100, from this and 1e-3
REWARD_MODEL = {
    **REWARD,
    "per_device_train_batch_size": 2,
    "dataloader_drop_last": True,
    "learning_rate": LEARNING_RATE,
}


@dataclass(frozen=True)
class Arm:
    """
    A reward model of the study.

    Args:
        title (`str`):
            Name in the tables.
        dataset (`str`):
            Training dataset.
        aggregate (`str`, *optional*, defaults to `"min"`):
            How step scores are combined for best-of-N.
        command (`str`, *optional*, defaults to `"reward"`):
            Training command.
        options (`dict[str, Any]`, *optional*):
            Options of the training that differ from `REWARD_MODEL`.
    """

    title: str
    dataset: str
    aggregate: str = "min"
    command: str = "reward"
    options: dict[str, Any] = field(default_factory=dict)


LABELS = {
    "mc-soft": Arm("Monte Carlo, soft", "mc-soft"),
    "mc-hard": Arm("Monte Carlo, hard, MC > 0", "mc-hard"),
    "mc-half": Arm("Monte Carlo, hard, MC > 0.5", "mc-half"),
    "mc-half-first": Arm("Monte Carlo, hard, MC > 0.5, to the first error", "mc-half-first"),
    "consensus": Arm("consensus, MC > 0", "consensus"),
    "consensus-half": Arm("consensus, MC > 0.5", "consensus-half"),
    "consensus-weighted": Arm(
        "consensus, MC > 0.5, weighted", "consensus-weighted", options={"label_weighting": "column"}
    ),
    "judge": Arm("judge", "judge"),
    "judge-same": Arm("judge, problems of Monte Carlo", "judge-same"),
    "progress": Arm("progress", "progress"),
    "checker": Arm("checker (no cost)", "checker"),
    "checker-first": Arm("checker (no cost), to the first error", "checker-first"),
    "consensus-lenient": Arm("consensus, MC > 0.5, lenient judge", "consensus-lenient"),
    "judge-lenient": Arm("lenient judge", "judge-lenient"),
}
OUTCOMES = {
    "orm": Arm("ORM, outcomes", "orm", aggregate="last"),
    "implicit-step": Arm("implicit PRM, outcomes, scores of steps", "orm", "min", "implicit_prm"),
    "implicit-prefix": Arm("implicit PRM, outcomes, scores of prefixes", "orm", "last", "implicit_prm"),
    "mc-soft": Arm("PRM, Monte Carlo", "mc-soft"),
    "hrm-soft": Arm("HRM, Monte Carlo", "hrm-soft"),
    "checker": Arm("PRM, checker", "checker"),
    "hrm-checker": Arm("HRM, checker", "hrm-checker"),
}
PARTS = {"labels": LABELS, "outcomes": OUTCOMES}
HEADINGS = {"labels": "## Which labels teach most", "outcomes": "## Reward models from outcomes alone"}
PICTURES = {"labels": "images/labels-study.png", "outcomes": "images/outcome-labels.png"}  # in the folder of the page
PAIRS = {
    "labels": [
        ("consensus", "mc-hard"),
        ("consensus", "mc-soft"),
        ("consensus-half", "mc-half"),
        ("consensus-half", "mc-half-first"),
        ("consensus-half", "mc-soft"),
        ("consensus-weighted", "consensus-half"),
        ("consensus-half", "judge"),
        ("judge", "mc-soft"),
        ("judge-same", "mc-soft"),
        ("mc-half", "mc-soft"),
        ("mc-half-first", "mc-half"),
        ("checker-first", "checker"),
        ("consensus-half", "checker-first"),
        ("progress", "mc-soft"),
        ("consensus-lenient", "mc-half-first"),
        ("judge-lenient", "mc-soft"),
    ],
    "outcomes": [
        ("implicit-step", "orm"),
        ("implicit-prefix", "orm"),
        ("implicit-step", "implicit-prefix"),
        ("implicit-step", "mc-soft"),
        ("implicit-step", "hrm-soft"),
        ("hrm-soft", "mc-soft"),
        ("hrm-checker", "checker"),
    ],
}
MEASURES = {
    "first_error_auroc": "AUROC of first errors",
    "auroc": "AUROC of steps",
    **{f"best_of_{n}": f"best of {n}" for n in SIZES},
}


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with Runner(folder, args.num_workers) as runner:
        run_stages(runner, folder, args)
    results = collect(folder, args) | {
        "settings": vars(args),
        "date": str(date.today()),
        "minutes": sum(stage["seconds"] for stage in runner.stages) / 60,
        "versions": versions(),
    }
    write_json(folder / "results.json", results)
    sections = {part: report(results, part) for part in args.parts}
    (folder / "results.md").write_text("\n".join(sections.values()), encoding="utf-8")
    for part, section in sections.items():
        figure = draw(results, part)
        figure.savefig(folder / f"{part}.png", metadata={"Software": None})
        if args.docs:
            page = Path(args.docs, "evidence.md")
            found = replace_section(page.read_text(encoding="utf-8"), section, HEADINGS[part])
            page.write_text(found, encoding="utf-8")
            figure.savefig(Path(args.docs, PICTURES[part]), metadata={"Software": None})
        print(section)


def run_stages(runner: Runner, folder: Path, args: argparse.Namespace) -> None:
    """Run the stages of the study in order."""

    def at(path: str) -> str:
        return str(folder / path)

    sizes = {"num_train": args.num_whole * len(args.seeds), "num_test": args.num_test}
    sizes |= {"num_starts": 20, "num_judged": args.num_held_out}
    runner.run("world", {"world": partial(make_world, at("world"), **sizes, seed=args.seed)}, lambda: "problems")
    jobs = {
        str(seed): partial(
            take_problems,
            at("world/train.jsonl"),
            place * args.num_whole,
            args.num_whole,
            at(f"problems/{seed}.jsonl"),
        )
        for place, seed in enumerate(args.seeds)
    }
    runner.run("problems", jobs, lambda: f"{args.num_whole} problems per seed")
    policy = partial(make_policy, at("world"), at("policy"), steps=args.policy_steps, seed=args.seed)
    runner.run("policy", {"policy": policy}, lambda: f"{args.policy_steps} steps")

    # Solutions with rollouts, solutions only, and candidates for best-of-N
    whole = {**WHOLE_SOLUTIONS, "max_solution_tokens": MAX_TOKENS, "shards": 1}
    most = {"num_solutions": NUM_CANDIDATES, "max_sequences": NUM_CANDIDATES}
    jobs = search_jobs(folder, "candidates", "test", **whole, **most)
    for seed in args.seeds:
        given = {**whole, "num_solutions": NUM_SOLUTIONS, "seed": seed}
        searched = {**given, "num_completions": NUM_COMPLETIONS, "limit": args.num_problems}
        jobs |= search_jobs(folder, f"mc-{seed}", f"../problems/{seed}", **searched)
        jobs |= search_jobs(folder, f"whole-{seed}", f"../problems/{seed}", **given)
    runner.run("search", jobs, lambda: describe_search(folder / "runs" / f"mc-{args.seeds[0]}"))

    jobs = {
        f"{run}-{name}-{seed}": partial(
            judge_copy, at(f"runs/{run}-{seed}"), name, seed, output_dir=at(f"judged/{run}-{name}-{seed}")
        )
        for seed in args.seeds
        for run in ("mc", "whole")
        for name in BELIEFS
    }
    runner.run("judges", jobs, lambda: f"{len(jobs)} runs, {NUM_VOTES} votes per solution")
    jobs = {
        f"{name}-{seed}": partial(
            make_budget,
            at(f"runs/mc-{seed}"),
            at(f"judged/mc-{name}-{seed}"),
            at(f"judged/whole-{name}-{seed}"),
            at("policy"),
            at(f"problems/{seed}.jsonl"),
            output_dir=at(f"budgets/{name}-{seed}"),
        )
        for seed in args.seeds
        for name in BELIEFS
    }
    runner.run("budgets", jobs, lambda: "numbers of problems")

    # Steps labelled by the checker, and the datasets of all arms
    trees = {f"mc-soft-{seed}": export_job(folder, f"mc-soft-{seed}", f"mc-{seed}") for seed in args.seeds}
    runner.run("trees", trees, lambda: "trees of the solutions with rollouts")
    jobs = {
        str(seed): partial(check_steps, at(f"datasets/mc-soft-{seed}"), at(f"checked/{seed}.jsonl"))
        for seed in args.seeds
    }
    runner.run("checker", jobs, lambda: "labels of the checker")
    arms = chosen_arms(args)
    kinds = {arm.dataset: None for arm in arms.values() if arm.dataset != "mc-soft"}
    whole_kinds = {kind.removesuffix("-first"): None for kind in kinds}
    jobs = {f"{kind}-{seed}": dataset_job(folder, kind, seed) for kind in whole_kinds for seed in args.seeds}
    runner.run("datasets", jobs, lambda: f"{len(jobs)} datasets")
    jobs = {
        f"{kind}-{seed}": partial(
            keep_to_first_error, at(f"datasets/{kind.removesuffix('-first')}-{seed}"), at(f"datasets/{kind}-{seed}")
        )
        for kind in kinds
        for seed in args.seeds
        if kind not in whole_kinds
    }
    runner.run("first-errors", jobs, lambda: "datasets with labels to the first error")

    runs = [(arm, f"{name}-{seed}", seed) for seed in args.seeds for name, arm in arms.items()]
    jobs = {
        f"{kind}-{seed}": partial(
            measure_labels,
            at(f"datasets/{kind}-{seed}"),
            at(f"datasets/mc-soft-{seed}") if kind.startswith("consensus") else None,
            at(f"budgets/{judge_of(kind)}-{seed}/consensus.jsonl"),
            output=at(f"measures/labels/{kind}-{seed}.json"),
        )
        for kind in {"mc-soft": None} | kinds
        for seed in args.seeds
    }
    runner.run("labels", jobs, lambda: "wrong labels")
    trained, scored, measured, ranked = {}, {}, {}, {}
    for arm, name, seed in runs:
        paths = {
            "model_name_or_path": at("policy"),
            "dataset_name": at(f"datasets/{arm.dataset}-{seed}"),
            "output_dir": at(f"models/{name}"),
        }
        settings = {**REWARD_MODEL, **paths, "max_steps": args.reward_steps, "seed": seed, **arm.options}
        if arm.command == "implicit_prm":  # one training for both kinds of scores
            settings["output_dir"] = at(f"models/implicit-{seed}")
            trained[f"implicit-{seed}"] = partial(train, arm.command, settings)
            scored[name] = partial(
                set_score_span, at(f"models/implicit-{seed}"), name.split("-")[1], output_dir=at(f"models/{name}")
            )
        else:
            trained[name] = partial(train, arm.command, settings)
        measured[name] = partial(
            measure_model, at(f"models/{name}"), at("world"), [[1]], args.seed, at(f"measures/models/{name}.json")
        )
        config = BestOfNConfig(
            candidates=at("runs/candidates"),
            reward_model=at(f"models/{name}"),
            reward_model_batch_size=16,
            extractors=["marker"],
            aggregate=[arm.aggregate],
            n=list(SIZES),
            output_dir=at(f"results/best-of-n/{name}"),
            overwrite=True,
        )
        ranked[name] = partial(best_of_n, config)
    runner.run("reward-models", trained, lambda: f"{len(trained)} reward models, {args.reward_steps} steps")
    runner.run("score-spans", scored, lambda: "scores of steps and of prefixes")
    runner.run("measures", measured, lambda: "AUROC")
    runner.run("best-of-n", ranked, lambda: f"best-of-N, N = {', '.join(map(str, SIZES))}")


def chosen_arms(args: argparse.Namespace) -> dict[str, Arm]:
    found = {name: arm for part in args.parts for name, arm in PARTS[part].items()}
    return {name: arm for name, arm in found.items() if args.arms is None or name in args.arms}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(Path(path), REMEDY)]


def write_rows(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(dump_json(row, path) + "\n" for row in rows), encoding="utf-8")


def read_dataset(folder: str | Path) -> list[StepTree]:
    """Return the training rows of a dataset that the package built."""
    (file,) = Path(folder, "data").glob("train-*.parquet")
    return [StepTree.from_row(row) for row in pq.read_table(file).to_pylist()]


def take_problems(source: str, first: int, number: int, output: str) -> None:
    """Write `number` problems from line `first` on."""
    write_rows(output, read_rows(source)[first : first + number])


def first_error(problem: str, steps: Sequence[str]) -> int:
    """Return the index of the first wrong step by the checker, or [`NO_ERROR`]."""
    verdicts = judge(Problem.parse(problem), steps)
    return next((i for i, one in enumerate(verdicts) if not one.on_track), NO_ERROR)


def another(place: int, num_steps: int, rng: random.Random) -> int:
    """Return a random other verdict on a solution of `num_steps` steps."""
    return rng.choice([other for other in range(NO_ERROR, num_steps) if other != place])


def believe_independent(problem: str, steps: Sequence[str], rng: random.Random) -> int:
    """Return the verdict of a judge whose errors do not depend on the solution."""
    place = first_error(problem, steps)
    return another(place, len(steps), rng) if rng.random() < ERROR_RATE else place


def believe_lenient(problem: str, steps: Sequence[str], rng: random.Random) -> int:
    """Return the verdict of a judge that overlooks errors in solutions with a right answer."""
    place = first_error(problem, steps)
    if place != NO_ERROR and judge(Problem.parse(problem), steps)[-1].on_track and rng.random() < OVERLOOKED:
        return NO_ERROR
    return another(place, len(steps), rng) if rng.random() < LENIENT_ERROR_RATE else place


BELIEFS: dict[str, Callable[[str, Sequence[str], random.Random], int]] = {
    "independent": believe_independent,
    "lenient": believe_lenient,
}


class CharacterChat(CharTokenizer):
    """One token per character, with a chat template."""

    chat_template = "{{ messages[-1]['content'] }}"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return messages[-1]["content"]


def respond(prompt: str, rng: random.Random, name: str, seed: int) -> str:
    """Return a response of a scripted judge. Its belief only depends on the solution and the seed, its statement on the vote, too."""
    problem = PROBLEM.search(prompt)[0]
    steps = NUMBERED_STEP.findall(prompt.partition("# Solution")[2].partition("# Task")[0])
    belief = BELIEFS[name](problem, steps, random.Random(f"{seed} {name} {problem} {solution_text(steps)}"))
    place = belief if rng.random() < FAITHFUL else another(belief, len(steps), rng)
    return f"\\boxed{{{NO_ERROR if place == NO_ERROR else place + 1}}}"


@dataclass(kw_only=True)
class ScriptedJudgeConfig(JudgeConfig):
    """Configuration of a judge that is played by [`respond`]. `judge` is its name in `BELIEFS`."""

    def model_identity(self) -> dict[str, Any]:
        return {"scripted": self.judge}

    def load_engine(self, shard: Any = None) -> ScriptedEngine:
        engine = ScriptedEngine(partial(respond, name=self.judge, seed=self.seed))
        engine.tokenizer = CharacterChat()
        return engine


def judge_copy(run: str, name: str, seed: int, output_dir: str) -> None:
    """Copy a run, and add the verdicts of a scripted judge on all of its solutions."""
    shutil.copytree(run, output_dir, dirs_exist_ok=True)
    config = ScriptedJudgeConfig(
        input=output_dir,
        judge=name,
        engine="transformers",
        num_votes=NUM_VOTES,
        max_solutions=NUM_SOLUTIONS,
        seed=seed,
    )
    print(write_verdicts(config))


def make_budget(run: str, judged: str, whole: str, policy: str, problems: str, output_dir: str) -> None:
    """
    Write how many problems each way to label can pay for, and the problems beyond.

    The budget is the number of tokens that the run sampled.

    Args:
        run (`str`):
            Run with rollouts.
        judged, whole (`str`):
            Copies of it, and of the run without rollouts, with verdicts.
        policy (`str`):
            Folder of the tokenizer.
        problems (`str`):
            JSON Lines file with the problems, in order.
        output_dir (`str`):
            Output folder: `budget.json`, and `consensus.jsonl` and `judge.jsonl` with the problems that are not used.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    order = [row["problem"] for row in read_rows(problems)]
    budget = sum(sampled_tokens(run).values())
    found: dict[str, Any] = {"tokens": budget, "problems_mc": len(sampled_tokens(run))}
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for name, folder in (("consensus", judged), ("judge", whole)):
        sampled, paid, wrong = sampled_tokens(folder), Counter(), []
        for row in read_rows(Path(folder, JUDGE_FOLDER, "judge", VERDICTS)):
            length = len(tokenizer.encode(solution_text(row["completions"]))) + 1  # and the end of the sequence
            paid[row["prompt"]] += NUM_VOTES * (length + VERDICT_TOKENS)
        costs = [sampled[problem] + paid[problem] for problem in order if problem in sampled]
        number = sum(total <= budget for total in accumulate(costs))
        if number == len(costs):
            raise ValueError(
                f"{folder}: {number} problems cost {sum(costs)} tokens, less than the budget of {budget}. Use more --num_whole."
            )
        beyond = [problem for problem in order if problem in sampled][number:]
        write_rows(Path(output_dir, f"{name}.jsonl"), [{"problem": problem} for problem in beyond])
        found[f"problems_{name}"] = number
        found[f"tokens_{name}"] = sum(costs[:number])
        found[f"judge_share_{name}"] = sum(paid[problem] for problem in order[:number]) / sum(costs[:number])
        truth = {
            tuple(row["node_ids"]): first_error(row["prompt"], row["completions"])
            for row in read_rows(Path(folder, JUDGE_FOLDER, "judge", VERDICTS))
        }
        verdicts = list(read_verdicts(folder))
        wrong = [one.first_error != truth[one.node_ids] for one in verdicts if one.first_error is not None]
        found[f"verdicts_wrong_{name}"] = fmean(wrong)
        found[f"verdicts_undecided_{name}"] = 1 - len(wrong) / len(verdicts)
    write_json(Path(output_dir, "budget.json"), found)


def sampled_tokens(run: str | Path) -> Counter[str]:
    """Return the number of tokens that a run sampled for each problem."""
    found: Counter[str] = Counter()
    for path in node_files(Path(run)):
        with open_nodes(path) as file:
            for row in file.read(["prompt", "num_tokens"]).to_pylist():
                found[row["prompt"]] += row["num_tokens"]
    return found


def check_steps(dataset: str, output: str) -> None:
    """Write the trees of a dataset with labels of the checker: whether the running value is right after each step."""
    rows = []
    for tree in read_dataset(dataset):
        labels = [float(one) for one in on_track(tree)]
        rows.append(StepTree(tree.prompt, tree.completions, labels, tree.parents).to_row())
    write_rows(output, rows)


def keep_to_first_error(dataset: str, output_dir: str) -> None:
    """Copy a dataset without the labels after the first wrong step of each path."""
    shutil.copytree(dataset, output_dir, dirs_exist_ok=True)
    (file,) = Path(output_dir, "data").glob("train-*.parquet")
    table = pq.read_table(file)
    rows = []
    for tree in map(StepTree.from_row, table.to_pylist()):
        labels, is_over = [], []
        for label, parent in zip(tree.labels, tree.parents, strict=True):
            is_later = parent != ROOT and (is_over[parent] or tree.labels[parent] == 0)
            is_over.append(is_later)
            labels.append(None if is_later else label)
        rows.append(labels)
    place = table.schema.get_field_index("labels")
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(rows, table.schema.field(place).type)), file
    )


def on_track(tree: StepTree) -> list[bool]:
    problem = Problem.parse(tree.prompt)
    return [
        judge(problem, [tree.completions[i] for i in tree.path(step)])[-1].on_track for step in range(len(tree.labels))
    ]


def dataset_job(folder: Path, kind: str, seed: int) -> partial:
    """Return the job that builds a dataset."""
    options: dict[str, dict[str, Any]] = {
        "mc-hard": {"labels": "hard"},
        "mc-half": {"labels": "hard", "threshold": 0.5},
        "progress": {"labels": "progress"},
        "hrm-soft": {"view": "hrm"},
        "orm": {"view": "orm"},
    }
    if kind in options:
        return export_job(folder, f"{kind}-{seed}", f"mc-{seed}", **options[kind])
    output = {"output_dir": str(folder / "datasets" / f"{kind}-{seed}")}
    judge_name = judge_of(kind)
    budget = folder / "budgets" / f"{judge_name}-{seed}"
    if kind.startswith("consensus"):
        weighted = {"disagreement": "weight"} if kind == "consensus-weighted" else {}
        threshold = {} if kind == "consensus" else {"threshold": 0.5}
        # the run is a copy of `mc-SEED` with verdicts
        return export_job(
            folder,
            f"{kind}-{seed}",
            f"../judged/mc-{judge_name}-{seed}",
            consensus=True,
            labels="hard",
            exclude=[str(budget / "consensus.jsonl")],
            **weighted,
            **threshold,
        )
    if kind in ("checker", "hrm-checker"):
        view = "hrm" if kind == "hrm-checker" else "tree"
        inputs: dict[str, Any] = {"inputs": [str(folder / "checked" / f"{seed}.jsonl")], "view": view}
    else:
        run = folder / "judged" / f"{'mc' if kind == 'judge-same' else 'whole'}-{judge_name}-{seed}"
        beyond = [] if kind == "judge-same" else [str(budget / "judge.jsonl")]
        inputs = {"inputs": [str(run / JUDGE_FOLDER / "judge" / VERDICTS)], "exclude": beyond}
    return partial(build_stepwise, BuildStepwiseConfig(**output, **inputs, **DATASET))


def set_score_span(model: str, span: str, output_dir: str) -> None:
    """Copy an implicit reward model, which then scores steps or prefixes."""
    shutil.copytree(model, output_dir, dirs_exist_ok=True)
    replace(StepFormat.from_pretrained(model), score_span=span).save(output_dir)


def judge_of(kind: str) -> str:
    """Return the judge of a dataset."""
    return "lenient" if kind.endswith("lenient") else "independent"


def measure_labels(dataset: str, whole: str | None, beyond: str, output: str) -> None:
    """
    Compare the labels of single steps in a dataset with the checker.

    Writes the numbers of problems and of labelled steps, the share of the labels that are wrong (by weight, if there are weights), and
    the share of solutions that were kept. A label is wrong if it is at least 0.5 and the running value is wrong after the step, or less
    and it is right.

    Args:
        dataset (`str`):
            Dataset to measure.
        whole (`str`, *optional*):
            Dataset with all solutions of the same problems, for the share of kept solutions.
        beyond (`str`):
            JSON Lines file with problems that do not count in `whole`.
        output (`str`):
            Output file.
    """
    trees = read_dataset(dataset)
    weights, errors = [], []
    for tree in trees:
        given = tree.step_columns.get("label_weights") or [1.0] * len(tree.labels)
        single = tree.num_merged or [1] * len(tree.labels)
        for label, right, merged, weight in zip(tree.labels, on_track(tree), single, given, strict=True):
            if label is not None and merged == 1:
                weights.append(weight)
                errors.append(weight * ((label >= 0.5) != right))
    found = {
        "problems": len({tree.prompt for tree in trees}),
        "labels": len(weights),
        "wrong": sum(errors) / sum(weights),
        "kept": None,
    }
    if whole is not None:
        unused = {row["problem"] for row in read_rows(beyond)}
        solutions = sum(len(tree.leaves()) for tree in read_dataset(whole) if tree.prompt not in unused)
        found["kept"] = sum(len(tree.leaves()) for tree in trees) / solutions
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(output), found)


def collect(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the measures of budgets, labels and reward models, one entry per seed."""
    arms = chosen_arms(args)

    def read(kind: str, name: str) -> list[dict[str, Any]]:
        return [read_json(folder / kind / f"{name}-{seed}.json") for seed in args.seeds]

    models: dict[str, dict[str, list[float]]] = {}
    for name, arm in arms.items():
        measured = read("measures/models", name)
        models[name] = {key: [one[key] for one in measured] for key in ("first_error_auroc", "auroc")}
        results = [load_results(folder / "results" / "best-of-n" / f"{name}-{seed}") for seed in args.seeds]
        for n in SIZES:
            models[name][f"best_of_{n}"] = [
                next(point["accuracy"] for point in one.curves[f"best_of_n/{arm.aggregate}"] if point["n"] == n)
                for one in results
            ]
    curves = results[0].curves  # without a reward model
    baselines = {
        f"{way}_{point['n']}": point["accuracy"] for way in ("majority_vote", "pass_at_n") for point in curves[way]
    }
    return {
        "budgets": {
            name: [read_json(folder / "budgets" / f"{name}-{seed}" / "budget.json") for seed in args.seeds]
            for name in BELIEFS
        },
        "labels": {
            kind: read("measures/labels", kind) for kind in dict.fromkeys(arm.dataset for arm in arms.values())
        },
        "models": models,
        "baselines": baselines,
        "outcome_share": fmean(share_of_solutions(folder, seed) for seed in args.seeds),
    }


def share_of_solutions(folder: Path, seed: int) -> float:
    """Return the tokens of solutions without rollouts, as a share of the tokens with rollouts, for the same problems."""
    searched, whole = (sampled_tokens(folder / "runs" / f"{kind}-{seed}") for kind in ("mc", "whole"))
    return sum(whole[problem] for problem in searched) / sum(searched.values())


def report(results: dict[str, Any], part: str) -> str:
    """Return a section of `docs/evidence.md`."""
    args, models = results["settings"], results["models"]
    arms = {name: arm for name, arm in PARTS[part].items() if name in models}
    pairs = [pair for pair in PAIRS[part] if set(pair) <= set(arms)]
    versions = version_words(results["versions"])
    seeds = args["seeds"]
    facts = (
        f"{results['date']}, {results['minutes']:.0f} minutes in {args['num_workers']} "
        f"process{'es' * (args['num_workers'] != 1)} with one thread on a shared machine for both studies, {versions}. The seeds "
        f"{', '.join(map(str, seeds))} have their own problems, samples, judge and training. There is one policy."
    )
    base = results["baselines"]
    measured = (
        f"AUROC on solutions of {args['num_held_out']} other problems. Best of N among {NUM_CANDIDATES} solutions of {args['num_test']} test "
        "problems, by the lowest step score (ORM and scores of prefixes: by the last score), over all subsets of N. Without a reward model: "
        + ", ".join(
            f"majority of {n} {100 * base[f'majority_vote_{n}']:.1f} %, at least one of {n} right {100 * base[f'pass_at_n_{n}']:.1f} %"
            for n in SIZES
        )
        + "."
    )
    introductions = {"labels": introduce_labels, "outcomes": introduce_outcomes}
    parts = [HEADINGS[part], *introductions[part](results), facts]
    parts += ["Mean over seeds (lowest to highest), in percent except for the numbers of problems and labels:"]
    parts += [main_table(results, part).markdown(), measured]
    parts += [f"![{'Labels' if part == 'labels' else 'Reward models'} and AUROC of first errors]({PICTURES[part]})"]
    rows, settled = [], []
    for ours, theirs in pairs:
        name, cells = f"{arms[ours].title} − {arms[theirs].title}", []
        for measure, title in MEASURES.items():
            values = (models[arm][measure] for arm in (ours, theirs))
            found = spread([x - y for x, y in zip(*values, strict=True)])
            cells.append(f"{signed(100 * found.mean)} ({interval(found)})")
            if found.is_settled and not found.low <= 0 <= found.high:
                settled.append(f"- {name}, {title}: {'above' if found.low > 0 else 'below'} 0")
        rows.append([name, *cells])
    number = len(pairs) * len(MEASURES)
    parts += [f"Differences in points, paired by seed, with 95 % t intervals over {len(seeds)} seeds:"]
    parts += [Table(["", *MEASURES.values()], rows).markdown()]
    parts += [
        f"{len(settled)} of the {number} intervals do not contain 0; about {number / 20:.1f} are expected to miss it by chance."
        + (" These are settled:" if settled else "")
    ]
    parts += ["\n".join(settled)] * bool(settled)
    return "\n\n".join(parts + [READINGS[part].strip()] * (arms == PARTS[part])) + "\n"


def introduce_labels(results: dict[str, Any]) -> list[str]:
    """Return what the section about labels compares, and the budgets."""
    budgets = results["budgets"]

    def mean(name: str, key: str, scale: float = 1) -> float:
        return scale * fmean(one[key] for one in budgets[name])

    numbers = ", ".join(
        f"{name} judge {mean(name, 'problems_consensus'):.0f} and {mean(name, 'problems_judge'):.0f}"
        for name in BELIEFS
    )
    wrong = ", ".join(
        f"{name} {mean(name, 'verdicts_wrong_judge', 100):.1f} % ({mean(name, 'verdicts_undecided_judge', 100):.1f} % undecided)"
        for name in BELIEFS
    )
    return [
        "Reward models of the same size, trained for the same number of steps on labels that cost the same number of tokens, by "
        "`benchmarks/labels_study.py`, which has the command and the design. [Labels](labels.md) says when to use which.",
        f"The budget of a seed is what Monte Carlo labels of {results['settings']['num_problems']} problems cost: {NUM_SOLUTIONS} solutions per "
        f"problem and {NUM_COMPLETIONS} rollouts after every step, {mean('independent', 'tokens'):,.0f} sampled tokens on average. A vote of the "
        f"judge costs as many tokens as the solution and {VERDICT_TOKENS} for the verdict, and each solution gets {NUM_VOTES} votes. The judge's tokens are "
        f"{mean('independent', 'judge_share_consensus', 100):.0f} % of the tokens of consensus and {mean('independent', 'judge_share_judge', 100):.0f} % of the tokens of the judge alone. "
        f"Problems that consensus and the judge alone can pay for: {numbers}. `judge, problems of Monte Carlo` and `checker` show the labels without the "
        "effect of the number of problems.",
        f"The judges are scripted. Wrong verdicts: {wrong}. The errors of the lenient judge are mostly errors that the solution corrects, which Monte "
        "Carlo overlooks, too.",
    ]


def introduce_outcomes(results: dict[str, Any]) -> list[str]:
    """Return what the section about outcomes compares."""
    return [
        "Reward models from outcomes alone, next to reward models from step labels of the same solutions, by `benchmarks/labels_study.py`, which has "
        "the command and the design. ORM and implicit PRM only see whether the answer of each solution is right. Sampling only solutions costs "
        f"{100 * results['outcome_share']:.0f} % of the tokens of solutions with rollouts. All models start from the policy, and are trained for the same "
        "number of steps with the same number of tokens.",
    ]


READINGS = {  # about the full study
    "labels": """
How to read this:

- Consensus with MC > 0.5 has the fewest wrong labels: 0.3 % instead of 6 % for Monte Carlo with the same threshold. It keeps two thirds of the
  solutions. Compared with labels of the checker to the first error, no difference in first errors or best-of-N is settled.
- At equal tokens, this does not settle that the filter helps. Compared with Monte Carlo labels of the same kind (MC > 0.5, to the first error), consensus
  is 1 to 2 points better in first errors and best-of-N, and no difference is settled. Compared with soft Monte Carlo labels, best of 4 is 20 points
  better and settled. In the means, most of this comes with the threshold and with leaving out the labels after the first error.
- The threshold matters more than the judge here. The policy corrects many of its errors, so there is a right rollout after most first errors. MC > 0
  calls them right: a fifth of its labels is wrong, and its reward models rank first errors above right steps. The consensus with MC > 0 keeps a quarter of
  the solutions. This is better for first errors than MC > 0 alone, and its best of 16 is poor.
- The judge alone is as good as consensus at equal tokens, with four times as many problems, although 12 % of its labels are wrong. The errors of these
  judges are spread over many places, and a judge that is wrong in the same way everywhere would do more harm. This also assumes that a token of the judge
  is as cheap as a token of the policy, and that 5 of 6 verdicts are right.
- The lenient judge overlooks errors that the solution corrects. Its consensus has 2 % wrong labels instead of 0.3 %: MC > 0.5 finds most of the errors that it
  overlooks. Its reward models are not worse.
- Labels to the first error give a lower AUROC of all steps than labels of all steps: these models have never seen a label after an error.
- Reward models from soft Monte Carlo and progress labels differ by up to 40 points between seeds, so most differences from them are open. The number of
  training steps is small, and longer training may change the order.
- A majority vote of 16 is better than every reward model here, and a majority vote of 4 is worse than the best ones. Wrong answers are spread over four values.

Not tested: a language model as judge, other budgets, error rates and prices of the judge's tokens, and training to convergence.
""",
    "outcomes": """
How to read this:

- The implicit PRM finds first errors, although no step has a label. In best-of-N, its scores of steps are 25 points or more above ORM, and above PRM and HRM
  with Monte Carlo labels, and these differences are settled. The differences in first errors are not settled, because the other models differ much between seeds.
- Its labels cost less: only the solutions are sampled, and no rollouts.
- Scores of prefixes are better for all steps, since the score of a step alone does not say whether an earlier step was wrong. For first errors and
  best-of-N, the two kinds of scores are equal within their intervals.
- Starting from the policy probably helps the implicit PRM most. It keeps the output layer of the policy, which has learned to write a correction after an error.
  The other models learn a new head.
- The ORM is trained on the last step only. At other steps, which it was not trained on, its AUROC of first errors is below 50 on average. No difference
  of HRM and PRM is settled. HRM was scored with single steps.

Not tested: other reference models, training to convergence, and problems that the policy cannot solve.
""",
}


def over_seeds(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    mean, low, high = (f"{scale * value:,.{digits}f}" for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main_table(results: dict[str, Any], part: str) -> Table:
    rows = []
    for name, arm in PARTS[part].items():
        if name not in results["models"]:
            continue
        found, cells = results["labels"][arm.dataset], []
        cells += [over_seeds([one[key] for one in found], 1, 0) for key in ("problems", "labels")]
        if part == "labels":
            cells.append("" if arm.dataset == "progress" else over_seeds([one["wrong"] for one in found]))
            cells.append("" if found[0]["kept"] is None else over_seeds([one["kept"] for one in found]))
        rows.append([arm.title, *cells, *(over_seeds(results["models"][name][measure]) for measure in MEASURES)])
    extra = ["wrong labels", "kept solutions"] * (part == "labels")
    return Table(["trained on", "problems", "labels", *extra, *MEASURES.values()], rows)


def draw(results: dict[str, Any], part: str) -> "Figure":
    """Draw the AUROC of first errors and the accuracy of best-of-N of every arm: the mean, and a point for each seed."""
    theme = THEMES["light"]
    arms = {name: arm for name, arm in PARTS[part].items() if name in results["models"]}
    shown = {name: title for name, title in MEASURES.items() if name in ("first_error_auroc", f"best_of_{SIZES[-1]}")}
    figure = new_figure()
    figure.set_size_inches(9, 1.2 + 0.32 * len(arms))
    figure.set_dpi(110)
    places = list(range(len(arms)))[::-1]
    for axes, (measure, title) in zip(figure.subplots(1, len(shown), sharey=True), shown.items(), strict=True):
        style_axes(axes, theme)
        for place, name in zip(places, arms, strict=True):
            values = [100 * value for value in results["models"][name][measure]]
            axes.plot(values, [place] * len(values), "o", color=theme.curves[0], alpha=0.45, markersize=5)
            axes.plot([fmean(values)], [place], "|", color=theme.curves[1], markersize=16, markeredgewidth=2.5)
        axes.set_title(f"{title}, %", fontsize=10, color=theme.text)
        axes.set_yticks(places, [arm.title for arm in arms.values()], fontsize=9, color=theme.text)
    return figure


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument(
        "--output_dir", default="outputs/labels", help="folder of all results (default: outputs/labels)"
    )
    parser.add_argument("--docs", help="folder of evidence.md, whose sections are replaced (default: none)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the study (default: all)"
    )
    parser.add_argument(
        "--arms", nargs="+", choices=LABELS | OUTCOMES, help="reward models to train (default: all of the parts)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="seeds of problems, samples, judge and training (default: 0 to 2)",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the world and the policy (default: 42)")
    for name, number, what in (
        ("num_problems", NUM_PROBLEMS, "problems with rollouts per seed"),
        ("num_whole", NUM_WHOLE, "problems without rollouts per seed"),
        ("num_test", 80, "test problems for best-of-N"),
        ("num_held_out", NUM_HELD_OUT, "problems with solutions for AUROC"),
        ("policy_steps", FULL.policy_steps, "training steps of the policy"),
        ("reward_steps", 150, "training steps of each reward model"),
        ("num_workers", 1, "parallel jobs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"number of {what} (default: {number})")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
