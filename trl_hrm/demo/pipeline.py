"""
Both papers end to end on synthetic arithmetic problems, without network: train a policy that makes mistakes and corrects some of them,
label steps by tree search, train reward models, select one of N solutions, self-train the policy, and write a report.

```bash
trl-hrm demo
trl-hrm demo --profile full --output_dir outputs/evidence
```

If the demo is interrupted, the same command resumes it. It creates these folders in `output_dir`:

    world/           problems, and solutions with step labels
    policy/          policy
    runs/            search trees for labels, and solutions for best-of-N
    datasets/        training datasets, in the format that is pushed to the Hub
    models/          reward models, in the format that is pushed to the Hub
    results/         results of best-of-N and step search for every reward model
    measures/        measurements of policy, labels and reward models with the checker
    self-training/   policies after self-training
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from ..config import PROCESSES, SEED, Config
from ..io import claimed_folder, read_json, shown, write_json
from ..processes import num_cores


if TYPE_CHECKING:
    from .profiles import Profile, RewardModel
    from .runner import Runner


MARK = ".trl-hrm-demo.json"  # settings of the demo in this folder
OUTPUTS = {".done", "datasets", "logs", "measures", "models", "policy", "results", "runs", "self-training", "world"}
OUTPUTS |= {"report.html", "report.json", "report_files"}
SHARDS = 2  # number of parallel processes per search
PAIRS = [1, 2]  # score single steps and pairs of steps

# Settings shared by all commands of the demo
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
    Configuration of [`run_demo`].

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/demo"`):
            Output folder.
        profile (`str`, *optional*, defaults to `"quick"`):
            Size of the demo. `"quick"` takes minutes. `"full"` takes an hour and has the size of the demo in docs/evidence.md. `"smoke"` only checks that every
            stage runs: its models are hardly trained, so its numbers mean nothing.
        seed (`int`, *optional*, defaults to `42`):
            Random seed of the problems and the policy.
        num_workers (`int`, *optional*):
            Number of parallel jobs. Defaults to the number of cores.
        force (`bool`, *optional*, defaults to `False`):
            Whether to delete the demo in `output_dir` and start over.
    """

    output_dir: str = field(default="outputs/demo", metadata={"help": "Output folder."})
    profile: Literal["smoke", "quick", "full"] = field(
        default="quick",
        metadata={
            "help": "Size of the demo. quick takes minutes. full takes an hour and has the size of the demo in docs/evidence.md. smoke only "
            "checks that every stage runs: its numbers mean nothing."
        },
    )
    seed: int = field(default=42, metadata={"help": "Random seed of the problems and the policy.", "range": SEED})
    num_workers: int | None = field(
        default=None, metadata={"help": "Number of parallel jobs (default: the number of cores).", "range": PROCESSES}
    )
    force: bool = field(default=False, metadata={"help": "Delete the demo in --output_dir and start over."})


def run_demo(config: DemoConfig) -> str:
    """
    Run the demo, or resume it.

    Args:
        config ([`DemoConfig`]):
            Size and output folder of the demo.

    Returns:
        `str`: Path of the report.

    Raises:
        `ValueError`: If the folder has other files or a demo with different settings, or if a job failed.
    """
    import time

    from .. import __version__
    from .collect import collect
    from .profiles import PROFILES
    from .report import write_report
    from .runner import Runner

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the demo does not use the Hub
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
        f"Next: open {folder / 'report.html'}, or run trl-hrm inspect {folder / 'runs' / 'search'} --problem 0"
    )


