"""
Speed and memory of the PRM800K builder: labelled steps per second and peak memory, for a file repeated 10 and 100 times.

```bash
python benchmarks/builders.py
python benchmarks/builders.py --full --num_proc 1
```

With `--full`: the builders of labelled steps and the preparation of a training, at the size of the largest public datasets. These are Math-Shepherd (445,000
solutions, here each of another problem) as JSON Lines, compressed and as a JSON array, PRM800K's phase 2 (1.0 GB), and a mixture of both.

Reads `prm800k/phase1_test.jsonl` from the folder `$TRL_HRM_SHARED_DATA`.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path

import psutil
from common import version_words


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
    parser.add_argument("--full", action="store_true", help="measure all builders at the size of the largest datasets")
    parser.add_argument("--rows", type=int, default=445_000, help="solutions of --full (default: 445000)")
    parser.add_argument(
        "--cases", nargs="+", help="words in the names of the cases of --full to measure (default: all)"
    )
    parser.add_argument(
        "--folder", default=None, help="folder for the files of --full, about 6 GB (default: a temporary one)"
    )
    args = parser.parse_args()

    names = ("datasets", "pyarrow", "huggingface_hub")
    versions = version_words(names)
    print(f"python {platform.python_version()}, {versions}, {os.cpu_count()} cores, num_proc={args.num_proc}")
    shared = Path(os.environ.get("TRL_HRM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    text = (shared / "prm800k" / "phase1_test.jsonl").read_bytes()
    if args.full:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            measure_full(Path(folder), args.rows, text, args.num_proc, args.cases)
        return
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
                steps, seconds, peak, _ = measure_process(build, str(source), output, view, args.num_proc)
                print(
                    f"{view:<6}{repeats:>8}{repeats * len(text) / 1e6:>8.1f}{steps:>16,}{seconds:>9.2f}"
                    f"{steps / seconds:>10,.0f}{peak / 1e6:>13.0f}"
                )


def measure_full(folder: Path, num_rows: int, prm800k: bytes, num_proc: int, words: list[str] | None) -> None:
    """Measure the builders and the preparation of a training. PRM800K is repeated to 1.0 GB for 445,000 rows."""
    files = {name: folder / name for name in ("shepherd.jsonl", "shepherd.jsonl.gz", "stepwise.json", "prm800k.jsonl")}
    built = {name: folder / name for name in ("shepherd", "flat", "gz", "array", "prm800k", "mixture")}
    cases = [  # name, builder, inputs, output and options
        ("math-shepherd tree", "math_shepherd", [files["shepherd.jsonl"]], built["shepherd"], {"view": "tree"}),
        ("math-shepherd prm", "math_shepherd", [files["shepherd.jsonl"]], built["flat"], {"view": "prm"}),
        ("math-shepherd gz hrm", "math_shepherd", [files["shepherd.jsonl.gz"]], built["gz"], {"view": "hrm"}),
        ("array tree", "stepwise", [files["stepwise.json"]], built["array"], {"view": "tree"}),
        ("prm800k tree", "prm800k", [files["prm800k.jsonl"]], built["prm800k"], {"view": "tree"}),
        (
            "mixture 1 : 1 tree",
            "stepwise",
            [built["shepherd"], built["prm800k"]],
            built["mixture"],
            {"view": "tree", "weights": [1.0, 1.0]},
        ),
        ("training on shepherd", None, [built["shepherd"]], folder / "cache", {}),
        ("training on prm800k", None, [built["prm800k"]], folder / "cache", {}),
    ]
    print(
        f"{'case':<24}{'rows':>9}{'MB in':>8}{'labelled steps':>16}{'seconds':>9}{'peak RSS MB':>13}{'not mapped MB':>15}",
        flush=True,
    )
    for name, builder, inputs, output, options in cases:
        if words is not None and not any(word in name for word in words):
            continue
        for path in inputs:
            if path in files.values() and not path.exists():
                write_input(path, num_rows, prm800k)
        paths = [str(path) for path in inputs]
        if builder is None:
            rows, steps, seconds, *peaks = measure_process(prepare, paths[0], str(output), num_proc)
        else:
            rows, steps, seconds, *peaks = measure_process(build_one, builder, paths, str(output), num_proc, options)
        sizes = [part.stat().st_size for path in inputs for part in [path, *path.rglob("*.parquet")] if part.is_file()]
        print(
            f"{name:<24}{rows:>9,}{sum(sizes) / 1e6:>8.0f}{steps:>16,}{seconds:>9.0f}{peaks[0] / 1e6:>13.0f}{peaks[1] / 1e6:>15.0f}",
            flush=True,
        )


def write_input(path: Path, num_rows: int, prm800k: bytes) -> None:
    """Write one of the files of [`measure_full`]."""
    if path.name.startswith("prm800k"):
        with open(path, "wb") as file:
            for _ in range(max(round(num_rows / 445_000 * 1e9 / len(prm800k)), 1)):
                file.write(prm800k)
        return
    is_array = path.suffix == ".json"
    opened = gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else open(path, "w")
    with opened as file:
        for i in range(num_rows):
            row = json.dumps(stepwise_row(i) if is_array else shepherd_row(i))
            file.write(("[" if i == 0 else ",") + row if is_array else row + "\n")
        file.write("]" if is_array else "")


def solution(i: int) -> tuple[str, list[str]]:
    """Return a problem of the length of those of Math-Shepherd, and six steps."""
    problem = (
        f"A shop sells {i} notebooks in the first week. In the second week it sells twice as many notebooks, and in the third week 12 "
        "fewer than in the second one. Each notebook costs 3 dollars. How much money does the shop take in these three weeks?"
    )
    steps = [
        f"Step 1: In the second week, the shop sells 2 * {i} = <<2*{i}={2 * i}>>{2 * i} notebooks.",
        f"Step 2: In the third week, it sells {2 * i} - 12 = <<{2 * i}-12={2 * i - 12}>>{2 * i - 12} notebooks.",
        f"Step 3: In the first two weeks, it sells {i} + {2 * i} = <<{i}+{2 * i}={3 * i}>>{3 * i} notebooks.",
        f"Step 4: In all three weeks, it sells {3 * i} + {2 * i - 12} = <<{3 * i}+{2 * i - 12}={5 * i - 12}>>{5 * i - 12} notebooks.",
        f"Step 5: It takes {5 * i - 12} * 3 = <<{5 * i - 12}*3={15 * i - 36}>>{15 * i - 36} dollars for them.",
        f"Step 6: So the shop takes {15 * i - 36} dollars in these three weeks. The answer is: {15 * i - 36}",
    ]
    return problem, steps


def shepherd_row(i: int) -> dict[str, str]:
    """Return a record of Math-Shepherd."""
    problem, steps = solution(i)
    labels = ["+" if j < i % 7 else "-" for j in range(6)]
    return {
        "input": problem + " " + "\n".join(f"{step} ки" for step in steps),
        "label": problem + " " + "\n".join(f"{step} {label}" for step, label in zip(steps, labels, strict=True)),
        "task": "GSM8K",
    }


def stepwise_row(i: int) -> dict:
    """Return a row in TRL's stepwise supervision format."""
    problem, steps = solution(i)
    return {"prompt": problem, "completions": steps, "labels": [j < i % 7 for j in range(6)]}


