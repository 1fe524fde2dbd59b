"""
Choose the best of several solutions of each problem with a step reward model, for fine-tuning on them (RAFT).

```bash
trl-hrm select-raft --candidates samples.jsonl --reward_model outputs/tiny-hrm --aggregate min --output_dir data/raft
trl-hrm select-raft --candidates runs/mcts --reward_model outputs/tiny-hrm --num_candidates 16 --output_dir data/raft
```
"""

import argparse

from ..data.raft_config import AGGREGATES
from ..search.steps import RULES
from .build_options import add_output_arguments, build_config, unescape
from .score_options import add_score_arguments, describe_scoring, load_scorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--candidates",
        required=True,
        metavar="INPUT",
        help="JSON Lines with `prompt` and `completion` (a text), `completions` (its steps) or `candidates` (a list of "
        "either), or outputs of search-and-learn; the folder of a dataset with these columns; or a folder of trl-hrm annotate, "
        "for all its finished solutions (required)",
    )
    parser.add_argument("--reward_model", required=True, help="folder or Hub id of the reward model (required)")
    parser.add_argument(
        "--output_dir",
        required=True,
        help="directory to create, with one Parquet file per split, a dataset card, build_report.json and scores.png "
        "(required)",
    )
    _add_choice_arguments(parser.add_argument_group("choice"))
    _add_candidate_arguments(parser.add_argument_group("candidates"))
    add_score_arguments(parser.add_argument_group("scores"))
    add_output_arguments(parser.add_argument_group("output"))


def _add_choice_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--aggregate", choices=AGGREGATES, default="min", help="how the scores of its steps become that of a candidate"
    )
    group.add_argument(
        "--num_candidates", type=int, metavar="N", help="use the first N candidates of each problem (default: all)"
    )
    group.add_argument("--top_k", type=int, default=1, metavar="K", help="most candidates of a problem to keep")
    group.add_argument("--min_score", type=float, default=0.0, help="least score of a candidate to keep")


def _add_candidate_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--split", help="split of a dataset (default: train)")
    group.add_argument(
        "--segmentation",
        choices=[*RULES, "regex"],
        help="where the steps of a text end; those of lists are known (default: step_header; of a run, as in its search)",
    )
    group.add_argument("--step_pattern", help="regular expression whose matches end steps, for --segmentation regex")
    group.add_argument(
        "--join_steps",
        type=unescape,
        metavar="TEXT",
        help=r"text between the steps of a list, in the completion; \n and \t are read as newline and tab (default: \n\n)",
    )

    group.add_argument(
        "--keep_thinking",
        action="store_true",
        help="judge the thinking of a reasoning model like the rest of a candidate, instead of leaving it out",
    )


def run(args: argparse.Namespace) -> None:
    from collections import Counter
    from pathlib import Path

    from ..data.candidates import read_candidates, source_warnings, unused_warnings
    from ..data.output import check_output
    from ..data.raft import build_raft, format_scores, shortlist
    from ..data.raft_config import RaftConfig
    from ..data.report import format_report
    from ..data.score_picture import new_figure
    from ..data.solutions import solution_warnings
    from ..scoring.candidate_scores import score_candidates

    config = build_config(args, RaftConfig)
    check_output(Path(config.output_dir), config)
    new_figure()  # what is missing shows before the long part
    counts = Counter()
    groups = shortlist(read_candidates(config, counts), config, counts)
    notes = {key[1]: count for key, count in counts.items() if key[0] == "notes"}
    warnings = [*source_warnings(config), *solution_warnings(notes), *unused_warnings(counts)]
    scorer = load_scorer(args.reward_model, args)
    scores = score_candidates(
        scorer,
        [group.problem for group in groups],
        [group.steps for group in groups],
        config.aggregate,
        spans=args.spans,
        combine=args.combine,
        progress=True,
    )
    judge = {"reward_model": args.reward_model, **describe_scoring(args)}
    report = build_raft(groups, scores, config, counts, judge, warnings)
    print(format_report(report))
    print(f"mean score: {format_scores(report)}. The picture: {Path(config.output_dir, report['picture']['file'])}")
