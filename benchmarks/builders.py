"""
Speed and memory of the PRM800K builder: labelled steps per second and peak memory, for a file repeated 10 and 100 times.

```bash
python benchmarks/builders.py
```

Reads `prm800k/phase1_test.jsonl` from the folder `$TRL_HRM_SHARED_DATA`.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path

import psutil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_proc", type=int, default=2, help="number of processes of the builder (default: 2)")
    parser.add_argument(
        "--repeats",
        type=int,
        nargs="+",
        default=[10, 100],
        help="numbers of times to repeat the file (default: 10 100)",
    )
    parser.add_argument("--views", nargs="+", default=["tree", "hrm"], help="views to build (default: tree hrm)")
    args = parser.parse_args()

    names = ("datasets", "pyarrow", "huggingface_hub")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"python {platform.python_version()}, {versions}, {os.cpu_count()} cores, num_proc={args.num_proc}")
    shared = Path(os.environ.get("TRL_HRM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    text = (shared / "prm800k" / "phase1_test.jsonl").read_bytes()
    print(
        f"{'view':<6}{'repeats':>8}{'MB in':>8}{'labelled steps':>16}{'seconds':>9}{'steps/s':>10}{'peak RSS MB':>13}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for repeats in args.repeats:
            source = Path(folder, f"x{repeats}.jsonl")
            with open(source, "wb") as file:
                for _ in range(repeats):
                    file.write(text)
            for view in args.views:
                output = str(Path(folder, f"{view}-{repeats}"))
                steps, seconds, peak = measure_process(build, str(source), output, view, args.num_proc)
                print(
                    f"{view:<6}{repeats:>8}{repeats * len(text) / 1e6:>8.1f}{steps:>16,}{seconds:>9.2f}"
                    f"{steps / seconds:>10,.0f}{peak / 1e6:>13.0f}"
                )


def measure_process(target, *args) -> tuple:
    """
    Run `target(sender, *args)` in a new process. Return the values that it sends, followed by the peak resident memory of the process and
    its children.
    """
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, *args))
    process.start()
    peak = 0
    watched = psutil.Process(process.pid)
    while process.is_alive():
        peak = max(peak, resident(watched))
        time.sleep(0.02)
    if process.exitcode:
        raise SystemExit(f"{target.__name__} failed, see above")
    return *results.recv(), peak


def resident(process: psutil.Process) -> int:
    """Return the resident memory of the process and its children in bytes. Processes that have exited count as 0."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        return total
    return total


def build(sender, source: str, output_dir: str, view: str, num_proc: int) -> None:
    """Time one build. Send the number of labelled steps and the seconds."""
    import datasets

    from trl_hrm.data.build_config import BuildPRM800KConfig
    from trl_hrm.data.prm800k import build_prm800k

    datasets.disable_progress_bars()
    start = time.perf_counter()
    report = build_prm800k(BuildPRM800KConfig(inputs=[source], output_dir=output_dir, view=view, num_proc=num_proc))
    sender.send((report["labelled_steps"], time.perf_counter() - start))


if __name__ == "__main__":
    main()
