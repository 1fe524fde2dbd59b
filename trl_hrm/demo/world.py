"""
Synthetic arithmetic problems ("the world"), solutions with mistakes and corrections, and a checker that labels every step.

A problem has a start value and four operations modulo 5, each with the operand 2 or 3:

    Start with 4. a+3 b*2 c-3 d*3. Work modulo 5.

A step applies one operation to the running value. A *slip* is a mistake: it copies the running value wrongly and then calculates
correctly. A *correction* repeats the last operation with the right value:

    a:4+3=2         right
    b:1*2=2         slip: the running value is 2
    Wait,b:2*2=4    correction

Steps are labelled by one of two rules. With *state* labels, a step is right if the running value is right after it. A correction is
right, and steps that build on an uncorrected slip are wrong. With *sticky* (first-error) labels, all steps after the first error are
wrong, including corrections. But a correction merged with the error that it corrects is right.

The texts have no spaces, so that a slip is only five tokens away from the value that it should have copied. A model with three layers
learns to detect this from scratch in a minute.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.hierarchy import hrm_view
from ..io import shown
from ..step_tree import StepTree


MODULUS = 5
NAMES = "abcd"
SIGHT = 5  # minimum ratio of corrected slips to corrected right steps, as rates, for a policy that detects its slips
STEP = re.compile(r"(Wait,)?([a-d]):(\d)([-+*])(\d)=(\d)")
ANSWER = re.compile(r"# Answer\n(\d)")


@dataclass(frozen=True)
class Problem:
    """A start value and operations, each an operator in `+-*` and an operand."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> "Problem":
        """
        Parse the text of a problem, as returned by [`Problem.text`].

        Raises:
            `ValueError`: If the text is not a problem.
        """
        start = re.match(r"Start with (\d)\. ", text)
        operations = tuple((op, int(operand)) for op, operand in re.findall(r"[a-d]([-+*])(\d)", text))
        problem = start and cls(int(start[1]), operations)
        if not problem or len(operations) != len(NAMES) or problem.text() != text:
            raise ValueError(
                f"{shown(text)} is not a valid problem. Expected a text such as 'Start with 4. a+3 b*2 c-3 d*3. Work modulo {MODULUS}.'"
            )
        return problem

    def text(self) -> str:
        operations = " ".join(
            f"{name}{op}{operand}" for name, (op, operand) in zip(NAMES, self.operations, strict=True)
        )
        return f"Start with {self.start}. {operations}. Work modulo {MODULUS}."

    def apply(self, value: int, i: int) -> int:
        """Return the value after operation `i`."""
        op, operand = self.operations[i]
        return {"+": value + operand, "-": value - operand, "*": value * operand}[op] % MODULUS

    def values(self) -> list[int]:
        """Return the right running values: the start value, then one after each operation."""
        values = [self.start]
        for i in range(len(self.operations)):
            values.append(self.apply(values[-1], i))
        return values

    def step(self, i: int, value: int, correction: bool = False) -> str:
        """Return the text of operation `i` applied to `value`."""
        op, operand = self.operations[i]
        prefix = "Wait," if correction else ""
        return f"{prefix}{NAMES[i]}:{value}{op}{operand}={self.apply(value, i)}"


def make_problem(rng: random.Random) -> Problem:
    """Return a random problem with four operations."""
    operations = tuple((rng.choice("+-*"), rng.choice((2, 3))) for _ in NAMES)
    return Problem(rng.randrange(MODULUS), operations)


def different_problems(rng: random.Random, number: int) -> list[Problem]:
    """Return `number` distinct random problems."""
    problems: dict[Problem, None] = {}
    while len(problems) < number:
        problems[make_problem(rng)] = None
    return list(problems)


def solve(
    problem: Problem, rng: random.Random, slip_rate: float = 0.25, correction_rate: float = 0.5, skew: float = 1.0
) -> tuple[list[str], list[float]]:
    """
    Return a random solution and its state labels.

    Args:
        problem (`Problem`):
            Problem to solve.
        rng (`random.Random`):
            Source of randomness.
        slip_rate (`float`, *optional*, defaults to `0.25`):
            Probability that an operation copies a wrong running value.
        correction_rate (`float`, *optional*, defaults to `0.5`):
            Probability that a slip is corrected by the next step.
        skew (`float`, *optional*, defaults to `1.0`):
            Ratio between the probabilities of a wrong value and the next larger one.

    Returns:
        `tuple[list[str], list[float]]`: Steps, with the answer last, and labels, 0 or 1.
    """
    right = problem.values()
    value, steps, labels = problem.start, [], []
    for i in range(len(problem.operations)):
        seen = value
        if rng.random() < slip_rate:
            others = [other for other in range(MODULUS) if other != value]
            seen = rng.choices(others, [skew**-other for other in others])[0]
        steps.append(problem.step(i, seen))
        labels.append(float(problem.apply(seen, i) == right[i + 1]))
        if seen != value and rng.random() < correction_rate:
            steps.append(problem.step(i, value, correction=True))
            labels.append(float(problem.apply(value, i) == right[i + 1]))
            seen = value
        value = problem.apply(seen, i)
    steps.append(f"# Answer\n{value}")
    labels.append(float(value == right[-1]))
    return steps, labels


