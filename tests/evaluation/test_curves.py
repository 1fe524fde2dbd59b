"""Curves over N must distinguish reward models that know the truth, that guess, and that mislead."""

import math
import random
from itertools import combinations, permutations

import numpy as np
import pytest

from trl_hrm.data.candidates import Candidate, ProblemCandidates
from trl_hrm.evaluation.curves import ScoredProblem, curve_with_gap, make_curves, summarize
from trl_hrm.evaluation.selection import best_of_n, majority_vote, pass_at_n, weighted_vote


N = [1, 2, 4, 8, 16, 32]


def judged(correct, scores, classes=None, name="p", texts=None) -> ScoredProblem:
    """Return a problem whose solutions all differ. Every wrong solution has its own answer."""
    if classes is None:
        classes = [0 if right else i + 1 for i, right in enumerate(correct)]
    return ScoredProblem(
        name, classes, correct, {"min": scores}, list(range(len(correct))) if texts is None else texts
    )


def make_pool(score, num_problems: int = 300, size: int = 32, seed: int = 0) -> list[ScoredProblem]:
    """Return problems from hard to easy. `score(right, rng)` is the reward model."""
    rng = random.Random(seed)
    pool = []
    for i in range(num_problems):
        p = rng.betavariate(1, 2)
        correct = [rng.random() < p for _ in range(size)]
        classes = [0 if right else rng.randint(1, 6) for right in correct]
        scores = [score(right, rng) for right in correct]
        pool.append(judged(correct, scores, classes, f"p{i}", rng.sample(range(size), size)))
    return pool


def accuracies(curves, name: str) -> list[float]:
    return [point["accuracy"] for point in curves.curves[name]]


def pass_at(pool, n: int) -> float:
    return sum(pass_at_n(len(p.correct), sum(p.correct), n) for p in pool) / len(pool)


def planted(right, rng):
    return 0.5 + 0.5 * rng.random() if right else 0.5 * rng.random()


def adversary(right, rng):
    """Usually right, but a few wrong ones get the highest scores. A small N seldom includes these."""
    if right:
        return rng.uniform(0.5, 0.9)
    return rng.uniform(0.95, 1.0) if rng.random() < 0.06 else rng.uniform(0.0, 0.5)


class TestHarness:
    def test_planted_reaches_pass_at_n(self):
        """Exactly: pass@N if N is the whole pool, and for a smaller N whether one of the first N solutions is right."""
        pool = make_pool(planted)
        curves = make_curves(pool, N)
        found = accuracies(curves, "best_of_n/min")
        assert found == pytest.approx([np.mean([any(p.correct[:n]) for p in pool]) for n in N], abs=1e-12)
        assert accuracies(curves, "pass_at_n") == pytest.approx([pass_at(pool, n) for n in N], abs=1e-12)
        assert found[-1] == pytest.approx(pass_at(pool, 32), abs=1e-12)
        assert curves.hacking_gap["best_of_n/min"]["gap"] == 0

    def test_planted_reaches_pass_at_n_over_all_subsets(self):
        """The mean over every subset of N equals the unbiased estimate exactly: small pools, no sampling."""
        for problem in make_pool(planted, num_problems=30, size=7, seed=1):
            for n in range(1, 8):
                subsets = list(combinations(range(7), n))
                solved = sum(problem.correct[s[best_of_n([problem.scores["min"][i] for i in s], s)]] for s in subsets)
                assert solved / len(subsets) == pass_at_n(7, sum(problem.correct), n)

    def test_random_reaches_pass_at_1(self):
        """At every N within four standard deviations of the binomial, and no gap beyond its interval."""
        pool = make_pool(lambda right, rng: rng.random())
        curves = make_curves(pool, N)
        expected = pass_at(pool, 1)
        deviation = math.sqrt(expected * (1 - expected) / len(pool))
        assert 0.25 < expected < 0.42 and deviation < 0.03
        for accuracy in accuracies(curves, "best_of_n/min"):
            assert abs(accuracy - expected) < 4 * deviation
        averaged = make_curves(pool, N, num_draws=50)
        for accuracy in accuracies(averaged, "best_of_n/min")[:3]:
            assert abs(accuracy - expected) < 1.5 * deviation  # the mean of 50 draws is more precise

    def test_adversary_shows_a_hacking_gap(self):
        curves = make_curves(make_pool(adversary), N)
        found, gap = accuracies(curves, "best_of_n/min"), curves.hacking_gap["best_of_n/min"]
        assert gap["gap"] == max(found) - found[-1] > 0.1
        assert gap["low"] > 0.05 and gap["high"] > gap["gap"] > gap["low"]
        assert gap["best_n"] in (2, 4, 8) and gap["largest_n"] == 32
        assert max(found) > found[0] + 0.05  # at small N it looks like a good reward model
        assert found[-1] < make_curves(make_pool(planted), N).curves["best_of_n/min"][-1]["accuracy"] - 0.3

    def test_three_reward_models_are_distinguished(self):
        """By the intervals at the largest N, which are the numbers in a report."""
        models = {"planted": planted, "random": lambda right, rng: rng.random(), "adversary": adversary}
        last = {name: make_curves(make_pool(score), N).curves["best_of_n/min"][-1] for name, score in models.items()}
        assert last["planted"]["low"] > last["random"]["high"] and last["planted"]["low"] > last["adversary"]["high"]

    def test_weights_of_a_planted_model_beat_plain_votes(self):
        curves = make_curves(make_pool(planted), N)
        assert accuracies(curves, "weighted_vote/min")[-1] > accuracies(curves, "majority_vote")[-1] + 0.1
        equal = make_curves(make_pool(lambda right, rng: 0.5), N)
        assert accuracies(equal, "weighted_vote/min") == accuracies(equal, "majority_vote")


