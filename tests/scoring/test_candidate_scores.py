"""Score many candidates in blocks of problems."""

import pytest

from trl_hrm import StepFormat, StepScorer
from trl_hrm.scoring import candidate_scores
from trl_hrm.scoring.aggregate import aggregate
from trl_hrm.scoring.candidate_scores import score_candidates
from trl_hrm.scoring.scoring_config import ScoringConfig

from ..helpers import tiny_model, tiny_tokenizer


class Bar:
    """A progress bar that records its updates."""

    moves: list[int] = []

    def __init__(self, **options):
        self.moves.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, number: int):
        self.moves.append(number)


def test_blocks(monkeypatch):
    """The bar must move during a long run, and a block border must not move a score to another problem."""
    monkeypatch.setattr(candidate_scores, "tqdm", Bar)
    scorer = StepScorer(tiny_model(), tiny_tokenizer(), StepFormat())
    problems = [f"{i}+2?" for i in range(70)]
    candidates = [[["add 1", f"so = {i}"]] * (i % 3) for i in range(70)]
    scores = score_candidates(scorer, problems, candidates, "min", ScoringConfig())
    assert sum(Bar.moves) == 70 and Bar.moves[0] < 70
    alone = scorer.score(problems, candidates)
    expected = [[aggregate(steps, "min") for steps in group] for group in alone]
    assert [len(group) for group in scores] == [i % 3 for i in range(70)]
    for found, values in zip(scores, expected, strict=True):
        assert found == pytest.approx(values, abs=1e-5)
