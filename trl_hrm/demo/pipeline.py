"""
Both papers from end to end on a small world of arithmetic, without a network: a policy that errs and corrects itself, labels by tree
search, reward models, choices among N, self-training, and one page that says what was seen.

```bash
trl-hrm demo
trl-hrm demo --profile full --output_dir outputs/evidence
```

Killed at any moment, the same command goes on where it was. The folders, below that of the demo:

    world/           problems, and solutions whose steps are labelled by the rules of the world
    policy/          the policy
    runs/            searches for labels, and the solutions from which reward models choose
    datasets/        what is trained on, as it is pushed to the Hub
    models/          reward models, as they are pushed to the Hub
    results/         choices among whole solutions and among next steps, with every reward model
    measures/        what the rules of the world say of policy, labels and reward models
    self-training/   policies after self-training
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from ..config import Config
from ..io import write_json


if TYPE_CHECKING:
    from .profiles import Profile, RewardModel
    from .runner import Runner


MARK = ".trl-hrm-demo.json"  # what the folder was begun with
SHARDS = 2  # parts of a search, each in a process of its own
PAIRS = [1, 2]  # spans that also score a step merged with the one before it

# What every command of the demo has in common
POLICY = {
    "engine": "transformers",
    "prompt": "question",
    "prompt_style": "plain",
    "segmentation": "blank_line",
    "extractors": ["marker"],
}
SEARCH = {**POLICY, "engine_args": {"batch_size": 256}, "max_in_flight": 512}
FULL_TREE = {"search": "full_tree", "num_children": 3, "max_step_tokens": 16, "max_sequences": 16384}
WHOLE_SOLUTIONS = {"search": "rollouts", "num_completions": 0, "max_solution_tokens": 128, "seed": 43}
STEP_SEARCH = {
    **POLICY,
    "engine_args": {"batch_size": 256},
    "max_depth": 12,
    "max_step_tokens": 16,
    "max_in_flight": 1024,
}
DATASET = {"test_size": 0.0, "num_proc": 1, "overwrite": True}
SFT = {"view": "sft", "min_mc_score": 0.5, "max_solutions": 16, "test_size": 0.15, "num_proc": 1, "overwrite": True}
REWARD = {
    "dtype": "float32",
    "per_device_train_batch_size": 4,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "max_length": 1024,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 50,
    "report_to": "none",
}

KL_SELF = {
    "dtype": "float32",
    "per_device_train_batch_size": 32,
    "learning_rate": 3.0e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "max_length": 256,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 10,
    "report_to": "none",
}


@dataclass(kw_only=True)
class DemoConfig(Config):
    """
    Settings of [`run_demo`].

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/demo"`):
            Folder of everything that is made.
        profile (`str`, *optional*, defaults to `"quick"`):
            How much of it: `"quick"` takes minutes, `"full"` makes the evidence of docs/evidence.md in an hour.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the world and of the policy.
        num_workers (`int`, *optional*):
            Number of jobs at a time. By default one for each core.
        force (`bool`, *optional*, defaults to `False`):
            Whether to do everything again.
    """

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder of everything that is made."})
    profile: Literal["quick", "full"] = field(
        default="quick",
        metadata={"help": "How much of it: minutes, or the evidence of docs/evidence.md in an hour."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of the world and of the policy."})
    num_workers: int | None = field(
        default=None, metadata={"help": "Number of jobs at a time (default: one for each core)."}
    )
    force: bool = field(default=False, metadata={"help": "Do everything again."})

    def __post_init__(self):
        super().__post_init__()
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers is {self.num_workers}, expected 1 or more.")


def run_demo(config: DemoConfig) -> str:
    """
    Run the demo, or go on with it.

    Args:
        config ([`DemoConfig`]):
            How much of it, and where.

    Returns:
        `str`: Where the report is.

    Raises:
        `ValueError`: If the folder holds something else, was begun with other settings, or a job failed.
    """
    import time

    from .. import __version__
    from .collect import collect
    from .profiles import PROFILES
    from .report import write_report
    from .runner import Runner

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here
    folder, profile = Path(config.output_dir), PROFILES[config.profile]
    settings = {
        "profile": config.profile,
        "seed": config.seed,
        "output_dir": config.output_dir,
        "trl_hrm": __version__,
    }
    with begun(folder, settings, config.force):
        with Runner(folder, config.num_workers or num_cores()) as runner:
            run_stages(runner, profile, folder, config.seed)
        began = time.perf_counter()
        data = collect(folder, profile, config.profile, config.seed, runner.stages)
        write_json(folder / "report.json", data)
        write_report(data, folder / "report.html")
    seconds = time.perf_counter() - began
    return (
        f"{'report':<16}{seconds:>6.0f} s  {folder / 'report.html'}\n"
        f"{'total':<16}{data['total_seconds'] + seconds:>6.0f} s\n"
        f"Next: open {folder / 'report.html'}; trl-hrm score FILE --reward_model {folder / 'models' / 'hrm-0'}"
    )


def run_stages(runner: "Runner", profile: "Profile", folder: Path, seed: int) -> None:
    """
    The stages of the demo, from top to bottom. Each calls what users call.

    Args:
        runner ([`~demo.runner.Runner`]):
            Runs the jobs of a stage, and knows which are done.
        profile ([`~demo.profiles.Profile`]):
            How much of everything.
        folder (`Path`):
            Folder of the demo.
        seed (`int`):
            Seed of the world and of the policy.
    """
    from ..data.build_config import BuildStepwiseConfig
    from ..data.stepwise import build_stepwise
    from ..scripts.best_of_n import BestOfNConfig, best_of_n
    from .jobs import make_policy, make_world, measure_model, measure_policy, measure_tree, measure_values, self_train

    def at(path: str) -> str:
        return str(folder / path)

    # Problems to search, to solve, and to solve from a slip on; solutions that the rules of the world label
    sizes = {name: getattr(profile, name) for name in ("num_train", "num_test", "num_starts", "num_judged")}
    runner.run(
        "world",
        {"world": partial(make_world, at("world"), **sizes, seed=seed)},
        lambda: (
            f"{profile.num_train} problems to search, {profile.num_test} to solve, {profile.num_starts} to solve from a slip on"
        ),
    )

    # A policy that errs and corrects itself, trained from scratch
    runner.run(
        "policy",
        {"policy": partial(make_policy, at("world"), at("policy"), steps=profile.policy_steps, seed=seed)},
        lambda: f"a policy from scratch, {profile.policy_steps:,} steps",
    )

    # The whole solutions from which every reward model chooses
    most = {"num_solutions": max(profile.n), "max_sequences": max(profile.n)}
    runner.run(
        "solutions",
        search_jobs(folder, "solutions", "test", **WHOLE_SOLUTIONS, **most),
        lambda: describe_search(folder / "runs" / "solutions"),
    )

    # Whether the policy sees its slips: if not, the rest shows little
    runner.run(
        "policy-check",
        {"check": partial(measure_policy, at("runs/solutions"), at("measures/policy.json"))},
        lambda: describe_policy(folder),
    )

    # Trees of steps, from whose outcomes labels are made; for their values by depth also with other depths
    jobs = search_jobs(folder, "search", "train", **FULL_TREE, max_depth=profile.max_depth)
    for cap in profile.caps:
        limit = {"max_depth": cap, "limit": profile.num_capped}
        jobs |= search_jobs(folder, f"cap-{cap}", "train", shards=1, **FULL_TREE, **limit)
    if profile.again:
        jobs |= search_jobs(folder, "search-again", "train", **FULL_TREE, max_depth=profile.max_depth, seed=142)
    runner.run("search", jobs, lambda: describe_search(folder / "runs" / "search"))

    # Labels of the search in the views of ORM, PRM and HRM, with node compression, hard and entropy labels; labels of the world
    jobs = {
        "orm": export_job(folder, "orm", view="orm"),
        "prm": export_job(folder, "prm", view="tree"),
        "hrm": export_job(folder, "hrm", view="hrm"),
        "hnc": export_job(folder, "hnc", view="hrm", hnc=True, hnc_min_children=2),
        "prm-hard": export_job(folder, "prm-hard", view="tree", labels="hard"),
    }
    for eta in profile.etas:
        name = f"prm-eta{eta:g}"
        jobs[name] = export_job(folder, name, view="tree", labels="entropy", eta=eta)
    jobs["sft"] = export_job(folder, "sft", **SFT)
    for name in ("judged-prm", "judged-hrm"):
        config = BuildStepwiseConfig(inputs=[at(f"world/{name}.jsonl")], output_dir=at(f"datasets/{name}"), **DATASET)
        jobs[name] = partial(build_stepwise, config)
    if profile.again:
        jobs["control"] = export_job(folder, "control", "search", "search-again", view="hrm")
    runner.run(
        "datasets",
        jobs,
        lambda: f"{len(list(folder.glob('datasets/[!.]*')))} datasets of judged steps and of solutions",
    )

    # Every reward model with every seed. Each begins as the policy
    jobs = {name: reward_job(folder, model, name, seed) for model in profile.models for name, seed in model.runs()}
    runner.run("reward-models", jobs, lambda: f"{len(list(folder.glob('models/*/config.json')))} reward models")

    # What the rules of the world say of reward models and of the values of searches
    jobs = {
        name: partial(
            measure_model,
            at(f"models/{name}"),
            at("world"),
            spans=spans_of(model),
            seed=seed,  # the same steps for all
            output=at(f"measures/models/{name}.json"),
        )
        for model in profile.models
        for name, _ in model.runs()
    }
    for cap, run in {**{cap: f"cap-{cap}" for cap in profile.caps}, profile.max_depth: "search"}.items():
        jobs[f"cap-{cap}"] = partial(
            measure_values,
            at(f"runs/{run}"),
            at("world"),
            num_problems=profile.num_capped,  # as many, and the same ones
            cap=cap,
            output=at(f"measures/cap-{cap}.json"),
        )
    jobs["tree"] = partial(measure_tree, at("runs/search"), at("measures/tree.json"))
    runner.run("checks", jobs, lambda: describe_models(folder, profile))

    # Choices among whole solutions
    jobs = {}
    for model in profile.models:
        for name, _ in model.runs() if model.ranks else ():
            config = BestOfNConfig(
                candidates=at("runs/solutions"),
                reward_model=at(f"models/{name}"),
                reward_model_batch_size=16,
                extractors=["marker"],
                aggregate=[model.aggregate],
                n=list(profile.n),
                output_dir=at(f"results/best-of-n/{name}"),
                overwrite=True,
            )
            jobs[name] = partial(best_of_n, config)
    runner.run("best-of-n", jobs, lambda: f"choices among up to {max(profile.n)} whole solutions")

    # Choices among next steps, what the HRM paper calls best-of-N for PRM and HRM
    jobs = {
        name: step_search_job(folder, f"step-search/{name}", name, "test", profile.n)
        for model in profile.models
        for name, _ in model.runs()
        if model.searches
    }
    runner.run("step-search", jobs, lambda: f"choices among up to {max(profile.n)} next steps")

    # Searches that begin after a slip: where self-correction shows
    jobs = {}
    for model in profile.models:
        for name, _ in model.runs() if model.corrects else ():
            for spans in spans_of(model):
                result = f"{name}-{max(spans)}"
                after = {"spans": spans, "prefix_column": "prefix"}
                jobs[result] = step_search_job(
                    folder, f"wrong-prefix/{result}", name, "starts", profile.prefix_n, **after
                )
    runner.run(
        "wrong-prefix",
        jobs,
        lambda: f"searches that begin after a slip, N = {', '.join(map(str, profile.prefix_n))}",
    )

    # The policy trained on its best solutions, at every λ
    jobs = {}
    for place, study in enumerate(profile.self_training):
        settings = {
            "model_name_or_path": at("policy"),
            "dataset_name": at("datasets/sft"),
            "output_dir": at(f"self-training/{place}"),
            "max_steps": profile.self_training_steps,
        }
        jobs[str(place)] = partial(self_train, {**KL_SELF, **settings, **study})
    runner.run("self-training", jobs, lambda: describe_self_training(folder, profile))

    # Solutions of the policies after self-training
    samples = {"num_solutions": profile.self_training_samples, "max_sequences": profile.self_training_samples}
    jobs = {}
    for place in range(len(profile.self_training)):
        name, given = f"self-trained-{place}", {**WHOLE_SOLUTIONS, **samples}
        jobs |= search_jobs(folder, name, "test", policy=f"self-training/{place}", shards=1, **given)
    runner.run(
        "self-trained",
        jobs,
        lambda: f"{profile.self_training_samples} solutions of each test problem by each policy",
    )


def search_jobs(
    folder: Path, name: str, problems: str, policy: str = "policy", shards: int = SHARDS, **settings: Any
) -> dict[str, partial]:
    """The parts of a search of problems of the world."""
    from ..scripts.annotate import AnnotateConfig, annotate

    return {
        f"{name}-{i}": partial(
            annotate,
            AnnotateConfig(
                policy=str(folder / policy),
                problems=str(folder / "world" / f"{problems}.jsonl"),
                output_dir=str(folder / "runs" / name),
                shard=f"{i}/{shards}",
                **{**SEARCH, **settings},
            ),
        )
        for i in range(shards)
    }


def export_job(folder: Path, name: str, *runs: str, **settings: Any) -> partial:
    """A dataset of labels of searches."""
    from ..data.export import export
    from ..data.export_config import ExportConfig

    inputs = [str(folder / "runs" / run) for run in runs or ("search",)]
    return partial(
        export, ExportConfig(inputs=inputs, output_dir=str(folder / "datasets" / name), **{**DATASET, **settings})
    )


def reward_job(folder: Path, model: "RewardModel", name: str, seed: int) -> partial:
    """The training of a reward model."""
    from .jobs import train

    settings = {
        "model_name_or_path": str(folder / "policy"),
        "dataset_name": str(folder / "datasets" / model.data),
        "output_dir": str(folder / "models" / name),
        "max_steps": model.steps,
        "seed": seed,
    }
    return partial(train, "reward", {**REWARD, **settings})


def step_search_job(
    folder: Path, result: str, model: str, problems: str, n: tuple[int, ...], **settings: Any
) -> partial:
    """A search step by step with a reward model."""
    from ..scripts.step_search import StepSearchConfig, step_search

    return partial(
        step_search,
        StepSearchConfig(
            problems=str(folder / "world" / f"{problems}.jsonl"),
            policy=str(folder / "policy"),
            reward_model=str(folder / "models" / model),
            reward_model_batch_size=16,
            n=list(n),
            output_dir=str(folder / "results" / result),
            overwrite=True,
            **STEP_SEARCH,
            **settings,
        ),
    )


def spans_of(model: "RewardModel") -> list[list[int]]:
    """How its scores are taken after a slip: as the papers do, and where it has learned pairs, with them."""
    return [[1], PAIRS] if model.is_merged else [[1]]


def describe_search(run: Path) -> str:
    from ..search.nodes import read_totals
    from ..search.run_folder import node_files

    totals = read_totals(node_files(run))
    leaves = totals["leaves_answered"] + totals["leaves_unresolved"]
    share = totals["leaves_correct"] / max(leaves, 1)
    return f"{totals['problems']:,} problems, {totals['num_tokens']:,} tokens, {leaves:,} solutions, {share:.0%} of them right"


def describe_policy(folder: Path) -> str:
    from .world import SIGHT

    found = json.loads((folder / "measures" / "policy.json").read_text(encoding="utf-8"))
    what = f"{found['accuracy']:.0%} right, {found['slip_rate']:.0%} slips, {found['correction_rate']:.0%} of them corrected"
    if found["sight"] is None:
        return f"{what}; it corrects no right step"
    seen = f"{what}; it corrects slips {found['sight']:.1f} times as often as right steps"
    blind = f", expected {SIGHT} or more: WARNING: it does not see its slips, and what follows shows little. Try another --seed"
    return seen if found["sight"] >= SIGHT else seen + blind


def describe_models(folder: Path, profile: "Profile") -> str:
    found = {}
    for model in profile.models[:4]:
        files = [folder / "measures" / "models" / f"{name}.json" for name, _ in model.runs()]
        found[model.title] = fmean(json.loads(file.read_text())["first_error_auroc"] for file in files)
    return "AUROC of first errors: " + ", ".join(f"{title} {value:.2f}" for title, value in found.items())


def describe_self_training(folder: Path, profile: "Profile") -> str:
    last = {}
    for place, settings in enumerate(profile.self_training):
        found = json.loads((folder / "self-training" / str(place) / "held_out.json").read_text())
        last.setdefault(settings["kl_coef"], found["curve"][-1]["kl"])
    return "KL to the reference at the end: " + ", ".join(f"{kl:.3f} at λ = {coef:g}" for coef, kl in last.items())


@contextlib.contextmanager
def begun(folder: Path, settings: dict[str, Any], force: bool = False) -> Iterator[None]:
    """
    A folder that is begun, or gone on with if it was begun with the same settings, and that no other demo works in meanwhile.

    Raises:
        `ValueError`: If it holds something else, was begun with other settings, or another demo works in it.
    """
    others = [path for path in folder.iterdir() if path.name not in (MARK, f"{MARK}.lock")] if folder.exists() else []
    if others and not (folder / MARK).exists():
        raise ValueError(f"{folder}: holds something that is no demo. Name another output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        taken = FileLock(folder / f"{MARK}.lock").acquire(blocking=False)
    except Timeout:
        raise ValueError(f"{folder}: another demo works in it. Wait for it, or name another output_dir.") from None
    with taken:
        mark = folder / MARK
        found = json.loads(mark.read_text(encoding="utf-8") or "null") if mark.exists() else None
        if found not in (None, settings) and not force:
            raise ValueError(
                f"{folder}: made with {found}, and {settings} is asked for. Name another output_dir, or pass --force to replace it."
            )
        if force:
            for path in others:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if found != settings:
            write_json(mark, settings)
        yield


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
