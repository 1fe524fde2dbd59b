"""
Seconds to score 64 candidates of one problem: as a forest, compared with one sequence per step prefix and one per candidate.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --shape smollm2 --num_candidates 16 --workloads "shared prompt" --rounds 1

Workloads of random words, with the size of competition problems:

- `next step`: a long problem and several shared steps, then 64 different next steps, as in step search.
- `shared steps`: the same problem and shared steps, then 64 different endings of three steps.
- `shared prompt`: 64 solutions that only share the problem, as in best-of-N.

Systems, which alternate in one process and use the same weights:

- `forest`: StepScorer.
- `per prefix`: one sequence per step of each candidate, with the problem and all steps up to it, as in TRL's docs and ProcessBench's script.
- `per candidate`: one sequence per candidate, with the scores of all its steps.
- `ceiling`: the number of tokens of the forest, as plain causal rows of `--max_length`.
- `ceiling short`: the same tokens as plain causal rows with the length of a candidate, which is a stricter comparison.

Each system uses the faster of batch sizes 1 and 8, measured on a part of the data before the rounds. Plain sequences are sorted by length to
minimize padding. Only the time of the forest includes tokenization and building the tree. The scores of all systems are compared first.

The time is CPU time of one thread, so that other programs disturb it less, or wall time with `--gpu`. "Tokens saved" is the number of tokens of a system
divided by the number of tokens of the forest: a forest is faster by this ratio if the time only depends on the number of tokens. Memory is the
peak while a system runs, minus the memory in use before (weights, data).
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    add_model_options,
    card_peak,
    describe_shape,
    make_model,
    model_flops,
    now,
    num_compute_parameters,
    peak,
    reset_peak,
    where_and_when,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_hrm import StepFormat, StepScorer
from trl_hrm.losses import step_score
from trl_hrm.tiny_model import make_tokenizer


WORDS = (
    "let x be the sum of all y so that we add and then divide by 2 which gives 3 4 7 12 = + - hence thus now".split()
)
LEAST_SECONDS = 5.0  # minimum time per system and round, to average over several short runs
WORKLOADS = ["next step", "shared steps", "shared prompt"]
SYSTEMS = ["forest", "per prefix", "per candidate", "ceiling", "ceiling short"]


def main() -> None:
    args = make_parser().parse_args()
    args.shape = args.shape or ("qwen2.5-math-1.5b" if args.gpu else "tiny")
    tokenizer = make_tokenizer([" ".join(WORDS) + "\n\n" + " ".join(reversed(WORDS))] * 3, 400)
    if not args.gpu:
        torch.set_num_threads(1)
    models = [new_model(args, len(tokenizer)) for _ in range(2)]
    if args.gpu:
        models[0].set_attn_implementation("flex_attention")
    line = where_and_when(("torch", "transformers"), args.gpu)
    report = [
        f"{describe_shape(args.shape, models[0])}, {'bf16' if args.gpu else 'fp32'}, {args.rounds} rounds. {line}"
    ]
    results = {}
    for name in args.workloads:
        num_steps, shared = {
            "next step": (args.shared_steps + 1, args.shared_steps),
            "shared steps": (args.num_steps, args.shared_steps),
            "shared prompt": (args.num_steps, 0),
        }[name]
        problem, candidates = make_candidates(tokenizer, args, num_steps, shared)
        results[name] = compare(args, tokenizer, models, name, problem, candidates)
        title = f"**{name}**: {args.num_candidates} candidates; a problem of {args.prompt_tokens} tokens, {num_steps} steps of "
        title += f"{args.step_tokens} tokens (and the separator), {shared} of them shared by all."
        at_peak = card_peak(args)
        flops_per_token = model_flops(num_compute_parameters(models[0]), 1, training=False)
        report.append(
            format_table(title, args.num_candidates, results[name], flops_per_token / at_peak if at_peak else None)
        )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(report))


def compare(
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    models: list[PreTrainedModel],
    name: str,
    problem: str,
    candidates: list[list[str]],
) -> dict[str, dict]:
    """Run all systems on one workload. Return seconds, tokens, batch size and peak memory of each system."""
    model, plain = models  # equal weights: StepScorer changes the attention of its model
    scorer = StepScorer(model, tokenizer, StepFormat(), max_length=args.max_length)
    run_forest = partial(forest_scores, scorer, problem, candidates)
    num_tokens = forest_tokens(scorer, problem, candidates)
    sequences = {
        system: found
        for system, found in make_sequences(scorer, problem, candidates, num_tokens).items()
        if system in args.systems
    }
    expected = run_forest(8)
    tolerance = 0.05 if args.gpu else 1e-4  # bf16 has 8 bits of precision
    for system, first in (("per prefix", 8 * len(candidates[0])), ("per candidate", 8)):  # sequences of 8 candidates
        if system not in sequences:
            continue
        found = plain_scores(plain, sequences[system][:first], 8)
        difference = np.abs(found - expected[: len(found)]).max()
        line = f"{name}: {system} differs from the forest by at most {difference:.1e}; scores deviate by {found.std():.2f}"
        print(line, file=sys.stderr, flush=True)
        if not difference < tolerance:
            raise ValueError(
                f"Scores of {system} and of the forest differ by {difference}. Expected less than {tolerance}."
            )
    runs = {"forest": (run_forest, num_tokens, run_forest)}
    for system, found in sequences.items():
        part = found[:: max(1, len(found) // 64)]
        number = sum(len(ids) for ids, _ in found)
        runs[system] = partial(plain_scores, plain, found), number, partial(plain_scores, plain, part)
    results = {}
    for system, (_, number, part) in runs.items():
        results[system] = {"tokens": number, "batch": faster_batch(part, args.gpu), "seconds": [], "memory": 0.0}
    for round_number in range(args.rounds):
        for system, (run, _, _) in runs.items():
            result = results[system]
            before = reset_peak(args.gpu)
            result["seconds"].append(timed(run, args.gpu, result["batch"], args.least_seconds))
            result["memory"] = max(result["memory"], (peak(args.gpu) - before) / 2**20)
            line = f"round {round_number + 1}/{args.rounds}  {name}: {system:<14} {result['seconds'][-1]:8.2f} s"
            print(line, file=sys.stderr, flush=True)
    return results


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_candidates", type=int, default=64, help="number of candidates (default: 64)")
    parser.add_argument(
        "--prompt_tokens", type=int, default=200, help="number of tokens in the problem (default: 200)"
    )
    parser.add_argument("--step_tokens", type=int, default=30, help="number of tokens per step (default: 30)")
    parser.add_argument("--num_steps", type=int, default=9, help="number of steps per candidate (default: 9)")
    parser.add_argument(
        "--shared_steps", type=int, default=6, help="number of steps shared by all candidates (default: 6)"
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, help="default: all")
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="systems next to the forest (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs per system (default: 3)")
    parser.add_argument(
        "--least_seconds", type=float, default=LEAST_SECONDS, help="least seconds per run (default: %(default)s)"
    )
    parser.add_argument("--max_length", type=int, default=2048, help="number of tokens per row (default: 2048)")
    add_model_options(parser)
    return parser


def new_model(args: argparse.Namespace, vocab_size: int) -> PreTrainedModel:
    model = make_model(
        args.shape, vocab_size, hidden_size=args.hidden_size, num_layers=args.num_layers, wide_init=True
    )
    return model.to(torch.bfloat16).cuda().eval() if args.gpu else model.eval()


def make_candidates(
    tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, num_steps: int, shared: int
) -> tuple[str, list[list[str]]]:
    """Return a problem and solutions with the same first `shared` steps."""
    rng = random.Random(0)

    def text(num_tokens: int) -> str:
        words = rng.choices(WORDS, k=num_tokens)
        ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
        return tokenizer.decode(ids[:num_tokens])

    prompt = text(args.prompt_tokens)
    common = [text(args.step_tokens) for _ in range(shared)]
    return prompt, [
        common + [text(args.step_tokens) for _ in range(num_steps - shared)] for _ in range(args.num_candidates)
    ]


def make_sequences(
    scorer: StepScorer, prompt: str, candidates: list[list[str]], num_tokens: int
) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Return the token ids and the positions of the scores, for each plain system."""
    prefixes, whole = [], []
    for steps in candidates:
        ids, step_ids = scorer.step_format.encode(scorer.tokenizer, prompt, steps)
        ends = []
        for step in step_ids:
            ids = ids + step
            ends.append(len(ids) - 1)
            prefixes.append((ids, [len(ids) - 1]))
        whole.append((ids, ends))
    vocab_size = len(scorer.tokenizer)
    return {
        "per prefix": prefixes,
        "per candidate": whole,
        "ceiling": causal_rows(num_tokens, scorer.max_length, vocab_size),
        "ceiling short": causal_rows(num_tokens, len(whole[0][0]), vocab_size),
    }