def run_stages(runner: "Runner", profile: "Profile", folder: Path, seed: int) -> None:
    """
    Run the stages of the demo in order. Most of them call the public functions of the commands.

    Args:
        runner ([`~demo.runner.Runner`]):
            Runs the unfinished jobs of a stage.
        profile ([`~demo.profiles.Profile`]):
            Sizes of the demo.
        folder (`Path`):
            Folder of the demo.
        seed (`int`):
            Seed of the problems and the policy.
    """
    from ..data.build_config import BuildStepwiseConfig
    from ..data.stepwise import build_stepwise
    from ..scripts.best_of_n import BestOfNConfig, best_of_n
    from .jobs import make_policy, make_world, measure_model, measure_policy, measure_tree, measure_values, self_train

    def at(path: str) -> str:
        return str(folder / path)

    # Training problems, test problems, problems with a wrong prefix, and solutions with first-error labels
    sizes = {name: getattr(profile, name) for name in ("num_train", "num_test", "num_starts", "num_judged")}
    runner.run(
        "world",
        {"world": partial(make_world, at("world"), **sizes, seed=seed)},
        lambda: (
            f"{profile.num_train} training problems, {profile.num_test} test problems, {profile.num_starts} with a wrong prefix"
        ),
    )

    # A policy that makes mistakes and corrects some of them, trained from scratch
    runner.run(
        "policy",
        {"policy": partial(make_policy, at("world"), at("policy"), steps=profile.policy_steps, seed=seed)},
        lambda: f"policy trained from scratch, {profile.policy_steps:,} steps",
    )

    # Whole solutions for best-of-N, shared by all reward models
    most = {"num_solutions": max(profile.n), "max_sequences": max(profile.n)}
    runner.run(
        "solutions",
        search_jobs(folder, "solutions", "test", **WHOLE_SOLUTIONS, **most),
        lambda: describe_search(folder / "runs" / "solutions"),
    )

    # Whether the policy detects its errors. If it does not, the other results are not meaningful
    runner.run(
        "policy-check",
        {"check": partial(measure_policy, at("runs/solutions"), at("measures/policy.json"))},
        lambda: describe_policy(folder),
    )

    # Search trees for labels, and smaller ones with other maximum depths to compare MC scores
    jobs = search_jobs(folder, "search", "train", **FULL_TREE, max_depth=profile.max_depth)
    for cap in profile.caps:
        limit = {"max_depth": cap, "limit": profile.num_capped}
        jobs |= search_jobs(folder, f"cap-{cap}", "train", shards=1, **FULL_TREE, **limit)
    if profile.again:
        jobs |= search_jobs(folder, "search-again", "train", **FULL_TREE, max_depth=profile.max_depth, seed=142)
    runner.run("search", jobs, lambda: describe_search(folder / "runs" / "search"))

    # Datasets from the search: ORM, PRM and HRM views, node compression, hard and entropy labels. Datasets with first-error labels
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
        per_child = {"hnc": True, "hnc_rule": "per_child", "hnc_min_children": 2}
        jobs["hnc-per-child"] = export_job(folder, "hnc-per-child", view="hrm", **per_child)
        jobs["control"] = export_job(folder, "control", "search", "search-again", view="hrm")
    runner.run(
        "datasets",
        jobs,
        lambda: f"{len(list(folder.glob('datasets/[!.]*')))} datasets of labelled steps and of solutions",
    )

    # Every reward model with every seed, initialized from the policy
    jobs = {name: reward_job(folder, model, name, seed) for model in profile.models for name, seed in model.runs()}
    runner.run("reward-models", jobs, lambda: f"{len(list(folder.glob('models/*/config.json')))} reward models")

    # Measure reward models and MC scores with the checker
    jobs = {
        name: partial(
            measure_model,
            at(f"models/{name}"),
            at("world"),
            spans=spans_of(model),
            seed=seed,  # same steps for all models
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
            num_problems=profile.num_capped,  # same problems for all caps
            cap=cap,
            output=at(f"measures/cap-{cap}.json"),
        )
    jobs["tree"] = partial(measure_tree, at("runs/search"), at("measures/tree.json"))
    runner.run("checks", jobs, lambda: describe_models(folder, profile))

    # Best-of-N among whole solutions
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
    runner.run("best-of-n", jobs, lambda: f"best-of-N, N = {', '.join(map(str, profile.n))}")

    # Step search, which the HRM paper calls best-of-N for PRM and HRM
    jobs = {
        name: step_search_job(folder, f"step-search/{name}", name, "test", profile.n)
        for model in profile.models
        for name, _ in model.runs()
        if model.searches
    }
    runner.run("step-search", jobs, lambda: f"step search, N = {', '.join(map(str, profile.n))}")

    # Step search from a wrong prefix, which shows self-correction
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
        lambda: f"step search from a wrong prefix, N = {', '.join(map(str, profile.prefix_n))}",
    )

    # Train the policy on its best solutions, with every λ
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

    # Sample solutions from the self-trained policies
    samples = {"num_solutions": profile.self_training_samples, "max_sequences": profile.self_training_samples}
    jobs = {}
    for place in range(len(profile.self_training)):
        name, given = f"self-trained-{place}", {**WHOLE_SOLUTIONS, **samples}
        jobs |= search_jobs(folder, name, "test", policy=f"self-training/{place}", shards=1, **given)
    runner.run(
        "self-trained",
        jobs,
        lambda: f"{profile.self_training_samples} solutions per test problem and policy",
    )


