"""
Seconds to score 64 candidates of one problem: as a forest, compared with one sequence per step prefix and one per candidate.

    python benchmarks/scoring.py

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
"""

import argparse
import importlib.metadata
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForTokenClassification, set_seed

from trl_hrm import StepFormat, StepScorer
from trl_hrm.losses import step_score
from trl_hrm.tiny_model import make_tokenizer


WORDS = (
    "let x be the sum of all y so that we add and then divide by 2 which gives 3 4 7 12 = + - hence thus now".split()
)
LEAST_SECONDS = 5.0  # minimum time per system and round, to average over several short runs


def main() -> None:
    args = make_parser().parse_args()
    tokenizer = make_tokenizer([" ".join(WORDS) + "\n\n" + " ".join(reversed(WORDS))] * 3, 400)
    report = [versions(args)]
    for name, num_steps, shared in (
        ("next step", args.shared_steps + 1, args.shared_steps),
        ("shared steps", args.num_steps, args.shared_steps),
        ("shared prompt", args.num_steps, 0),
    ):
        problem, candidates = make_candidates(tokenizer, args, num_steps, shared)
        seconds, tokens, batch_sizes = compare(args, tokenizer, name, problem, candidates)
        title = f"**{name}**: {args.num_candidates} candidates; a problem of {args.prompt_tokens} tokens, {num_steps} steps of "
        title += f"{args.step_tokens} tokens (and the separator), {shared} of them shared by all."
        report.append(format_table(title, args.num_candidates, seconds, tokens, batch_sizes))
    print("\n\n".join(report))


def compare(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, name: str, problem: str, candidates: list[list[str]]
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, int]]:
    """Run all systems on one workload. Return seconds, tokens and batch size of each system."""
    scorer = StepScorer(make_model(args, len(tokenizer)), tokenizer, StepFormat(), max_length=args.max_length)
    plain = make_model(args, len(tokenizer))
    run_forest = partial(forest_scores, scorer, problem, candidates)
    num_tokens = forest_tokens(scorer, problem, candidates)
    sequences = make_sequences(scorer, problem, candidates, num_tokens)
    expected = run_forest(8)
    for system, first in (("per prefix", 8 * len(candidates[0])), ("per candidate", 8)):  # sequences of 8 candidates
        found = plain_scores(plain, sequences[system][:first], 8)
        difference = np.abs(found - expected[: len(found)]).max()
        line = f"{name}: {system} differs from the forest by at most {difference:.1e}; scores deviate by {found.std():.2f}"
        print(line, file=sys.stderr, flush=True)
        if not difference < 1e-4:
            raise ValueError(f"Scores of {system} and of the forest differ by {difference}. Expected less than 1e-4.")
    batch_sizes = {"forest": faster_batch(run_forest)}
    for system, found in sequences.items():
        part = found[:: max(1, len(found) // 64)]
        batch_sizes[system] = faster_batch(partial(plain_scores, plain, part))
    runs = {"forest": run_forest} | {
        system: partial(plain_scores, plain, found) for system, found in sequences.items()
    }
    seconds: dict[str, list[float]] = {system: [] for system in runs}
    for number in range(args.rounds):
        for system, run in runs.items():
            seconds[system].append(timed(run, batch_sizes[system], LEAST_SECONDS))
            line = f"round {number + 1}/{args.rounds}  {name}: {system:<14} {seconds[system][-1]:8.2f} s"
            print(line, file=sys.stderr, flush=True)
    tokens = {"forest": num_tokens} | {s: sum(len(ids) for ids, _ in found) for s, found in sequences.items()}
    return seconds, tokens, batch_sizes


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
    parser.add_argument("--rounds", type=int, default=3, help="runs per system (default: 3)")
    parser.add_argument("--max_length", type=int, default=2048, help="number of tokens per row (default: 2048)")
    parser.add_argument("--hidden_size", type=int, default=384, help="hidden size of the model (default: 384)")
    parser.add_argument("--num_layers", type=int, default=4, help="number of layers of the model (default: 4)")
    return parser


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


def make_model(args: argparse.Namespace, vocab_size: int) -> PreTrainedModel:
    set_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=max(1, args.hidden_size // 256),
        max_position_embeddings=8192,
        num_labels=2,
        initializer_range=args.hidden_size**-0.5,  # large enough for different scores
        use_cache=False,
    )
    return Qwen2ForTokenClassification(config).eval()


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
    vocab_size = scorer.model.config.vocab_size
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
        logits = model(input_ids=ids).logits  # causal, so padding on the right has no effect
        for row, i in enumerate(batch):
            scores[i] = step_score(logits[row, sequences[i][1]], StepFormat()).numpy()
    return np.concatenate(scores)


def timed(run: Callable[[int], np.ndarray], batch_size: int, least: float = 0.0) -> float:
    """Return the mean seconds per run. Runs are repeated for `least` seconds."""
    start, num_runs = time.perf_counter(), 0
    while num_runs == 0 or time.perf_counter() - start < least:
        run(batch_size)
        num_runs += 1
    return (time.perf_counter() - start) / num_runs


def faster_batch(run: Callable[[int], np.ndarray]) -> int:
    """Return the faster of batch sizes 1 and 8."""
    run(8)  # warm-up
    return min((1, 8), key=partial(timed, run))


def format_table(
    title: str,
    num_candidates: int,
    seconds: dict[str, list[float]],
    tokens: dict[str, int],
    batch_sizes: dict[str, int],
) -> str:
    median = {system: statistics.median(found) for system, found in seconds.items()}
    lines = [
        title,
        "",
        "| system | tokens read | batch | seconds (median; all) | candidates/s | forest is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for system in seconds:
        ratio = "" if system == "forest" else f"{median[system] / median['forest']:.2f}×"
        every = ", ".join(f"{value:.2f}" for value in seconds[system])
        rate = num_candidates / median[system]
        lines.append(
            f"| {system} | {tokens[system]:,} | {batch_sizes[system]} | {median[system]:.2f} ({every}) | {rate:.1f} "
            f"| {ratio} |"
        )
    share = {system: median[system] / median["forest"] for system in ("ceiling", "ceiling short")}
    lines += [
        "",
        f"Speed relative to the ceiling: {share['ceiling']:.0%}, to the short ceiling: {share['ceiling short']:.0%}.",
    ]
    return "\n".join(lines)


def versions(args: argparse.Namespace) -> str:
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    cores = len(os.sched_getaffinity(0))
    return (
        f"{time.strftime('%Y-%m-%d')}; {packages}; Python {platform.python_version()}, {cores} cores, "
        f"{torch.get_num_threads()} threads; {args.rounds} rounds. Model: Qwen2 token classifier with random weights, hidden "
        f"size {args.hidden_size}, {args.num_layers} layers, fp32."
    )


if __name__ == "__main__":
    main()
