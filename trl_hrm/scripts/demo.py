"""
Both papers from end to end on a small world of arithmetic, without a network: a policy that errs and corrects itself, labels by tree
search, reward models, choices among N, self-training, and one page that says what was seen.

```bash
trl-hrm demo
trl-hrm demo --profile full --output_dir outputs/evidence
```

Killed at any moment, the same command goes on where it was.
"""

import argparse
from pathlib import Path

from .demo_profiles import PROFILES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default="outputs/demo", help="folder of everything that is made")
    parser.add_argument(
        "--profile",
        choices=list(PROFILES),
        default="quick",
        help="how much of it: minutes, or the evidence of docs/evidence.md in an hour or more",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the world and of the policy")
    parser.add_argument("--num_workers", type=int, help="jobs at a time (default: one for each core)")
    parser.add_argument("--force", action="store_true", help="do everything again")


def run(args: argparse.Namespace) -> None:
    import os
    import time
    from importlib.util import find_spec

    from .demo_report import collect
    from .demo_runner import Runner
    from .demo_stages import stages

    if find_spec("matplotlib") is None:
        raise ImportError('the report needs matplotlib: pip install "trl-hrm[plots]"')
    if args.num_workers is not None and args.num_workers < 1:
        raise ValueError(f"--num_workers is {args.num_workers}, expected 1 or more.")
    folder = Path(args.output_dir)
    _prepare(folder, {"profile": args.profile, "seed": args.seed}, args.force)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here
    profile = PROFILES[args.profile]
    with Runner(folder, args.num_workers or os.cpu_count() or 1) as runner:
        for stage in stages(profile, str(folder), args.seed):
            runner.run(stage)
    began = time.perf_counter()
    from ..demo.report import write_report
    from ..search.log import write_json

    data = collect(folder, profile, args, runner.costs)
    write_json(folder / "report.json", data)
    write_report(data, folder / "report.html")
    print(f"{'report':<16}{time.perf_counter() - began:>6.0f} s  {folder / 'report.html'}")
    print(f"{'total':<16}{data['total_seconds']:>6.0f} s")
    print(f"Next: open {folder / 'report.html'}; trl-hrm score --model {folder / 'models' / 'hrm-0'} --input FILE")


def _prepare(folder: Path, settings: dict, force: bool) -> None:
    """Begin a folder, or go on with it if it was begun with the same settings."""
    import json
    import shutil

    from .. import __version__
    from ..search.log import write_json

    mark = folder / ".done" / "demo.json"
    settings = {**settings, "trl_hrm": __version__}
    if mark.exists():
        found = json.loads(mark.read_text(encoding="utf-8"))
        if force:
            shutil.rmtree(folder)
        elif found != settings:
            raise ValueError(
                f"{folder}: made with {found}, and {settings} is asked for. Name another --output_dir, or pass --force to replace it."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds something that is no demo. Name another --output_dir.")
    mark.parent.mkdir(parents=True, exist_ok=True)
    write_json(mark, settings)
