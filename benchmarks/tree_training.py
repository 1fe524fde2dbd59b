"""
Labelled steps per second in training: one forward pass per tree compared with one sequence per path, with the same steps and model.

    python benchmarks/tree_training.py --data path/to/prm800k/phase1_test.jsonl
    python benchmarks/tree_training.py --shape smollm2 --records 1 --max_labels 20 --rounds 1

Systems, each a real training run in a separate process. The systems alternate.

- `prm tree`, `hrm tree`: HRMRewardTrainer on step trees, with rows of `--max_length` tokens.
- `prm TRL 1.13`: TRL's last PRMTrainer on its own conversion of PRM800K (one row per root-to-leaf path).
- `hrm per label`: the same trainer on one row per labelled step, single and merged (`train_on_last_step_only`).
- `prm ceiling`, `hrm ceiling`: the number of tokens of the trees, as plain causal rows of `--max_length`.
- `prm ceiling short`, `hrm ceiling short`: the same tokens as plain causal rows of 512.

The rate is the number of distinct labelled steps divided by the time of `Trainer.train`, without set-up and a warm-up step. On a CPU, it is the CPU
time of one thread, so that other programs disturb it less. TRL 1.13 is installed in a temporary folder. "Tokens" counts all tokens that the
model computes, with padding. If the time only depended on this number, a tree would be faster by the ratio in the next column. With `--gpu`: the
shape of Qwen2.5-Math-1.5B with random weights, bf16, flex attention, wall time, and the share of the card's peak FLOPs.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import (
    add_model_options,
    card_peak,
    describe_shape,
    make_model,
    model_flops,
    now,
    num_compute_parameters,
    peak,
    run_worker,
    where_and_when,
)


SYSTEMS = [
    f"{view} {kind}"
    for view, kinds in (
        ("prm", ("tree", "TRL 1.13", "ceiling", "ceiling short")),
        ("hrm", ("tree", "per label", "ceiling", "ceiling short")),
    )
    for kind in kinds
]
SHORT = 512
WITH_OLD_TRL = ("prm TRL 1.13", "hrm per label")


def make_parser() -> argparse.ArgumentParser:
    shared = Path(os.environ.get("TRL_HRM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(shared / "prm800k" / "phase1_test.jsonl"), help="PRM800K file")
    parser.add_argument("--records", type=int, default=4, help="number of records to train on (default: 4)")
    parser.add_argument("--max_labels", type=int, help="only records with at most this number of labelled steps")
    parser.add_argument("--rounds", type=int, default=3, help="runs per system (default: 3)")
    parser.add_argument("--max_length", type=int, default=4096, help="number of tokens per row (default: 4096)")
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing records (default: 0)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="systems to run (default: all)")
    parser.add_argument(
        "--trl_1_13",
        help="folder with TRL 1.13, from `pip install --no-deps --target FOLDER trl==1.13.0` (default: installed to a temporary folder)",
    )
    add_model_options(parser)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    return parser


# Preparation, shared by all systems


def prepare(args: argparse.Namespace, work: Path) -> dict:
    """Write the trees, the tokenizer and TRL 1.13 to `work`. Return counts of steps and tokens."""
    from datasets import load_dataset

    from trl_hrm import StepFormat, hrm_view
    from trl_hrm.data.build_config import BuildPRM800KConfig
    from trl_hrm.data.prm800k import build_prm800k
    from trl_hrm.step_tree import StepTree
    from trl_hrm.tiny_model import make_tokenizer, texts_of
    from trl_hrm.trainer.forest_dataset import ForestBuilder

    build_prm800k(BuildPRM800KConfig(inputs=args.data, output_dir=str(work / "data"), test_size=0))
    dataset = load_dataset(str(work / "data"), cache_dir=str(work / "cache"))["train"]
    tokenizer = make_tokenizer(
        (text for row in dataset for text in texts_of([row["prompt"], row["completions"]])), 8192
    )
    tokenizer.save_pretrained(work / "tokenizer")
    counts = [len(row["labels"]) - row["labels"].count(None) for row in dataset]
    fitting = [i for i, count in enumerate(counts) if args.max_labels is None or count <= args.max_labels]
    if not fitting:
        raise ValueError(f"No record has at most {args.max_labels} labelled steps. The smallest has {min(counts)}.")
    chosen = sorted(random.Random(args.seed).sample(fitting, min(args.records, len(fitting))))
    columns = ("prompt", "completions", "labels", "parents")
    trees = [StepTree.from_row({name: dataset[i][name] for name in columns}) for i in chosen]
    facts = {"labels of the whole file": sum(counts)}
    for view, view_trees in (("prm", trees), ("hrm", [hrm_view(tree) for tree in trees])):
        (work / f"{view}.jsonl").write_text("".join(json.dumps(tree.to_row()) + "\n" for tree in view_trees))
        rows, report = ForestBuilder(tokenizer, StepFormat(), args.max_length)(read_rows(work, view), view)
        if report.labels_too_long or report.labels_joined:
            raise ValueError(f"{view}: labelled steps are too long for --max_length, or were joined: {report}")
        facts[view] = {
            "labels": report.labels_kept,
            "rows": len(rows),
            "tokens": sum(len(ids) for ids in rows["input_ids"]),
            "distinct tokens": report.tokens,
            "tokens of one row per label": report.tokens_unshared,
        }
    if args.trl_1_13 is None and set(args.systems) & set(WITH_OLD_TRL):
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(work / "trl"), "trl==1.13.0"],
            check=True,
        )
    (work / "facts.json").write_text(json.dumps(facts))
    return facts


def read_rows(work: Path, view: str):
    from datasets import Dataset

    return Dataset.from_list([json.loads(line) for line in open(work / f"{view}.jsonl")])


# Workers: one system in one process


def worker(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    work = Path(args.work)
    view, kind = args.worker.split(" ", 1)
    facts = json.loads((work / "facts.json").read_text())[view]
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    if not args.gpu:
        torch.set_num_threads(1)
    model = make_model(args.shape, len(tokenizer), hidden_size=args.hidden_size, num_layers=args.num_layers)
    if args.gpu:
        model = model.to(torch.bfloat16).cuda()
    settings = {
        "output_dir": str(work / "out"),
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "use_cpu": not args.gpu,
        "bf16": args.gpu,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    make = {"tree": tree_trainer, "TRL 1.13": trl_trainer, "per label": trl_trainer}.get(kind, causal_trainer)
    trainer = make(args, settings, model, tokenizer, work, view)
    warm_up = torch.randint(2, min(1000, len(tokenizer)), (1, SHORT), device=model.device)
    model(warm_up, use_cache=False).logits.float().sum().backward()
    model.zero_grad()
    if args.gpu:
        trainer.train()  # compiles the kernels for all rows
    num_tokens = 0

    def count(module, positional, keywords):
        nonlocal num_tokens
        num_tokens += (keywords["input_ids"] if "input_ids" in keywords else positional[0]).numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    start = now(args.gpu)
    trainer.train()
    seconds = now(args.gpu) - start
    facts = {
        "seconds": seconds,
        "rate": facts["labels"] / seconds,
        "memory": peak(args.gpu) / 2**20,
        "tokens": num_tokens,
    }
    flops = model_flops(num_compute_parameters(model), num_tokens, training=True)
    print(json.dumps(facts | {"flops": flops, "model": describe_shape(args.shape, model)}))


def tree_trainer(args, settings, model, tokenizer, work, view):
    from trl_hrm import HRMRewardConfig, HRMRewardTrainer

    if args.gpu:
        model.set_attn_implementation("flex_attention")
    config = HRMRewardConfig(
        **settings,
        per_device_train_batch_size=1,
        max_length=args.max_length,
        pad_to_multiple_of=128 if args.gpu else None,
    )
    return HRMRewardTrainer(model, config, train_dataset=read_rows(work, view), processing_class=tokenizer)


def trl_trainer(args, settings, model, tokenizer, work, view):
    """Return TRL 1.13's trainer on root-to-leaf paths with all labels (prm), or on one row per label (hrm)."""
    from datasets import Dataset
    from trl.experimental.prm import PRMConfig, PRMTrainer

    from trl_hrm.step_tree import StepTree

    trees = [StepTree.from_row(row) for row in read_rows(work, view)]
    if view == "prm":
        rows = [chain.to_row() for tree in trees for chain in tree.chains()]
    else:
        rows = [
            tree.take(tree.path(i)).to_row()
            for tree in trees
            for i, label in enumerate(tree.labels)
            if label is not None
        ]
    rows = [
        {
            "prompt": row["prompt"],
            "completions": row["completions"],
            "labels": [bool(label) for label in row["labels"]],  # TRL does not support steps without a label
        }
        for row in rows
    ]
    config = PRMConfig(
        **settings,
        per_device_train_batch_size=8,
        max_length=args.max_length,
        step_separator="\n\n",
        train_on_last_step_only=view == "hrm",
    )
    return PRMTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def causal_trainer(args, settings, model, tokenizer, work, view):
    """Return a trainer on the same number of tokens as the trees, without a mask, with one label at the end of each row."""
    import torch
    from transformers import Trainer, TrainingArguments

    length = SHORT if "short" in args.worker else args.max_length
    facts = json.loads((work / "facts.json").read_text())[view]
    ids = torch.randint(2, min(1000, len(tokenizer)), (-(-facts["tokens"] // length), length))
    last = facts["tokens"] - (len(ids) - 1) * length
    rows = [row[:last] if i == len(ids) - 1 else row for i, row in enumerate(ids)]
    rows = [{"input_ids": row, "labels": torch.tensor([-100] * (len(row) - 1) + [1])} for row in rows]

    def collate(examples):
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([example["input_ids"] for example in examples], batch_first=True),
            "labels": pad([example["labels"] for example in examples], batch_first=True, padding_value=-100),
        }

    model.config.use_cache = False
    arguments = TrainingArguments(**settings, per_device_train_batch_size=args.max_length // length)
    return Trainer(model, arguments, train_dataset=rows, data_collator=collate)


# Driver


def run_system(system: str, args: argparse.Namespace, work: Path) -> dict:
    environment = {"CI": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4") if args.gpu else "1"}
    if system in WITH_OLD_TRL:
        paths = [args.trl_1_13 or str(work / "trl"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    options = {
        name: value for name, value in vars(args).items() if name not in ("systems", "gpu", "worker", "work", "json")
    }
    words = [f"--{name}={value}" for name, value in options.items() if value is not None] + ["--gpu"] * args.gpu
    return run_worker(__file__, [*words, f"--worker={system}", f"--work={work}"], environment)


def main() -> None:
    args = make_parser().parse_args()
    args.shape = args.shape or ("qwen2.5-math-1.5b" if args.gpu else "tiny")
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        facts = prepare(args, Path(folder))
        results = {system: [] for system in args.systems}
        for number in range(args.rounds):
            for system in args.systems:
                results[system].append(run_system(system, args, Path(folder)))
                seconds = results[system][-1]["seconds"]
                print(f"round {number + 1}/{args.rounds}  {system:<18} {seconds:8.1f} s", file=sys.stderr, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(report(args, facts, results))


def report(args: argparse.Namespace, facts: dict, results: dict[str, list[dict]]) -> str:
    rates = {system: statistics.median(run["rate"] for run in runs) for system, runs in results.items()}
    lines = [
        f"{args.records} records of {Path(args.data).name}, {args.rounds} rounds, rows of {args.max_length} tokens."
    ]
    lines[0] += f" The whole file has {facts['labels of the whole file']:,} labelled steps."
    lines += [f"{view}: " + ", ".join(f"{n:,} {name}" for name, n in facts[view].items()) for view in ("prm", "hrm")]
    at_peak = card_peak(args)
    lines += [
        "",
        "| system | labelled steps/s (median; all) | tree is faster by | tokens | tokens, relative to the tree | tokens/s | peak memory, MiB |"
        + " of the card's peak FLOPs |" * bool(at_peak),
        "|---|---|---|---|---|---|---|" + "---|" * bool(at_peak),
    ]
    for system, runs in results.items():
        tree = f"{system[:3]} tree"
        is_compared = tree in rates and system != tree
        ratio = f"{rates[tree] / rates[system]:.2f}×" if is_compared else ""
        more = f"{runs[0]['tokens'] / results[tree][0]['tokens']:.2f}×" if is_compared else ""
        every = ", ".join(f"{run['rate']:.1f}" for run in runs)
        memory = statistics.median(run["memory"] for run in runs)
        seconds = statistics.median(run["seconds"] for run in runs)
        lines.append(
            f"| {system} | {rates[system]:.1f} ({every}) | {ratio} | {runs[0]['tokens']:,} | {more} | {runs[0]['tokens'] / seconds:,.0f} "
            f"| {memory:,.0f} |" + (f" {runs[0]['flops'] / seconds / at_peak:.1%} |" if at_peak else "")
        )
    versions = where_and_when(("torch", "transformers", "trl", "accelerate", "datasets"), args.gpu)
    model = next(iter(results.values()))[0]["model"]
    peer = " Peer: trl 1.13.0." if set(results) & set(WITH_OLD_TRL) else ""
    return "\n".join([*lines, "", f"{model}, {'bf16' if args.gpu else 'fp32'}.{peer} {versions}"])


if __name__ == "__main__":
    main()
