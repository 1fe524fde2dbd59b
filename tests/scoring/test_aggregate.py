"""Aggregate step scores into candidate scores, and handle candidates that are too long for the model."""

import math
import random
from functools import partial

import pytest

from trl_hrm import StepFormat, StepScorer
from trl_hrm.scoring import candidate_scores
from trl_hrm.scoring.aggregate import AGGREGATES, aggregate, aggregate_name
from trl_hrm.scoring.candidate_scores import score_candidates
from trl_hrm.scoring.scoring_config import ScoringConfig

from ..helpers import HEADS, WORDS, tiny_model, tiny_tokenizer


def test_by_hand():
    scores = [0.5, 0.25, 1.0, 0.75]
    found = {name: aggregate(scores, name) for name in AGGREGATES}
    assert found == {"min": 0.25, "prod": 0.09375, "last": 0.75, "mean": 0.625, "max": 1.0}
    assert {aggregate([0.4], name) for name in AGGREGATES} == {0.4}


def test_order_of_the_aggregates():
    """prod <= min <= mean <= max, and only `last` depends on the order. Swapped names would break this."""
    rng = random.Random(0)
    for _ in range(200):
        scores = [rng.random() for _ in range(rng.randint(2, 6))]
        found = {name: aggregate(scores, name) for name in AGGREGATES}
        assert found["prod"] < found["min"] < found["mean"] < found["max"]
        assert found["prod"] == pytest.approx(math.exp(sum(map(math.log, scores))))
        turned = {name: aggregate(scores[::-1], name) for name in AGGREGATES}
        assert turned.pop("last") == scores[0] and found.pop("last") == scores[-1]
        assert turned == pytest.approx(found)


def test_custom_function():
    """A custom function receives the step scores, and raises if it returns NaN."""

    def second_worst(scores):
        return sorted(scores)[:2][-1]

    assert aggregate([0.5, 0.25, 1.0], second_worst) == 0.5
    assert aggregate((0.5, 0.25), sum) == 0.75
    assert [aggregate_name(name) for name in (second_worst, sum, "min")] == ["second_worst", "sum", "min"]
    assert aggregate_name(partial(second_worst)) == "partial"
    with pytest.raises(ValueError, match=r"broken returned NaN.*\[0.5\]"):

        def broken(scores):
            return math.nan

        aggregate([0.5], broken)
    with pytest.raises(ValueError, match="`scores` is empty"):
        aggregate([], sum)


def test_faults():
    with pytest.raises(ValueError, match="`aggregate` is 'sum'.*min, prod, last, mean, max"):
        aggregate([0.5], "sum")
    with pytest.raises(ValueError, match="`scores` is empty"):
        aggregate([], "min")


@pytest.mark.parametrize("name", [*AGGREGATES, len])
def test_nan_scores(name):
    """The minimum of 0.5 and NaN depends on their order, so a NaN could win or lose by its position."""
    for scores in ([0.5, math.nan], [math.nan, 0.5]):
        with pytest.raises(ValueError, match=r"\[.*nan.*\]"):
            aggregate(scores, name)


def random_candidates(rng: random.Random, number: int) -> tuple[list[str], list[list[list[str]]]]:
    problems = [f"{i}+2?" for i in range(number)]
    return problems, [
        [[" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 4))] for _ in range(4)]
        for _ in problems
    ]


@pytest.mark.parametrize("spans", [(1,), (1, 2)])
def test_candidates_are_scored_as_alone(monkeypatch, spans):
    """A wrong count of blocks or dropped candidates would shift scores to a neighbour."""
    monkeypatch.setattr(candidate_scores, "BLOCK", 3)
    scorer = StepScorer(tiny_model(), tiny_tokenizer(), HEADS["classification"])
    problems, candidates = random_candidates(random.Random(0), 8)
    found = score_candidates(scorer, problems, candidates, "mean", ScoringConfig(spans))
    for problem, solutions, scores in zip(problems, candidates, found, strict=True):
        for steps, score in zip(solutions, scores, strict=True):
            alone = scorer.score([problem], [[steps]], spans)[0][0]
            assert score == pytest.approx(sum(alone) / len(alone), abs=1e-5)


@pytest.mark.parametrize("spans", [(1,), (1, 2), (1, 2, 3)])
def test_too_long(spans):
    """
    Skip exactly the candidates that the scorer refuses: one more would be lost, one less would stop a long run. A
    merged step may be longer than its steps.
    """
    step_format = StepFormat(merge_separator="\n and then\n")
    scorer = StepScorer(tiny_model(max_position_embeddings=26), tiny_tokenizer(), step_format)
    problems, candidates = random_candidates(random.Random(1), 30)
    candidates[3] = [["add " * 50], ["sub " * 60]]  # no candidate of this problem fits
    found = score_candidates(scorer, problems, candidates, "min", ScoringConfig(spans))
    num_refused = 0
    for problem, solutions, scores in zip(problems, candidates, found, strict=True):
        for steps, score in zip(solutions, scores, strict=True):
            if score is None:
                with pytest.raises(ValueError, match="26 positions"):
                    scorer.score([problem], [[steps]], spans)
                num_refused += 1
            else:
                assert min(scorer.score([problem], [[steps]], spans)[0][0]) == pytest.approx(score, abs=1e-5)
    assert found[3] == [None, None]
    assert 10 < num_refused < 100
