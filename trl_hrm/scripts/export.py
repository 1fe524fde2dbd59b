"""
Make a dataset of judged steps of searched trees. No policy is asked: labels, view and compression can be chosen anew.

```bash
trl-hrm export runs/mcts --labels soft --view hrm --hnc --output_dir data/gsm8k-hrm
trl-hrm export runs/mcts --labels entropy --eta 2 --view prm --output_dir data/gsm8k-prm
trl-hrm export runs/mcts --view sft --min_value 0.95 --top_k 4 --output_dir data/gsm8k-sft
trl-hrm export math-aps-tree.jsonl --format openr --output_dir data/math-aps
```
"""

import argparse

from .build_options import add_build_arguments, build_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="RUN",
        help="folders of trl-hrm annotate, or Parquet files of nodes from them; with --format openr, its JSON Lines files",
    )
    parser.add_argument("--format", choices=["run", "openr"], default="run", help="what the inputs are")
    add_build_arguments(parser, views=("tree", "hrm", "prm", "orm", "sft"), strict=False)
    _add_label_arguments(parser.add_argument_group("labels"))
    _add_hnc_arguments(parser.add_argument_group("node compression (HNC)"))


def _add_label_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--labels",
        choices=["soft", "hard", "entropy"],
        default="soft",
        help="the MC score; whether it is above 0; ER-PRM's map of it",
    )
    group.add_argument(
        "--eta",
        type=float,
        help="strength of the entropy regularisation, for --labels entropy; negative for completions of the optimal policy",
    )
    group.add_argument(
        "--estimator",
        choices=["child_mean", "leaf_share"],
        default="child_mean",
        help="MC score of a step: mean over its children, recursively; share of right leaves below it",
    )
    group.add_argument(
        "--truncated",
        choices=["drop", "wrong"],
        default="drop",
        help="what a solution without an answer is: unknown, or wrong",
    )
    group.add_argument(
        "--min_leaves", type=int, default=1, help="labels that rest on fewer leaves become context, never trained on"
    )
    group.add_argument(
        "--balance",
        type=int,
        metavar="BINS",
        help="make training labels of full bins context at random until all of so many bins of equal width hold about as "
        "many; label_weights has what undoes it (default: off)",
    )
    group.add_argument(
        "--min_score",
        "--min_value",
        type=float,
        default=0.0,
        help="least MC score of all judged steps of a solution, for --view sft",
    )
    group.add_argument(
        "--top_k",
        type=int,
        metavar="K",
        help="most solutions of a problem, those with the highest MC scores, for --view sft (default: all)",
    )


def _add_hnc_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hnc", action="store_true", help="add a row with merged nodes for every training problem")
    group.add_argument("--hnc_probability", type=float, default=0.5, help="chance of a node to lose a child")
    group.add_argument("--hnc_min_children", type=int, default=4, help="least number of children of such a node")
    group.add_argument("--hnc_passes", type=int, default=1, help="number of passes")
    group.add_argument("--hnc_seed", type=int, default=42, help="seed of the choice")


def run(args: argparse.Namespace) -> None:
    from ..data.export_config import ExportConfig
    from ..data.report import format_report
    from ..data.search_trees import build_search_trees

    config = build_config(args, ExportConfig)
    print(format_report(build_search_trees(args.inputs, config, args.format)))
