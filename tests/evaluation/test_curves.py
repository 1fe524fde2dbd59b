"""Curves over N must distinguish reward models that know the truth, that guess, and that mislead."""

import math
import random
from fractions import Fraction
from itertools import combinations, permutations, product

import numpy as np
import pytest

from trl_hrm.data.candidates import Candidate, ProblemCandidates
from trl_hrm.evaluation.curves import ScoredProblem, curve_with_gap, make_curves, plain_curves, summarize
from trl_hrm.evaluation.results import estimate_words
from trl_hrm.evaluation.selection import best_of_n, majority_vote, pass_at_n, ranked, subset_weights, weighted_vote
from trl_hrm.intervals import difference_interval, mean_interval


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
        pool = make_pool(planted)
        curves = make_curves(pool, N, num_draws=10)
        found = accuracies(curves, "best_of_n/min")
        assert found == pytest.approx([pass_at(pool, n) for n in N], abs=1e-12)
        assert accuracies(curves, "pass_at_n") == pytest.approx([pass_at(pool, n) for n in N], abs=1e-12)
        assert curves.hacking_gap["best_of_n/min"]["gap"] == 0

    def test_planted_reaches_pass_at_n_over_all_subsets(self):
        """The mean over every subset of N equals the unbiased estimate exactly: small pools, no sampling."""
        for problem in make_pool(planted, num_problems=30, size=7, seed=1):
            for n in range(1, 8):
                subsets = list(combinations(range(7), n))
                solved = sum(problem.correct[s[best_of_n([problem.scores["min"][i] for i in s], s)]] for s in subsets)
                assert solved / len(subsets) == pass_at_n(7, sum(problem.correct), n)

    def test_random_reaches_pass_at_1(self):
        """At every N within four standard deviations, which are smaller for smaller N. Exactly at N = 1."""
        pool = make_pool(lambda right, rng: rng.random())
        found = accuracies(make_curves(pool, N, num_draws=10), "best_of_n/min")
        expected = pass_at(pool, 1)
        assert 0.25 < expected < 0.42 and found[0] == pytest.approx(expected, abs=1e-12)
        for n, accuracy in zip(N, found, strict=True):
            assert abs(accuracy - expected) < 4 * math.sqrt(0.25 * n / 32 / len(pool))

    def test_adversary_shows_a_hacking_gap(self):
        curves = make_curves(make_pool(adversary), N, num_draws=1)
        found, gap = accuracies(curves, "best_of_n/min"), curves.hacking_gap["best_of_n/min"]
        assert gap["gap"] == max(found) - found[-1] > 0.1
        assert gap["low"] > 0.05 and gap["high"] > gap["gap"] > gap["low"]
        assert gap["best_n"] in (2, 4, 8) and gap["largest_n"] == 32
        assert max(found) > found[0] + 0.05  # at small N it looks like a good reward model
        assert (
            found[-1] < make_curves(make_pool(planted), N, num_draws=1).curves["best_of_n/min"][-1]["accuracy"] - 0.3
        )

    def test_three_reward_models_are_distinguished(self):
        """By the intervals at the largest N, which are the numbers in a report."""
        models = {"planted": planted, "random": lambda right, rng: rng.random(), "adversary": adversary}
        last = {
            name: make_curves(make_pool(score), N, num_draws=1).curves["best_of_n/min"][-1]
            for name, score in models.items()
        }
        assert last["planted"]["low"] > last["random"]["high"] and last["planted"]["low"] > last["adversary"]["high"]

    def test_weights_of_a_planted_model_beat_plain_votes(self):
        curves = make_curves(make_pool(planted), N, num_draws=1)
        assert accuracies(curves, "weighted_vote/min")[-1] > accuracies(curves, "majority_vote")[-1] + 0.1
        equal = make_curves(make_pool(lambda right, rng: 0.5), N, num_draws=10)
        assert accuracies(equal, "weighted_vote/min") == accuracies(equal, "majority_vote")