def test_by_hand():
    """Two problems, three solutions each."""
    pool = [
        judged([False, True, True], [0.9, 0.8, 0.3], [5, 1, 1], "a"),
        judged([True, False, False], [0.2, 0.1, 0.6], [1, 2, 2], "b"),
    ]
    curves = make_curves(pool, [3, 1, 2, 2])
    assert {name: accuracies(curves, name) for name in curves.curves} == {
        "best_of_n/min": [0.5, 0.5, 0.0],
        "weighted_vote/min": [0.5, 0.5, 0.5],
        "majority_vote": [0.5, 0.5, 0.5],
        "pass_at_n": pytest.approx([0.5, (1 + 2 / 3) / 2, 1.0]),
    }
    # one of two problems is lost: Tango's score interval for 1 and 0 discordant pairs of 2
    gap = {"gap": 0.5, "best_n": 1, "largest_n": 3, "loss": 0.5, "from_n": 1, "undecided": None}
    assert curves.hacking_gap["best_of_n/min"] == gap | {
        "low": pytest.approx(-0.4864, abs=1e-4),
        "high": pytest.approx(0.9055, abs=1e-4),
    }
    assert [point["n"] for point in curves.curves["pass_at_n"]] == [1, 2, 3]
    # Wilson's intervals for 0 of 2 and 1 of 2
    assert curves.curves["best_of_n/min"][2] == {
        "n": 3,
        "accuracy": 0.0,
        "low": 0.0,
        "high": pytest.approx(0.6576, abs=1e-4),
    }
    assert curves.curves["best_of_n/min"][0] == {
        "n": 1,
        "accuracy": 0.5,
        "low": pytest.approx(0.0945, abs=1e-4),
        "high": pytest.approx(0.9055, abs=1e-4),
    }


def test_against_plain_loops():
    """Every curve equals choosing from each prefix with the selection functions."""
    pool = make_pool(adversary, num_problems=40, size=16, seed=3)
    curves = make_curves(pool, [1, 3, 16])
    for place, n in enumerate([1, 3, 16]):
        solved = {"best_of_n/min": [], "weighted_vote/min": [], "majority_vote": []}
        for p in pool:
            c, s, t = p.classes[:n], p.scores["min"][:n], p.ranks[:n]
            solved["best_of_n/min"].append(p.correct[best_of_n(s, t)])
            solved["weighted_vote/min"].append(p.correct[weighted_vote(c, s, t)])
            solved["majority_vote"].append(p.correct[majority_vote(c, t)])
        for name, values in solved.items():
            assert curves.curves[name][place]["accuracy"] == pytest.approx(np.mean(values))