def causal_rows(num_tokens: int, length: int, vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """Return random tokens in rows of `length`, scored at their last position."""
    ids = np.random.default_rng(0).integers(2, vocab_size, num_tokens).tolist()
    rows = [ids[start : start + length] for start in range(0, num_tokens, length)]
    return [(row, [len(row) - 1]) for row in rows]


def forest_scores(scorer: StepScorer, prompt: str, candidates: list[list[str]], batch_size: int) -> np.ndarray:
    scorer.batch_size = batch_size
    return np.concatenate(scorer.score([prompt], [candidates])[0])


def forest_tokens(scorer: StepScorer, prompt: str, candidates: list[list[str]]) -> int:
    """Return the number of tokens in the forward passes of the scorer. If a tree is split, shared ancestors count in each part."""
    read = []
    score_rows = scorer._score_rows
    scorer._score_rows = lambda rows: read.extend(len(tree) for row in rows for tree in row) or score_rows(rows)
    forest_scores(scorer, prompt, candidates, 8)
    del scorer._score_rows
    return sum(read)


@torch.inference_mode()
def plain_scores(model: PreTrainedModel, sequences: list[tuple[list[int], list[int]]], batch_size: int) -> np.ndarray:
    """Return the scores at the given positions of plain sequences, in the order of the sequences."""
    scores = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(sequences[i][0]) for i in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i][0])] = torch.tensor(sequences[i][0])
        logits = (
            model(input_ids=ids.to(model.device)).logits.float().cpu()
        )  # causal, so padding on the right has no effect
        for row, i in enumerate(batch):
            scores[i] = step_score(logits[row, sequences[i][1]], StepFormat()).numpy()
    return np.concatenate(scores)