def test_by_hand():
    """Two problems, three solutions each. The pairs of solutions are counted by hand."""
    pool = [
        judged([False, True, True], [0.9, 0.8, 0.3], [5, 1, 1], "a"),
        judged([True, False, False], [0.2, 0.1, 0.6], [1, 2, 2], "b"),
    ]
    curves = make_curves(pool, [3, 1, 2, 2])
    assert {name: accuracies(curves, name) for name in curves.curves} == {
        "best_of_n/min": [0.5, pytest.approx(1 / 3), 0.0],
        "weighted_vote/min": [0.5, pytest.approx(1 / 3), 0.5],
        "majority_vote": [0.5, pytest.approx(0.5), 0.5],
        "pass_at_n": [0.5, pytest.approx((1 + 2 / 3) / 2), 1.0],
    }
    low, high = difference_interval(np.array([2 / 3, 1 / 3]))
    assert curves.hacking_gap["best_of_n/min"] == {
        "gap": 0.5, "best_n": 1, "largest_n": 3, "loss": 0.5, "from_n": 1, "undecided": None,
        "low": pytest.approx(low), "high": pytest.approx(high),
    }  # fmt: skip
    assert [point["n"] for point in curves.curves["pass_at_n"]] == [1, 2, 3]
    # Wilson's interval for 0 of 2
    assert curves.curves["best_of_n/min"][2] == {
        "n": 3, "accuracy": 0.0, "low": 0.0, "high": pytest.approx(0.6576, abs=1e-4)
    }  # fmt: skip
    low, high = mean_interval(np.array([2 / 3, 1 / 3]))
    assert curves.curves["best_of_n/min"][0] == {"n": 1, "accuracy": 0.5, "low": low, "high": high}
    assert curves.estimate == {"method": "subsets", "min_candidates": 3, "max_candidates": 3, "num_draws": 200}


def odd_problem(rng: random.Random, size: int, name: str) -> ScoredProblem:
    """Return a problem with ties, missing scores, grades and answers, and equal texts, which may have different grades."""
    texts = [rng.randrange(size) for _ in range(size)]
    answer_of = {text: rng.choice([None, 0, 1, 2]) for text in range(size)}
    score_of = {text: rng.choice([None, 0.0, 0.1, 0.2, 0.3, rng.random()]) for text in range(size)}
    scores = [None if rng.random() < 0.1 else score_of[text] for text in texts]
    correct = [rng.choice([True, True, False, False, None]) for _ in texts]
    return judged(correct, scores, [answer_of[text] for text in texts], name, texts)


def over_all_subsets(problem: ScoredProblem, n: int) -> dict[str, float]:
    """
    Return the accuracy of each method over all subsets of n candidates, by the selection functions.

    If the selected candidate has a twin with the same text, score and answer in the subset, each of them is selected equally often.
    Selections without a grade are ignored.
    """
    totals = {name: [0.0, 0.0] for name in ("best_of_n/min", "weighted_vote/min", "majority_vote")}
    for subset in combinations(range(len(problem.ranks)), n):
        c, s, t = ([values[i] for i in subset] for values in (problem.classes, problem.scores["min"], problem.ranks))
        for name, chosen, twins in (
            ("best_of_n/min", best_of_n(s, t), list(zip(s, t, strict=True))),
            ("weighted_vote/min", weighted_vote(c, s, t), list(zip(c, s, t, strict=True))),
            ("majority_vote", majority_vote(c, t), list(zip(c, t, strict=True))),
        ):
            grades = [problem.correct[i] for i, twin in zip(subset, twins, strict=True) if twin == twins[chosen]]
            totals[name][0] += sum(grade is True for grade in grades) / len(grades)
            totals[name][1] += sum(grade is not None for grade in grades) / len(grades)
    return {name: right / graded if graded else math.nan for name, (right, graded) in totals.items()}


