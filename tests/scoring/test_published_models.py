"""Every published discriminative reward model: `StepScorer` gives the scores of the authors' loop, on tiny copies."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trl_hrm import StepFormat, StepScorer, StepTree
from trl_hrm.published_formats import PUBLISHED_FORMATS

from .published import KI, MARK, PUBLISHED, Published


PROBLEM = "What is 1+2, plus 3?"
SOLUTIONS = {
    "short": ("x + x - y?", [["- 3 + 4"], ["+"]]),
    "ragged": (PROBLEM, [["1+2 = 3."], ["1+2 = 3.", "3+3 = 6.", "So it is 6"], ["1+2 = 3.", "3+3 = 7."], ["Is it 5?"] * 6]),
    "latex": (
        r"Solve $\frac{x}{2} \le \sqrt{2}$ for $x$.",
        [[r"\[x \le 2\sqrt{2}\]", r"So $x - 1 \le 1.9$,", r"\boxed{2\sqrt 2}"], [r"Let $y = \frac{x}{2}$.", "It's $y_1 = 1$;"]],
    ),
    "chinese": ("小明有 3 个苹果，又买了 2 个。一共几个？", [["第一步：3 加 2。", "所以答案是 5。"], ["3+2=5，", "答案是 $5$"]]),
    "numbered": ("Add 2 to 3.", [["Step 1: so 2 + 3", "Step 2: thus 5."], ["Step 1:add", "then 5", "Step 3: x"], ["Step 12: x"]]),
    "lines": ("Two lines.\nWhat is x?", [["We have\nx = 2", "so\nx + 1 = 3."], ["We have\nx = 2", "- a\n- b"]]),
    "letters": ("Why?! 🙂", [["🙂...", "((x))", "café Ωmega", "ends with 123", "−1"], ["  two spaces", "a  b"]]),
}  # fmt: skip
TREE = StepTree(
    PROBLEM,
    ["1+2 = 3.", "3+3 = 6.", "3+3 = 7.", "So it is 6", "1+2 = 4.", "4+3 = 7.", "所以答案是 7。"],
    [None] * 7,
    [-1, 0, 0, 1, -1, 4, 5],
)

every = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[Published], str]:
    """Return the folder of a tiny copy, in a folder named as its repository."""
    root = tmp_path_factory.mktemp("published")

    def folder(published: Published) -> str:
        path = root / published.repository
        if not path.exists():
            published.save(path)
        return str(path)

    return folder


def scorer_of(published: Published, folder: str) -> StepScorer:
    """Load a copy without naming its format, unless this package does not list the model."""
    is_listed = published.repository in PUBLISHED_FORMATS[published.format_name][0]
    step_format = None if is_listed else StepFormat.published(published.format_name)
    return StepScorer.from_pretrained(folder, step_format=step_format)


@every
class TestScores:
    def test_the_loop(self, saved, published):
        """All solutions at once, so that they share prefixes and forward passes."""
        folder = saved(published)
        found = scorer_of(published, folder).score(
            [problem for problem, _ in SOLUTIONS.values()], [solutions for _, solutions in SOLUTIONS.values()]
        )
        for (problem, solutions), scores in zip(SOLUTIONS.values(), found, strict=True):
            expected = published.scores(folder, problem, solutions)
            assert list(map(len, scores)) == list(map(len, solutions))
            np.testing.assert_allclose(
                np.concatenate(scores), np.concatenate(expected), rtol=0, atol=1e-6, err_msg=problem
            )

    def test_scores_differ(self, saved, published):
        """Otherwise the other tests could not fail."""
        scores = published.scores(saved(published), *SOLUTIONS["ragged"])
        flat = np.unique(np.concatenate(scores[1:]).round(5))
        assert len(flat) == 3 + 2 + 6 - 1  # two solutions share their first step

    def test_two_runs(self, saved, published):
        problem, solutions = SOLUTIONS["ragged"]
        first, second = (scorer_of(published, saved(published)).score([problem], [solutions]) for _ in range(2))
        assert first == second

    def test_a_tree(self, saved, published):
        """Every path of a tree alone, in a forward pass of its own."""
        folder = saved(published)
        [found] = scorer_of(published, folder).score_trees([TREE])
        paths = [TREE.path(step) for step in range(len(TREE.completions))]
        solutions = [[TREE.completions[i] for i in path] for path in paths]
        expected = [scores[-1] for scores in published.scores(folder, TREE.prompt, solutions)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

    def test_pairs(self, saved, published):
        """`spans=(1, 2)`: the pair of a step and the previous one is a step of its own, at the place of the previous one."""
        folder, (problem, solutions) = saved(published), SOLUTIONS["ragged"]
        scorer = scorer_of(published, folder)
        [found] = scorer.score([problem], [solutions], spans=(1, 2))
        merge = scorer.step_format.merge
        for steps, scores in zip(solutions, found, strict=True):
            [single] = published.scores(folder, problem, [steps])
            merged = [[*steps[: i - 1], merge(steps[i - 1 : i + 1])] for i in range(1, len(steps))]
            pairs = [values[-1] for values in published.scores(folder, problem, merged)]
            expected = [single[0], *map(max, single[1:], pairs)]
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
