"""The command line of `trl-hrm best-of-n`, and which of its options go together."""

import argparse
from pathlib import Path

from ..scoring.aggregate import AGGREGATES
from .annotate import add_engine_arguments, add_problem_arguments, add_prompt_arguments, add_run_arguments
from .annotate_options import SEARCH_OPTIONS
from .build_options import unescape
from .score_options import add_score_arguments


STEP_OPTIONS = ("branching", "max_depth", "max_step_tokens")
STRATEGY_OPTIONS = {
    "best_of_n": ("candidates", "num_draws", "max_solution_tokens"),
    "step_search": (*STEP_OPTIONS[1:], "prefix_column"),
    "beam_search": (*STEP_OPTIONS, "prefix_column"),
    "diverse_tree_search": (*STEP_OPTIONS, "prefix_column"),
}
AGGREGATES_OF_SOLUTIONS = ["min", "last", "prod", "mean"]
OF_CANDIDATES = ("candidates_split", "candidates_columns", "join_steps", "keep_thinking")
OF_PROBLEMS = ("problem_format", "split", "limit", "exclude", "strict", "candidates_columns")
# of the prompt these say how any solution is read: the others are of sampling
_READING = ("segmentation", "step_pattern", "extractors")
NUMBERS = [1, 2, 4, 8, 16, 32, 64]
SAMPLES = "samples"  # the run folder of the policy's solutions, in the folder of the results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reward_model", required=True, help="folder or Hub id of the reward model (required)")
    parser.add_argument("--output_dir", default="outputs/best-of-n", help="folder of the results")
    _add_choice_arguments(parser.add_argument_group("choice"))
    _add_candidate_arguments(parser.add_argument_group("given candidates"))
    problem_group = parser.add_argument_group("problems")
    add_problem_arguments(
        problem_group,
        help="JSON Lines or JSON file, or directory or Hub name of a dataset, to sample solutions of; beside --candidates, for their "
        "reference answers",
    )
    problem_group.add_argument(
        "--prefix_column",
        metavar="NAME",
        help="column with the beginning of each solution, raw text up to the end of a step, from which step searches go on "
        "(default: none, they begin at the problem)",
    )
    add_engine_arguments(parser.add_argument_group("policy"), required=False, prefix="policy_")
    add_prompt_arguments(parser.add_argument_group("prompt and steps"), of_candidates=True)
    _add_sampling_arguments(parser.add_argument_group("sampling"))
    add_score_arguments(parser.add_argument_group("scores"))
    run_group = parser.add_argument_group("run")
    add_run_arguments(run_group)
    run_group.add_argument("--seed", type=int, default=42, help="seed of samples and draws")
    run_group.add_argument("--overwrite", action="store_true", help="replace results and parts of them")


def _add_choice_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--strategy",
        choices=list(STRATEGY_OPTIONS),
        default="best_of_n",
        help="best_of_n: among whole solutions, also by votes; the others choose among next steps: step_search greedily (what the "
        "HRM paper calls best-of-N), beam_search keeps several paths, diverse_tree_search (DVTS) searches in several trees",
    )
    group.add_argument(
        "--n",
        type=int,
        nargs="+",
        help="how many to choose from (default: 1 2 4 8 16 32 64; with --candidates, no more than every problem has)",
    )
    group.add_argument(
        "--aggregate",
        nargs="+",
        choices=AGGREGATES,
        help="how the scores of its steps become that of a solution; step searches take one, for paths (default: min last prod "
        "mean; for step searches last)",
    )
    group.add_argument(
        "--num_draws",
        type=int,
        metavar="R",
        help="average over the first N of R random orders of all candidates, for best_of_n (default: the first N as they come)",
    )


