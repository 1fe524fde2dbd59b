"""
Generate labelled solutions of synthetic arithmetic problems, to try the package without a dataset.

    python recipes/tiny/make_data.py --output world.jsonl
    trl-hrm build-stepwise world.jsonl --view hrm --output_dir data/world-hrm
"""

import argparse
import json
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl_hrm import StepTree


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON Lines file to write")
    parser.add_argument("--num_problems", type=int, default=300, help="number of problems")
    parser.add_argument("--num_solutions", type=int, default=8, help="number of solutions per problem")
    parser.add_argument(
        "--step_headers",
        action="store_true",
        help="write steps in the format of the policy of make_policy.py, to train reward models for it",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the problems and solutions")
    return parser


def main(args: argparse.Namespace) -> None:
    from trl_hrm.demo.world import step_trees

    with open(args.output, "w", encoding="utf-8") as file:
        for tree in step_trees(args.num_problems, args.num_solutions, args.seed):
            file.write(json.dumps((headed(tree) if args.step_headers else tree).to_row()) + "\n")
    print(f"Wrote {args.num_problems} problems to {args.output}.")


def headed(tree: "StepTree") -> "StepTree":
    """Return the tree with a header before each step, and each answer merged with the step before it."""
    from trl_hrm import StepTree
    from trl_hrm.demo.world import with_headers

    chains = []
    for answer in (i for i, text in enumerate(tree.completions) if text.startswith("# Answer")):
        path = tree.path(answer)
        texts = with_headers([tree.completions[i] for i in path])
        labels = [tree.labels[i] for i in [*path[:-2], answer]]
        chains.append(StepTree(tree.prompt, texts, labels, list(range(-1, len(texts) - 1))))
    return StepTree.from_chains(chains)[0]


if __name__ == "__main__":
    main(make_parser().parse_args())
