"""
One good file of each kind that the package writes, and what reads it. Also a program that counts how readers take mutations:

    python -m tests.own_files NUM_MUTATIONS SEED
"""

import json
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from shutil import copytree
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trl_hrm import StepFormat
from trl_hrm.data.build_config import BuildStepwiseConfig
from trl_hrm.data.candidate_sources import reading_settings, rule_of
from trl_hrm.data.candidates import Candidate, ProblemCandidates
from trl_hrm.data.candidates_config import CandidatesConfig
from trl_hrm.data.publish_shards import published_files, read_build
from trl_hrm.data.self_training import prompt_of
from trl_hrm.data.stepwise import build_stepwise
from trl_hrm.data.tree_files import parse_openr, run_warnings
from trl_hrm.demo.measures import PolicyMeasures, read_measures
from trl_hrm.demo.runner import read_mark
from trl_hrm.evaluation.best_of_n import SampleCost, total_cost
from trl_hrm.evaluation.results import Part, format_results, load_candidates, load_results, read_parts, scored_row
from trl_hrm.evaluation.step_search import SearchedProblems, StepSearchSettings
from trl_hrm.io import write_json
from trl_hrm.search.log import EventLog
from trl_hrm.search.nodes import SCHEMA, read_totals, read_trees, read_unreadable_references
from trl_hrm.search.run_folder import (
    Shard,
    check_manifest,
    finish_shard,
    node_files,
    read_manifest,
    read_summary,
)
from trl_hrm.search.scheduler import Progress

from .evaluation.report_runs import STEP_ROWS, bare_page, benchmark, candidate, problem, selection, write
from .evaluation.step_searches import Grader, search
from .mutations import at, dump, kind_of, kinds_of, mutate, pattern, places
from .search.scripted import PROMPT, RULE, SEARCHES, ExactGrader, make_problems, run_scripted


# Settings that are shown in reports and compared with a new run. Seeds may be negative.
FREE = {
    "intervals",
    "settings",
    "policy",
    "reward_model",
    "engine",
    "grader",
    "search",
    "started_with",
    "seed",
    "chat_template_kwargs",
    # optional, or of another type than in the good file
    "answer",
    "chat_template_date",
    "finish",
    "num_calls",
    "num_tokens",
    "round",
    "sight",
    "thinking_marks",
    "threshold",
    "unless",
}
HEADER = {"n": [1, 2], "reward_model": {"model": "m"}, "candidates": "abc"}
MANIFEST = {
    "engine": {"engine": "scripted", "model": "p"},
    "prompt": asdict(PROMPT),
    "steps": asdict(RULE),
    "extractors": ["boxed"],
    "grader": {"timeout": 1.0},
    "started_with": {"problems": "coins.jsonl", "split": "train", "engine_args": None},
    "search": SEARCHES["rollouts"].describe(),
    "seed": 42,
    "num_shards": 1,
    "versions": {"trl_hrm": "1"},
}


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name in the folder, how it is written, and what is read from it."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]


def run(folder: Path, search: str = "rollouts") -> None:
    run_scripted(folder, SEARCHES[search], make_problems(5), grader=ExactGrader(("8",)), max_in_flight=40)
    check_manifest(folder, MANIFEST)
    finish_shard(folder, 0, 1)
    SampleCost(folder, Shard(0, 1)).end(Progress(num_problems=1, num_requests=2, generated_tokens=100))


def read_log(folder: Path) -> Any:
    finish_shard(folder, 0, 1)
    with EventLog(folder / "log-00000-of-00001.jsonl") as log:
        opened = [log.read(name) for name in log.problems]
    return [asdict(one.tree) for one in opened], [sorted(one.scores.items()) for one in opened]


def read_nodes(folder: Path) -> Any:
    files = sorted(folder.glob("nodes-*.parquet"))
    trees = [asdict(tree) for file in files for tree in read_trees(file)]
    return trees, read_totals(files), read_unreadable_references(files)


def read_settings(folder: Path) -> Any:
    manifest = read_manifest(folder, ["engine", "prompt", "search", "seed"])
    config = CandidatesConfig(candidates=str(folder))
    found = [asdict(prompt_of(manifest)), manifest["engine"], reading_settings(config), vars(rule_of(config) or RULE)]
    found += [manifest["search"], manifest["seed"]]
    resumed = False
    try:
        check_manifest(folder, MANIFEST)
        resumed = True
    except ValueError as error:
        if "different settings" not in str(error):
            raise
    return found, resumed, run_warnings({"run": manifest | read_summary(folder)})


def read_summaries(folder: Path) -> Any:
    node_files(folder)
    return read_summary(folder), run_warnings({"run": read_manifest(folder) | read_summary(folder)})


