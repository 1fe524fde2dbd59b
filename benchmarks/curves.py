"""
Precision of the curves over N: estimates from all subsets compared with the first N samples, and coverage of the 95 % intervals.

    python benchmarks/curves.py

Problems, samples and scores are simulated, so the true accuracy is known up to 0.1 points. A reward model scores right samples higher than
most wrong ones, but 5 % of the wrong samples are traps with the highest scores. Two tables are printed:

- Standard deviation of the accuracy over repeated evaluations, for new samples of the same problems and for new problems.
- Share of evaluations whose interval contains the true accuracy, for an accuracy and for the loss between two N. The populations differ in
  how difficult their problems are. `few easy` is the hardest case: 3 % of the problems are solved by every sample, and the others by one in
  1,000, so that most evaluations with few problems see one easy problem or none.
"""

import argparse
from collections.abc import Callable

import numpy as np

from trl_hrm.evaluation.curves import ScoredProblem, make_curves
from trl_hrm.evaluation.selection import best_of_n, majority_vote, subset_weights
from trl_hrm.intervals import difference_interval, mean_interval


POPULATIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "hard to easy": lambda rng, size: rng.beta(1, 2, size),
    "all or nothing": lambda rng, size: rng.beta(0.2, 0.2, size),
    "mostly hard": lambda rng, size: rng.beta(0.1, 2, size),
    "few easy": lambda rng, size: np.where(rng.random(size) < 0.03, 1.0, 0.001),
}
TRAPS = 0.05
NUM_TRUE = 200_000  # number of problems for the true accuracy


def main() -> None:
    args = make_parser().parse_args()
    rng = np.random.default_rng(args.seed)
    print_deviations(args, rng)
    print_coverage(args, rng)


