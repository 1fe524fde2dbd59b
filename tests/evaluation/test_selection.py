"""Choices among solutions: compared with hand-written cases and enumeration, in every order of the solutions."""

import math
import random
from itertools import combinations, permutations

import pytest

from trl_hrm.evaluation.selection import best_of_n, majority_vote, pass_at_n, weighted_vote


class TestByHand:
    def test_best_of_n(self):
        assert best_of_n([0.2, 0.9, 0.4], ["a", "b", "c"]) == 1
        assert best_of_n([0.9, 0.9, 0.4], ["b", "a", "c"]) == 1  # ties go to the smallest text
        assert best_of_n([None, 0.0], ["a", "b"]) == 1  # any score beats no score
        assert best_of_n([None, None], ["b", "a"]) == 1
        assert best_of_n([-2.0, -1.0], ["a", "b"]) == 1

    def test_majority_vote(self):
        assert majority_vote([0, 1, 1], ["a", "c", "b"]) == 2
        assert (
            majority_vote([None, None, None, 4], ["a", "b", "c", "d"]) == 3
        )  # a solution without an answer has no vote
        assert majority_vote([None, None], ["b", "a"]) == 1
        assert majority_vote([0, 1], ["b", "a"]) == 1  # ties go to the smallest text
        assert majority_vote(["x", "y", "y", "x"], ["d", "c", "b", "a"]) == 3

    def test_weighted_vote(self):
        assert (
            weighted_vote([0, 1, 1], [0.9, 0.5, 0.6], ["a", "b", "c"]) == 2
        )  # 0.9 against 1.1, and then its best solution
        assert weighted_vote([0, 1, 1], [0.9, 0.3, 0.3], ["a", "b", "c"]) == 0  # a few votes may weigh more
        assert weighted_vote([None, 1], [1.0, 0.0], ["a", "b"]) == 1
        assert (
            weighted_vote([0, 1, 1], [0.0, 0.0, None], ["b", "c", "a"]) == 1
        )  # all weights are 0: texts decide, then scores
        assert weighted_vote([0, 1, 1], [0.5, None, 0.4], ["b", "c", "a"]) == 0

    def test_pass_at_n(self):
        assert pass_at_n(4, 1, 2) == 0.5
        assert pass_at_n(5, 0, 5) == 0.0
        assert pass_at_n(5, 1, 5) == 1.0
        assert pass_at_n(10, 3, 1) == 0.3
        assert pass_at_n(200, 1, 64) == 0.32


def random_pool(rng: random.Random, size: int) -> tuple[list, list, list]:
    """Few distinct values, so that ties are frequent. Equal texts have equal answers and scores."""
    kinds = [(rng.choice([None, 0, 1, 2]), rng.choice([None, 0.1, 0.2, 0.3]), text) for text in "abcdefg"]
    return tuple(map(list, zip(*rng.choices(kinds, k=size), strict=True)))


def test_the_order_does_not_matter():
    """If the first solution won a tie, results would change with the order of an engine's batches."""
    rng = random.Random(0)
    ties = 0
    for _ in range(150):
        classes, scores, texts = random_pool(rng, 5)
        found = set()
        for order in permutations(range(5)):
            c, s, t = ([values[i] for i in order] for values in (classes, scores, texts))
            found.add((t[best_of_n(s, t)], t[majority_vote(c, t)], t[weighted_vote(c, s, t)]))
        assert len(found) == 1
        ties += len(set(map(str, scores))) < len(set(texts))
    assert ties > 100


def test_rounding_does_not_break_ties():
    """0.1 + 0.2 + 0.3 depends on the order: 0.6 or 0.6000000000000001. Added naively, one of two equal answers would win."""
    scores, texts = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1], ["b", "c", "d", "e", "f", "a"]
    assert weighted_vote([0, 0, 0, 1, 1, 1], scores, texts) == 3  # the answer of "a", with the best solution "e"
    assert weighted_vote([1, 1, 1, 0, 0, 0], scores[::-1], texts[::-1]) == 2


def test_properties():
    """Swapped names, or a vote that counts missing answers, break one of these."""
    rng = random.Random(1)
    for _ in range(500):
        classes, scores, texts = random_pool(rng, rng.randint(1, 9))
        best, vote, weighted = (
            best_of_n(scores, texts),
            majority_vote(classes, texts),
            weighted_vote(classes, scores, texts),
        )
        known = [score for score in scores if score is not None]
        assert scores[best] == (max(known) if known else None)
        votes = {group: classes.count(group) for group in classes if group is not None}
        weights = {
            group: math.fsum(s or 0 for c, s in zip(classes, scores, strict=True) if c == group) for group in votes
        }
        assert (classes[vote] is None) == (classes[weighted] is None) == (not votes)
        if votes:
            assert votes[classes[vote]] == max(votes.values())
            assert weights[classes[weighted]] == max(weights.values())
        assert (
            weighted_vote(classes, [0.5] * len(texts), texts) == vote
        )  # with equal weights it equals the majority vote
        assert majority_vote([7] * len(texts), texts) == texts.index(min(texts))


def test_pass_at_n_against_enumeration():
    """Compared with all subsets, without a formula."""
    for size in range(1, 8):
        for num_right in range(size + 1):
            for n in range(1, size + 1):
                subsets = list(combinations(range(size), n))
                solved = sum(any(i < num_right for i in subset) for subset in subsets)
                assert pass_at_n(size, num_right, n) == solved / len(subsets)


def test_pass_at_n_is_exact():
    """In floating point, products of a thousand factors lose digits, and factorials overflow."""
    assert pass_at_n(1000, 1, 512) == 0.512
    assert pass_at_n(4096, 1, 1) == 1 / 4096
    assert pass_at_n(10_000, 5_000, 5_001) == 1.0
    values = [pass_at_n(512, 3, n) for n in range(1, 513)]
    assert values == sorted(values) and values[-1] == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_of_n([], []), "0 values"),
        (lambda: best_of_n([0.1], ["a", "b"]), "1 values for 2 texts"),
        (lambda: best_of_n([0.1, math.nan], ["a", "b"]), "nan"),
        (lambda: majority_vote([], []), "0 values"),
        (lambda: weighted_vote([0], [0.1, 0.2], ["a", "b"]), "1 values for 2 texts"),
        (lambda: weighted_vote([0], [-0.1], ["a"]), "-0.1"),
        (lambda: weighted_vote([0], [math.nan], ["a"]), "nan"),
        (lambda: pass_at_n(4, 1, 5), "4.* n=5"),
        (lambda: pass_at_n(4, 5, 1), "5.* n=1"),
        (lambda: pass_at_n(4, 1, 0), "n=0"),
    ],
)
def test_faults(call, message):
    with pytest.raises(ValueError, match=message):
        call()
