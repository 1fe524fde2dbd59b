"""
Collects the numbers of `report.json` from the folders of a demo.

Shares are between 0 and 1. Lists such as `auroc`, `accuracy` and `seconds` have one entry per seed in the list `seeds` of the same object.
Accuracies and intervals have one entry per N for each seed.
"""

import os
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..evaluation.results import load_results
from ..evaluation.saved_results import read_results, verdict
from .measures import (
    HeldOutMeasures,
    ModelMeasures,
    NumProblems,
    PolicyMeasures,
    SmallTree,
    ValueMeasures,
    measure_policy,
    read_measures,
)
from .over_seeds import spread
from .pipeline import spans_of
from .profiles import Profile, RewardModel
from .runner import DONE, read_mark
from .world import NAMES, SIGHT


VERSIONS = ("torch", "transformers", "trl", "datasets", "accelerate", "trl-hrm")
HNC_PAIRS = (
    *(("hnc", "prm"), ("hnc", "hrm"), ("hnc", "control"), ("hnc-per-child", "prm"), ("hnc-per-child", "hrm")),
    *(("hrm", "prm"), ("hnc-long", "prm-long")),
)
DATASETS = {
    "orm": "whole solutions, outcome labels",
    "prm": "single steps, MC scores",
    "hrm": "single and merged steps, MC scores",
    "hnc": "single and merged steps, MC scores, with and without node compression",
    "hnc-per-child": "as hnc, with the rule of HRM's code for the nodes to merge",
    "control": "single and merged steps of two searches, MC scores",
    "prm-hard": "single steps, correct if any solution below is correct",
    "judged-prm": "single steps, correct up to the first error",
    "judged-hrm": "single and merged steps, correct up to the first error",
    "sft": "solutions for self-training",
}


