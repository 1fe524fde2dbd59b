"""
Speed and memory of `trl-hrm export`: node compression, labels and the HRM view of full trees with 5 children and depth 5.

```bash
python benchmarks/export.py
```

The trees are synthetic, with 3905 nodes each and about 100 characters per step. The HRM paper reports 30 minutes of CPU time for node
compression.
"""

import argparse
import multiprocessing
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from builders import measure_process
from common import version_words


CHILDREN, DEPTH = 5, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_proc", type=int, default=2, help="number of processes of the export (default: 2)")
    parser.add_argument("--trees", type=int, nargs="+", default=[200, 800], help="numbers of trees (default: 200 800)")
    args = parser.parse_args()

    names = ("datasets", "pyarrow")
    versions = version_words(names)
    print(f"python {platform.python_version()}, {versions}, {os.cpu_count()} cores, num_proc={args.num_proc}")
    print(
        f"{'trees':>6}  {'options':<42}{'labelled steps':>15}{'seconds':>9}{'CPU s':>8}{'nodes/s':>10}{'peak RSS MB':>13}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for number in args.trees:
            source = str(Path(folder, f"nodes-{number}.parquet"))
            in_process(write_trees, source, number)
            for options in (
                {"view": "hrm", "hnc": True},
                {"view": "hrm", "hnc": True, "labels": "entropy", "eta": 2.0},
                {"view": "tree"},
            ):
                output = str(Path(folder, "dataset"))
                steps, seconds, cpu, peak, _ = measure_process(export, source, output, options, args.num_proc)
                shown = " ".join(f"{name}={value}" for name, value in options.items())
                nodes = number * sum(CHILDREN**depth for depth in range(1, DEPTH + 1))
                print(
                    f"{number:>6}  {shown:<42}{steps:>15,}{seconds:>9.1f}{cpu:>8.1f}{nodes / seconds:>10,.0f}{peak / 1e6:>13.0f}"
                )


def in_process(function, *args) -> None:
    """Run a function in a new process, so that its memory does not count towards the measurements."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed, see above")


def write_trees(path: str, number: int) -> None:
    """Write `number` full trees to a node file."""
    from trl_hrm.search.nodes import write_nodes

    write_nodes(make_trees(number), path)


def make_trees(number: int) -> Iterator:
    """Yield full trees. The probability that a leaf is right is random per tree."""
    from trl_hrm.search.tree import Node, Problem, SearchTree, make_id

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    for i in range(number):
        skill = rng.random()
        tree = SearchTree(Problem(f"{i}", f"Problem {i}: {' '.join(rng.choices(words, k=40))}?", "7"), status="done")
        level = [(-1, f"p{i}")]
        for depth in range(1, DEPTH + 1):
            below = []
            for parent, above in level:
                for child in range(CHILDREN):
                    is_final = depth == DEPTH
                    text = f"{' '.join(rng.choices(words, k=15))}.\n\n" + ("" if is_final else f"# Step {depth + 1}")
                    node = Node(make_id(above, 0, child), parent, child, 0, rng.choices(range(150000), k=25), text)
                    if is_final:
                        node.is_final, node.finish, node.answer = True, "eos", "7"
                        node.correct = rng.random() < skill
                    else:
                        node.tail = len("# Step 2")
                    below.append((len(tree.nodes), node.node_id))
                    tree.nodes.append(node)
            level = below
        yield tree


def export(sender, source: str, output_dir: str, options: dict, num_proc: int) -> None:
    """Time one export. Send the number of labelled steps, the seconds, and the CPU seconds of all processes."""
    import datasets

    from trl_hrm.data.export import export as export_trees
    from trl_hrm.data.export_config import ExportConfig

    datasets.disable_progress_bars()
    start = time.perf_counter()
    config = ExportConfig(inputs=source, output_dir=output_dir, num_proc=num_proc, overwrite=True, **options)
    report = export_trees(config)
    seconds = time.perf_counter() - start
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    sender.send((report["labelled_steps"], seconds, sum(part.ru_utime + part.ru_stime for part in usage)))


if __name__ == "__main__":
    main()