def results(folder: Path) -> None:
    rows = [
        problem(str(i), [candidate([0.9, 0.2], True), candidate([0.7], False), candidate(None, None, None)])
        for i in range(3)
    ]
    counts = {"problems_without_answer": 7, "candidates_without_answer": 5, "num_candidates": 9, "not_graded": 1}
    solutions = {"right": 3, "wrong": 4}
    policy = {"engine": "scripted", "seed": 1}
    more = {"intervals": {"confidence": 0.95}, "warnings": ["one"], "solutions": solutions}
    write(folder, selection(counts=counts, policy=policy, **more), rows)


def read_selection(folder: Path) -> Any:
    found = load_results(folder)
    return asdict(found) | {"output_dir": ""}, format_results(found), bare_page([folder])


def read_candidates(folder: Path) -> Any:
    return [one.to_row() for one in load_candidates(folder)], bare_page([folder])


def benchmarks(folder: Path) -> None:
    write(folder, benchmark(), STEP_ROWS, "scores.jsonl")


def part(folder: Path) -> None:
    with Part(folder, HEADER) as opened:
        for start in (0, 3):
            rows = []
            for i in range(start, start + 3):
                candidates = [
                    Candidate("so", ["so"], "1", "eos", 4, True, [0.5]),
                    Candidate("", [], None, "length", 0),
                ]
                rows.append(scored_row(i, ProblemCandidates(f"p{i}", f"{i}?", "1", candidates), [0, None]))
            counts = {"num_candidates": 6, "candidates_without_answer": 3, "scorer_seconds": 0.5, "rest_seconds": 0.1}
            opened.append(
                {"rows": rows, "counts": counts, "unreadable_references": [{"problem_id": "x", "answer": "y"}]}
            )
        opened.finish()


def read_part(folder: Path) -> Any:
    unreadable: list = []
    with Part(folder, HEADER) as opened:
        opened.finish()
    rows, counts = read_parts([opened.finished], unreadable)
    rows = [(one.to_row(), classes) for one, classes in rows]
    return rows, counts, unreadable


def read_cost(folder: Path) -> Any:
    found = SampleCost(folder, Shard(0, 1))
    return found.costs, found.is_known, total_cost(folder, Counter())


def build(folder: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "completions": ["It."], "labels": [i % 2 == 0]} for i in range(20)]
    file = folder.parent / f"{folder.name}.jsonl"
    file.write_text("".join(dump(row) + "\n" for row in rows))
    build_stepwise(BuildStepwiseConfig(inputs=[str(file)], output_dir=str(folder / "built"), view="prm", num_proc=1))


def read_built(folder: Path) -> Any:
    found = read_build(folder / "built")
    return found.name, found.splits, [file.path for file in published_files(found, 1 << 30, folder)]


def step_format(folder: Path) -> None:
    StepFormat(prompt_style="chat", system_prompt="s", chat_template_kwargs={"a": {"b": 1}}).save(folder)


def read_format(folder: Path) -> Any:
    return asdict(StepFormat.from_pretrained(folder))


def openr(folder: Path) -> None:
    leaf = {"text": "It is \\boxed{3}.", "mc_value": 1.0, "children": []}
    root = {"text": "1+2?", "mc_value": 0.5, "children": [leaf, {"text": "So", "mc_value": 0.0, "children": [leaf]}]}
    row = {"question": "1+2?", "final_answer": "3", "question_id": 0, "reasoning_steps": root}
    (folder / "openr.json").write_text(dump(row))


def read_openr(folder: Path) -> Any:
    path = folder / "openr.json"
    return asdict(parse_openr(json.loads(path.read_text()), f"{path}:1"))


STEP_SEARCH = StepSearchSettings("", n=[2], max_depth=5, max_step_tokens=60).searches(PROMPT, RULE)[2]


def step_search(folder: Path) -> None:
    problems = [problem for _, problem in make_problems(4)]
    search(folder / "made", problems=problems, n=[2], score=lambda path: 0.5 / len(path))
    for path in (folder / "made" / "n-2").iterdir():
        path.rename(folder / path.name)


def read_step_search(folder: Path) -> Any:
    found = SearchedProblems(STEP_SEARCH, folder, [problem for _, problem in make_problems(4)])
    return [asdict(problem) | {"where": ""} for problem in found.grade(Grader())], found.cost(), found.counts


def demo(folder: Path) -> None:
    write_json(folder / "mark.json", {"seconds": 1.5, "since": 2.5})
    rates = {"slip_rate": 0.1, "correction_rate": 0.2, "spurious_rate": 0.0, "sight": None}
    write_json(folder / "policy.json", {"num_right": 1, "num_solutions": 2, "accuracy": 0.5} | rates)


