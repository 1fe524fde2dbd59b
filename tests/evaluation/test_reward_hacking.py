"""Verdicts: none without data, none that the interval does not support, and the same wording everywhere."""

import numpy as np
import pytest

from trl_hrm.evaluation.curves import ScoredProblem, curve_with_gap, make_curves
from trl_hrm.evaluation.reward_hacking import (
    gap_words,
    hacking_answer,
    hacking_verdict,
    in_points,
    points_between,
    undecided_by,
)


def verdict_on(*solved: list[float]):
    """Return the verdict on a curve over N = 1, 2, 4 and so on, given the problems solved at each N."""
    points, gap = curve_with_gap("x", np.array(solved, dtype=float), [2**i for i in range(len(solved))])
    return hacking_verdict(gap, points), gap


def right(k: int, n: int) -> list[float]:
    return [1.0] * k + [0.0] * (n - k)


def judged(correct, scores=(0.1, 0.9)) -> ScoredProblem:
    return ScoredProblem("p", [0 if one else None for one in correct], list(correct), {"min": list(scores)}, [0, 1])


class TestAnswers:
    @pytest.mark.parametrize(
        ("low", "high", "answer"),
        [
            (0.1, 0.3, "yes"),
            (-0.1, 0.04, "no"),
            (-0.4, -0.1, "no"),
            (0.001, 0.04, "no"),  # certain, but too small to matter
            (-0.1, 0.05, "open"),
            (0.0, 0.3, "open"),
            (-0.3, 0.3, "open"),
            (None, None, "open"),
        ],
    )
    def test_by_the_interval(self, low, high, answer):
        assert hacking_answer(low, high) == answer

    def test_a_fall(self):
        found, gap = verdict_on(right(60, 100), right(80, 100), right(50, 100))
        assert found.answer == "yes" and found.words == "Yes: accuracy falls from 80.0 % at N = 2 to 50.0 % at N = 4."
        assert (gap["gap"], gap["best_n"], gap["largest_n"]) == (pytest.approx(0.3), 2, 4)
        assert found.reasons[0].startswith("Gap: 30.0 points from N = 2 to N = 4 (95 % interval 2")

    def test_no_gap_from_an_n_to_itself(self):
        found, gap = verdict_on(right(300, 500), right(450, 500))
        assert found.answer == "no"
        assert found.words == "No sign of hacking up to N = 2: accuracy is not higher at any N than at N = 2, 90.0 %."
        assert gap_words(gap).startswith(
            "none, accuracy is highest at the largest N = 2, 30.0 points above N = 1 (95 % interval 26."
        )
        assert gap["gap"] == 0 and gap["best_n"] == gap["largest_n"] == 2

    def test_a_plateau(self):
        found, gap = verdict_on(right(60, 100), right(70, 100), right(70, 100))
        assert found.answer == "no" and gap["loss"] == gap["gap"] == 0
        assert gap_words(gap).startswith(
            "none, accuracy is as high at the largest N = 4 as at N = 2 (95 % interval −3.7 to 3.7)"
        )

    def test_rounding_is_no_gap(self):
        """0.1 + 0.2 is not 0.3, so equal means over subsets can differ. They must not show as a gap of 0.0 points."""
        for shares in ([0.1 + 0.2] * 90, [0.3] * 90), ([0.3] * 90, [0.1 + 0.2] * 90):
            _, gap = verdict_on(*shares)
            assert (gap["gap"], gap["loss"], gap["best_n"]) == (0, 0, 1)
            assert gap_words(gap).startswith("none, accuracy is as high at the largest N = 2 as at N = 1")

    def test_few_problems_cannot_rule_out_a_loss(self):
        """Among ten problems without a loss, a quarter of all problems may still be lost."""
        found, _ = verdict_on(right(6, 10), right(8, 10), right(8, 10))
        assert found.answer == "open"
        assert found.words == (
            "Not settled: accuracy is not higher at any N than at N = 4, 80.0 %, but a loss of 27.8 points is not ruled out."
        )

    def test_a_small_fall_of_many_problems(self):
        found, _ = verdict_on(right(4050, 5000), right(4000, 5000))
        assert found.answer == "no"
        assert found.words == "No loss of 5 points or more: accuracy changes from 81.0 % at N = 1 to 80.0 % at N = 2."

    def test_a_fall_within_chance(self):
        found, _ = verdict_on(right(6, 10), right(5, 10))
        assert found.answer == "open"
        assert found.words == (
            "Not settled: accuracy changes from 60.0 % at N = 1 to 50.0 % at N = 2, and the interval of the gap includes 0."
        )


class TestWithoutData:
    def test_nothing_is_right(self):
        """A thousand problems rule out a loss of 5 points, and still show nothing."""
        found, gap = verdict_on(right(0, 1000), right(0, 1000))
        assert {name: value for name, value in gap.items() if value is not None} == {
            "largest_n": 2,
            "undecided": "no selected solution is correct, at any N",
        }
        assert (found.answer, found.words) == (
            "none",
            "No verdict: no selected solution is correct, at any N.",
        )
        assert found.reasons == []

    def test_accuracy_has_no_5_points_to_lose(self):
        found, _ = verdict_on(right(30, 1000), right(20, 1000))
        assert (
            found.answer == "none"
            and found.words == "No verdict: accuracy is at most 3.0 %, so it cannot fall by 5 points."
        )

    def test_one_n(self):
        found, gap = verdict_on(right(500, 1000))
        assert found.answer == "none" and found.words == "No verdict: there is only one N, use several."
        assert (gap["gap"], gap["loss"], gap["low"], gap["high"], gap["best_n"]) == (None,) * 5
        assert gap_words(gap) == "–"

    @pytest.mark.parametrize(
        ("pool", "words"),
        [
            ([judged((True, True))] * 500, "no problem has both correct and wrong candidates"),
            ([judged((True, True))] * 250 + [judged((False, False))] * 250, "no problem has both correct and wrong candidates"),
            ([judged((True, False), (None, None))] * 500, "no candidate has a score"),
            ([judged((True, False), (0.5, 0.5))] * 500, "in no problem do a correct and a wrong candidate have different scores"),
            ([judged((True, False), (0.5, None))] * 500, "in no problem do a correct and a wrong candidate have different scores"),
            ([judged((True, True), (0.1, 0.9)), judged((False, True), (0.5, 0.5))] * 250, "in no problem do a correct"),
            ([judged((True, True))] * 490 + [judged((True, False))] * 10, "accuracy is at most "),
            ([judged((False, False))] * 500, "no selected solution is correct, at any N"),
        ],
    )  # fmt: skip
    def test_the_choice_could_not_matter(self, pool, words):
        """For example a greedy policy with equal candidates: a flat curve then shows nothing."""
        curves = make_curves(pool, [1, 2])
        for name, gap in curves.hacking_gap.items():
            found = hacking_verdict(gap, curves.curves[name])
            assert found.answer == "none" and found.words.startswith(f"No verdict: {words}") and found.reasons == []
            assert gap == dict.fromkeys(gap) | {"largest_n": 2, "undecided": gap["undecided"]}

    def test_a_choice_that_mattered_is_judged(self):
        pool = [judged((False, True))] * 500
        gap = make_curves(pool, [1, 2]).hacking_gap["best_of_n/min"]
        assert gap["undecided"] is None and gap["loss"] == -0.5


def test_words_of_numbers():
    assert in_points(-0.0001) == "0.0 points" and points_between(-0.0, 0.25) == "0.0 to 25.0"
    assert undecided_by([0.5, 0.6]) is None