class TestAllSubsets:
    @pytest.mark.parametrize("size", range(1, 11))
    def test_equals_enumeration(self, size):
        """With ties, missing scores, answers and grades, and equal texts."""
        rng = random.Random(size)
        for number in range(3 if size == 10 else 12):
            problem = odd_problem(rng, size, f"p{number}")
            for n in range(1, size + 1):
                expected = over_all_subsets(problem, n)
                # the second problem is always graded: a curve without any grade is an error
                graded = judged([True] * size, [0.5] * size, [0] * size, "graded")
                curves = make_curves([problem, graded], [n], num_draws=252)
                for name, value in expected.items():
                    if name in curves.curves:
                        wanted = 1.0 if math.isnan(value) else (value + 1) / 2
                        assert accuracies(curves, name)[0] == pytest.approx(wanted, abs=1e-12), (name, problem, n)

    def test_one_candidate_is_pass_at_1(self):
        """Exactly, for every method, and whatever the scores are."""
        rng = random.Random(0)
        for size in (1, 3, 7, 49, 64):
            correct = [[rng.random() < 0.6 for _ in range(size)] for _ in range(9)]
            pool = [
                judged(one, [rng.random() for _ in one], [rng.randrange(3) for _ in one], f"p{i}")
                for i, one in enumerate(correct)
            ]
            curves = make_curves(pool, [1], num_draws=1)
            assert {name: accuracies(curves, name) for name in curves.curves} == dict.fromkeys(
                curves.curves, [float(np.mean([sum(one) / size for one in correct]))]
            )

    def test_the_first_sample_does_not_decide(self):
        """40 problems with 25 samples: 62.8 % of all samples and 42.5 % of the first samples are right. N = 1 used to show 42.5 %."""
        rng, pool = random.Random(0), []
        for i in range(40):
            num_right, first = 16 if i < 28 else 15, i % 40 < 17
            rest = [True] * (num_right - first) + [False] * (25 - num_right - (not first))
            correct = [first, *rng.sample(rest, len(rest))]
            pool.append(judged(correct, [rng.random() for _ in correct], name=f"p{i}"))
        assert np.mean([problem.correct[0] for problem in pool]) == 0.425
        curves = make_curves(pool, [1, 25])
        assert [accuracies(curves, name)[0] for name in curves.curves] == pytest.approx([0.628] * 4, abs=1e-12)

    def test_problems_of_different_sizes(self):
        """All candidates of each problem are used."""
        pool = [judged([True] * 2, [0.5, 0.6]), judged([False] * 9 + [True], [i / 10 for i in range(10)], name="q")]
        curves = make_curves(pool, [1, 2])
        assert accuracies(curves, "best_of_n/min") == pytest.approx([(1 + 0.1) / 2, (1 + 0.2) / 2])
        assert (curves.estimate["min_candidates"], curves.estimate["max_candidates"]) == (2, 10)

    def test_unbiased(self):
        """
        Mean over 4,000 pools of 6 samples against the accuracy of 3 new samples: the best is right if none of them is a trap, and at
        least one is right. The first three samples give the same mean with a larger variance.
        """
        rng, p, traps = np.random.default_rng(0), 0.4, 0.06
        right = rng.random((4000, 6)) < p
        trap = ~right & (rng.random(right.shape) < traps)
        scores = np.where(right, rng.uniform(0.5, 0.9, right.shape), rng.uniform(0, 0.5, right.shape))
        scores = np.where(trap, rng.uniform(0.95, 1, right.shape), scores)
        truth = (1 - (1 - p) * traps) ** 3 - ((1 - p) * (1 - traps)) ** 3
        weights = subset_weights(6, [3])[0] * 3 / 6
        found = np.take_along_axis(right, np.argsort(-scores), axis=1) @ weights
        first = np.take_along_axis(right[:, :3], scores[:, :3].argmax(axis=1)[:, None], axis=1)[:, 0]
        assert abs(found.mean() - truth) < 4 * found.std() / math.sqrt(4000)
        assert abs(first.mean() - truth) < 4 * first.std() / math.sqrt(4000)
        assert found.var() < 0.6 * first.var()
        few = plain_curves(scores[:50].tolist(), right[:50].tolist(), [list("abcdef")] * 50, [3])
        assert accuracies(few, "best_of_n/score")[0] == pytest.approx(found[:50].mean())

    def test_votes_are_unbiased(self):
        """Mean over 1,000 pools of 5 samples against the vote of 3 new samples, with one random subset per pool."""
        rng, share = random.Random(0), {0: 0.45, 1: 0.35, 2: 0.2}
        truth = 0.0
        for three in product(share, repeat=3):  # the text of an answer is its class, so the lowest answer wins a tie
            winner = three[majority_vote(three, three)]
            truth += math.prod(share[one] for one in three) * (winner == 1)
        pool = []
        for i in range(1000):
            classes = rng.choices(list(share), list(share.values()), k=5)
            pool.append(judged([one == 1 for one in classes], [0.5] * 5, classes, f"p{i}", classes))
        curves = make_curves(pool, [3], num_draws=1)
        assert accuracies(curves, "majority_vote")[0] == pytest.approx(truth, abs=4 * math.sqrt(0.25 / 1000))

    def test_random_subsets_are_near_all_subsets(self):
        """Within four standard errors of the mean over 100 problems with 60 of 252 subsets each."""
        pool = make_pool(lambda right, rng: rng.random() * (0.7 + 0.3 * right), num_problems=100, size=10)
        every, some = make_curves(pool, [5], num_draws=252), make_curves(pool, [5], num_draws=60)
        for name in ("weighted_vote/min", "majority_vote"):
            assert accuracies(some, name)[0] == pytest.approx(
                accuracies(every, name)[0], abs=4 * math.sqrt(0.25 / 60 / 100)
            )
            assert accuracies(some, name) != accuracies(every, name)
        assert some.curves["best_of_n/min"] == every.curves["best_of_n/min"]

    @pytest.mark.parametrize("size", [5, 64, 4096])
    def test_weights(self, size):
        """Against binomials of exact integers, for small and huge ones, and their sum is 1."""
        n = sorted({1, 2, 3, size // 2, size - 1, size})
        found = subset_weights(size, n)
        assert found.shape == (len(n), size) and np.isfinite(found).all()
        assert (found.sum(axis=1) * n / size).tolist() == pytest.approx([1.0] * len(n), rel=1e-12)
        for row, number in enumerate(n):
            for rank in {1, 2, 3, size // 3, size - number, size - number + 1, size - number + 2, size} - {
                0,
                size + 1,
            }:
                exact = Fraction(math.comb(size - rank, number - 1), math.comb(size - 1, number - 1))
                assert found[row, rank - 1] == pytest.approx(float(exact), rel=1e-11, abs=1e-300)

    def test_bad_numbers(self):
        pool = [judged([True] * 3, [0.5] * 3), judged([True] * 2, [0.5] * 2, name="q")]
        for n in ([0, 1], [3], []):
            with pytest.raises(ValueError, match="`n` is .* from 1 to 2, the number of candidates of problem 'q'"):
                make_curves(pool, n)
        with pytest.raises(ValueError, match="`num_draws` is 0"):
            make_curves(pool, [1], num_draws=0)
        with pytest.raises(ValueError, match="from 1 to 4"):
            subset_weights(4, [5])
        with pytest.raises(ValueError, match="problem 'p': the weights of the votes"):
            make_curves([judged([True, False], [-1.0, 0.5])], [1])
        with pytest.raises(ValueError, match="nan"):
            ranked([math.nan], ["a"])

    def test_without_scores_or_without_answers(self):
        """A policy alone has votes and pass@N. Votes require answers."""
        alone = ScoredProblem("p", [0, 0, 1], [True, True, False], {}, [0, 1, 2])
        found = make_curves([alone], [1, 3])
        assert list(found.curves) == ["majority_vote", "pass_at_n"] and found.hacking_gap == found.calibration == {}
        silent = [judged([False] * 4, [0.5] * 4, [None] * 4, f"p{i}") for i in range(5)]
        found = make_curves(silent, [1, 4])
        assert list(found.curves) == ["best_of_n/min", "pass_at_n"] and "num_draws" not in found.estimate
        assert all(accuracies(found, name) == [0.0, 0.0] for name in found.curves)


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
    """Only votes are drawn, and the draws of a problem do not depend on other problems."""
    pool = make_pool(adversary, num_problems=50, size=16)
    first, again = make_curves(pool, [1, 8], num_draws=3, seed=1), make_curves(pool, [1, 8], num_draws=3, seed=1)
    assert first == again
    other = make_curves(pool, [1, 8], num_draws=3, seed=2)
    assert first.curves["majority_vote"] != other.curves["majority_vote"]
    for name in ("best_of_n/min", "pass_at_n"):
        assert first.curves[name] == other.curves[name]
    # equal problems have different draws: otherwise one unlucky draw would affect all of them
    same = [judged([True, False, False], [0.5] * 3, [0, 1, 2], name=f"p{i}") for i in range(40)]
    assert 0.4 < accuracies(make_curves(same, [2], num_draws=1), "majority_vote")[0] < 0.95
    alone = make_curves(pool[7:8], [1, 8, 16], num_draws=3, seed=1)
    values = make_curves(pool[7:9], [1, 8, 16], num_draws=3, seed=1)
    rest = make_curves(pool[8:9], [1, 8, 16], num_draws=3, seed=1)
    for name in values.curves:
        pairs = zip(accuracies(alone, name), accuracies(rest, name), strict=True)
        assert accuracies(values, name) == pytest.approx([sum(pair) / 2 for pair in pairs])
    whole = make_curves(pool, [16], num_draws=5, seed=1)
    assert whole.curves == make_curves(pool, [16], seed=2).curves  # there is one subset


def test_a_larger_n_contains_the_draws_of_a_smaller_one():
    """With independent draws, a vote could fall from N to N + 1 by chance alone. Only one candidate is right, and it wins if drawn."""
    pool = [judged([i == 0 for i in range(40)], [1.0] + [0.0] * 39, name=f"p{k}") for k in range(20)]
    found = accuracies(make_curves(pool, list(range(2, 40)), num_draws=5), "weighted_vote/min")
    assert found == sorted(found) and found[0] < 0.2 < 0.8 < found[-1]


class TestNotGraded:
    def test_ungraded_is_neither_right_nor_wrong(self):
        """Problem b is unknown where its ungraded solution is chosen, and counts elsewhere."""
        pool = [
            judged([True, False], [0.9, 0.1], name="a"),
            judged([False, None], [0.1, 0.9], [1, 2], name="b"),
            judged([False, False], [0.1, 0.2], name="c"),
        ]
        curves = make_curves(pool, [1, 2])
        assert accuracies(curves, "best_of_n/min") == pytest.approx([(1 / 2 + 0 + 0) / 3, 1 / 2])
        # the graded solution of b is wrong, so b counts as unsolved
        assert accuracies(curves, "pass_at_n") == pytest.approx([(1 / 2 + 0 + 0) / 3, 1 / 3])
        assert curves.estimate["min_graded"] == 1
        assert "at least 1 with a grade" in estimate_words("best_of_n", curves.estimate)

    def test_subsets_with_an_ungraded_selection_are_ignored(self):
        """Of the three pairs, the right one is chosen from two and the ungraded one from the third."""
        problem = judged([True, None, False], [0.9, 0.8, 0.1], [0, 1, 2])
        assert accuracies(make_curves([problem], [2]), "best_of_n/min") == [1.0]
        problem = judged([False, None, True], [0.9, 0.8, 0.1], [0, 1, 2])
        assert accuracies(make_curves([problem], [1, 2]), "best_of_n/min") == [0.5, 0.0]

    def test_right_despite_an_ungraded_solution(self):
        """With two of three drawn and two right, one drawn solution is right, whatever the third is."""
        pool = [judged([True, True, None], [0.1, 0.2, 0.3], [0, 0, 1]), judged([False] * 3, [0.1, 0.2, 0.3], name="q")]
        assert accuracies(make_curves(pool, [2, 3]), "pass_at_n") == [0.5, 0.5]

    def test_nothing_graded(self):
        pool = [judged([None, None], [0.1, 0.2], [1, 2])]
        with pytest.raises(ValueError, match="N=1.*given grades are null.*--grader_timeout"):
            make_curves(pool, [1])

    def test_few_missing_grades_change_little(self):
        """If problems with fewer than N grades only counted when solved, pass@64 of these would be about 28 points too high."""
        rng = random.Random(0)
        whole = [[rng.random() < 0.01 for _ in range(64)] for _ in range(200)]
        lost = [[None if rng.random() < 0.02 else right for right in one] for one in whole]
        full, partial = (
            make_curves([judged(one, [0.5] * 64, [0] * 64, f"p{i}") for i, one in enumerate(pool)], [1, 32, 64])
            for pool in (whole, lost)
        )
        assert accuracies(partial, "pass_at_n") == pytest.approx(accuracies(full, "pass_at_n"), abs=0.02)
        assert "min_graded" not in full.estimate and 55 < partial.estimate["min_graded"] < 64

    def test_best_of_n_is_known_without_all_grades(self):
        """An unknown pass@2 was an error, although the graded solution is selected."""
        curves = plain_curves([[0.2, 0.1]], [[False, None]], [["a", "b"]], [2]).curves
        assert curves["best_of_n/score"][0]["accuracy"] == curves["pass_at_n"][0]["accuracy"] == 0


def test_votes_do_not_depend_on_the_order():
    """With random subsets, the columns from which they are drawn must not follow the order of the candidates."""
    rng = random.Random(1)
    rows = [(rng.choice([0, 1, 2, None]), rng.random() < 0.5, rng.choice([0.1, 0.2, 0.7]), i // 2) for i in range(16)]
    found = set()
    for _ in range(5):
        classes, correct, scores, texts = map(list, zip(*rng.sample(rows, 16), strict=True))
        curves = make_curves([ScoredProblem("p", classes, correct, {"min": scores}, texts)], [4, 8], num_draws=20)
        found.add(tuple(tuple(accuracies(curves, name)) for name in curves.curves))
    assert len(found) == 1


def test_solutions_without_score_or_answer():
    """They are chosen last, have no vote, and are wrong."""
    pool = [judged([False, True, False], [None, 0.1, None], [None, 1, None])]
    curves = make_curves(pool, [1, 2, 3])
    for name in ("best_of_n/min", "weighted_vote/min", "majority_vote"):
        assert accuracies(curves, name) == pytest.approx([1 / 3, 2 / 3, 1.0])


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


def test_plain_curves_of_arrays():
    """NumPy's booleans and 0 or 1 counted as wrong, because they are not `True`."""
    scores, correct, texts = (
        [[0.2, 0.9, 0.4], [0.5, 0.1, 0.7]],
        [[True, False, True], [False, True, True]],
        ["a", "b", "c"],
    )
    expected = plain_curves(scores, correct, [texts] * 2, [1, 2])
    assert accuracies(expected, "pass_at_n") == pytest.approx([2 / 3, 1])
    numbers = [[int(right) for right in row] for row in correct]
    assert plain_curves(scores, numbers, [texts] * 2, [1, 2]) == expected
    for kind in (bool, np.int64, np.float32):
        arrays = np.array(scores), np.array(correct).astype(kind), np.array([texts] * 2)
        assert plain_curves(*arrays, np.array([2, 1])) == expected
    assert plain_curves(scores, correct, [texts] * 2, 2).curves["pass_at_n"] == expected.curves["pass_at_n"][1:]
    with pytest.raises(ValueError, match="problem 1.*'yes'.*True or False"):
        plain_curves(scores, [correct[0], [False, "yes", True]], [texts] * 2)


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
