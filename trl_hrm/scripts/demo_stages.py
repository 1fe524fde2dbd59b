"""
The stages of the demo, from top to bottom. Each calls what users call: a command or a recipe with settings of `recipes/demo`. The
folders, below that of the demo:

    world/           problems, and solutions that the world's judge labels
    policy/          the policy
    runs/            searches for labels, and the solutions from which reward models choose
    datasets/        what is trained on, as it is pushed to the Hub
    models/          reward models, as they are pushed to the Hub
    results/         choices among whole solutions and among next steps, with every reward model
    measures/        what the world's checker says
    self-training/   policies after self-training, and their solutions
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from .demo_jobs import (
    make_policy,
    make_world,
    measure_model,
    measure_policy,
    measure_tree,
    measure_values,
    recipe,
    self_train,
)
from .demo_profiles import Profile, RewardModel
from .demo_runner import Job, Stage, command, run_command, run_recipe


SHARDS = 2  # parts of a search, each in a process of its own
PAIRS = [1, 2]  # spans that also judge a step merged with the one before it


def stages(profile: Profile, folder: str, seed: int) -> list[Stage]:
    """
    The stages, in their order.

    Args:
        profile ([`~demo_profiles.Profile`]):
            How much of everything.
        folder (`str`):
            Folder of the demo.
        seed (`int`):
            Seed of the world and of the policy.
    """
    at = Places(folder)
    searched = [model for model in profile.models if model.searches]
    ranking = [model for model in profile.models if model.ranks]
    corrects = [model for model in profile.models if model.corrects]
    sizes = {name: getattr(profile, f"num_{name}") for name in ("train", "test", "starts", "judged")}
    world = {f"num_{name}": size for name, size in sizes.items()}
    return [
        Stage(
            "world",
            [Job("world", make_world, {"folder": at("world"), **world, "seed": seed})],
            lambda _: (
                f"{profile.num_train} problems to search, {profile.num_test} to solve, {profile.num_starts} to solve from a slip on"
            ),
        ),
        Stage(
            "policy",
            [
                Job(
                    "policy",
                    make_policy,
                    {"world": at("world"), "folder": at("policy"), "steps": profile.policy_steps, "seed": seed},
                )
            ],
            lambda _: f"a policy from scratch, {profile.policy_steps:,} steps",
        ),
        Stage(
            "solutions",
            _search(at, "solutions", "candidates", "test", num_solutions=max(profile.n), max_sequences=max(profile.n)),
            _tell_search(at, "solutions"),
        ),
        Stage(
            "policy-check",
            [Job("check", measure_policy, {"run": at("runs/solutions"), "output": at("measures/policy.json")})],
            _tell_policy,
        ),
        Stage("search", _all_searches(profile, at), _tell_search(at, "search")),
        Stage(
            "datasets",
            _datasets(profile, at),
            lambda path: f"{len(list(path.glob('datasets/*')))} datasets of judged steps and of solutions",
        ),
        Stage(
            "reward-models",
            [_training(at, model, name, seed) for model in profile.models for name, seed in model.runs()],
            _tell_models,
        ),
        Stage(
            "checks",
            [
                *[
                    Job(name, measure_model, _measured(at, model, name, seed))
                    for model in profile.models
                    for name, _ in model.runs()
                ],
                *[
                    Job(
                        f"cap-{cap}",
                        measure_values,
                        {"run": at(f"runs/cap-{cap}"), "cap": cap, "output": at(f"measures/cap-{cap}.json")},
                    )
                    for cap in profile.caps
                ],
                Job(
                    f"cap-{profile.max_depth}",
                    measure_values,
                    {
                        "run": at("runs/search"),
                        "cap": profile.max_depth,
                        "output": at(f"measures/cap-{profile.max_depth}.json"),
                    },
                ),
                Job("tree", measure_tree, {"run": at("runs/search"), "output": at("measures/tree.json")}),
            ],
            _tell_checks(profile),
        ),
        Stage(
            "best-of-n",
            [_ranking(at, profile, model, name) for model in ranking for name, _ in model.runs()],
            lambda _: f"choices among up to {max(profile.n)} whole solutions",
        ),
        Stage(
            "step-search",
            [_searching(at, profile, model, name) for model in searched for name, _ in model.runs()],
            lambda _: f"choices among up to {max(profile.n)} next steps",
        ),
        Stage(
            "wrong-prefix",
            [
                _searching(
                    at, profile, model, name, f"wrong-prefix/{name}-{max(spans)}", spans, "starts", profile.prefix_n
                )
                for model in corrects
                for name, _ in model.runs()
                for spans in _spans_of(model)
            ],
            lambda _: f"searches that begin after a slip, N = {', '.join(map(str, profile.prefix_n))}",
        ),
        Stage(
            "self-training",
            [_self_training(profile, at, place, settings) for place, settings in enumerate(profile.self_training)],
            _tell_self_training(profile),
        ),
        Stage(
            "self-trained",
            [job for place in range(len(profile.self_training)) for job in _sampled_again(profile, at, place)],
            lambda _: f"{profile.self_training_samples} solutions of each test problem by each policy",
        ),
    ]


class Places:
    """Paths below the folder of the demo, as settings have them."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, path: str) -> str:
        return str(Path(self.folder, path))


