"""What each stage of the demo says of itself when it is done, in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from .demo_profiles import Profile


Tell = Callable[[Path], str]


def world(profile: Profile) -> Tell:
    words = f"{profile.num_train} problems to search, {profile.num_test} to solve, {profile.num_starts} to solve from a slip on"
    return lambda folder: words


def policy(profile: Profile) -> Tell:
    return lambda folder: f"a policy from scratch, {profile.policy_steps:,} steps"


def searched(name: str) -> Tell:
    def tell(folder: Path) -> str:
        from ..search.nodes import read_totals
        from ..search.run_folder import node_files

        totals = read_totals(node_files(folder / "runs" / name))
        leaves = totals["leaves_answered"] + totals["leaves_unresolved"]
        share = totals["leaves_correct"] / max(leaves, 1)
        return f"{totals['problems']:,} problems, {totals['num_tokens']:,} tokens, {leaves:,} solutions, {share:.0%} of them right"

    return tell


def policy_check(folder: Path) -> str:
    from ..demo.world import SIGHT

    found = json.loads((folder / "measures" / "policy.json").read_text(encoding="utf-8"))
    what = f"{found['accuracy']:.0%} right, {found['slip_rate']:.0%} slips, {found['correction_rate']:.0%} of them corrected"
    if found["sight"] is None:
        return f"{what}; it corrects no right step"
    seen = f"{what}; it corrects slips {found['sight']:.1f} times as often as right steps"
    blind = f", expected {SIGHT} or more: WARNING: it does not see its slips, and what follows shows little. Try another --seed"
    return seen if found["sight"] >= SIGHT else seen + blind


def datasets(folder: Path) -> str:
    return f"{len(list(folder.glob('datasets/[!.]*')))} datasets of judged steps and of solutions"


def reward_models(folder: Path) -> str:
    return f"{len(list(folder.glob('models/*/config.json')))} reward models"


def checks(profile: Profile) -> Tell:
    def tell(folder: Path) -> str:
        found = {}
        for model in profile.models[:4]:
            files = [folder / "measures" / "models" / f"{name}.json" for name, _ in model.runs()]
            found[model.title] = fmean(json.loads(file.read_text())["first_error_auroc"] for file in files)
        return "AUROC of first errors: " + ", ".join(f"{title} {value:.2f}" for title, value in found.items())

    return tell


def best_of_n(profile: Profile) -> Tell:
    return lambda folder: f"choices among up to {max(profile.n)} whole solutions"


def step_search(profile: Profile) -> Tell:
    return lambda folder: f"choices among up to {max(profile.n)} next steps"


def wrong_prefix(profile: Profile) -> Tell:
    return lambda folder: f"searches that begin after a slip, N = {', '.join(map(str, profile.prefix_n))}"


def self_training(profile: Profile) -> Tell:
    def tell(folder: Path) -> str:
        last = {}
        for place, settings in enumerate(profile.self_training):
            found = json.loads((folder / "self-training" / str(place) / "held_out.json").read_text())
            last.setdefault(settings["kl_coef"], found["curve"][-1]["kl"])
        shown = ", ".join(f"{value:.3f} at λ = {coef:g}" for coef, value in last.items())
        return f"KL to the reference at the end: {shown}"

    return tell


def self_trained(profile: Profile) -> Tell:
    return lambda folder: f"{profile.self_training_samples} solutions of each test problem by each policy"