def measure_process(target, *args) -> tuple:
    """
    Run `target(sender, *args)` in a new process. Return the values that it sends, followed by the peak resident memory of the process and
    its children, and by the peak of the part that is not of mapped files.
    """
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, *args))
    process.start()
    peak = private = 0
    watched = psutil.Process(process.pid)
    while process.is_alive():
        total, mapped = resident(watched)
        peak, private = max(peak, total), max(private, total - mapped)
        time.sleep(0.2)  # listing the processes takes milliseconds
    if process.exitcode:
        raise SystemExit(f"{target.__name__} failed, see above")
    return *results.recv(), peak, private


def resident(process: psutil.Process) -> tuple[int, int]:
    """
    Return the resident memory of the process and its children in bytes, and the part of it that is shared, such as the pages of mapped
    files (0 where the system does not tell). Processes that have exited count as 0.
    """
    total = shared = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            memory = member.memory_info()
            total, shared = total + memory.rss, shared + getattr(memory, "shared", 0)
    except psutil.NoSuchProcess:
        pass
    return total, shared


def build_one(sender, builder: str, inputs: list[str], output_dir: str, num_proc: int, options: dict) -> None:
    """Time one build. Send the number of records, of labelled steps, and the seconds."""
    import datasets

    import trl_hrm

    datasets.disable_progress_bars()
    function, config = {
        "math_shepherd": (trl_hrm.build_math_shepherd, trl_hrm.BuildMathShepherdConfig),
        "prm800k": (trl_hrm.build_prm800k, trl_hrm.BuildPRM800KConfig),
        "stepwise": (trl_hrm.build_stepwise, trl_hrm.BuildStepwiseConfig),
    }[builder]
    start = time.perf_counter()
    report = function(config(inputs=inputs, output_dir=output_dir, num_proc=num_proc, test_size=0.0, **options))
    sender.send((report["records_in"], report["labelled_steps"], time.perf_counter() - start))


def prepare(sender, folder: str, cache: str, num_proc: int) -> None:
    """Time the preparation of a training with a small tokenizer. Send the number of rows, of labels, and the seconds."""
    import datasets

    from trl_hrm import StepFormat
    from trl_hrm.tiny_model import make_tokenizer
    from trl_hrm.trainer.forest_dataset import ForestBuilder

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(folder, split="train", cache_dir=cache)
    tokenizer = make_tokenizer([" ".join(solution(i)[1]) for i in range(1000)], vocab_size=1000)
    start = time.perf_counter()
    _, report = ForestBuilder(tokenizer, StepFormat(), max_length=2048)(rows, "train_dataset", num_proc)
    sender.send((len(rows), report.labels_kept, time.perf_counter() - start))


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
