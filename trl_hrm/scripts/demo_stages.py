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
    self-training/   policies after self-training
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import demo_tell as tell
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
    demo = Demo(profile, folder, seed)
    return [
        demo.world(),
        demo.policy(),
        demo.solutions(),
        demo.policy_check(),
        demo.search(),
        demo.datasets(),
        demo.reward_models(),
        demo.checks(),
        demo.best_of_n(),
        demo.step_search(),
        demo.wrong_prefix(),
        demo.self_training(),
        demo.self_trained(),
    ]


@dataclass(frozen=True)
class Demo:
    """What the stages share."""

    profile: Profile
    folder: str
    seed: int

    def at(self, path: str) -> str:
        """A path below the folder of the demo."""
        return str(Path(self.folder, path))

    def world(self) -> Stage:
        """Problems to search, to solve, and to solve from a slip on; solutions that the world's judge labels."""
        sizes = {f"num_{name}": getattr(self.profile, f"num_{name}") for name in ("train", "test", "starts", "judged")}
        job = Job("world", make_world, {"folder": self.at("world"), **sizes, "seed": self.seed})
        return Stage("world", [job], tell.world(self.profile))

    def policy(self) -> Stage:
        """A policy that errs and corrects itself, trained from scratch."""
        settings = {"world": self.at("world"), "folder": self.at("policy")}
        job = Job("policy", make_policy, {**settings, "steps": self.profile.policy_steps, "seed": self.seed})
        return Stage("policy", [job], tell.policy(self.profile))

    def solutions(self) -> Stage:
        """The whole solutions from which every reward model chooses."""
        most = max(self.profile.n)
        jobs = self._search("solutions", "candidates", "test", num_solutions=most, max_sequences=most)
        return Stage("solutions", jobs, tell.searched("solutions"))

    def policy_check(self) -> Stage:
        """Whether the policy sees its slips: if not, the rest shows little."""
        job = Job(
            "check", measure_policy, {"run": self.at("runs/solutions"), "output": self.at("measures/policy.json")}
        )
        return Stage("policy-check", [job], tell.policy_check)

    def search(self) -> Stage:
        """Trees of steps, from whose outcomes labels are made; for their values by depth also with other depths."""
        profile = self.profile
        jobs = self._search("search", "annotate", "train", max_depth=profile.max_depth)
        for cap in profile.caps:
            limit = {"max_depth": cap, "limit": profile.num_capped}
            jobs += self._search(f"cap-{cap}", "annotate", "train", shards=1, **limit)
        if profile.again:
            jobs += self._search("search-again", "annotate", "train", max_depth=profile.max_depth, seed=142)
        return Stage("search", jobs, tell.searched("search"))

    def datasets(self) -> Stage:
        """Labels of the search in the views of ORM, PRM and HRM, with node compression, hard and entropy labels; a judge's labels."""
        jobs = [
            self._export("orm", view="orm"),
            self._export("prm", view="tree"),
            self._export("hrm", view="hrm"),
            self._export("hnc", view="hrm", hnc=True, hnc_min_children=2),
            self._export("prm-hard", view="tree", labels="hard"),
            *[self._export(f"prm-eta{eta:g}", view="tree", labels="entropy", eta=eta) for eta in self.profile.etas],
            self._export("sft", config="sft"),
            self._build("judged-prm"),
            self._build("judged-hrm"),
        ]
        if self.profile.again:
            jobs.append(self._export("control", "search", "search-again", view="hrm"))
        return Stage("datasets", jobs, tell.datasets)

    def reward_models(self) -> Stage:
        """Every reward model with every seed. Each begins as the policy."""
        jobs = [self._training(model, name, seed) for model in self.profile.models for name, seed in model.runs()]
        return Stage("reward-models", jobs, tell.reward_models)

    def checks(self) -> Stage:
        """What the world's checker says of reward models and of the values of searches."""
        caps = {**{cap: f"cap-{cap}" for cap in self.profile.caps}, self.profile.max_depth: "search"}
        jobs = [self._measured(model, name) for model in self.profile.models for name, _ in model.runs()]
        for cap, run in caps.items():
            settings = {
                "run": self.at(f"runs/{run}"),
                "world": self.at("world"),
                "num_problems": self.profile.num_capped,  # as many, and the same ones
                "cap": cap,
                "output": self.at(f"measures/cap-{cap}.json"),
            }
            jobs.append(Job(f"cap-{cap}", measure_values, settings))
        jobs.append(
            Job("tree", measure_tree, {"run": self.at("runs/search"), "output": self.at("measures/tree.json")})
        )
        return Stage("checks", jobs, tell.checks(self.profile))

    def best_of_n(self) -> Stage:
        """Choices among whole solutions."""
        models = [model for model in self.profile.models if model.ranks]
        jobs = [self._ranking(model, name) for model in models for name, _ in model.runs()]
        return Stage("best-of-n", jobs, tell.best_of_n(self.profile))

    def step_search(self) -> Stage:
        """Choices among next steps."""
        models = [model for model in self.profile.models if model.searches]
        jobs = [self._searching("step-search", name, "test", self.profile.n) for m in models for name, _ in m.runs()]
        return Stage("step-search", jobs, tell.step_search(self.profile))

    def wrong_prefix(self) -> Stage:
        """Searches that begin after a slip: where self-correction shows."""
        runs = [(m, name) for m in self.profile.models if m.corrects for name, _ in m.runs()]
        jobs = [
            self._searching("wrong-prefix", name, "starts", self.profile.prefix_n, spans)
            for model, name in runs
            for spans in spans_of(model)
        ]
        return Stage("wrong-prefix", jobs, tell.wrong_prefix(self.profile))

    def self_training(self) -> Stage:
        """The policy trained on its best solutions, at every λ."""
        shared = {
            "policy": self.at("policy"),
            "data": self.at("datasets/sft"),
            "steps": self.profile.self_training_steps,
        }
        jobs = [
            Job(str(place), self_train, {**shared, "output": self.at(f"self-training/{place}"), "settings": settings})
            for place, settings in enumerate(self.profile.self_training)
        ]
        return Stage("self-training", jobs, tell.self_training(self.profile))

    def self_trained(self) -> Stage:
        """Solutions of the policies after self-training."""
        samples = self.profile.self_training_samples
        jobs = []
        for place in range(len(self.profile.self_training)):
            given = {"num_solutions": samples, "max_sequences": samples, "policy": self.at(f"self-training/{place}")}
            jobs += self._search(f"self-trained-{place}", "candidates", "test", shards=1, **given)
        return Stage("self-trained", jobs, tell.self_trained(self.profile))

    def _search(self, name: str, config: str, problems: str, shards: int = SHARDS, **settings: Any) -> list[Job]:
        """The parts of a search."""
        given = {
            "policy": self.at("policy"),
            "problems": self.at(f"world/{problems}.jsonl"),
            "output_dir": self.at(f"runs/{name}"),
            **settings,
        }
        return [
            Job(f"{name}-{i}", run_command, command("annotate", recipe(config), **given, shard=f"{i}/{shards}"))
            for i in range(shards)
        ]

    def _export(self, name: str, *runs: str, config: str = "export", **settings: Any) -> Job:
        inputs = [self.at(f"runs/{run}") for run in runs or ("search",)]
        given = {"inputs": inputs, "output_dir": self.at(f"datasets/{name}"), **settings}
        return Job(name, run_command, command("export", recipe(config), **given))

    def _build(self, name: str) -> Job:
        given = {"inputs": [self.at(f"world/{name}.jsonl")], "output_dir": self.at(f"datasets/{name}")}
        return Job(name, run_command, command("build-stepwise", recipe("build_stepwise"), **given))

    def _training(self, model: RewardModel, name: str, seed: int) -> Job:
        settings = {
            "model_name_or_path": self.at("policy"),
            "dataset_name": self.at(f"datasets/{model.data}"),
            "output_dir": self.at(f"models/{name}"),
            "max_steps": model.steps,
            "seed": seed,
        }
        return Job(name, run_recipe, {"name": "hrm_reward", "config": recipe("hrm_reward"), "settings": settings})

    def _measured(self, model: RewardModel, name: str) -> Job:
        settings = {
            "model": self.at(f"models/{name}"),
            "world": self.at("world"),
            "spans": spans_of(model),
            "seed": self.seed,  # the same steps for all
            "output": self.at(f"measures/models/{name}.json"),
        }
        return Job(name, measure_model, settings)

    def _ranking(self, model: RewardModel, name: str) -> Job:
        settings = {
            "candidates": self.at("runs/solutions"),
            "reward_model": self.at(f"models/{name}"),
            "output_dir": self.at(f"results/best-of-n/{name}"),
            "n": list(self.profile.n),
            "aggregate": [model.aggregate],
        }
        return Job(name, run_command, command("best-of-n", recipe("best_of_n"), **settings))

    def _searching(
        self, stage: str, name: str, problems: str, n: tuple[int, ...], spans: list[int] | None = None
    ) -> Job:
        """A search step by step. With `spans` it begins after a slip, and its folder tells how scores are taken."""
        output = name if spans is None else f"{name}-{max(spans)}"
        settings = {
            "problems": self.at(f"world/{problems}.jsonl"),
            "policy": self.at("policy"),
            "reward_model": self.at(f"models/{name}"),
            "output_dir": self.at(f"results/{stage}/{output}"),
            "n": list(n),
            **({} if spans is None else {"spans": spans, "prefix_column": "prefix"}),
        }
        return Job(output, run_command, command("best-of-n", recipe("step_search"), **settings))


def spans_of(model: RewardModel) -> list[list[int]]:
    """How its scores are taken after a slip: as the papers do, and where it has learned pairs, with them."""
    return [[1], PAIRS] if model.is_merged else [[1]]