def collect(folder: Path, profile: Profile, name: str, seed: int, costs: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Return all measurements that the report shows.

    Args:
        folder (`Path`):
            Folder of the demo.
        profile ([`~demo.profiles.Profile`]):
            Profile of the demo.
        name (`str`):
            Name of the profile.
        seed (`int`):
            Seed of the problems and the policy.
        costs (`list[dict[str, Any]]`):
            `name`, `seconds` and `did` of each stage.
    """
    policy = read_measures(folder / "measures" / "policy.json", PolicyMeasures)
    return {
        **_header(folder, profile, name, seed),
        "policy": {**policy, "is_sighted": policy["sight"] is None or policy["sight"] >= SIGHT},
        "datasets": [_dataset(folder, path.name) for path in sorted((folder / "datasets").glob("[!.]*"))],
        "models": [_model(folder, model) for model in profile.models],
        "n": list(profile.n),
        "best_of_n": _best_of_n(folder, profile),
        "step_search": {
            "models": [_chosen(folder / "results" / "step-search", m) for m in profile.models if m.searches]
        },
        "wrong_prefix": _wrong_prefix(folder, profile),
        "step_kinds": [kinds for model in profile.models if model.corrects for kinds in _step_kinds(folder, model)],
        "values_by_cap": [
            read_measures(folder / "measures" / f"cap-{cap}.json", ValueMeasures)
            for cap in sorted({*profile.caps, profile.max_depth})
        ],
        "solution_length": len(NAMES) + 1,
        "calibration": [one for model in profile.models if model.ranks for one in _calibration(folder, model)],
        "self_training": _self_training(folder, profile, policy),
        "eta": _etas(folder, profile),
        "hnc": _hnc(folder, profile),
        "tree": read_measures(folder / "measures" / "tree.json", SmallTree),
        "stages": costs,
        "total_seconds": sum(cost["seconds"] for cost in costs),
    }


def _header(folder: Path, profile: Profile, name: str, seed: int) -> dict[str, Any]:
    from datetime import UTC, datetime
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")  # `platform.processor` only returns the architecture
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    processor = next(models, platform.processor())
    return {
        "profile": name,
        "command": f"trl-hrm demo --profile {name} --seed {seed}",
        "date": datetime.now(UTC).date().isoformat(),
        "seed": seed,
        "versions": {package: version(package) for package in VERSIONS},
        "machine": {"cores": os.cpu_count(), "processor": processor, "python": platform.python_version()},
        "problems": {
            "train": profile.num_train,
            "test": profile.num_test,
            "policy": read_measures(folder / "policy" / "problems.json", NumProblems)["num_problems"],
        },
    }


@cache
def _dataset(folder: Path, name: str) -> dict[str, Any]:
    from datasets import load_dataset

    rows = load_dataset(str(folder / "datasets" / name), split="train")
    column = "mc_score" if name == "sft" else "labels"
    labels = [x for value in rows[column] for x in (value if isinstance(value, list) else [value]) if x is not None]
    what = DATASETS.get(name) or f"single steps, entropy labels, η = {name.removeprefix('prm-eta')}"
    return {
        "name": name,
        "what": what,
        "rows": len(rows),
        "labels": len(labels),
        "mean_label": sum(labels) / len(labels),
    }


def _model(folder: Path, model: RewardModel) -> dict[str, Any]:
    found = [read_measures(folder / "measures" / "models" / f"{name}.json", ModelMeasures) for name, _ in model.runs()]
    seconds = [read_mark(folder / DONE / "reward-models" / f"{name}.json")["seconds"] for name, _ in model.runs()]
    return {
        "name": model.name,
        "title": model.title,
        "labels": model.labels,
        "data": model.data,
        "rows": _dataset(folder, model.data)["rows"],
        "seeds": list(model.seeds),
        "auroc": [one["auroc"] for one in found],
        "first_error_auroc": [one["first_error_auroc"] for one in found],
        "seconds": seconds,
    }


def _chosen(results: Path, model: RewardModel) -> dict[str, Any]:
    """Return the accuracies, intervals and verdicts over N of all seeds of a model."""
    found = read_results([results / name for name, _ in model.runs()])
    curves = [one.values["curves"][one.headline] for one in found]
    gaps = [one.values["hacking_gap"][one.headline] for one in found]
    return {
        "name": model.name,
        "seeds": list(model.seeds),
        "accuracy": [[point["accuracy"] for point in curve] for curve in curves],
        "interval": [[[point["low"], point["high"]] for point in curve] for curve in curves],
        "verdicts": [verdict(one, one.headline).answer for one in found],
        "undecided": [gap["undecided"] for gap in gaps],
        "gap": [[gap[name] for name in ("loss", "low", "high", "from_n", "largest_n")] for gap in gaps],
    }


def _best_of_n(folder: Path, profile: Profile) -> dict[str, Any]:
    results = folder / "results" / "best-of-n"
    models = [model for model in profile.models if model.ranks]
    plain = load_results(results / models[0].runs()[0][0]).curves
    return {
        "aggregate": {model.name: model.aggregate for model in models},
        **{name: [point["accuracy"] for point in plain[name]] for name in ("majority_vote", "pass_at_n")},
        "models": [_chosen(results, model) for model in models],
    }


def _wrong_prefix(folder: Path, profile: Profile) -> dict[str, Any]:
    found = []
    for model in (model for model in profile.models if model.corrects):
        for spans in spans_of(model):
            results = folder / "results" / "wrong-prefix"
            curves = [load_results(results / f"{name}-{max(spans)}").curves for name, _ in model.runs()]
            found.append(
                {
                    "name": model.name,
                    "title": model.title,
                    "spans": spans,
                    "seeds": list(model.seeds),
                    "accuracy": [[point["accuracy"] for point in one["step_search"]] for one in curves],
                }
            )
    return {"num_problems": profile.num_starts, "n": list(profile.prefix_n), "models": found}


def _step_kinds(folder: Path, model: RewardModel) -> list[dict[str, Any]]:
    found = [
        read_measures(folder / "measures" / "models" / f"{name}.json", ModelMeasures)["kinds"]
        for name, _ in model.runs()
    ]
    names = ("correction", "locally_right", "new_error", "auroc")
    shared = {"name": model.name, "title": model.title, "seeds": list(model.seeds)}
    return [
        {**shared, "spans": same[0]["spans"], **{name: [one[name] for one in same] for name in names}}
        for same in zip(*found, strict=True)
    ]


def _calibration(folder: Path, model: RewardModel) -> list[dict[str, Any]]:
    from ..step_metrics import binned_calibration_error

    name, seed = model.runs()[0]
    bins = load_results(folder / "results" / "best-of-n" / name).calibration["bins"]
    return [{"name": model.name, "seed": seed, "bins": bins, "ece": binned_calibration_error(bins)}]


def _self_training(folder: Path, profile: Profile, policy: dict[str, Any]) -> dict[str, Any]:
    from datasets import load_dataset

    rows = load_dataset(str(folder / "datasets" / "sft"), split="train")
    runs = []
    for place, settings in enumerate(profile.self_training):
        path = folder / "self-training" / str(place) / "held_out.json"
        accuracy = measure_policy(folder / "runs" / f"self-trained-{place}")
        runs.append(
            {
                "kl_coef": settings["kl_coef"],
                "kl_scaling": settings.get("kl_scaling", "log1p") if settings["kl_coef"] else None,
                "kl_reduction": settings.get("kl_reduction", "sum") if settings["kl_coef"] else None,
                "curve": read_measures(path, HeldOutMeasures, more=True)["curve"],
                "accuracy": {"num_right": accuracy["num_right"], "num_samples": accuracy["num_solutions"]},
            }
        )
    return {
        "reference_accuracy": {"num_right": policy["num_right"], "num_samples": policy["num_solutions"]},
        "num_trajectories": len(rows),
        "num_different": len(set(zip(rows["prompt"], rows["completion"], strict=True))),
        "runs": runs,
    }


def _etas(folder: Path, profile: Profile) -> list[dict[str, Any]]:
    found = []
    for model in profile.models:
        if model.name == "prm" or (model.labels in ("hard", "entropy")):
            measured, chosen = _model(folder, model), _chosen(folder / "results" / "best-of-n", model)
            found.append(
                {
                    "labels": model.labels,
                    "eta": model.eta,
                    "mean_label": _dataset(folder, model.data)["mean_label"],
                    "seeds": list(model.seeds),
                    "auroc": measured["first_error_auroc"],
                    "accuracy": chosen["accuracy"],
                }
            )
    return found


def _hnc(folder: Path, profile: Profile) -> dict[str, Any] | None:
    """Return the paired differences in step search over seeds. `None` without the control model."""
    models = {model.name: model for model in profile.models}
    if "control" not in models:
        return None
    accuracy = {
        name: _chosen(folder / "results" / "step-search", model)["accuracy"]
        for name, model in models.items()
        if model.searches
    }
    return {
        "seeds": list(models["hnc"].seeds),
        "n": list(profile.n),
        "rows": {
            name: _dataset(folder, models[name].data)["rows"]
            for name in ("prm", "hrm", "hnc", "hnc-per-child", "control")
        },
        "comparisons": [
            {"a": a, "b": b, "steps": models[a].steps, "difference": _differences(accuracy[a], accuracy[b])}
            for a, b in HNC_PAIRS
        ],
    }


def _differences(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Return the difference of two models for each N, from their accuracies per seed."""
    found = [
        spread([own - other for own, other in zip(*pair, strict=True)])
        for pair in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True)
    ]
    return [{"mean": one.mean, "low": one.low, "high": one.high, "per_seed": list(one.values)} for one in found]