def _search(at: Places, name: str, config: str, problems: str, shards: int = SHARDS, **settings: Any) -> list[Job]:
    """The parts of a search."""
    given = {
        "policy": at("policy"),
        "problems": at(f"world/{problems}.jsonl"),
        "output_dir": at(f"runs/{name}"),
        **settings,
    }
    return [
        Job(f"{name}-{i}", run_command, command("annotate", recipe(config), **given, shard=f"{i}/{shards}"))
        for i in range(shards)
    ]


def _all_searches(profile: Profile, at: Places) -> list[Job]:
    jobs = _search(at, "search", "annotate", "train", max_depth=profile.max_depth)
    for cap in profile.caps:
        jobs += _search(at, f"cap-{cap}", "annotate", "train", shards=1, max_depth=cap, limit=profile.num_capped)
    if profile.again:
        jobs += _search(at, "search-again", "annotate", "train", max_depth=profile.max_depth, seed=142)
    return jobs


def _datasets(profile: Profile, at: Places) -> list[Job]:
    def export(name: str, *runs: str, config: str = "export", **settings: Any) -> Job:
        inputs = [at(f"runs/{run}") for run in runs or ("search",)]
        given = command("export", recipe(config), inputs=inputs, output_dir=at(f"datasets/{name}"), **settings)
        return Job(name, run_command, given)

    def build(name: str) -> Job:
        inputs = [at(f"world/{name}.jsonl")]
        return Job(
            name,
            run_command,
            command("build-stepwise", recipe("build_stepwise"), inputs=inputs, output_dir=at(f"datasets/{name}")),
        )

    return [
        export("orm", view="orm"),
        export("prm", view="tree"),
        export("hrm", view="hrm"),
        export("hnc", view="hrm", hnc=True, hnc_min_children=2),
        *([export("control", "search", "search-again", view="hrm")] if profile.again else []),
        export("prm-hard", view="tree", labels="hard"),
        *[export(f"prm-eta{eta:g}", view="tree", labels="entropy", eta=eta) for eta in profile.etas],
        build("judged-prm"),
        build("judged-hrm"),
        export("sft", config="sft"),
    ]


def _training(at: Places, model: RewardModel, name: str, seed: int) -> Job:
    settings = {
        "model_name_or_path": at("policy"),
        "dataset_name": at(f"datasets/{model.data}"),
        "output_dir": at(f"models/{name}"),
        "max_steps": model.steps,
        "seed": seed,
    }
    return Job(name, run_recipe, {"name": "hrm_reward", "config": recipe("hrm_reward"), "settings": settings})


def _spans_of(model: RewardModel) -> list[list[int]]:
    """How its scores are taken after a slip: as the papers do, and where it has learned pairs, with them."""
    return [[1], PAIRS] if "hrm" in model.data else [[1]]


