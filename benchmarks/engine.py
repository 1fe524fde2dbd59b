"""
CPU time of the transformers engine, compared with plain calls of `generate` for the same requests.

```bash
python benchmarks/engine.py --model HuggingFaceTB/SmolLM2-135M-Instruct
```

The requests are the same as in a tree search. A prefix is one of two problems and its first steps. Samples end at a stop string, an
end-of-sequence token or `--max_tokens`. Systems:

- *engine*: all requests at once, as the scheduler of a search sends them.
- *one call per request*: `generate(ids, num_return_sequences=n, stop_strings=...)`, the loop that most people write. No padding.
- *padded batches*: `generate` with up to `--batch_size` left-padded rows of several requests.

All systems sample from the softmax in one process with one thread and the same weights, in turns. CPU time (`time.process_time`) is divided by the
number of tokens up to the end of each sample, because other samples have other lengths.
"""

import argparse
import asyncio
import platform
import statistics
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from trl_hrm.search.engines.transformers import TransformersEngine


SOLUTIONS = {
    "Tom has 3 apples and buys 4 more. How many apples does he have?": [
        "Tom starts with 3 apples.",
        "He buys 4 more, so we add 4 to 3.",
    ],
    "A bakery sells a loaf of bread for 4 dollars and a cake for 15 dollars. On Monday it sells 12 loaves and 3 cakes, and on "
    "Tuesday 10 loaves and 5 cakes. How many dollars does it earn on both days together?": [
        "On Monday it earns 12 * 4 = 48 dollars with bread and 3 * 15 = 45 dollars with cakes, which is 93 dollars.",
        "On Tuesday it earns 10 * 4 = 40 dollars with bread and 5 * 15 = 75 dollars with cakes, which is 115 dollars.",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="path or Hub id of the policy")
    parser.add_argument("--n", type=int, default=5, help="samples per request (default: 5)")
    parser.add_argument("--max_tokens", type=int, default=128, help="maximum tokens per sample (default: 128)")
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[0, 1, 2], help="steps in the prefixes (default: 0 1 2)"
    )
    parser.add_argument("--stop", default="\n\n", help="stop string, '' for none (default: an empty line)")
    parser.add_argument(
        "--prefix", help="a text to continue instead of the problems, to measure decoding without long prefixes"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="rows per batch (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    prefixes = [
        encode(tokenizer, problem, steps[:depth]) for problem, steps in SOLUTIONS.items() for depth in args.depths
    ]
    if args.prefix is not None:
        prefixes = [tokenizer.encode(args.prefix)]
    systems = {"engine": run_engine, "one call per request": run_requests, "padded batches": run_batches}
    for run in systems.values():  # not measured: stop strings are compiled once
        run(model, tokenizer, prefixes[:1], argparse.Namespace(**vars(args) | {"max_tokens": 2}), 0)
    found: dict[str, list[float]] = {name: [] for name in systems}
    num_tokens = dict.fromkeys(systems, 0)
    for number in range(args.rounds):
        for name, run in systems.items():
            start = time.process_time()
            lengths = run(model, tokenizer, prefixes, args, 1000 * number)
            found[name].append(1000 * (time.process_time() - start) / sum(lengths))
            num_tokens[name] += sum(lengths)
    print(
        f"{args.model}, {len(prefixes)} prefixes of {min(map(len, prefixes))} to {max(map(len, prefixes))} tokens, {args.n} samples each, at "
        f"most {args.max_tokens} tokens, stop string {args.stop!r}, {args.rounds} rounds; fp32, one thread; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}\n"
    )
    print("| system | tokens | CPU seconds per 1,000 tokens (median; all) | engine costs |\n|---|---|---|---|")
    for name, values in found.items():
        every = ", ".join(f"{value:.1f}" for value in values)
        median = statistics.median(values)
        ratio = "" if name == "engine" else f"{statistics.median(found['engine']) / median:.2f}×"
        print(f"| {name} | {num_tokens[name]:,} | {median:.1f} ({every}) | {ratio} |")


def encode(tokenizer: PreTrainedTokenizerBase, problem: str, steps: list[str]) -> list[int]:
    text = f"{problem}\n\n"
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": f"{problem} Solve it step by step."}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text + "".join(f"{step}\n\n" for step in steps), add_special_tokens=False)


def run_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: list[list[int]],
    args: argparse.Namespace,
    seed: int,
) -> list[int]:
    async def sample() -> list:
        engine = TransformersEngine(model, tokenizer, batch_size=args.batch_size)
        requests = (
            engine.sample(ids, args.n, [args.stop] if args.stop else [], args.max_tokens, seed + args.n * i)
            for i, ids in enumerate(prefixes)
        )
        try:
            return await asyncio.gather(*requests)
        finally:
            await engine.close()

    return [len(one.token_ids) for samples in asyncio.run(sample()) for one in samples]


def run_requests(model, tokenizer, prefixes, args, seed) -> list[int]:
    set_seed(seed)
    lengths = []
    for ids in prefixes:
        lengths += generate(model, tokenizer, [ids], args, num_return_sequences=args.n)
    return lengths


def run_batches(model, tokenizer, prefixes, args, seed) -> list[int]:
    set_seed(seed)
    rows = [ids for ids in prefixes for _ in range(args.n)]
    lengths = []
    for start in range(0, len(rows), args.batch_size):
        lengths += generate(model, tokenizer, rows[start : start + args.batch_size], args)
    return lengths


def generate(model, tokenizer, rows, args, **options) -> list[int]:
    """Sample from rows of ids with left padding. Return the lengths of the samples."""
    width = max(map(len, rows))
    pad = next(token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id)
    output = model.generate(
        torch.tensor([[pad] * (width - len(ids)) + ids for ids in rows]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=args.max_tokens,
        stop_strings=[args.stop] if args.stop else None,
        tokenizer=tokenizer,
        pad_token_id=pad,  # differs from EOS, so that a sample ends before its first padding token
        **options,
    )
    ids = [row[width:] for row in output.tolist()]
    return [row.index(pad) if pad in row else len(row) for row in ids]


if __name__ == "__main__":
    main()