def search_jobs(
    folder: Path, name: str, problems: str, policy: str = "policy", shards: int = SHARDS, **settings: Any
) -> dict[str, partial]:
    """Return the jobs of a search, one per shard."""
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
    """Return the job that exports a dataset of labels."""
    from ..data.export import export
    from ..data.export_config import ExportConfig

    inputs = [str(folder / "runs" / run) for run in runs or ("search",)]
    return partial(
        export, ExportConfig(inputs=inputs, output_dir=str(folder / "datasets" / name), **{**DATASET, **settings})
    )


def reward_job(folder: Path, model: "RewardModel", name: str, seed: int) -> partial:
    """Return the job that trains a reward model."""
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
    """Return the job of a step search with a reward model."""
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
    """Return the spans to score after a slip: single steps as in the papers and, for models trained on pairs, also pairs."""
    return [[1], PAIRS] if model.is_merged else [[1]]


def describe_search(run: Path) -> str:
    from ..search.nodes import read_totals
    from ..search.run_folder import node_files

    totals = read_totals(node_files(run))
    leaves = totals["leaves_answered"] + totals["leaves_unresolved"]
    share = totals["leaves_correct"] / max(leaves, 1)
    return (
        f"{totals['problems']:,} problems, {totals['num_tokens']:,} tokens, {leaves:,} solutions, {share:.0%} correct"
    )


def describe_policy(folder: Path) -> str:
    from .measures import PolicyMeasures, read_measures
    from .world import SIGHT

    found = read_measures(folder / "measures" / "policy.json", PolicyMeasures)
    what = f"accuracy {found['accuracy']:.0%}, {found['slip_rate']:.0%} of steps are errors, {found['correction_rate']:.0%} of them corrected"
    if found["sight"] is None:
        return f"{what}, no correct step corrected"
    seen = f"{what}, {found['sight']:.1f} times as often as correct steps"
    blind = f". WARNING: expected at least {SIGHT} times. The policy does not detect its errors. Try another --seed"
    return seen if found["sight"] >= SIGHT else seen + blind


def describe_models(folder: Path, profile: "Profile") -> str:
    from .measures import ModelMeasures, read_measures

    found = {}
    for model in profile.models[:4]:
        files = [folder / "measures" / "models" / f"{name}.json" for name, _ in model.runs()]
        found[model.title] = fmean(read_measures(file, ModelMeasures)["first_error_auroc"] for file in files)
    return "first-error AUROC: " + ", ".join(f"{title} {value:.2f}" for title, value in found.items())


def describe_self_training(folder: Path, profile: "Profile") -> str:
    from .measures import HeldOutMeasures, read_measures

    last = {}
    for place, settings in enumerate(profile.self_training):
        path = folder / "self-training" / str(place) / "held_out.json"
        found = read_measures(path, HeldOutMeasures, more=True)
        last.setdefault(settings["kl_coef"], found["curve"][-1]["kl"])
    return "KL from the reference after training: " + ", ".join(
        f"{kl:.3f} at λ = {coef:g}" for coef, kl in last.items()
    )


@contextlib.contextmanager
def begun(folder: Path, settings: dict[str, Any], force: bool = False) -> Iterator[None]:
    """
    Create the folder of the demo, or reuse it if it was created with the same settings, and lock it for this process.

    Raises:
        `BlockingIOError`: If another demo is running in the folder.
        `ValueError`: If the folder has other files or a demo with different settings.
    """
    lock, mark = f"{MARK}.lock", folder / MARK
    with claimed_folder(folder, "output_dir", (MARK, "report.json", "report.html"), lock):
        others = [path for path in folder.iterdir() if path.name not in (MARK, lock)]
        foreign = [path.name for path in others if path.name not in OUTPUTS]
        if others and not mark.exists() or foreign and force:
            raise ValueError(
                f"{folder} has files that do not belong to a demo: {shown(', '.join(sorted(foreign)) or others[0].name)}. Move them, or "
                "set another `output_dir`."
            )
        is_begun = mark.exists() and mark.stat().st_size > 0
        found = read_json(mark, "Set another `output_dir`, or delete the folder.") if is_begun else None
        if found not in (None, settings) and not force:
            raise ValueError(
                f"The demo in {folder} was created with {found}, but the settings are now {settings}. Set another `output_dir`, or use "
                "--force to replace it."
            )
        if force:
            for path in others:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if found != settings:
            write_json(mark, settings)
        yield