def test_intervals_cover_the_truth():
    """For 200 samples of 100 problems, the 95 % interval holds the known mean in 88 to 100 %. Intervals over solutions would not."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = rng.random((1, 100)) < 0.3
        points, _ = curve_with_gap("x", values.astype(float), [1])
        covered += points[0]["low"] <= 0.3 <= points[0]["high"]
    assert 176 <= covered <= 200


def test_intervals_are_of_95_percent():
    """As wide as the binomial interval, 2 * 1.96 deviations. A 90 % interval would nearly pass the coverage test above."""
    points, _ = curve_with_gap("x", np.array([[1.0] * 500 + [0.0] * 500]), [1])
    assert points[0]["high"] - points[0]["low"] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 1000), rel=0.08)


def test_the_gap_is_paired():
    """The same problems fail at both N. Unpaired, the interval of a gap of 0.1 over 100 problems would reach below 0."""
    solved = np.array([[1.0] * 50 + [0.0] * 50, [1.0] * 40 + [0.0] * 60])
    _, gap = curve_with_gap("x", solved, [1, 2])
    assert gap["gap"] == pytest.approx(0.1) and 0.03 < gap["low"] < 0.1 < gap["high"] < 0.18
    _, gap = curve_with_gap("x", solved[::-1], [1, 2])
    # no gap, and how far accuracy rises up to the largest N
    assert (gap["gap"], gap["best_n"], gap["largest_n"], gap["from_n"]) == (0, 2, 2, 1)
    assert gap["loss"] == pytest.approx(-0.1) and -0.18 < gap["low"] < -0.1 < gap["high"] < -0.03


def test_seeds():
    pool = make_pool(adversary, num_problems=50, size=16)
    first, again = make_curves(pool, [1, 8], num_draws=3, seed=1), make_curves(pool, [1, 8], num_draws=3, seed=1)
    assert first == again
    other = make_curves(pool, [1, 8], num_draws=3, seed=2)
    assert first.curves["best_of_n/min"] != other.curves["best_of_n/min"]
    assert make_curves(pool, [1, 8], seed=1) == make_curves(pool, [1, 8], seed=2)  # no draws, and no resampling
    # equal problems have different orders: otherwise one unlucky order would affect all of them
    same = [judged([True, False], [0.5, 0.5], name=f"p{i}") for i in range(40)]
    assert 0.2 < accuracies(make_curves(same, [1], num_draws=1), "best_of_n/min")[0] < 0.8
    # the draws of a problem do not depend on other problems, and with N equal to the pool every draw is the same set
    alone = make_curves(pool[7:8], [1, 8, 16], num_draws=3, seed=1)
    values = make_curves(pool[7:9], [1, 8, 16], num_draws=3, seed=1)
    rest = make_curves(pool[8:9], [1, 8, 16], num_draws=3, seed=1)
    for name in values.curves:
        pairs = zip(accuracies(alone, name), accuracies(rest, name), strict=True)
        assert accuracies(values, name) == pytest.approx([sum(pair) / 2 for pair in pairs])
    whole = make_curves(pool, [16], num_draws=5, seed=1).curves["best_of_n/min"]
    assert whole == make_curves(pool, [16], seed=1).curves["best_of_n/min"]


def test_draws_are_averages_over_subsets():
    """Many draws of two of three approach the mean over the three pairs."""
    problem = judged([True, False, False], [0.5, 0.9, 0.1])
    curves = make_curves([problem], [2], num_draws=2000)
    assert accuracies(curves, "best_of_n/min")[0] == pytest.approx(1 / 3, abs=0.05)
    assert accuracies(curves, "pass_at_n")[0] == pytest.approx(2 / 3)


class TestNotGraded:
    def test_ungraded_is_neither_right_nor_wrong(self):
        """Problem b is unknown where its ungraded solution is chosen, and counts elsewhere."""
        pool = [
            judged([True, False], [0.9, 0.1], name="a"),
            judged([False, None], [0.1, 0.9], [1, 2], name="b"),
            judged([False, False], [0.1, 0.2], name="c"),
        ]
        curves = make_curves(pool, [1, 2])
        assert accuracies(curves, "best_of_n/min") == pytest.approx([1 / 3, 1 / 2])
        # one of b's two solutions is wrong and one unknown, so with both drawn b is unknown
        assert accuracies(curves, "pass_at_n") == pytest.approx([(1 / 2 + 0 + 0) / 3, (1 + 0) / 2])

    def test_right_despite_an_ungraded_solution(self):
        """With two of three drawn and two right, one drawn solution is right, whatever the third is."""
        pool = [judged([True, True, None], [0.1, 0.2, 0.3], [0, 0, 1]), judged([False] * 3, [0.1, 0.2, 0.3], name="q")]
        assert accuracies(make_curves(pool, [2, 3]), "pass_at_n") == [0.5, 0.5]

    def test_nothing_graded(self):
        pool = [judged([None, None], [0.1, 0.2], [1, 2])]
        with pytest.raises(ValueError, match="N=1.*--grader_timeout"):
            make_curves(pool, [1])


def test_solutions_without_score_or_answer():
    """They are chosen last, have no vote, and are wrong."""
    pool = [judged([False, True, False], [None, 0.1, None], [None, 1, None])]
    curves = make_curves(pool, [1, 2])
    for name in ("best_of_n/min", "weighted_vote/min", "majority_vote"):
        assert accuracies(curves, name) == [0.0, 1.0]
    silent = [judged([False] * 4, [0.5] * 4, [None] * 4, f"p{i}") for i in range(5)]
    curves = make_curves(silent, [1, 4])
    assert all(accuracies(curves, name) == [0.0, 0.0] for name in curves.curves)


def test_calibration():
    correct = [True, False, True, False, None, False]
    scores = [0.95, 0.91, 1.0, 0.05, 0.5, None]
    found = make_curves([judged(correct, scores, list(range(6)))], [1]).calibration
    assert found["aggregate"] == "min"
    assert found["bins"] == [
        {"low": 0.0, "high": 0.1, "count": 1, "mean_score": 0.05, "share_right": 0.0},
        {
            "low": 0.9,
            "high": 1.0,
            "count": 3,
            "mean_score": pytest.approx(2.86 / 3),
            "share_right": pytest.approx(2 / 3),
        },
    ]


def test_summarize():
    candidates = [
        Candidate("b", ["x", "y"], "1", correct=True, scores=[0.5, 0.8]),
        Candidate("a", [], None),
        Candidate("b", ["x", "y"], "1", correct=None, scores=[0.5, 0.8]),
    ]

    def second(scores):
        return scores[1]

    found = summarize(ProblemCandidates("p", "?", "1", candidates), [0, None, 0], ["prod", second])
    assert found == ScoredProblem(
        "p", [0, None, 0], [True, False, None], {"prod": [0.4, None, 0.4], "second": [0.8, None, 0.8]}, [1, 0, 1]
    )
    with pytest.raises(ValueError, match="min, min"):
        summarize(ProblemCandidates("p", "?", "1", candidates), [0, None, 0], ["min", "min"])


def test_the_order_does_not_matter_if_n_is_the_whole_pool():
    rng = random.Random(5)
    names, texts = (0, 1, None), [3, 1, 2, 0]
    for _ in range(20):
        rows = [(rng.choice(names), rng.random() < 0.5, rng.choice([None, 0.1, 0.2]), text) for text in texts]
        found = set()
        for order in permutations(rows):
            classes, correct, scores, ranks = map(list, zip(*order, strict=True))
            curves = make_curves([ScoredProblem("p", classes, correct, {"min": scores}, ranks)], [4])
            found.add(tuple(accuracies(curves, name)[0] for name in curves.curves))
        assert len(found) == 1
