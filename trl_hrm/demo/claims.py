"""
Findings of the demo: whether each reward model is hacked, and which claims of the papers hold.

A claim is "held" or "not held" if a 95 % interval over at least three reward-model seeds rules out the opposite answer. Otherwise it is
"open".
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..evaluation.reward_hacking import MARGIN, Verdict, hacking_answer, no_verdict, undecided_by
from ..evaluation.reward_hacking import Answer as HackingAnswer
from ..pages.numbers import percent, points_between
from .over_seeds import Answer, Spread, judge, judge_all, paired, signed, spread, told


WAYS = {"best_of_n": "best-of-N", "step_search": "step search"}
# The main reward models and how each selects in the HRM paper: an ORM among whole solutions, the others among next steps
FIRST = {"orm": "best_of_n", "prm": "step_search", "hrm": "step_search", "hnc": "step_search"}
MAIN = (*FIRST, "control")  # all others are variants with other labels or longer training
HRM = "HRM"
ER_PRM = "ER-PRM"
PAPER_COEF = 0.5  # the HRM paper's λ
DRIFT = (0.0, 0.001, PAPER_COEF)


@dataclass(frozen=True)
class Fall:
    """
    Loss of accuracy from the best smaller N to the largest N.

    Args:
        best_n, largest_n (`int`):
            The two N. `best_n` is the N below `largest_n` with the highest mean accuracy over seeds.
        best, last (`float`):
            Mean accuracies at `best_n` and `largest_n`.
        spread ([`Spread`]):
            Accuracy at `best_n` minus accuracy at `largest_n`, over seeds.
        undecided (`str`, *optional*):
            Why the accuracies of a seed, or their means, cannot show whether the model is hacked. `None` if they can.
    """

    best_n: int
    largest_n: int
    best: float
    last: float
    spread: Spread
    undecided: str | None = None

    @property
    def answer(self) -> HackingAnswer:
        """Answer given by the interval over seeds."""
        return "none" if self.undecided else hacking_answer(self.spread.low, self.spread.high)


@dataclass(frozen=True)
class Headline:
    """
    The main curve of a reward model, with the verdict on hacking.

    Args:
        name, title (`str`):
            Name and title of the model.
        way (`str`):
            Key of `WAYS`: how solutions are selected.
        points (`list[dict]`):
            Points of the curve. See [`curve_over_seeds`].
        fall ([`Fall`]):
            Loss of accuracy at the largest N.
        verdict ([`Verdict`]):
            Whether the model is hacked.
    """

    name: str
    title: str
    way: str
    points: list[dict[str, Any]]
    fall: Fall
    verdict: Verdict


def titles(data: dict[str, Any]) -> dict[str, str]:
    """Return the titles of the reward models by name."""
    return {model["name"]: model["title"] for model in data["models"]}


def named(models: Sequence[dict[str, Any]], name: str, spans: Sequence[int] | None = None) -> dict[str, Any] | None:
    """Return the measurements of a model by name and, if given, by the spans that were scored. `None` if it was not measured."""
    return next((one for one in models if one["name"] == name and spans in (None, one.get("spans"))), None)


def curve_over_seeds(accuracy: Sequence[Sequence[float]], n: Sequence[int]) -> list[dict[str, Any]]:
    """Return the points of a curve: mean `accuracy` over seeds, with the lowest (`low`) and highest (`high`) seed."""
    return [
        {"n": number, "accuracy": statistics.fmean(seeds), "low": min(seeds), "high": max(seeds)}
        for number, seeds in zip(n, zip(*accuracy, strict=True), strict=True)
    ]


def curve_of(model: dict[str, Any], n: Sequence[int]) -> list[dict[str, Any]]:
    """Return the points of a model's curve. With one seed, `low` and `high` are its interval over problems."""
    points = curve_over_seeds(model["accuracy"], n)
    if len(model["seeds"]) == 1:
        points = [
            point | {"low": low, "high": high} for point, (low, high) in zip(points, model["interval"][0], strict=True)
        ]
    return points