@dataclass(frozen=True)
class Judged:
    """
    Verdict of the checker on a step.

    Args:
        on_track (`bool`):
            Whether the running value is right after the step. For the answer, whether it is right.
        kind (`str`):
            `"right"`: on track, like the step before. `"first_error"`: wrong after a step that was on track. `"correction"`: corrects an
            error. `"locally_right"`: continues correctly from a wrong value. `"new_error"`: continues incorrectly from a wrong value, or
            is not a valid step. `"lucky"`: on track again without a correction. `"answer"`: the answer.
    """

    on_track: bool
    kind: str


def judge(problem: Problem, steps: Sequence[str]) -> list[Judged]:
    """Return the verdict on each step of a solution or of its beginning. Only uses the texts."""
    right, value, on_track, judged = problem.values(), problem.start, True, []
    for text in steps:
        if found := ANSWER.fullmatch(text):
            judged.append(Judged(int(found[1]) == right[-1], "answer"))
            continue
        found = STEP.fullmatch(text)
        place = NAMES.index(found[2]) if found else -1
        # The step applies its operation and calculates correctly, but possibly with a wrong value
        is_operation = (
            bool(found)
            and problem.operations[place] == (found[4], int(found[5]))
            and problem.apply(int(found[3]), place) == int(found[6])
        )
        was_on_track, on_track = on_track, is_operation and int(found[6]) == right[place + 1]
        follows = is_operation and not found[1] and int(found[3]) == value
        judged.append(Judged(on_track, _kind(was_on_track, on_track, follows, bool(found and found[1]))))
        value = int(found[6]) if found else value
    return judged


def _kind(was_on_track: bool, on_track: bool, follows: bool, is_correction: bool) -> str:
    if was_on_track:
        return "right" if on_track else "first_error"
    if on_track:
        return "correction" if is_correction else "lucky"
    return "locally_right" if follows else "new_error"


def with_headers(solution: Sequence[str]) -> list[str]:
    """
    Return the steps of a solution in the format of the tiny policy and of the HRM paper's prompts. Each step has a header, and the answer
    is part of the last step, after a blank line.
    """
    *steps, answer = solution
    headed = [f"# Step {k}\n{step}" for k, step in enumerate(steps, start=1)]
    headed[-1] += "\n\n" + answer.replace("\n", "\n\n") + "\n# END!"
    return headed


def step_trees(num_problems: int, num_solutions: int, seed: int) -> list[StepTree]:
    """
    Return trees of labelled solutions, one per distinct problem.

    Args:
        num_problems (`int`):
            Number of trees.
        num_solutions (`int`):
            Number of solutions per problem. Equal beginnings are merged.
        seed (`int`):
            Random seed.
    """
    rng = random.Random(seed)
    return [solution_tree(problem, num_solutions, rng) for problem in different_problems(rng, num_problems)]


def solution_tree(problem: Problem, num_solutions: int, rng: random.Random) -> StepTree:
    """Return random solutions of a problem as a tree with state labels."""
    chains = []
    for _ in range(num_solutions):
        steps, labels = solve(problem, rng)
        chains.append(StepTree(problem.text(), steps, labels, list(range(-1, len(steps) - 1))))
    return StepTree.from_chains(chains)[0]


def sticky(tree: StepTree, merged: bool = False) -> StepTree:
    """
    Return a tree with sticky labels: all steps after the first error are wrong.

    Args:
        tree ([`StepTree`]):
            Tree of single steps of one problem.
        merged (`bool`, *optional*, defaults to `False`):
            Whether to add pairs of consecutive steps. A pair is right if the value is right after it and no error came before it.
    """
    problem = Problem.parse(tree.prompt)
    judged = [judge(problem, [tree.completions[i] for i in tree.path(step)]) for step in range(len(tree.labels))]
    single = [float(all(step.on_track for step in steps)) for steps in judged]
    alone = StepTree(tree.prompt, tree.completions, single, tree.parents)
    if not merged:
        return alone
    pairs = [float(steps[-1].on_track and all(step.on_track for step in steps[:-2])) for steps in judged]
    both = hrm_view(StepTree(tree.prompt, tree.completions, pairs, tree.parents))
    both.labels[: len(single)] = single
    return both
