"""
What holds of the papers' claims in the demo's world, computed from its measurements.

A claim is held or not held where a 95 % interval over three reward-model seeds or more leaves out what the other answer would
need. All else is open, with the number that was seen.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.hacking import MARGIN, percent
from .hacking import WAYS, Fall, Headline, fall_words, headlines, named, titles
from .over_seeds import Answer, Spread, judge, judge_all, paired, spread, told


HRM = "HRM"
ER_PRM = "ER-PRM"
PAPER_COEF = 0.5  # the HRM paper's λ
DRIFT = (0.0, 0.001, PAPER_COEF)


@dataclass(frozen=True)
class Claim:
    """
    A claim and what is seen of it.

    Args:
        paper (`str`):
            The paper that makes it.
        words (`str`):
            What it claims.
        here (`str`):
            What is seen here, with its numbers.
        answer (`str`):
            `"held"`, `"not held"` or `"open"`.
    """

    paper: str
    words: str
    here: str
    answer: Answer


def _claim(words: str, here: str, answer: Answer, *measured: Spread, paper: str = HRM, each: str = "seed") -> Claim:
    """A claim, that says what did not settle it where nothing did."""
    if answer == "open":
        number = min(len(one.values) for one in measured)
        here += f" Not settled by {number} {each}{'s' * (number != 1)}."
    return Claim(paper, words, here, answer)


def _not_measured(words: str, paper: str = HRM) -> Claim:
    return Claim(paper, words, "Not measured here.", "open")


def claims(data: dict[str, Any]) -> list[Claim]:
    """
    All claims of both papers that the demo can speak of.

    Args:
        data (`dict[str, Any]`):
            The measurements. See [`write_report`].

    Returns:
        `list[Claim]`: In the order of the page.
    """
    return [
        *_over_n(data),
        _hrm_over_prm(data),
        *_corrections(data["step_kinds"]),
        _wrong_prefix(data["wrong_prefix"]),
        *_hnc(data["hnc"], titles(data)),
        *_self_training(data["self_training"]["runs"]),
        _entropy(data["eta"], data["n"]),
    ]


def _over_n(data: dict[str, Any]) -> list[Claim]:
    """ORM and PRM fall as N grows, HRM does not."""
    headline = {one.name: one for one in headlines(data)}
    asked = (
        ("orm", "ORM loses accuracy as N grows.", _falls),
        ("prm", "PRM loses accuracy as N grows.", _falls),
        ("hrm", "HRM stays stable as N grows.", _stays),
    )
    return [
        _claim(words, _curve_words(headline[name]), answer(headline[name].fall), headline[name].fall.spread)
        if name in headline
        else _not_measured(words)
        for name, words, answer in asked
    ]


def _falls(fall: Fall) -> Answer:
    return {"yes": "held", "no": "not held", "open": "open"}[fall.answer]


def _stays(fall: Fall) -> Answer:
    return {"yes": "not held", "no": "held", "open": "open"}[fall.answer]


def _curve_words(headline: Headline) -> str:
    fall = headline.fall
    return (
        f"By {WAYS[headline.way]}: {percent(fall.best)} at N = {fall.best_n}, {percent(fall.last)} at N = {fall.largest_n}; "
        f"accuracy {fall_words(fall)}."
    )


def _hrm_over_prm(data: dict[str, Any]) -> Claim:
    n, models = data["n"][-1], data["step_search"]["models"]
    words = "HRM is above PRM at the largest N."
    hrm, prm = named(models, "hrm"), named(models, "prm")
    if hrm is None or prm is None:
        return _not_measured(words)
    found = _difference_at(hrm, prm, -1)
    here = f"HRM minus PRM at N = {n}, step search: {told(found)}."
    return _claim(words, here, judge(found), found)


def _difference_at(mine: dict[str, Any], other: dict[str, Any], i: int) -> Spread:
    """Difference of accuracies at the i-th N."""
    return paired(
        mine["seeds"],
        [accuracy[i] for accuracy in mine["accuracy"]],
        other["seeds"],
        [accuracy[i] for accuracy in other["accuracy"]],
    )


def _corrections(kinds: Sequence[dict[str, Any]]) -> list[Claim]:
    """
    HRM approves of corrections: by pairs, and scored as the papers score.

    A model that likes everything more likes corrections more, so that telling corrections from the other steps after an error
    (AUROC) must get better too.
    """
    prm, found = named(kinds, "judged-prm", [1]), []
    ways = (
        ([1, 2], "HRM judges a correction by the pair that it ends, where PRM looks at one step."),
        ([1], "HRM judges a correction better than PRM as the papers score: each step alone."),
    )
    for spans, words in ways:
        hrm = named(kinds, "judged-hrm", spans)
        if hrm is None or prm is None:
            found.append(_not_measured(words))
            continue
        score, auroc = (paired(hrm["seeds"], hrm[key], prm["seeds"], prm[key]) for key in ("correction", "auroc"))
        here = (
            f"Mean score of a correction: {statistics.fmean(hrm['correction']):.2f}, PRM {statistics.fmean(prm['correction']):.2f}; "
            f"difference {told(score, 1, '', 2)}. AUROC of corrections against other steps after an error: difference "
            f"{told(auroc, 1, '', 2)}."
        )
        found.append(_claim(words, here, judge_all([judge(score), judge(auroc)]), score, auroc))
    return found


def _wrong_prefix(found: dict[str, Any]) -> Claim:
    words = "HRM recovers from an error that it is given, where PRM does not."
    hrm, prm = named(found["models"], "judged-hrm", [1, 2]), named(found["models"], "judged-prm", [1])
    if hrm is None or prm is None:
        return _not_measured(words)
    difference = _difference_at(hrm, prm, -1)
    ends = (percent(statistics.fmean([accuracy[-1] for accuracy in one["accuracy"]])) for one in (hrm, prm))
    here = (
        f"Search from a wrong prefix, N = {found['n'][-1]}: {next(ends)} with pairs scored, PRM {next(ends)}; difference "
        f"{told(difference)}."
    )
    return _claim(words, here, judge(difference), difference)


def _hnc(found: dict[str, Any] | None, names: dict[str, str]) -> list[Claim]:
    if found is None:
        here = "Not measured in this profile: run the full one."
        return [Claim(HRM, f"HRM + HNC is above {name}.", here, "open") for name in ("PRM", "HRM")]
    return [_of_hnc(one, found["n"][-1], names) for one in found["comparisons"] if one["a"].startswith("hnc")]


def _of_hnc(comparison: dict[str, Any], n: int, names: dict[str, str]) -> Claim:
    a, b = (names[comparison[key]] for key in ("a", "b"))
    difference = compared(comparison["difference"][-1])
    words = f"{a} is above {b}{' (a control of ours)' if comparison['b'] == 'control' else ''}."
    here = f"Difference at N = {n}, step search, {comparison['steps']:,} training steps: {told(difference)}."
    return _claim(words, here, judge(difference), difference)


def compared(point: dict[str, Any]) -> Spread:
    """A paired difference of the measurements."""
    return Spread(tuple(point["per_seed"]), point["mean"], point["low"], point["high"])


def runs_of(
    runs: Sequence[dict[str, Any]], kl_coef: float, scaling: str, reduction: str = "sum"
) -> list[dict[str, Any]]:
    """The runs at one λ. Without a KL term there is nothing to scale or to reduce."""
    keys = (0.0, None, None) if kl_coef == 0 else (kl_coef, scaling, reduction)
    return [run for run in runs if (run["kl_coef"], run["kl_scaling"], run["kl_reduction"]) == keys]


def accuracy_of(found: dict[str, int]) -> float:
    """Share of right samples."""
    return found["num_right"] / found["num_samples"]


def _self_training(runs: Sequence[dict[str, Any]]) -> list[Claim]:
    """Claims of λ, as the paper takes KL: summed over a solution, and its logarithm."""
    coefs = sorted({run["kl_coef"] for run in runs})
    by_coef = {coef: found for coef in coefs if (found := runs_of(runs, coef, "log1p"))}
    return [_drift(by_coef), _best_coef(by_coef), _log_scaling(runs)]


def _drift(by_coef: dict[float, list[dict[str, Any]]]) -> Claim:
    words = "Without a KL term the policy drifts, and a small λ hardly holds it: KL(0) > KL(0.001) > KL(0.5)."
    by_coef = {coef: by_coef[coef] for coef in DRIFT if coef in by_coef}
    if len(by_coef) < len(DRIFT):
        return _not_measured(words)
    last = [[run["curve"][-1]["kl"] for run in found] for found in by_coef.values()]
    means = ", ".join(
        f"{statistics.fmean(values):.3g} at λ = {coef:g}" for coef, values in zip(by_coef, last, strict=True)
    )
    falls = [_run_by_run(more, less) for more, less in zip(last, last[1:], strict=False)]
    order = "in the order claimed" if all(fall.mean > 0 for fall in falls) else "not in the order claimed"
    here = f"KL at the end, nats per solution: {means}: {order}."
    return _claim(words, here, judge_all([judge(fall) for fall in falls]), *falls, each="run")


def _run_by_run(mine: Sequence[float], others: Sequence[float]) -> Spread:
    """Differences of repeated runs, the first with the first."""
    if len(mine) != len(others):
        raise ValueError(
            f"Runs of self-training to compare: found {len(mine)} of one λ and {len(others)} of another, expected as many of each. "
            "Repeat all with the same seeds."
        )
    return spread([a - b for a, b in zip(mine, others, strict=True)])


def _best_coef(by_coef: dict[float, list[dict[str, Any]]]) -> Claim:
    words = f"λ = {PAPER_COEF:g} is the best balance."
    if PAPER_COEF not in by_coef or len(by_coef) < 2:
        return _not_measured(words)
    accuracy = {coef: [accuracy_of(run["accuracy"]) for run in found] for coef, found in by_coef.items()}
    above = {coef: _run_by_run(accuracy[PAPER_COEF], accuracy[coef]) for coef in by_coef if coef != PAPER_COEF}
    best = max(accuracy, key=lambda coef: statistics.fmean(accuracy[coef]))
    means = ", ".join(f"{percent(statistics.fmean(values))} at λ = {coef:g}" for coef, values in accuracy.items())
    rival = min(above, key=lambda coef: above[coef].mean)
    here = (
        f"Accuracy after training: {means}; the highest at λ = {best:g}. λ = {PAPER_COEF:g} minus λ = {rival:g}: "
        f"{_over_runs(above[rival])}."
    )
    return _claim(words, here, judge_all([judge(one) for one in above.values()]), *above.values(), each="run")


def _over_runs(found: Spread) -> str:
    return told(found).replace("seed", "run")


def _log_scaling(runs: Sequence[dict[str, Any]]) -> Claim:
    words = f"The logarithm of KL gives the balance: at λ = {PAPER_COEF:g}, accuracy is higher with it."
    with_log, without = (runs_of(runs, PAPER_COEF, scaling) for scaling in ("log1p", "none"))
    if not with_log or not without:
        return _not_measured(words)
    accuracy = [[accuracy_of(run["accuracy"]) for run in found] for found in (with_log, without)]
    kl = [statistics.fmean(run["curve"][-1]["kl"] for run in found) for found in (with_log, without)]
    difference = _run_by_run(*accuracy)
    here = f"With minus without: {_over_runs(difference)}; KL at the end {kl[0]:.3g} and {kl[1]:.3g}."
    is_small = difference.is_settled and max(abs(difference.low), abs(difference.high)) < MARGIN
    return _claim(words, here, "not held" if is_small else judge(difference), difference, each="run")


def _entropy(found: Sequence[dict[str, Any]], n: Sequence[int]) -> Claim:
    """The best η stands for entropy labels: it is chosen on what it is measured on, which favours the claim."""
    words = "Entropy labels are above hard and soft ones."
    entropy = [one for one in found if one["labels"] == "entropy"]
    rivals = [one for one in found if one["labels"] != "entropy"]
    if not entropy or len(rivals) < 2:
        return _not_measured(words, ER_PRM)
    best = max(entropy, key=lambda one: statistics.fmean(accuracy[-1] for accuracy in one["accuracy"]))
    above = {rival["labels"]: _difference_at(best, rival, -1) for rival in rivals}
    parts = "; ".join(f"minus {labels} labels {told(difference)}" for labels, difference in above.items())
    here = f"Accuracy at N = {n[-1]} with the best η here, {best['eta']:g}: {parts}. The best of {len(entropy)} η favours the claim."
    return _claim(words, here, judge_all(list(map(judge, above.values()))), *above.values(), paper=ER_PRM)
