"""How benchmarks are scored: by the scorer's own scores, each solution once, and nothing lost."""

import math
import random

import pytest

from trl_hrm import StepFormat, StepScorer
from trl_hrm.evaluation.benchmarks.run import BLOCK, score_solutions
from trl_hrm.evaluation.benchmarks.suite import Solution
from trl_hrm.scoring.scoring_config import ScoringConfig

from ..helpers import tiny_model, tiny_tokenizer
from .benchmark_rows import SayingScorer, knows


def solution(problem: str, steps: list[str]) -> Solution:
    return Solution(f"file:{problem}", "s", problem, problem, steps, [1] * len(steps), problem)


def random_solutions(count: int) -> list[Solution]:
    """Two thirds share a problem and their first steps with other solutions."""
    rng = random.Random(0)
    return [
        solution(f"p{rng.randrange(max(1, count // 3))}?", [f"x {rng.randrange(3)}" for _ in range(rng.randint(1, 4))])
        for _ in range(count)
    ]


@pytest.mark.parametrize("spans", [(1,), (1, 2)])
def test_scores_are_those_of_each_solution_alone(spans):
    """Solutions of one problem share a forward pass, and each score must return to its own step."""
    scorer = StepScorer(tiny_model(), tiny_tokenizer(), StepFormat(), max_length=128)
    solutions = random_solutions(40)
    found = score_solutions(scorer, solutions, ScoringConfig(spans))
    for one, scores in zip(solutions, found, strict=True):
        assert scores == pytest.approx(scorer.score([one.problem], [[one.steps]], spans=spans)[0][0], abs=1e-5)
    assert len({round(score, 4) for scores in found for score in scores}) > 20


def test_every_solution_is_asked_for_once():
    """With more problems than fit in a block, every solution is scored exactly once."""
    solutions = [solution(f"p{i % (2 * BLOCK + 3)}", [f"ok {i}", f"bad {i}"]) for i in range(5 * BLOCK)]
    scorer = SayingScorer(knows)
    assert score_solutions(scorer, solutions, ScoringConfig()) == [[0.9, 0.1]] * len(solutions)
    assert sorted(scorer.asked) == sorted((one.problem, one.steps) for one in solutions)


@pytest.mark.parametrize("spans", [(1,), (1, 2)])
def test_solutions_that_are_too_long_have_no_scores(spans):
    """One row that does not fit must neither stop a run of hours nor be scored 0."""
    scorer = StepScorer(tiny_model(max_position_embeddings=64), tiny_tokenizer(), StepFormat())
    short, long = ["x y", "so 3"], ["x y so thus " * 40, "so 3"]
    solutions = [solution("1?", long), solution("1?", short), solution("2?", long), solution("3?", short)]
    found = score_solutions(scorer, solutions, ScoringConfig(spans))
    assert [scores is None for scores in found] == [True, False, True, False]
    assert found[1] == pytest.approx(scorer.score(["1?"], [[short]], spans=spans)[0][0], abs=1e-5)


def test_a_merged_step_may_be_longer():
    """A scorer raises for a step beyond its positions, so one row would stop the run."""
    step_format = StepFormat(merge_separator=" then " * 40)
    scorer = StepScorer(tiny_model(step_format, max_position_embeddings=64), tiny_tokenizer(), step_format)
    solutions = [solution("1?", ["x y", "so 3"]), solution("2?", ["x"])]
    assert [scores is None for scores in score_solutions(scorer, solutions, ScoringConfig())] == [False, False]
    assert [scores is None for scores in score_solutions(scorer, solutions, ScoringConfig([1, 2]))] == [True, False]


def test_no_number_raises():
    scorer = SayingScorer(lambda step: math.nan if step == "bad" else 0.5)
    with pytest.raises(ValueError, match=r"file:b: .*\[0.5, nan\] for 2 steps"):
        score_solutions(scorer, [solution("a", ["ok"]), solution("b", ["ok", "bad"])], ScoringConfig())


def test_too_few_scores_raise():
    """Aligned with the labels, missing scores would silently drop the last step."""
    scorer = SayingScorer(knows)
    scorer.score = lambda prompts, candidates, spans, combine: [[[0.5] for _ in group] for group in candidates]
    with pytest.raises(ValueError, match=r"file:a: .*\[0.5\] for 2 steps"):
        score_solutions(scorer, [solution("a", ["ok", "ok"])], ScoringConfig())
