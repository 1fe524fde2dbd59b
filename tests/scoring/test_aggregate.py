"""From step scores to the score of a candidate, and candidates that do not fit the model."""

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
    """prod <= min <= mean <= max, and only `last` depends on the order: names that are swapped break it."""
    rng = random.Random(0)
    for _ in range(200):
        scores = [rng.random() for _ in range(rng.randint(2, 6))]
        found = {name: aggregate(scores, name) for name in AGGREGATES}
        assert found["prod"] < found["min"] < found["mean"] < found["max"]
        assert found["prod"] == pytest.approx(math.exp(sum(map(math.log, scores))))
        turned = {name: aggregate(scores[::-1], name) for name in AGGREGATES}
        assert turned.pop("last") == scores[0] and found.pop("last") == scores[-1]
        assert turned == pytest.approx(found)


def test_a_function_of_ones_own():
    """It is given the steps' scores themselves; a name that is none is still refused."""

    def second_worst(scores):
        return sorted(scores)[:2][-1]

    assert aggregate([0.5, 0.25, 1.0], second_worst) == 0.5
    assert aggregate((0.5, 0.25), sum) == 0.75
    assert [aggregate_name(name) for name in (second_worst, sum, "min")] == ["second_worst", "sum", "min"]
    assert aggregate_name(partial(second_worst)) == "partial"
    with pytest.raises(ValueError, match=r"aggregate: broken returned NaN for the scores \[0.5\]"):

        def broken(scores):
            return math.nan

        aggregate([0.5], broken)
    with pytest.raises(ValueError, match="`scores` is empty"):
        aggregate([], sum)


def test_faults():
    with pytest.raises(ValueError, match="aggregate is 'sum'.* one of min, prod, last, mean, max, or a function"):
        aggregate([0.5], "sum")
    with pytest.raises(ValueError, match="`scores` is empty"):
        aggregate([], "min")


@pytest.mark.parametrize("name", [*AGGREGATES, len])
def test_scores_that_are_no_numbers(name):
    """Of 0.5 and NaN the least is 0.5 or NaN by their order: a silent one would be chosen or not by where it stands."""
    for scores in ([0.5, math.nan], [math.nan, 0.5]):
        with pytest.raises(ValueError, match=r"the scores \[.*nan.*\] contain NaN"):
            aggregate(scores, name)


def random_candidates(rng: random.Random, number: int) -> tuple[list[str], list[list[list[str]]]]:
    problems = [f"{i}+2?" for i in range(number)]
    return problems, [
        [[" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 4))] for _ in range(4)]
        for _ in problems
    ]


@pytest.mark.parametrize("spans", [(1,), (1, 2)])
def test_candidates_are_scored_as_alone(monkeypatch, spans):
    """Blocks and dropped candidates shift scores to neighbours if one count is off."""
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
    Not judged is exactly what the scorer alone refuses: one more would be lost, one less stops a long run near its end. A
    merged step may be longer than its steps.
    """
    step_format = StepFormat(merge_separator="\n and then\n")
    scorer = StepScorer(tiny_model(max_position_embeddings=26), tiny_tokenizer(), step_format)
    problems, candidates = random_candidates(random.Random(1), 30)
    candidates[3] = [["add " * 50], ["sub " * 60]]  # a problem without any that fits
    found = score_candidates(scorer, problems, candidates, "min", ScoringConfig(spans))
    num_refused = 0
    for problem, solutions, scores in zip(problems, candidates, found, strict=True):
        for steps, score in zip(solutions, scores, strict=True):
            if score is None:
                with pytest.raises(ValueError, match="the model has 26 positions"):
                    scorer.score([problem], [[steps]], spans)
                num_refused += 1
            else:
                assert min(scorer.score([problem], [[steps]], spans)[0][0]) == pytest.approx(score, abs=1e-5)
    assert found[3] == [None, None]
    assert 10 < num_refused < 100