KINDS = {
    "log": Kind("log-00000-of-00001.jsonl", run, read_log),
    "full_tree_log": Kind("log-00000-of-00001.jsonl", partial(run, search="full_tree"), read_log),
    "nodes": Kind("nodes-00000-of-00001.parquet", run, read_nodes),
    "manifest": Kind("manifest.json", run, read_settings),
    "summary": Kind("summary-00000-of-00001.json", run, read_summaries),
    "results": Kind("results.json", results, read_selection),
    "candidates": Kind("candidates.jsonl", results, read_candidates),
    "benchmark": Kind("results.json", benchmarks, lambda folder: bare_page([folder])),
    "scores": Kind("scores.jsonl", benchmarks, lambda folder: bare_page([folder])),
    "part": Kind("part-00000-of-00001.jsonl", part, read_part),
    "cost": Kind("cost-00000-of-00001.json", run, read_cost),
    "build_report": Kind("built/build_report.json", build, read_built),
    "step_format": Kind("step_format.json", step_format, read_format),
    "openr": Kind("openr.json", openr, read_openr),
    "step_search_log": Kind("log-00000-of-00001.jsonl", step_search, read_step_search),
    "step_search_cost": Kind("cost-00000-of-00001.json", step_search, read_step_search),
    "demo_mark": Kind("mark.json", demo, lambda folder: read_mark(folder / "mark.json")),
    "demo_measures": Kind("policy.json", demo, lambda folder: read_measures(folder / "policy.json", PolicyMeasures)),
}


def load(path: Path) -> list[Any]:
    """Return the records of a file."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return [json.loads(path.read_text())]


def store(path: Path, records: list[Any]) -> None:
    """Write records as [`load`] returns them. Raises an Arrow error if Parquet cannot hold them."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records, SCHEMA), path)
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in records))


@cache
def good(name: str) -> tuple[Path, list[Any], Any]:
    """Return the folder of a good file, its records and the result of its reader. Callers must not change them."""
    folder = Path(tempfile.mkdtemp(prefix="own-files-")) / "here"
    folder.mkdir()
    KINDS[name].make(folder)
    records = load(folder / KINDS[name].name)
    work = folder.with_name("first")
    copytree(folder, work)
    return folder, records, KINDS[name].read(work)


def mutated(name: str, rng: random.Random, work: Path) -> tuple[str, Any]:
    """Copy the folder of a good file to `work` and change one thing. Return what was changed, and the new records."""
    folder, records, _ = good(name)
    while True:
        copytree(folder, work, dirs_exist_ok=True)
        place = rng.randrange(len(records))
        if rng.random() < 0.1 and len(records) > 1:
            what, other = f"record {place} removed", [*records[:place], *records[place + 1 :]]
            if rng.random() < 0.5:
                what, other = f"record {place} repeated", [*records[: place + 1], *records[place:]]
        else:
            what, one = mutate(records[place], rng)
            what, other = f"record {place}: {what}", [*records[:place], one, *records[place + 1 :]]
        try:
            store(work / KINDS[name].name, other)
            # Parquet stores 1.5 in a column of whole numbers as 1
            return what, load(work / KINDS[name].name) if KINDS[name].name.endswith("parquet") else other
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            continue  # Parquet cannot hold this


def count(number: int, seed: int) -> None:
    """Print how the readers take mutations of each kind of file, and all tracebacks."""
    for name, kind in KINDS.items():
        rng, found, examples = random.Random(f"{seed} {name}"), Counter(), {}
        good(name)
        known = kinds_of(good(name)[1])
        for _ in range(number):
            with tempfile.TemporaryDirectory() as folder:
                work = Path(folder, "here")
                what, records = mutated(name, rng, work)
                outcome = outcome_of(kind, work, good(name)[2], known, records)
                found[outcome.split(":")[0]] += 1
                examples.setdefault(outcome, []).append(what)
        print(name, dict(found))
        for outcome, whats in sorted(examples.items()):
            if not outcome.startswith(("clean", "equal", "other")):
                print(f"   {outcome[:150]} [{len(whats)}]: {'; '.join(whats[:3])}")


def outcome_of(kind: Kind, work: Path, expected: Any, known: dict, records: list[Any]) -> str:
    """Return how the reader took a mutation."""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(20)
    try:
        found = kind.read(work)
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, UnicodeError | pa.ArrowException | json.JSONDecodeError) or str(work) not in text:
            return f"unnamed: {type(error).__name__} {text[:100]}"
        return "long" if len(text) > 1500 or "\n" in text else "clean"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {type(error).__name__} {str(error)[:50]} {frame.name}"
    finally:
        signal.alarm(0)
    if found == expected:
        return "equal"
    for record in records:
        for place in places(record):
            kinds = known.get(pattern(place))
            if kinds is not None and not FREE & set(place) and kind_of(at(record, place)) not in kinds:
                return f"wrong: {'.'.join(map(str, pattern(place)))} is {kind_of(at(record, place))}"
    return "other"


def _stop(*_: Any) -> None:
    raise RuntimeError("hang")


if __name__ == "__main__":
    count(int(sys.argv[1]), int(sys.argv[2]))