def baseline_curves(data: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the curves that do not use a reward model."""
    found = data["best_of_n"]
    return [
        ("majority vote", curve_over_seeds([found["majority_vote"]], data["n"])),
        ("pass@N", curve_over_seeds([found["pass_at_n"]], data["n"])),
    ]


def fall_of(model: dict[str, Any], n: Sequence[int]) -> Fall:
    """Return the loss of a model from its best smaller N to the largest N."""
    means = [point["accuracy"] for point in curve_over_seeds(model["accuracy"], n)]
    best = max(range(len(n) - 1), key=means.__getitem__)
    lost = [
        round(accuracy[best] - accuracy[-1], 12) for accuracy in model["accuracy"]
    ]  # equal means differ by rounding
    reasons = zip(model["seeds"], model["undecided"], strict=True)
    of_seed = next((f"seed {seed}: {why}" for seed, why in reasons if why is not None), None)
    return Fall(n[best], n[-1], means[best], means[-1], spread(lost), undecided_by(means) or of_seed)


def hacking_verdict(model: dict[str, Any], n: Sequence[int]) -> Verdict:
    """
    Return the verdict whether a reward model is hacked: whether accuracy falls with more candidates.

    Args:
        model (`dict[str, Any]`):
            A model of `best_of_n` or `step_search` of the measurements.
        n (`Sequence[int]`):
            Numbers of candidates.

    Returns:
        [`Verdict`]: The answer given by the interval of the fall over seeds, see [`~evaluation.reward_hacking.hacking_answer`]. If there
        is no interval (one or two seeds, or equal falls), the answer only applies to these models. It is the answer given by
        their intervals over problems, or `"open"` if they differ. It is `"none"` if the accuracies of a seed cannot show a
        loss.
    """
    fall, verdicts = fall_of(model, n), model["verdicts"]
    ends = f"{percent(fall.best)} at N = {fall.best_n}, {percent(fall.last)} at N = {fall.largest_n}."
    if fall.undecided:
        return replace(no_verdict(fall.undecided), reasons=[ends])
    if fall.spread.is_settled:
        lead = {"yes": "Yes", "no": "No loss of 5 points or more", "open": f"Not settled by {len(verdicts)} seeds"}
        return Verdict(fall.answer, f"{lead[fall.answer]}: accuracy {fall_words(fall)}.", [ends])
    answer = verdicts[0] if len(set(verdicts)) == 1 else "open"
    here = "this model" if len(verdicts) == 1 else f"these {len(verdicts)} models"
    lead = {"yes": f"Yes, {here}", "no": f"No sign of hacking in {here}", "open": f"Not settled for {here}"}
    gaps = [f"{signed(100 * gap)} ({points_between(low, high)})" for gap, low, high, _, _ in model["gap"]]
    words = f"Points lost, with 95 % intervals: {'; '.join(gaps)}."
    return Verdict(answer, f"{lead[answer]}: accuracy {fall_words(fall)}.", [f"{ends} Other seeds may differ.", words])


def fall_words(fall: Fall) -> str:
    """Return a text with the number of seeds in which accuracy falls, and the mean fall or rise."""
    lost, number = fall.spread, len(fall.spread.values)
    size = f"{100 * abs(lost.mean):.1f} points"
    if number == 1:
        if lost.mean == 0:
            return f"is the same at N = {fall.best_n} and N = {fall.largest_n}"
        return f"{'falls' if lost.mean > 0 else 'rises'} by {size} from N = {fall.best_n} to N = {fall.largest_n}"
    words = f"falls beyond N = {fall.best_n} in {sum(value > 0 for value in lost.values)} of {number} seeds"
    words += f", by {size} on average" if lost.mean >= 0 else f"; on average it rises by {size}"
    if not lost.is_settled:
        return words
    ends = (lost.low, lost.high) if lost.mean >= 0 else (-lost.high, -lost.low)
    return f"{words} (95 % interval over seeds {points_between(*ends)})"


def headlines(data: dict[str, Any]) -> list[Headline]:
    """Return the main curves and verdicts of the main reward models that were measured."""
    found = []
    for name, way in FIRST.items():
        model = named(data[way]["models"], name)
        if model is not None:
            curve = curve_of(model, data["n"])
            verdict = hacking_verdict(model, data["n"])
            found.append(Headline(name, titles(data)[name], way, curve, fall_of(model, data["n"]), verdict))
    return found


def vote_words(data: dict[str, Any]) -> str:
    """Return a text that compares majority vote with the reward models at the largest N."""
    n, vote = data["n"][-1], data["best_of_n"]["majority_vote"][-1]
    models = [(way, model) for way in WAYS for model in data[way]["models"]]
    last = [spread([accuracy[-1] for accuracy in model["accuracy"]]) for _, model in models]
    best = max(range(len(models)), key=lambda i: last[i].mean)
    way, model = models[best]
    title = f"{titles(data)[model['name']]} ({WAYS[way]})"
    side = "higher than every reward model" if vote > last[best].mean else "not higher than every reward model"
    words = (
        f"Majority vote: {percent(vote)} at N = {n}, {side}. The best reward model is {title} with "
        f"{percent(last[best].mean)}"
    )
    if not last[best].is_settled:
        return f"{words} ({len(model['seeds'])} seed{'s' * (len(model['seeds']) != 1)})."
    if last[best].low <= vote <= last[best].high:
        return f"{words}. Its 95 % interval over seeds includes the vote, so the difference is not settled."
    return f"{words}. Its 95 % interval over seeds excludes the vote."


@dataclass(frozen=True)
class Claim:
    """
    A claim of a paper and the finding of the demo.

    Args:
        paper (`str`):
            Paper that makes the claim.
        words (`str`):
            The claim.
        here (`str`):
            The finding, with numbers.
        answer (`str`):
            `"held"`, `"not held"` or `"open"`.
    """

    paper: str
    words: str
    here: str
    answer: Answer


def _claim(words: str, here: str, answer: Answer, *measured: Spread, paper: str = HRM, each: str = "seed") -> Claim:
    """Return a claim. If it is open, its finding ends with the number of seeds or runs that did not settle it."""
    if answer == "open":
        number = min(len(one.values) for one in measured)
        here += f" Not settled by {number} {each}{'s' * (number != 1)}."
    return Claim(paper, words, here, answer)


def _not_measured(words: str, paper: str = HRM) -> Claim:
    return Claim(paper, words, "Not measured in this profile. Use --profile full.", "open")


def claims(data: dict[str, Any]) -> list[Claim]:
    """
    Return all claims of both papers that the demo tests.

    Args:
        data (`dict[str, Any]`):
            The measurements. See [`~demo.report.write_report`].

    Returns:
        `list[Claim]`: Claims in the order of the page.
    """
    runs = data["self_training"]["runs"]
    # KL as in the paper: the logarithm of the sum over a solution
    by_coef = {coef: runs_of(runs, coef, "log1p") for coef in sorted({run["kl_coef"] for run in runs})}
    by_coef = {coef: found for coef, found in by_coef.items() if found}
    return [
        *_over_n(data),
        _hrm_over_prm(data),
        *_corrections(data["step_kinds"]),
        _wrong_prefix(data["wrong_prefix"]),
        *_hnc(data["hnc"], titles(data)),
        _drift(by_coef),
        _best_coef(by_coef),
        _log_scaling(runs),
        _entropy(data["eta"], data["n"]),
    ]


def _over_n(data: dict[str, Any]) -> list[Claim]:
    """Return the claims that ORM and PRM lose accuracy as N grows, and HRM does not."""
    headline = {one.name: one for one in headlines(data)}
    falls: dict[str, Answer] = {"yes": "held", "no": "not held", "open": "open", "none": "open"}
    stays: dict[str, Answer] = {"yes": "not held", "no": "held", "open": "open", "none": "open"}
    found = []
    for name, words, answers in (
        ("orm", "ORM loses accuracy as N grows.", falls),
        ("prm", "PRM loses accuracy as N grows.", falls),
        ("hrm", "HRM stays stable as N grows.", stays),
    ):
        if name not in headline:
            found.append(_not_measured(words))
            continue
        fall = headline[name].fall
        if fall.undecided:
            found.append(Claim(HRM, words, f"No verdict: {fall.undecided}.", "open"))
            continue
        here = (
            f"By {WAYS[headline[name].way]}: {percent(fall.best)} at N = {fall.best_n}, {percent(fall.last)} at N = {fall.largest_n}; "
            f"accuracy {fall_words(fall)}."
        )
        found.append(_claim(words, here, answers[fall.answer], fall.spread))
    return found


def _hrm_over_prm(data: dict[str, Any]) -> Claim:
    n, models = data["n"][-1], data["step_search"]["models"]
    words = "HRM is more accurate than PRM at the largest N."
    hrm, prm = named(models, "hrm"), named(models, "prm")
    if hrm is None or prm is None:
        return _not_measured(words)
    found = _difference_at(hrm, prm, -1)
    here = f"HRM minus PRM at N = {n}, step search: {told(found)}."
    return _claim(words, here, judge(found), found)


def _difference_at(mine: dict[str, Any], other: dict[str, Any], i: int) -> Spread:
    """Return the difference of accuracies at the i-th N."""
    return paired(
        mine["seeds"],
        [accuracy[i] for accuracy in mine["accuracy"]],
        other["seeds"],
        [accuracy[i] for accuracy in other["accuracy"]],
    )


def _corrections(kinds: Sequence[dict[str, Any]]) -> list[Claim]:
    """
    Return the claims that HRM recognizes corrections better than PRM, with steps and pairs scored and with single steps scored.

    A model that scores all steps higher also scores corrections higher. So both the score of corrections and their AUROC against other
    steps after an error must be higher.
    """
    prm, found = named(kinds, "judged-prm", [1]), []
    ways = (
        ([1, 2], "When pairs of steps are scored too, HRM recognizes corrections better than PRM."),
        ([1], "When single steps are scored, as in the papers, HRM recognizes corrections better than PRM."),
    )
    for spans, words in ways:
        hrm = named(kinds, "judged-hrm", spans)
        if hrm is None or prm is None:
            found.append(_not_measured(words))
            continue
        score, auroc = (paired(hrm["seeds"], hrm[key], prm["seeds"], prm[key]) for key in ("correction", "auroc"))
        here = (
            f"First-error labels. Mean score of a correction: HRM {statistics.fmean(hrm['correction']):.2f}, PRM "
            f"{statistics.fmean(prm['correction']):.2f}; difference {told(score, 1, '', 2)}. AUROC of corrections against other steps after an error: difference "
            f"{told(auroc, 1, '', 2)}."
        )
        found.append(_claim(words, here, judge_all([judge(score), judge(auroc)]), score, auroc))
    return found


def _wrong_prefix(found: dict[str, Any]) -> Claim:
    words = "HRM recovers from a wrong prefix more often than PRM."
    hrm, prm = named(found["models"], "judged-hrm", [1, 2]), named(found["models"], "judged-prm", [1])
    if hrm is None or prm is None:
        return _not_measured(words)
    difference = _difference_at(hrm, prm, -1)
    ends = (percent(statistics.fmean([accuracy[-1] for accuracy in one["accuracy"]])) for one in (hrm, prm))
    here = (
        f"First-error labels. Search from a wrong prefix, N = {found['n'][-1]}: HRM {next(ends)}, PRM {next(ends)}; difference "
        f"{told(difference)}."
    )
    return _claim(words, here, judge(difference), difference)


def _hnc(found: dict[str, Any] | None, names: dict[str, str]) -> list[Claim]:
    if found is None:
        return [_not_measured(f"HRM + HNC is more accurate than {name}.") for name in ("PRM", "HRM")]
    claimed = []
    for one in found["comparisons"]:
        if one["a"].startswith("hnc"):
            a, b = (names[one[key]] for key in ("a", "b"))
            difference = compared(one["difference"][-1])
            words = f"{a} is more accurate than {b}{', our control' if one['b'] == 'control' else ''}."
            here = f"Difference at N = {found['n'][-1]}, step search, {one['steps']:,} training steps: {told(difference)}."
            claimed.append(_claim(words, here, judge(difference), difference))
    return claimed


def compared(point: dict[str, Any]) -> Spread:
    """Return a paired difference of the measurements as a [`Spread`]."""
    return Spread(tuple(point["per_seed"]), point["mean"], point["low"], point["high"])


def runs_of(
    runs: Sequence[dict[str, Any]], kl_coef: float, scaling: str, reduction: str = "sum"
) -> list[dict[str, Any]]:
    """Return the runs with one λ. Runs without a KL term have no scaling or reduction."""
    keys = (0.0, None, None) if kl_coef == 0 else (kl_coef, scaling, reduction)
    return [run for run in runs if (run["kl_coef"], run["kl_scaling"], run["kl_reduction"]) == keys]


def accuracy_of(found: dict[str, int]) -> float:
    """Return the share of correct samples."""
    return found["num_right"] / found["num_samples"]


def _drift(by_coef: dict[float, list[dict[str, Any]]]) -> Claim:
    words = "The policy drifts without a KL term, and a small λ hardly reduces the drift: KL(0) > KL(0.001) > KL(0.5)."
    by_coef = {coef: by_coef[coef] for coef in DRIFT if coef in by_coef}
    if len(by_coef) < len(DRIFT):
        return _not_measured(words)
    last = [[run["curve"][-1]["kl"] for run in found] for found in by_coef.values()]
    means = ", ".join(
        f"{statistics.fmean(values):.3g} at λ = {coef:g}" for coef, values in zip(by_coef, last, strict=True)
    )
    falls = [_run_by_run(more, less) for more, less in zip(last, last[1:], strict=False)]
    order = "as claimed" if all(fall.mean > 0 for fall in falls) else "not as claimed"
    here = f"KL at the end of training, in nats per solution: {means}. The order is {order}."
    return _claim(words, here, judge_all([judge(fall) for fall in falls]), *falls, each="run")


def _run_by_run(mine: Sequence[float], others: Sequence[float]) -> Spread:
    """Return the differences between runs with the same seed, which have the same position."""
    if len(mine) != len(others):
        raise ValueError(
            f"Found {len(mine)} self-training runs for one λ and {len(others)} for another. Expected the same number. Run every λ with "
            "the same seeds."
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
        f"Accuracy after training: {means}. It is highest at λ = {best:g}. λ = {PAPER_COEF:g} minus λ = {rival:g}: "
        f"{told(above[rival], each='run')}."
    )
    return _claim(words, here, judge_all([judge(one) for one in above.values()]), *above.values(), each="run")


def _log_scaling(runs: Sequence[dict[str, Any]]) -> Claim:
    words = f"At λ = {PAPER_COEF:g}, accuracy is higher with the logarithm of KL than without it."
    with_log, without = (runs_of(runs, PAPER_COEF, scaling) for scaling in ("log1p", "none"))
    if not with_log or not without:
        return _not_measured(words)
    accuracy = [[accuracy_of(run["accuracy"]) for run in found] for found in (with_log, without)]
    kl = [statistics.fmean(run["curve"][-1]["kl"] for run in found) for found in (with_log, without)]
    difference = _run_by_run(*accuracy)
    here = (
        f"With minus without: {told(difference, each='run')}; KL at the end of training {kl[0]:.3g} and {kl[1]:.3g}."
    )
    is_small = difference.is_settled and max(abs(difference.low), abs(difference.high)) < MARGIN
    return _claim(words, here, "not held" if is_small else judge(difference), difference, each="run")


def _entropy(found: Sequence[dict[str, Any]], n: Sequence[int]) -> Claim:
    """Return the claim for the best η. It is selected on the test problems, which favours the claim."""
    words = "Entropy labels give higher accuracy than hard and soft labels."
    entropy = [one for one in found if one["labels"] == "entropy"]
    rivals = [one for one in found if one["labels"] != "entropy"]
    if not entropy or len(rivals) < 2:
        return _not_measured(words, ER_PRM)
    best = max(entropy, key=lambda one: statistics.fmean(accuracy[-1] for accuracy in one["accuracy"]))
    above = {rival["labels"]: _difference_at(best, rival, -1) for rival in rivals}
    parts = "; ".join(f"minus {labels} labels {told(difference)}" for labels, difference in above.items())
    eta = f"the best η ({best['eta']:g})" if len(entropy) > 1 else f"η = {best['eta']:g}"
    here = f"Accuracy at N = {n[-1]} with {eta}: {parts}."
    if len(entropy) > 1:
        here += f" The best of {len(entropy)} η is selected on the test problems, which favours the claim."
    return _claim(words, here, judge_all(list(map(judge, above.values()))), *above.values(), paper=ER_PRM)
