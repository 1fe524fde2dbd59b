"""
What a tree saves as it grows: time and memory of a training step and of scoring, for a tree and for one sequence per path.

    python benchmarks/tree_scaling.py
    python benchmarks/tree_scaling.py --cases "long 8,000" "long 32,000" --hidden_size 256

Cases of random tokens, each with a problem of 200 tokens and steps of 30 tokens:

- `best of N`: N solutions of 9 steps that share only the problem.
- `search, depth D`: D steps in a row, with 3 more alternatives for each, as in PRM800K. Paths end at each alternative.
- `full, branching B`: B children for each step, to depth 3.
- `long T`: a tree of T tokens, as in thinking traces: a trace of T/2 tokens, and 4 more endings of T/8 tokens each, after 1/8, 3/8, 5/8 and 7/8 of it.

A tree is read in rows of `--max_length` tokens, long trees in one row, with gradient checkpointing for long trees, as in HRMRewardTrainer. Paths
are read in batches of up to 8 sequences and `--max_length` tokens, without padding where their lengths are equal. Both give the same scores,
which are compared first. The training step is one forward and backward pass over all labelled steps, without an optimizer.

"Tokens saved" is the number of tokens of the paths, with padding, divided by the number of tokens of the rows. It is the limit of the gain where the
time only depends on the number of tokens. Attention adds a cost that grows with the length of the paths, and saves more. For best of N, the limit
is (P + S) / (P/N + S) for a problem of P and solutions of S tokens, so at most 1 + P/S.

The time is CPU time of one thread, or wall time with `--gpu`. Memory is the peak minus the memory in use before (weights and gradients).
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from common import SHAPES, describe_shape, make_model, now, peak, reset_peak, where_and_when
from transformers import PreTrainedModel

from trl_hrm.forest import TokenTree, TokenTrie, pad_rows
from trl_hrm.tree_attention import model_inputs, use_tree_attention


PROMPT, STEP, VOCABULARY = 200, 30, 1000
CASES = [
    "best of 4",
    "best of 16",
    "best of 64",
    "search, depth 4",
    "search, depth 8",
    "search, depth 16",
    "full, branching 2",
    "full, branching 4",
    "full, branching 8",
    "long 8,000",
    "long 32,000",
]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="trees to measure (default: all)")
    parser.add_argument(
        "--path_limit",
        type=int,
        default=60_000,
        help="do not measure one sequence per path above this number of tokens (default: %(default)s)",
    )
    parser.add_argument("--max_length", type=int, default=4096, help="number of tokens per row (default: 4096)")
    parser.add_argument("--rounds", type=int, default=1, help="runs per measurement (default: 1)")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="shape of the model (default: tiny)")
    parser.add_argument("--hidden_size", type=int, default=256, help="hidden size of the tiny shape (default: 256)")
    parser.add_argument("--num_layers", type=int, default=4, help="number of layers of the tiny shape (default: 4)")
    parser.add_argument("--gpu", action="store_true", help="one GPU, bf16, flex attention")
    parser.add_argument("--json", help="file for the results as JSON")
    return parser


def make_tree(case: str, prompt: int = PROMPT, step: int = STEP, seed: int = 0) -> TokenTree:
    """Return the tree of a case, with a labelled step after every `step` tokens."""
    rng = random.Random(seed)
    trie = TokenTrie()
    kind, _, size = case.rpartition(" ")
    size = int(size.replace(",", ""))

    def add(node: int, num_tokens: int = step) -> int:
        node = trie.insert([rng.randrange(2, VOCABULARY) for _ in range(num_tokens)], after=node)
        trie.mark(node)
        return node

    def chain(node: int, num_steps: int) -> list[int]:
        nodes = []
        for _ in range(num_steps):
            nodes.append(node := add(node))
        return nodes

    root = trie.insert([rng.randrange(2, VOCABULARY) for _ in range(prompt)])
    if kind == "best of":
        for _ in range(size):
            chain(root, 9)
    elif kind == "search, depth":
        for parent in [root, *chain(root, size)[:-1]]:
            for _ in range(3):
                add(parent)
    elif kind == "full, branching":
        level = [root]
        for _ in range(3):
            level = [add(parent) for parent in level for _ in range(size)]
    else:
        trace = chain(root, size // 2 // step)
        for eighths in (1, 3, 5, 7):
            chain(trace[len(trace) * eighths // 8], size // 8 // step)
    return trie.layout()


def rows_of_paths(tree: TokenTree, max_length: int) -> list[list[TokenTree]]:
    """Return one sequence per path, in batches of up to 8 sequences and `max_length` tokens with padding."""
    batches: list[list[TokenTree]] = []
    for chain in sorted(tree.chains(), key=len):
        if batches and len(batches[-1]) < 8 and (len(batches[-1]) + 1) * len(chain) <= max_length:
            batches[-1].append(chain)
        else:
            batches.append([chain])
    return batches


def num_computed(batches: list[list[TokenTree]]) -> int:
    return sum(len(batch) * max(map(len, batch)) for batch in batches)


def forward(model: PreTrainedModel, batch: list[TokenTree], is_tree: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits at the labelled steps of a batch, float32, and the numbers of the steps."""
    tokens = {name: tensor.to(model.device) for name, tensor in pad_rows(batch, 0).items()}
    width = tokens["input_ids"].shape[1]
    positions = torch.cat([torch.from_numpy(row.step_positions).long() + i * width for i, row in enumerate(batch)])
    if is_tree:
        inputs = model_inputs(**tokens, config=model.config, dtype=model.dtype)
    else:  # causal attention, in which padding on the right has no effect
        inputs = {"input_ids": tokens["input_ids"], "use_cache": False}
    logits = model(**inputs).logits.flatten(0, 1)
    steps = torch.cat([torch.from_numpy(row.steps).long() for row in batch])
    return logits[positions.to(model.device)].float(), steps


