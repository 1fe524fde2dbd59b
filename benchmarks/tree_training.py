"""
Labelled steps per second in training: one forward pass per tree compared with one sequence per path, with the same steps and model.

    python benchmarks/tree_training.py --data path/to/prm800k/phase1_test.jsonl

Systems, each a real training run in a separate process. The systems alternate.

- `prm tree`, `hrm tree`: HRMRewardTrainer on step trees, with rows of `--max_length` tokens.
- `prm TRL 1.13`: TRL's last PRMTrainer on its own conversion of PRM800K (one row per root-to-leaf path).
- `hrm per label`: the same trainer on one row per labelled step, single and merged (`train_on_last_step_only`).
- `prm ceiling`, `hrm ceiling`: the number of tokens of the trees, as plain causal rows of `--max_length`.
- `prm ceiling short`, `hrm ceiling short`: the same tokens as plain causal rows of 512.

The rate is the number of distinct labelled steps divided by the wall time of `Trainer.train`, without set-up and a warm-up step. TRL 1.13 is
installed in a temporary folder. With `--gpu`: the shape of Qwen2.5-Math-1.5B with random weights, bf16, flex attention.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


SYSTEMS = [
    f"{view} {kind}"
    for view, kinds in (
        ("prm", ("tree", "TRL 1.13", "ceiling", "ceiling short")),
        ("hrm", ("tree", "per label", "ceiling", "ceiling short")),
    )
    for kind in kinds
]
SHORT = 512


def make_parser() -> argparse.ArgumentParser:
    shared = Path(os.environ.get("TRL_HRM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(shared / "prm800k" / "phase1_test.jsonl"), help="PRM800K file")
    parser.add_argument("--records", type=int, default=4, help="number of records to train on (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="runs per system (default: 3)")
    parser.add_argument("--max_length", type=int, default=4096, help="number of tokens per row (default: 4096)")
    parser.add_argument("--hidden_size", type=int, default=384, help="hidden size of the CPU model (default: 384)")
    parser.add_argument("--num_layers", type=int, default=4, help="number of layers of the CPU model (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing records (default: 0)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="systems to run (default: all)")
    parser.add_argument("--gpu", action="store_true", help="Qwen2.5-Math-1.5B shape, bf16, flex attention")
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
    chosen = sorted(random.Random(args.seed).sample(range(len(dataset)), min(args.records, len(dataset))))
    columns = ("prompt", "completions", "labels", "parents")
    whole = sum(len(row["labels"]) - row["labels"].count(None) for row in dataset)
    trees = [StepTree.from_row({name: dataset[i][name] for name in columns}) for i in chosen]
    facts = {"labels of the whole file": whole}
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
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(work / "trl"), "trl==1.13.0"],
        check=True,
    )
    (work / "facts.json").write_text(json.dumps(facts))
    return facts


def read_rows(work: Path, view: str):
    from datasets import Dataset

    return Dataset.from_list([json.loads(line) for line in open(work / f"{view}.jsonl")])


def make_model(args: argparse.Namespace, vocab_size: int):
    import torch
    from transformers import Qwen2Config, Qwen2ForTokenClassification, set_seed

    set_seed(0)
    if args.gpu:
        config = Qwen2Config(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            num_labels=2,
        )
        return Qwen2ForTokenClassification(config).to(torch.bfloat16).cuda()
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=max(1, args.hidden_size // 256),
        max_position_embeddings=8192,
        num_labels=2,
    )
    return Qwen2ForTokenClassification(config)


# Workers: one system in one process


def worker(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    work = Path(args.work)
    view, kind = args.worker.split(" ", 1)
    facts = json.loads((work / "facts.json").read_text())[view]
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    model = make_model(args, len(tokenizer))
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
    warm_up = torch.randint(2, 1000, (1, SHORT), device=model.device)
    model(warm_up, use_cache=False).logits.float().sum().backward()
    model.zero_grad()
    start = time.perf_counter()
    trainer.train()
    if args.gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "rate": facts["labels"] / seconds, "memory": peak_memory(args.gpu)}))


def peak_memory(gpu: bool) -> float:
    """Return the peak GPU or resident memory of this process in MiB."""
    import resource

    import torch

    if gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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
    ids = torch.randint(2, 1000, (-(-facts["tokens"] // length), length))
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


def run_worker(system: str, work: Path) -> dict:
    environment = dict(os.environ, HF_HUB_OFFLINE="1", CI="1")
    if system in ("prm TRL 1.13", "hrm per label"):
        environment["PYTHONPATH"] = str(work / "trl")
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", system, "--work", str(work)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{system} failed:\n{result.stdout}\n{result.stderr}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
    args = make_parser().parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        facts = prepare(args, Path(folder))
        results = {system: [] for system in args.systems}
        for number in range(args.rounds):
            for system in args.systems:
                results[system].append(run_worker(system, Path(folder)))
                seconds = results[system][-1]["seconds"]
                print(f"round {number + 1}/{args.rounds}  {system:<18} {seconds:8.1f} s", file=sys.stderr, flush=True)
    print(report(args, facts, results))


def report(args: argparse.Namespace, facts: dict, results: dict[str, list[dict]]) -> str:
    rates = {system: statistics.median(run["rate"] for run in runs) for system, runs in results.items()}
    lines = [
        f"{args.records} records of {Path(args.data).name}, {args.rounds} rounds, rows of {args.max_length} tokens."
    ]
    lines[0] += f" The whole file has {facts['labels of the whole file']:,} labelled steps."
    lines += [f"{view}: " + ", ".join(f"{n:,} {name}" for name, n in facts[view].items()) for view in ("prm", "hrm")]
    lines += [
        "",
        "| system | labelled steps/s (median; all) | peak memory, MiB | tree is faster by |",
        "|---|---|---|---|",
    ]
    for system, runs in results.items():
        tree = f"{system[:3]} tree"
        ratio = f"{rates[tree] / rates[system]:.2f}×" if tree in rates and system != tree else ""
        every = ", ".join(f"{run['rate']:.1f}" for run in runs)
        memory = statistics.median(run["memory"] for run in runs)
        lines.append(f"| {system} | {rates[system]:.1f} ({every}) | {memory:,.0f} | {ratio} |")
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "trl", "accelerate", "datasets")
    )
    cores = len(os.sched_getaffinity(0))
    lines += [
        "",
        f"{time.strftime('%Y-%m-%d')}; {versions}, peer trl 1.13.0; Python {platform.python_version()}, {cores} cores.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