def timed(run: Callable[[int], np.ndarray], gpu: bool, batch_size: int, least: float = 0.0) -> float:
    """Return the mean seconds per run. Runs are repeated for `least` seconds."""
    start, num_runs = now(gpu), 0
    while num_runs == 0 or now(gpu) - start < least:
        run(batch_size)
        num_runs += 1
    return (now(gpu) - start) / num_runs


def faster_batch(run: Callable[[int], np.ndarray], gpu: bool) -> int:
    """Return the faster of batch sizes 1 and 8."""
    run(8)  # warm-up
    return min((1, 8), key=partial(timed, run, gpu))


def format_table(
    title: str, num_candidates: int, results: dict[str, dict], peak_share_per_token: float | None = None
) -> str:
    """Return the table of one workload. `peak_share_per_token` is the time of one token at the peak of the card, in seconds."""
    median = {system: statistics.median(result["seconds"]) for system, result in results.items()}
    lines = [
        title,
        "",
        "| system | tokens | tokens saved | forest is faster by | seconds (median; all) | candidates/s | batch | peak memory, MiB |"
        + " of the card's peak FLOPs |" * (peak_share_per_token is not None),
        "|---|---|---|---|---|---|---|---|" + "---|" * (peak_share_per_token is not None),
    ]
    for system, result in results.items():
        is_forest = system == "forest"
        ratio = "" if is_forest else f"{median[system] / median['forest']:.2f}×"
        saved = "" if is_forest else f"{result['tokens'] / results['forest']['tokens']:.2f}×"
        every = ", ".join(f"{value:.2f}" for value in result["seconds"])
        line = (
            f"| {system} | {result['tokens']:,} | {saved} | {ratio} | {median[system]:.2f} ({every}) "
            f"| {num_candidates / median[system]:.1f} | {result['batch']} | {result['memory']:,.0f} |"
        )
        if peak_share_per_token is not None:
            line += f" {result['tokens'] * peak_share_per_token / median[system]:.1%} |"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
