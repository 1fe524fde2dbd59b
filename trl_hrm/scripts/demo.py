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
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from .demo_profiles import PROFILES


MARK = ".trl-hrm-demo.json"  # what the folder was begun with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default="outputs/demo", help="folder of everything that is made")
    parser.add_argument(
        "--profile",
        choices=list(PROFILES),
        default="quick",
        help="how much of it: minutes, or the evidence of docs/evidence.md in an hour",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the world and of the policy")
    parser.add_argument("--num_workers", type=int, help="jobs at a time (default: one for each core)")
    parser.add_argument("--force", action="store_true", help="do everything again")


def run(args: argparse.Namespace) -> None:
    from importlib.util import find_spec

    from .demo_runner import Runner
    from .demo_stages import stages

    if find_spec("matplotlib") is None:
        raise ImportError('the report needs matplotlib: pip install "trl-hrm[plots]"')
    if args.num_workers is not None and args.num_workers < 1:
        raise ValueError(f"--num_workers is {args.num_workers}, expected 1 or more.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here
    settings = {"profile": args.profile, "seed": args.seed, "output_dir": args.output_dir, "trl_hrm": __version__}
    with begun(Path(args.output_dir), settings, args.force):
        with Runner(Path(args.output_dir), args.num_workers or _num_cores()) as runner:
            for stage in stages(PROFILES[args.profile], args.output_dir, args.seed):
                runner.run(stage)
        _report(args, runner.costs)


def _report(args: argparse.Namespace, costs: list[dict[str, Any]]) -> None:
    import time

    from ..demo.report import write_report
    from ..io import write_json
    from .demo_report import collect

    began, folder = time.perf_counter(), Path(args.output_dir)
    data = collect(folder, PROFILES[args.profile], args, costs)
    write_json(folder / "report.json", data)
    write_report(data, folder / "report.html")
    seconds = time.perf_counter() - began
    print(f"{'report':<16}{seconds:>6.0f} s  {folder / 'report.html'}")
    print(f"{'total':<16}{data['total_seconds'] + seconds:>6.0f} s")
    print(f"Next: open {folder / 'report.html'}; trl-hrm score --model {folder / 'models' / 'hrm-0'} --input FILE")


@contextlib.contextmanager
def begun(folder: Path, settings: dict[str, Any], force: bool = False) -> Iterator[None]:
    """
    A folder that is begun, or gone on with if it was begun with the same settings, and that no other demo works in meanwhile.

    Raises:
        `ValueError`: If it holds something else, was begun with other settings, or another demo works in it.
    """
    others = [path for path in folder.iterdir() if path.name != MARK] if folder.exists() else []
    if others and not (folder / MARK).exists():
        raise ValueError(f"{folder}: holds something that is no demo. Name another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / MARK, "a+", encoding="utf-8") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another demo works in it. Wait for it, or name another --output_dir."
            ) from None
        mark.seek(0)
        found = json.loads(mark.read() or "null")
        if found not in (None, settings) and not force:
            raise ValueError(
                f"{folder}: made with {found}, and {settings} is asked for. Name another --output_dir, or pass --force to replace it."
            )
        if force:
            for path in others:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if found != settings:
            mark.truncate(0)
            mark.write(json.dumps(settings))
            mark.flush()
        yield


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