def _add_candidate_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--candidates",
        metavar="INPUT",
        help="choose among these instead of sampling: JSON Lines with `prompt`, `answer` and `completion` (a text), `completions` "
        "(its steps) or `candidates` (a list of either), or outputs of search-and-learn; the folder of a dataset with these "
        "columns; or a folder of trl-hrm annotate --search rollouts",
    )
    group.add_argument("--candidates_split", help="split of a dataset of candidates (default: train)")
    group.add_argument(
        "--candidates_columns",
        nargs="+",
        metavar="NAME=COLUMN",
        help="--columns of the candidates where --problems are given too, whose columns --columns then names",
    )
    group.add_argument(
        "--join_steps",
        type=unescape,
        metavar="TEXT",
        help=r"text between the steps of a list, in its text; \n and \t are read as newline and tab (default: \n\n)",
    )
    group.add_argument(
        "--keep_thinking",
        action="store_true",
        help="read the thinking of a reasoning model like the rest of a candidate, instead of leaving it out",
    )


def _add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max_solution_tokens", type=int, help="most tokens of a solution, for best_of_n (default: 2048)"
    )
    group.add_argument(
        "--max_depth", type=int, help="most steps of a solution, prefix included, for step searches (default: 40)"
    )
    group.add_argument("--max_step_tokens", type=int, help="most tokens of a step, for step searches (default: 512)")
    group.add_argument(
        "--branching",
        type=int,
        help="next steps of a path, for beam_search (N / branching paths) and diverse_tree_search (N / branching trees) (default: 4)",
    )


def check_options(args: argparse.Namespace) -> None:
    """
    Refuse options that contradict each other, or would do nothing.

    Raises:
        `ValueError`: The message names the option and what to do.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    def refuse(names, why: str) -> None:
        for name in names:
            if getattr(args, name) != parser.get_default(name):
                raise ValueError(f"--{name} {why} Leave it out.")

    if args.n is not None and min(args.n) < 1:
        raise ValueError(f"--n is {' '.join(map(str, args.n))}, expected numbers of 1 or more.")
    if args.num_draws is not None and args.num_draws < 1:
        raise ValueError(f"--num_draws is {args.num_draws}, expected 1 or more.")
    if args.strategy != "best_of_n" and args.aggregate and len(args.aggregate) > 1:
        raise ValueError(
            f"--aggregate is {' '.join(args.aggregate)}, and --strategy {args.strategy} takes one at a time."
        )
    own = STRATEGY_OPTIONS[args.strategy]
    for strategy, names in STRATEGY_OPTIONS.items():
        refuse((n for n in names if n not in own), f"goes with --strategy {strategy}, and it is {args.strategy}.")
    if (args.candidates is None) == (args.policy is None):
        raise ValueError(
            "give either --candidates, to choose among solutions that are there, or --policy and --problems, to sample them."
            if args.strategy == "best_of_n"
            else f"--strategy {args.strategy} needs --policy and --problems."
        )
    if args.policy is not None:
        refuse(OF_CANDIDATES, "goes with --candidates, and solutions are sampled with --policy.")
        if args.problems is None:
            raise ValueError("--policy needs --problems to solve.")
    else:
        refuse(sampling_options(), "goes with --policy, and with --candidates nothing is sampled.")
    if args.problems is None:
        refuse(OF_PROBLEMS, "goes with --problems.")


def sampling_options() -> list[str]:
    """Names of the options that only sampling has."""
    parser = argparse.ArgumentParser(add_help=False)
    add_engine_arguments(parser.add_argument_group(), required=False, prefix="policy_")
    add_prompt_arguments(parser.add_argument_group())
    names = [name for name in vars(parser.parse_args([])) if name not in _READING]
    return [*names, "max_solution_tokens", "max_in_flight", "max_open_problems"]


def policy_options(args: argparse.Namespace) -> argparse.Namespace:
    """The options of `trl-hrm annotate` that sample the largest N of whole solutions of each problem, and nothing else."""
    unused = {name: None for names in SEARCH_OPTIONS.values() for name in names}
    own = {name: getattr(args, f"policy_{name}") for name in ("revision", "dtype", "batch_size")}
    search = {
        "search": "rollouts",
        "num_solutions": max(args.n),
        "num_completions": 0,
        "max_sequences": max(args.n),
        "max_solution_tokens": args.max_solution_tokens,
        "root_filter": None,
        "output_dir": str(Path(args.output_dir) / SAMPLES),
    }
    return argparse.Namespace(**{**vars(args), **unused, **own, **search})
