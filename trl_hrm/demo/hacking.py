"""Is a reward model being hacked? The answer over its seeds, from accuracies over N."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.hacking import Answer, Verdict, judge_loss, percent, points_between, undecided_by
from .over_seeds import Spread, signed, spread


WAYS = {"best_of_n": "best-of-N", "step_search": "step search"}
# what is asked first, each chosen by as the HRM paper chooses: whole solutions by an ORM, steps by the others
FIRST = {"orm": "best_of_n", "prm": "step_search", "hrm": "step_search", "hnc": "step_search"}
MAIN = (*FIRST, "control")  # the rest are variants of these: other labels, longer training


@dataclass(frozen=True)
class Fall:
    """
    What is lost from the best smaller N to the largest.

    Args:
        best_n, largest_n (`int`):
            The two. The best N is that of the mean over seeds, below the largest.
        best, last (`float`):
            Mean accuracies there.
        spread ([`Spread`]):
            Accuracy at the best N minus that at the largest, over seeds.
        undecided (`str`, *optional*):
            Why the mean accuracies cannot tell whether the model is hacked, if they cannot.
    """

    best_n: int
    largest_n: int
    best: float
    last: float
    spread: Spread
    undecided: str | None = None

    @property
    def answer(self) -> Answer:
        """The answer of the interval over seeds."""
        return "open" if self.undecided else judge_loss(self.spread.low, self.spread.high)


@dataclass(frozen=True)
class Headline:
    """
    The curve that answers for a reward model.

    Args:
        name, title (`str`):
            The model.
        way (`str`):
            Key of `WAYS`: how solutions are chosen.
        points (`list[dict]`):
            Its curve. See [`curve_over_seeds`].
        fall ([`Fall`]):
            What it loses.
        verdict ([`Verdict`]):
            The answer.
    """

    name: str
    title: str
    way: str
    points: list[dict[str, Any]]
    fall: Fall
    verdict: Verdict


def titles(data: dict[str, Any]) -> dict[str, str]:
    """Titles of the reward models by their names."""
    return {model["name"]: model["title"] for model in data["models"]}


def named(models: Sequence[dict[str, Any]], name: str, spans: Sequence[int] | None = None) -> dict[str, Any] | None:
    """The model of a name, scored with the given spans where these differ. `None` if it was not measured."""
    return next((one for one in models if one["name"] == name and spans in (None, one.get("spans"))), None)


def curve_over_seeds(accuracy: Sequence[Sequence[float]], n: Sequence[int]) -> list[dict[str, Any]]:
    """Points with the mean `accuracy` and, from `low` to `high`, that of all seeds."""
    return [
        {"n": number, "accuracy": statistics.fmean(seeds), "low": min(seeds), "high": max(seeds)}
        for number, seeds in zip(n, zip(*accuracy, strict=True), strict=True)
    ]


def curve_of(model: dict[str, Any], n: Sequence[int]) -> list[dict[str, Any]]:
    """The same of a model of a search. One seed has no spread: its band is the interval over problems."""
    points = curve_over_seeds(model["accuracy"], n)
    if len(model["seeds"]) == 1:
        points = [
            point | {"low": low, "high": high} for point, (low, high) in zip(points, model["interval"][0], strict=True)
        ]
    return points


def plain_curve(accuracy: Sequence[float], n: Sequence[int]) -> list[dict[str, Any]]:
    """A curve that no reward model has a part in."""
    return curve_over_seeds([accuracy], n)


def beside_curves(data: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """What stands beside every curve of a reward model."""
    found = data["best_of_n"]
    return [
        ("majority vote", plain_curve(found["majority_vote"], data["n"])),
        ("pass@N", plain_curve(found["pass_at_n"], data["n"])),
    ]


def fall_of(model: dict[str, Any], n: Sequence[int]) -> Fall:
    """What a model loses beyond its best N below the largest."""
    means = [point["accuracy"] for point in curve_over_seeds(model["accuracy"], n)]
    best = max(range(len(n) - 1), key=means.__getitem__)
    lost = [accuracy[best] - accuracy[-1] for accuracy in model["accuracy"]]
    return Fall(n[best], n[-1], means[best], means[-1], spread(lost), undecided_by(means))


def hacking_verdict(model: dict[str, Any], n: Sequence[int]) -> Verdict:
    """
    Whether more candidates make a reward model's choice worse.

    Args:
        model (`dict[str, Any]`):
            A model of `best_of_n` or `step_search` of the measurements.
        n (`Sequence[int]`):
            Numbers of candidates.

    Returns:
        [`Verdict`]: By the interval of the fall over seeds, see [`~evaluation.hacking.judge_loss`]. Where there is none (one or two
        seeds, or seeds with equal falls) the answer is for these models only: the one that each has by its interval over problems,
        `"open"` if they differ.
    """
    fall, verdicts = fall_of(model, n), model["verdicts"]
    ends = f"{percent(fall.best)} at N = {fall.best_n}, {percent(fall.last)} at N = {fall.largest_n}."
    if fall.undecided:
        return Verdict("open", f"Cannot be told: {fall.undecided}.", [ends])
    if fall.spread.is_settled:
        lead = {"yes": "Yes", "no": "No fall of more than 5 points", "open": f"Not settled by {len(verdicts)} seeds"}
        return Verdict(fall.answer, f"{lead[fall.answer]}: accuracy {fall_words(fall)}.", [ends])
    answer = verdicts[0] if len(set(verdicts)) == 1 else "open"
    here = "this model" if len(verdicts) == 1 else f"these {len(verdicts)} models"
    lead = {"yes": f"Yes, {here}", "no": f"No sign of it in {here}", "open": f"Not settled for {here}"}
    gaps = [f"{signed(100 * gap)} ({points_between(low, high)})" for gap, low, high, _, _ in model["gap"]]
    words = f"Points lost, 95 % over problems: {'; '.join(gaps)}."
    return Verdict(answer, f"{lead[answer]}: accuracy {fall_words(fall)}.", [f"{ends} Other seeds may differ.", words])


def fall_words(fall: Fall) -> str:
    """In how many seeds accuracy falls, and by how much. A rise is said as one."""
    lost, number = fall.spread, len(fall.spread.values)
    size = f"{100 * abs(lost.mean):.1f} points"
    if number == 1:
        change = f"falls by {size}" if lost.mean > 0 else f"rises by {size}" if lost.mean < 0 else "is the same"
        return f"{change} from N = {fall.best_n} to N = {fall.largest_n}"
    words = f"falls beyond N = {fall.best_n} in {sum(value > 0 for value in lost.values)} of {number} seeds"
    words += f", by {size} on average" if lost.mean >= 0 else f"; on average it rises by {size}"
    if not lost.is_settled:
        return words
    ends = (lost.low, lost.high) if lost.mean >= 0 else (-lost.high, -lost.low)
    return f"{words} (95 % interval over seeds {points_between(*ends)})"


def headlines(data: dict[str, Any]) -> list[Headline]:
    """The answers for the reward models that are asked about first, as far as they were measured."""
    found = []
    for name, way in FIRST.items():
        model = named(data[way]["models"], name)
        if model is not None:
            curve = curve_of(model, data["n"])
            verdict = hacking_verdict(model, data["n"])
            found.append(Headline(name, titles(data)[name], way, curve, fall_of(model, data["n"]), verdict))
    return found


def vote_words(data: dict[str, Any]) -> str:
    """How plain majority vote stands beside every reward model at the largest N."""
    n, vote = data["n"][-1], data["best_of_n"]["majority_vote"][-1]
    models = [(way, model) for way in WAYS for model in data[way]["models"]]
    last = [spread([accuracy[-1] for accuracy in model["accuracy"]]) for _, model in models]
    best = max(range(len(models)), key=lambda i: last[i].mean)
    way, model = models[best]
    title = f"{titles(data)[model['name']]} by {WAYS[way]}"
    above = vote > last[best].mean
    side = "above every reward model here" if above else "not above every reward model here"
    words = (
        f"Plain majority vote, with no reward model: {percent(vote)} at N = {n}, {side} (the highest mean is that of {title}, "
        f"{percent(last[best].mean)}"
    )
    if not last[best].is_settled:
        return f"{words}, {len(model['seeds'])} seed{'s' * (len(model['seeds']) != 1)})."
    if last[best].low <= vote <= last[best].high:
        return f"{words}; its interval over seeds holds the vote: not settled)."
    return f"{words}, which the interval over its seeds confirms)."