def _measured(at: Places, model: RewardModel, name: str, seed: int) -> dict[str, Any]:
    return {
        "model": at(f"models/{name}"),
        "world": at("world"),
        "spans": _spans_of(model),
        "seed": seed,
        "output": at(f"measures/models/{name}.json"),
    }


def _ranking(at: Places, profile: Profile, model: RewardModel, name: str) -> Job:
    settings = {
        "candidates": at("runs/solutions"),
        "reward_model": at(f"models/{name}"),
        "output_dir": at(f"results/best-of-n/{name}"),
        "n": list(profile.n),
        "aggregate": ["last" if model.data == "orm" else "min"],
    }
    return Job(name, run_command, command("best-of-n", recipe("best_of_n"), **settings))


def _searching(
    at: Places,
    profile: Profile,
    model: RewardModel,
    name: str,
    output: str | None = None,
    spans: list[int] | None = None,
    problems: str = "test",
    n: tuple[int, ...] | None = None,
) -> Job:
    output = output or f"step-search/{name}"
    settings = {
        "problems": at(f"world/{problems}.jsonl"),
        "policy": at("policy"),
        "reward_model": at(f"models/{name}"),
        "output_dir": at(f"results/{output}"),
        "n": list(n or profile.n),
        "spans": spans or [1],
        **({"prefix_column": "prefix"} if problems == "starts" else {}),
    }
    return Job(Path(output).name, run_command, command("best-of-n", recipe("step_search"), **settings))


def _self_training(profile: Profile, at: Places, place: int, settings: dict[str, Any]) -> Job:
    given = {
        "policy": at("policy"),
        "data": at("datasets/sft"),
        "output": at(f"self-training/{place}"),
        "steps": profile.self_training_steps,
        "settings": settings,
    }
    return Job(str(place), self_train, given)


def _sampled_again(profile: Profile, at: Places, place: int) -> list[Job]:
    samples = profile.self_training_samples
    name = f"self-trained-{place}"
    given = {"num_solutions": samples, "max_sequences": samples, "policy": at(f"self-training/{place}")}
    return _search(at, name, "candidates", "test", shards=1, **given)


def _tell_search(at: Places, name: str) -> Callable[[Path], str]:
    def tell(path: Path) -> str:
        from ..search.nodes import read_totals
        from ..search.run_folder import node_files

        totals = read_totals(node_files(path / "runs" / name))
        leaves = totals["leaves_answered"] + totals["leaves_unresolved"]
        share = totals["leaves_correct"] / max(leaves, 1)
        return f"{totals['problems']:,} problems, {totals['num_tokens']:,} tokens, {leaves:,} solutions, {share:.0%} of them right"

    return tell


def _tell_policy(path: Path) -> str:
    found = json.loads((path / "measures" / "policy.json").read_text())
    sight = (
        "it corrects no right step"
        if found["sight"] is None
        else f"it corrects slips {found['sight']:.1f} times as often as right steps"
    )
    blind = (
        ""
        if found["sight"] is None or found["sight"] >= 5
        else ". WARNING: it does not see its slips; the rest shows little"
    )
    return f"{found['accuracy']:.0%} right, {found['slip_rate']:.0%} slips, {found['correction_rate']:.0%} of them corrected; {sight}{blind}"


def _tell_models(path: Path) -> str:
    return f"{len(list(path.glob('models/*/config.json')))} reward models"


def _tell_checks(profile: Profile) -> Callable[[Path], str]:
    def tell(path: Path) -> str:
        found = {}
        for model in profile.models[:4]:
            files = [path / "measures" / "models" / f"{name}.json" for name, _ in model.runs()]
            found[model.name] = fmean(json.loads(file.read_text())["first_error_auroc"] for file in files)
        return "AUROC of first errors: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items())

    return tell


def _tell_self_training(profile: Profile) -> Callable[[Path], str]:
    def tell(path: Path) -> str:
        found = [
            json.loads((path / "self-training" / str(i) / "held_out.json").read_text())
            for i in range(len(profile.self_training))
        ]
        shown = ", ".join(f"λ = {one['kl_coef']:g}: {one['curve'][-1]['kl']:.3f}" for one in found[:3])
        return f"KL to the reference at the end: {shown}"

    return tell
