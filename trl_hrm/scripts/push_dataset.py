"""
Push built datasets to a repository on the Hub, each as a configuration.

```bash
trl-hrm push-dataset data/prm800k-hrm --repo_id me/prm800k --private --dry_run
trl-hrm push-dataset data/prm800k-tree data/prm800k-hrm --repo_id me/prm800k --private
```

The token is that of `hf auth login` or of HF_TOKEN. It is no option, since other users of a machine can see command lines.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="folders that build-prm800k, build-math-shepherd, build-stepwise, export or select-raft wrote",
    )
    parser.add_argument(
        "--repo_id",
        required=True,
        metavar="NAME",
        help="the repository, as in me/prm800k; it is created if it does not exist (required)",
    )
    parser.add_argument(
        "--private",
        action="store_const",
        const=True,
        help="create it as private, and refuse one that is public (default: as the Hub makes it, or as it is)",
    )
    parser.add_argument(
        "--config_name",
        metavar="NAME",
        help="name of the configuration, for a single folder (default: its view, as in hrm)",
    )
    parser.add_argument(
        "--revision", default="main", metavar="BRANCH", help="branch; it is created if it does not exist"
    )
    parser.add_argument(
        "--max_shard_size",
        default="500MB",
        metavar="SIZE",
        help="size above which the file of a split is cut into shards, at its row groups",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the files and the card that would be sent, without network, and send nothing",
    )


def run(args: argparse.Namespace) -> None:
    from ..data.publish import format_push, push_dataset

    push = push_dataset(
        args.folders,
        args.repo_id,
        config_name=args.config_name,
        private=args.private,
        revision=args.revision,
        max_shard_size=args.max_shard_size,
        dry_run=args.dry_run,
    )
    print(format_push(push))
