"""
A small world of arithmetic whose solutions err and correct themselves, with a checker that labels every step.

A problem is a start value and operations modulo 5, each with the operand 2 or 3:

    Start with 4. a+3 b*2 c-3 d*3. Work modulo 5.

A step applies one operation to the running value. A *slip* copies the running value wrongly and then calculates
rightly; a *correction* takes the last operation again with the right value:

    a:4+3=2         right
    b:1*2=2         slip: the running value is 2
    Wait,b:2*2=4    correction

A step is labelled correct when the running value is right after it, so a correction is correct and what is built on an
uncorrected slip is not. The texts have no spaces: a slip is then five tokens away from the value it should have copied,
which a model of three layers learns to see from scratch in a minute.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..step_tree import StepTree


MODULUS = 5
NAMES = "abcd"


@dataclass(frozen=True)
class Problem:
    """A start value and operations: pairs of an operator in `+-*` and an operand."""

    start: int
    operations: tuple[tuple[str, int], ...]

    def text(self) -> str:
        operations = " ".join(
            f"{name}{op}{operand}" for name, (op, operand) in zip(NAMES, self.operations, strict=True)
        )
        return f"Start with {self.start}. {operations}. Work modulo {MODULUS}."

    def apply(self, value: int, i: int) -> int:
        """The value after operation `i`."""
        op, operand = self.operations[i]
        return {"+": value + operand, "-": value - operand, "*": value * operand}[op] % MODULUS

    def values(self) -> list[int]:
        """The right running values: the start, then one after each operation."""
        values = [self.start]
        for i in range(len(self.operations)):
            values.append(self.apply(values[-1], i))
        return values

    def step(self, i: int, value: int, correction: bool = False) -> str:
        """Text of operation `i` applied to `value`."""
        op, operand = self.operations[i]
        prefix = "Wait," if correction else ""
        return f"{prefix}{NAMES[i]}:{value}{op}{operand}={self.apply(value, i)}"


def make_problem(rng: random.Random) -> Problem:
    """A random problem with four operations."""
    operations = tuple((rng.choice("+-*"), rng.choice((2, 3))) for _ in NAMES)
    return Problem(rng.randrange(MODULUS), operations)


def solve(
    problem: Problem, rng: random.Random, slip_rate: float = 0.25, correction_rate: float = 0.5
) -> tuple[list[str], list[float]]:
    """
    One solution with its labels.

    Args:
        problem (`Problem`):
            The problem.
        rng (`random.Random`):
            Source of randomness.
        slip_rate (`float`, *optional*, defaults to `0.25`):
            Probability that an operation copies a wrong running value.
        correction_rate (`float`, *optional*, defaults to `0.5`):
            Probability that a slip is corrected by the next step.

    Returns:
        `tuple[list[str], list[float]]`: Steps, the last of which is the answer, and labels, 0 or 1.
    """
    right = problem.values()
    value, steps, labels = problem.start, [], []
    for i in range(len(problem.operations)):
        seen = value
        if rng.random() < slip_rate:
            seen = rng.choice([other for other in range(MODULUS) if other != value])
        steps.append(problem.step(i, seen))
        labels.append(float(problem.apply(seen, i) == right[i + 1]))
        if seen != value and rng.random() < correction_rate:
            steps.append(problem.step(i, value, correction=True))
            labels.append(float(problem.apply(value, i) == right[i + 1]))
            seen = value
        value = problem.apply(seen, i)
    steps.append(f"# Answer\n\n{value}")
    labels.append(float(value == right[-1]))
    return steps, labels


def with_headers(solution: Sequence[str]) -> list[str]:
    """The steps of a solution as the tiny policy writes them: each with a header, and the answer in one step with the last."""
    *steps, answer = solution
    headed = [f"# Step {k}\n{step}" for k, step in enumerate(steps, start=1)]
    headed[-1] += f"\n\n{answer}\n# END!"
    return headed


def step_trees(num_problems: int, num_solutions: int, seed: int) -> list[StepTree]:
    """
    Trees of judged solutions, one per problem, all problems different.

    Args:
        num_problems (`int`):
            Number of trees.
        num_solutions (`int`):
            Solutions of each problem; equal beginnings become one.
        seed (`int`):
            Seed: the same one gives the same trees.
    """
    rng = random.Random(seed)
    problems: dict[Problem, None] = {}
    while len(problems) < num_problems:
        problems[make_problem(rng)] = None
    trees = []
    for problem in problems:
        chains = []
        for _ in range(num_solutions):
            steps, labels = solve(problem, rng)
            chains.append(StepTree(problem.text(), steps, labels, list(range(-1, len(steps) - 1))))
        trees.append(StepTree.from_chains(chains)[0])
    return trees