def sample(rng: np.random.Generator, rates: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each of `size` samples of each problem is right, and its score. Shape `(P, size)` each."""
    right = rng.random((len(rates), size)) < rates[:, None]
    scores = np.where(right, rng.uniform(0.3, 0.9, right.shape), rng.uniform(0.0, 0.6, right.shape))
    return right, np.where(~right & (rng.random(right.shape) < TRAPS), rng.uniform(0.95, 1.0, right.shape), scores)


def accuracies(right: np.ndarray, scores: np.ndarray, n: list[int]) -> np.ndarray:
    """Return the best-of-N accuracy of each problem over all subsets. Shape `(P, len(n))`."""
    size = right.shape[1]
    ordered = np.take_along_axis(right, np.argsort(-scores, axis=1), axis=1)
    return ordered @ subset_weights(size, n).T * n / size


def true_accuracy(rng: np.random.Generator, rates: Callable, size: int, n: list[int]) -> np.ndarray:
    """Return the accuracy at each N over many problems, in blocks to limit memory."""
    blocks = [accuracies(*sample(rng, rates(rng, 20_000), size), n).mean(axis=0) for _ in range(NUM_TRUE // 20_000)]
    return np.mean(blocks, axis=0)


def print_deviations(args: argparse.Namespace, rng: np.random.Generator) -> None:
    rates, n = POPULATIONS["hard to easy"], args.n
    fixed = rates(rng, args.num_problems)
    found = {"samples": [], "problems": []}
    for _ in range(args.num_runs):
        found["samples"].append(estimates(rng, fixed, args))
        found["problems"].append(estimates(rng, rates(rng, args.num_problems), args))
    truth = true_accuracy(rng, rates, args.num_samples, n)
    print(
        f"{args.num_problems} problems with {args.num_samples} samples, {args.num_runs} evaluations. Standard deviations in points:\n\n"
        "| method | N | true accuracy | mean of the first N | mean of all subsets | new samples: first N | all subsets | "
        "new problems: first N | all subsets |\n|---|---|---|---|---|---|---|---|---|"
    )
    deviations = {key: np.std(values, axis=0) for key, values in found.items()}  # (method, estimate, N)
    means = np.mean(found["problems"], axis=0)
    for row, method in enumerate(("best-of-N", "majority vote")):
        for place, number in enumerate(n):
            cells = [f"{truth[place]:.1%}" if row == 0 else "", *(f"{value:.1%}" for value in means[row, :, place])]
            cells += [f"{100 * value:.2f}" for key in found for value in deviations[key][row, :, place]]
            print(f"| {method} | {number} | {' | '.join(cells)} |")


def estimates(rng: np.random.Generator, rates: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Return the accuracies of one evaluation, from the first N samples and from all subsets. Shape `(2, 2, len(n))`."""
    right, scores = sample(rng, rates, args.num_samples)
    classes = np.where(right, 0, rng.integers(1, 5, right.shape))
    ranks = np.argsort(rng.random(right.shape), axis=1)
    first = np.zeros((2, len(args.n)))
    for place, number in enumerate(args.n):
        for i in range(len(rates)):
            first[0, place] += right[i, best_of_n(scores[i, :number].tolist(), ranks[i, :number].tolist())]
            first[1, place] += right[i, majority_vote(classes[i, :number].tolist(), ranks[i, :number].tolist())]
    problems = [
        ScoredProblem(str(i), classes[i].tolist(), right[i].tolist(), {"min": scores[i].tolist()}, ranks[i].tolist())
        for i in range(len(rates))
    ]
    curves = make_curves(problems, args.n, args.num_draws, int(rng.integers(2**31))).curves
    every = [[point["accuracy"] for point in curves[name]] for name in ("best_of_n/min", "majority_vote")]
    return np.stack([first / len(rates), np.array(every)], axis=1)


def print_coverage(args: argparse.Namespace, rng: np.random.Generator) -> None:
    n = [1, 8, args.num_samples]
    head = [
        *(f"accuracy at N = {number}" for number in n),
        *(f"loss from N = {number} to {n[-1]}" for number in n[:-1]),
    ]
    print(
        f"\nCoverage of the 95 % intervals and their mean width in points, {args.num_intervals:,} evaluations:\n\n"
        f"| problems | population | {' | '.join(head)} |\n|---|---|{'---|' * len(head)}"
    )
    for name, rates in POPULATIONS.items():
        truth = true_accuracy(rng, rates, args.num_samples, n)
        for num_problems in args.interval_problems:
            covered, widths = np.zeros(len(head)), np.zeros(len(head))
            for _ in range(args.num_intervals):
                values = accuracies(*sample(rng, rates(rng, num_problems), args.num_samples), n)
                cases = [(mean_interval(values[:, i]), truth[i]) for i in range(len(n))]
                cases += [
                    (difference_interval(values[:, i] - values[:, -1]), truth[i] - truth[-1])
                    for i in range(len(n) - 1)
                ]
                covered += [low <= value <= high for (low, high), value in cases]
                widths += [high - low for (low, high), _ in cases]
            cells = [
                f"{share / args.num_intervals:.1%} ({100 * width / args.num_intervals:.1f})"
                for share, width in zip(covered, widths, strict=True)
            ]
            print(f"| {num_problems} | {name} | {' | '.join(cells)} |")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_problems", type=int, default=40, help="Problems of an evaluation (default: 40).")
    parser.add_argument("--num_samples", type=int, default=64, help="Samples of a problem (default: 64).")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 4, 16, 64], help="Values of N (default: 1 4 16 64).")
    parser.add_argument("--num_draws", type=int, default=200, help="Random subsets for votes (default: 200).")
    parser.add_argument("--num_runs", type=int, default=200, help="Evaluations for deviations (default: 200).")
    parser.add_argument("--num_intervals", type=int, default=1000, help="Evaluations for coverage (default: 1000).")
    parser.add_argument(
        "--interval_problems", type=int, nargs="+", default=[40, 200], help="Problems for coverage (default: 40 200)."
    )
    parser.add_argument("--seed", type=int, default=42, help="Random seed (default: 42).")
    return parser


if __name__ == "__main__":
    main()