def score(model: PreTrainedModel, batches: list[list[TokenTree]], is_tree: bool) -> torch.Tensor:
    """Return the logits of all labelled steps, by number."""
    with torch.inference_mode():
        found = [forward(model.eval(), batch, is_tree) for batch in batches]
    logits = torch.cat([logits for logits, _ in found]).cpu()
    return logits[torch.cat([steps for _, steps in found]).argsort()]


def train(model: PreTrainedModel, batches: list[list[TokenTree]], is_tree: bool) -> None:
    """Add the gradients of one step over all labels. The label of step i is i % 2."""
    model.train()
    number = sum(len(row.steps) for batch in batches for row in batch)
    for batch in batches:
        logits, steps = forward(model, batch, is_tree)
        loss = torch.nn.functional.cross_entropy(logits, steps.to(logits.device) % 2, reduction="sum")
        (loss / number).backward()


def measure(model: PreTrainedModel, batches: list[list[TokenTree]], is_tree: bool, args: argparse.Namespace) -> dict:
    """Return seconds and MiB of scoring and of a training step."""
    result = {}
    for name, run in (("scoring", score), ("training", train)):
        before, seconds = reset_peak(args.gpu), []
        for _ in range(args.rounds):
            start = now(args.gpu)
            run(model, batches, is_tree)
            seconds.append(now(args.gpu) - start)
        result[name] = {
            "seconds": sorted(seconds)[len(seconds) // 2],
            "memory": (peak(args.gpu) - before) / 2**20,
        }
    return result


def run_case(case: str, models: list[PreTrainedModel], args: argparse.Namespace) -> dict:
    """Return the numbers of tokens and the measurements of one case. `models` are for trees and for paths."""
    tree = make_tree(case)
    is_long = case.startswith("long")
    rows = [[part] for part in (tree.split(len(tree) if is_long else args.max_length))]
    paths = rows_of_paths(tree, args.max_length)
    result = {
        "case": case,
        "labels": len(tree.steps),
        "distinct": len(tree),
        "rows": len(rows),
        "tree tokens": num_computed(rows),
        "path tokens": num_computed(paths),
    }
    for model in models:
        if is_long:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
    if result["path tokens"] <= args.path_limit:
        difference = (score(models[0], rows, True) - score(models[1], paths, False)).abs().max().item()
        limit = 0.2 if args.gpu else 1e-3  # bf16 has 8 bits of precision
        if not difference < limit:
            raise ValueError(
                f"{case}: logits of the tree and of the paths differ by {difference}, expected below {limit}."
            )
        result["difference"] = difference
        result["paths"] = measure(models[1], paths, False, args)
    result["tree"] = measure(models[0], rows, True, args)
    return result


def report(results: list[dict], line: str) -> str:
    """Return the table as Markdown."""
    lines = [
        "| tree | labelled steps | tokens: rows | paths | tokens saved | training: faster by | seconds: tree | paths | MiB: tree | paths "
        "| scoring: faster by | seconds: tree | paths | MiB: tree | paths |",
        "|---" * 15 + "|",
    ]
    for one in results:
        cells = [one["case"], f"{one['labels']:,}", f"{one['tree tokens']:,}", f"{one['path tokens']:,}"]
        cells.append(f"{one['path tokens'] / one['tree tokens']:.2f}×")
        for kind in ("training", "scoring"):
            tree, paths = one["tree"][kind], one.get("paths", {}).get(kind)
            cells.append(f"{paths['seconds'] / tree['seconds']:.2f}×" if paths else "")
            for name, digits in (("seconds", 1), ("memory", 0)):
                cells += [f"{tree[name]:,.{digits}f}", f"{paths[name]:,.{digits}f}" if paths else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", line])


def main() -> None:
    args = make_parser().parse_args()
    if not args.gpu:
        torch.set_num_threads(1)
    models = []
    for _ in range(2):  # equal weights, different attention
        model = make_model(
            args.shape,
            VOCABULARY,
            hidden_size=args.hidden_size,
            num_layers=args.num_layers,
            num_positions=40_000,
            wide_init=True,
        )
        models.append(model.to(torch.bfloat16).cuda() if args.gpu else model)
    if args.gpu:
        models[0].set_attn_implementation("flex_attention")
    use_tree_attention(models[0], models[0].device)
    score(models[1], [[make_tree("best of 4")]], False)  # warm-up
    for model in models:  # gradients exist before memory is measured
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
    results = []
    for case in args.cases:
        results.append(run_case(case, models, args))
        print(f"{case}: {results[-1]}", file=sys.stderr, flush=True)
    line = f"{describe_shape(args.shape, models[0])}, {'bf16' if args.gpu else 'fp32'}, {args.rounds} "
    line += f"round{'s' * (args.rounds > 1)}. {where_and_when(('torch', 'transformers'), args.gpu)}"
    if args.json:
        Path(args.json).write_text(json.dumps({"results": results, "line": line}, indent=1) + "\n", encoding="utf-8")
    print(report(results, line))


if __name__ == "__main__":
    main()
