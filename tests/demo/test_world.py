"""The labels of the arithmetic world, recomputed from the texts alone."""

import random
import re
from collections import Counter

import pytest

from trl_hrm.demo.world import MODULUS, Problem, different_problems, judge, solve, step_trees, sticky
from trl_hrm.step_tree import StepTree


def labels_from_text(prompt: str, steps: list[str]) -> list[float]:
    """Compute the right running values from the prompt. A step is right if it ends with the value expected there."""
    value = int(re.match(r"Start with (\d+)", prompt)[1])
    due = {}
    for name, op, operand in re.findall(r"([a-d])([-+*])(\d)", prompt):
        value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[op] % MODULUS
        due[name] = value
    labels = []
    for step in steps:
        answer = re.fullmatch(r"# Answer\n(\d+)", step)
        found = answer[1] if answer else step.split("=")[1]
        name = "d" if answer else step.removeprefix("Wait,")[0]
        labels.append(float(int(found) == due[name]))
    return labels


def test_labels():
    """A label that follows the mistake instead of the value would call an uncorrected error right."""
    trees = step_trees(50, 8, seed=1)
    chains = [chain for tree in trees for chain in tree.chains()]
    for chain in chains:
        assert chain.labels == labels_from_text(chain.prompt, chain.completions)
    corrections = [
        label for c in chains for text, label in zip(c.completions, c.labels, strict=True) if "Wait" in text
    ]
    assert 0 < sum(corrections) < len(corrections)  # taking back one mistake after another mistake is not right
    assert 0.3 < sum(map(sum, (c.labels for c in chains))) / sum(len(c.labels) for c in chains) < 0.9


def test_seed():
    rows = [[tree.to_row() for tree in step_trees(10, 4, seed)] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert len({row["prompt"] for row in rows[0]}) == 10


PROBLEM = Problem.parse("Start with 4. a+3 b*2 c-3 d*3. Work modulo 5.")


def test_problems_read_back():
    problems = different_problems(random.Random(3), 200)
    assert [Problem.parse(problem.text()) for problem in problems] == problems and len(set(problems)) == 200
    for text in ("What is 1 + 1?", "Start with 4. a+3 b*2 c-3. Work modulo 5.", PROBLEM.text() + " "):
        with pytest.raises(ValueError, match="valid problem"):
            Problem.parse(text)


@pytest.mark.parametrize(
    ("steps", "kinds"),
    [
        (["a:4+3=2", "b:2*2=4", "c:4-3=1", "d:1*3=3", "# Answer\n3"], ["right"] * 4 + ["answer"]),
        (["a:4+3=2", "b:1*2=2", "Wait,b:2*2=4"], ["right", "first_error", "correction"]),
        (["a:4+3=2", "b:1*2=2", "c:2-3=4", "d:1*3=3"], ["right", "first_error", "locally_right", "lucky"]),
        (["a:3+3=1", "b:0*2=0", "Wait,b:1*2=2"], ["first_error", "new_error", "new_error"]),
        (["a:4+3=3", "b:2*3=1", "hm"], ["first_error", "new_error", "new_error"]),
        (["a:4+3=2", "Wait,a:4+3=2"], ["right", "right"]),
    ],
)
def test_kinds_of_steps(steps, kinds):
    """The demo's tables depend on these kinds: a correction that corrects nothing must not count as one."""
    assert [step.kind for step in judge(PROBLEM, steps)] == kinds


def test_kinds_agree_with_labels():
    """The checker reads texts and the generator knows what it did. They must agree."""
    for tree in step_trees(40, 8, seed=5):
        problem = Problem.parse(tree.prompt)
        for chain in tree.chains():
            judged = judge(problem, chain.completions)
            assert [float(step.on_track) for step in judged] == chain.labels


def test_sticky_labels():
    """A labeller that stops at the first error calls a correction wrong alone, and right if merged with the error it takes back."""
    steps = ["a:4+3=2", "b:1*2=2", "Wait,b:2*2=4", "c:4-3=1"]
    tree = StepTree(PROBLEM.text(), steps, [None] * 4, [-1, 0, 1, 2])
    assert sticky(tree).labels == [1, 0, 0, 0]
    both = sticky(tree, merged=True)
    assert both.labels[:4] == [1, 0, 0, 0] and both.num_merged == [1, 1, 1, 1, 2, 2, 2]
    pairs = dict(zip(both.completions[4:], both.labels[4:], strict=True))
    assert pairs == {"\n".join(steps[:2]): 0, "\n".join(steps[1:3]): 1, "\n".join(steps[2:]): 0}
    assert both.parents[4:] == [-1, 0, 1]


def test_skewed_slips():
    """Each wrong value is four times as likely as the next larger one, and the right value never occurs."""
    rng, seen = random.Random(0), Counter()
    for _ in range(3000):
        steps, labels = solve(PROBLEM, rng, 1.0, 0.0, skew=4.0)
        seen[steps[0][2]] += 1
    assert list(seen) and seen.keys() == set("0123")
    assert 3 < seen["0"] / seen["1"] < 5 and 3 < seen["1"] / seen["2"] < 5.5
