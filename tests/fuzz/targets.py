"""What the fuzzer mutates: the inputs of every command, and the invariants of every result."""

import contextlib
import gzip
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import yaml
from datasets import Dataset

import trl_hrm
from trl_hrm import StepFormat
from trl_hrm.cli import COMMANDS, main
from trl_hrm.data.step_labels import solution_ends, unite_steps
from trl_hrm.search.nodes import read_trees
from trl_hrm.step_tree import StepTree

from ..data.judged_runs import write_verdicts
from ..evaluation.benchmark_rows import mistake_row, prm_row, process_row
from ..helpers import save_checkpoint
from ..reasoning.grids import save_grid_model
from ..scripts.commands import save_judge
from ..search.policies import KNOWN, SOLUTIONS, make_policy


LAYOUT = """
title: Best of N
source: a paper
points: [1, 2]
series:
  - {label: lowest score, results: results, curve: best_of_n/min, paper: [0.5, null]}
"""
GRIDS = """source,question,answer,rating
a,..3....2.1....4.,1234341241232341,0
a,.......4.3.1.2..,3412213443211243,1
a,......43....13..,3412214342311324,2
a,...3..122....3..,1243341221344321,3
"""
GRID = "build-grid sudoku --train_csv grids.csv --num_train 2 --num_validation 1 --num_test 1 --num_few_blanks 0 --output_dir OUT"
FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = "--reward_model model --reward_model_max_length 512"
PROMPT = "--prompt question --prompt_style plain --segmentation step_header --final_stops END!"
POLICY = f"--policy policy --engine transformers {PROMPT} --engine_args {{}}"
PROBLEMS = "--problems problems.jsonl --limit 1"
ANNOTATE = f"annotate {POLICY} {PROBLEMS} --num_children 2 --max_depth 1 --max_step_tokens 8"
MORE = f"annotate {POLICY} --more_from run --more_samples 4 --num_completions 2 --max_solution_tokens 8"
BUILD = "--output_dir OUT --test_size 0.0"
BEST_OF_N = f"{POLICY} {PROBLEMS} {MODEL} --n 1 2 --max_solution_tokens 8"
TRAIN = (
    "--per_device_train_batch_size 1 --max_steps 1 --output_dir OUT --use_cpu true --report_to none --bf16 false "
    "--gradient_checkpointing false --save_strategy no"
)
TRAIN_GRID = (
    "--per_device_train_batch_size 2 --max_steps 1 --output_dir OUT --use_cpu true --report_to none --save_strategy no"
)
GRPO = (
    f"{PROBLEMS} --prompt question --prompt_style plain --num_generations 2 --gradient_accumulation_steps 2 "
    "--max_completion_length 8 --guard_min_steps 1"
)
PARTED = f"best-of-n --candidates candidates.jsonl {MODEL} --n 1 2"
EVALUATE = f"{POLICY} {PROBLEMS} --n 1 2 --max_solution_tokens 8"
JUDGE = "--judge judge --engine transformers --template judge.json --num_votes 2 --max_response_tokens 4"
STEP_SEARCH = f"{POLICY} {PROBLEMS} {MODEL} --n 2 --max_depth 1 --max_step_tokens 8"


@dataclass(frozen=True)
class Target:
    """
    A command and a file that it reads.

    Args:
        command (`str`): Command line. `OUT` is the output.
        file (`str`): Pattern of the files to mutate, or `""` to mutate an option.
        check (`Callable`): Function that checks the results of a command that ended with 0, given the working directory and stdout.
        weight (`float`): How often the target is drawn. Lower for slow commands.
        about (`str`): Name that an error message may use instead of the file's name.
    """

    command: str
    file: str
    check: Callable[[Path, str], None]
    weight: float = 1.0
    about: str = ""

    @property
    def name(self) -> str:
        return f"{self.command.split()[0]} {self.file or 'OPTION'}"


def train_policy(folder: Path) -> None:
    make_policy(folder, 256, texts=SOLUTIONS)


def make_inputs(folder: Path, write_policy: Callable[[Path], object] = train_policy) -> None:
    """Write a small valid set of inputs of all commands. `write_policy` writes the policy to a folder."""
    write_policy(folder / "policy")
    (folder / "model").mkdir(parents=True)
    save_checkpoint(folder / "model")
    save_judge(folder, folder / "policy")
    save_grid_model(folder / "grid")
    (folder / "puzzles.txt").write_text("1...\n..2.\n.3..\n...4\n\n1.......2.......\n", encoding="utf-8")
    (folder / "grids.csv").write_text(GRIDS, encoding="utf-8")
    shepherd = {"input": "1+2? Step 1: so 3 ки\nStep 2: thus 3 ки", "label": "1+2? Step 1: so 3 +\nStep 2: thus 3 -", "task": "GSM8K"}  # fmt: skip
    steps = [
        {"prompt": f"{i}+2?", "completions": ["so 3", "thus 3"], "labels": [True, False], "weight": 0.5}
        for i in range(4)
    ]
    rows = {
        "prm800k": [json.loads(line) for line in (FIXTURES / "prm800k.jsonl").read_text().splitlines()[:3]],
        "openr": [json.loads(line) for line in (FIXTURES / "openr.jsonl").read_text().splitlines()[:2]],
        "shepherd": [shepherd, {**shepherd, "task": "MATH"}],
        "steps": steps,
        "trees": [{**row, "parents": [-1, -1], "num_merged": [1, 1], "labels": [0.25, None]} for row in steps],
        "problems": KNOWN,
        "exclude": [{"problem": "0+2?"}, {"problem": "9+9?"}],
        "solutions": [{"prompt": "1+2?", "completion": f"# Step 1\nso {i}\n\n# Step 2\nx"} for i in range(3)],
        "candidates": [
            {"prompt": "1+2?", "answer": "3", "candidates": [f"# Step 1\nso\n\n# Answer\n\n{i}" for i in (3, 4)]}
        ],
        "processbench": [process_row(i, i - 1) for i in range(3)],
        "prmbench": [prm_row(i, "confidence", [2]) for i in range(3)],
        "mistake": [mistake_row(i, i or None) for i in range(3)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "array.json").write_text(json.dumps(steps, indent=1), encoding="utf-8")
    (folder / "steps.jsonl.gz").write_bytes(gzip.compress((folder / "steps.jsonl").read_bytes()))
    Dataset.from_list(steps).to_parquet(folder / "rows" / "train.parquet")
    Dataset.from_list(rows["candidates"]).to_parquet(folder / "pool" / "train.parquet")
    (folder / "layout.yaml").write_text(LAYOUT, encoding="utf-8")
    (folder / "prompt.txt").write_text("Solve: {question}\n", encoding="utf-8")
    with contextlib.chdir(folder):
        for line in (
            f"{ANNOTATE} --limit 2 --num_children 4 --max_depth 4 --max_step_tokens 30 --output_dir run",
            "export run --output_dir dataset --test_size 0.0",
            GRID.replace("OUT", "grids"),
            f"best-of-n {BEST_OF_N} --output_dir results",
            f"{PARTED} --output_dir given",
            f"evaluate {EVALUATE} --output_dir evaluated",
            f"step-search {STEP_SEARCH} --output_dir searched",
            f"benchmark processbench.jsonl --suite processbench --validation_size 0.0 {MODEL} --output_dir judged",
            f"judge steps.jsonl {JUDGE} --output_dir verdicts",
        ):
            silent = io.StringIO()
            with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
                assert main(words(line)) == 0, silent.getvalue()
        with patch("trl_hrm.evaluation.best_of_n.write_candidates", side_effect=OSError("No space left on device")):
            with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
                assert main(words(f"{PARTED} --output_dir parted")) == 1  # leaves a part
        assert list(Path("parted").glob("part-*.jsonl"))
        for name in SETTINGS:
            if name != "env":
                Path(f"{name}.yaml").write_text(yaml.safe_dump(settings(name)), encoding="utf-8")
    shutil.copytree(folder / "run", folder / "agreed")
    votes = {}
    for tree in read_trees(next((folder / "agreed").glob("nodes-*.parquet"))):
        steps = unite_steps(tree, Counter())
        for end in solution_ends(tree, steps):
            labelled = StepTree("p", steps.texts, [None] * len(steps.texts), steps.parents)
            ids = tuple(tree.nodes[steps.members[step][0]].node_id for step in labelled.path(end))
            votes[tree.problem.problem_id, ids] = [-1, -1, len(ids) - 1]
    write_verdicts(folder / "agreed", votes)
    pairs = [{"prompt": "1+2?", "completion": f" so {i}"} for i in range(2)]
    Dataset.from_list(pairs).to_parquet(folder / "pairs" / "train.parquet")
    outcomes = [{"prompt": "1+2?", "completion": f"so {i}\n\nthus {i}", "label": i == 3} for i in (3, 4)]
    Dataset.from_list(outcomes).to_parquet(folder / "outcomes" / "train.parquet")
    shutil.copytree(folder / "policy", folder / "implicit")
    StepFormat(head="implicit", reference_model="policy").save(folder / "implicit")


def words(command: str) -> list[str]:
    """Split a command line at spaces. `END!` is the stop string `# END!`."""
    return ["# END!" if word == "END!" else word for word in command.split()]


# Invariants of results


def finite(value: Any) -> None:
    """Check that a value of JSON has no `NaN` and no infinity."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        finite(inner)
    assert not isinstance(value, float) or math.isfinite(value)


def read(path: Path) -> Any:
    value = json.loads(path.read_text(encoding="utf-8"))
    finite(value)
    return value


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def is_probability(value: Any) -> bool:
    return isinstance(value, float | int) and 0 <= value <= 1


def check_dataset(work: Path, stdout: str) -> None:
    """Counts add up, and labels, parents and scores are in range."""
    report = read(work / "OUT" / "build_report.json")
    assert report["records_in"] == report["records_kept"] + sum(report["dropped"].values())
    labelled = 0
    for split, expected in report["rows"].items():
        [file] = (work / "OUT" / "data").glob(f"{split}-*.parquet")
        rows = pq.read_table(file).to_pylist()
        assert len(rows) == expected > 0
        for row in rows:
            if "labels" not in row:
                assert row["completion"].strip() and row["prompt"]
                assert all(is_probability(row[name]) for name in ("score", "mc_score") if name in row)
                continue
            size = len(row["completions"])
            assert len(row["labels"]) == size > 0 and row["prompt"].strip()
            assert all(label is None or is_probability(label) for label in row["labels"])
            assert all(step.strip() for step in row["completions"])
            assert all(-1 <= parent < i for i, parent in enumerate(row.get("parents") or ()))
            assert all(weight >= 0 and math.isfinite(weight) for weight in row.get("label_weights") or ())
            labelled += sum(label is not None for label in row["labels"])
    assert labelled == report["labelled_steps"] or report["view"] in ("sft", "raft")
    assert "NaN" not in (work / "OUT" / "README.md").read_text(encoding="utf-8")


def check_grids(work: Path, stdout: str) -> None:
    """Solutions agree with the givens, and have no blanks."""
    report = read(work / "OUT" / "build_report.json")
    for split, expected in report["rows"].items():
        [file] = (work / "OUT" / "data").glob(f"{split}-*.parquet")
        rows = pq.read_table(file).to_pylist()
        assert len(rows) == expected > 0
        for row in rows:
            pairs = list(zip(row["puzzle"], row["solution"], strict=True))
            assert len(pairs) == row["height"] * row["width"] > 0
            assert all(answer >= 2 and given in (1, answer) for given, answer in pairs)


def check_answers(work: Path, stdout: str) -> None:
    assert "nan" not in stdout.lower()
    rows = lines_of(work / "answers.jsonl")
    assert rows
    for row in rows:
        finite(row)


def check_run(work: Path, stdout: str) -> None:
    """The summary counts all problems, and values and weights of the nodes are in range."""
    out = work / "OUT" if (work / "OUT").exists() else work / "run"
    summary = read(next(out.glob("summary-*.json")))
    rows = pq.read_table(next(out.glob("nodes-*.parquet"))).to_pylist()
    ended = sum(count for status, count in summary["problems"].items() if status not in ("open", "error"))
    assert len(rows) == ended > 0
    for row in rows:
        assert len(row["nodes"]) == row["num_nodes"]
        for i, node in enumerate(row["nodes"]):
            assert -1 <= node["parent"] < i and (node["value"] is None or is_probability(node["value"]))
            assert all(0 <= token < 2**31 for token in node["token_ids"] or ())


def check_page(work: Path, stdout: str) -> None:
    page = (work / "page.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>") and "<script>alert" not in page


def check_table(work: Path, stdout: str) -> None:
    assert (work / "table.md").read_text(encoding="utf-8").startswith("<!-- Made by `trl-hrm table`. -->")
    assert all(path.stat().st_size for path in (work / "table_files").iterdir())


def check_printed(work: Path, stdout: str) -> None:
    assert stdout.strip()


def check_scores(work: Path, stdout: str) -> None:
    for row in lines_of(work / "scores.jsonl"):
        assert row["scores"] is None or len(row["scores"]) == len(row["completions"])
        assert all(score is None or is_probability(score) for score in row["scores"] or ())


def check_results(work: Path, stdout: str) -> None:
    """Curves are between 0 and 1, and scores of candidates are in range."""
    out = next(
        work / name for name in ("OUT", "parted", "results", "searched") if (work / name / "results.json").exists()
    )
    results = read(out / "results.json")
    for points in results["curves"].values():
        assert [point["n"] for point in points] == results["n"]
        assert all(0 <= point["low"] <= point["accuracy"] <= point["high"] <= 1 for point in points)
    for file in out.glob("candidates*.jsonl"):
        rows = lines_of(file)
        assert len(rows) == results["num_problems"] > 0
        for row in rows:
            for scores in row.get("scores") or ():
                assert all(is_probability(score) for score in scores or ())


def check_evaluation(work: Path, stdout: str) -> None:
    """Curves are between 0 and 1, and greedy decoding has one point."""
    out = next(work / name for name in ("OUT", "evaluated") if (work / name / "results.json").exists())
    curves = read(out / "results.json")["curves"]
    assert len(curves["greedy"]) == 1 and curves["pass_at_n"][0]["n"] == 1
    for points in curves.values():
        assert all(0 <= point["low"] <= point["accuracy"] <= point["high"] <= 1 for point in points)


def check_verdicts(work: Path, stdout: str) -> None:
    """Votes name a step or none, labels are probabilities, and the counts add up."""
    out = next(work / name for name in ("OUT", "verdicts") if (work / name / "verdicts.jsonl").exists())
    rows, summary = lines_of(out / "verdicts.jsonl"), read(out / "summary.json")
    for row in rows:
        assert len(row["completions"]) == len(row["labels"]) == len(row["node_ids"]) > 0
        assert all(label is None or is_probability(label) for label in row["labels"])
        assert all(vote is None or -1 <= vote < len(row["node_ids"]) for vote in row["judge_votes"])
    votes = [vote for row in rows for vote in row["judge_votes"]]
    assert (len(rows), len(votes)) == (summary["solutions"], summary["votes"])
    assert sum(vote is None for vote in votes) == sum(summary["unreadable"].values())


def check_benchmark(work: Path, stdout: str) -> None:
    results = read(work / "OUT" / "results.json")
    assert results["suites"]
    for row in lines_of(work / "OUT" / "scores.jsonl"):
        assert all(is_probability(score) for score in row.get("scores") or ())


def check_model(work: Path, stdout: str) -> None:
    assert (work / "OUT" / "model.safetensors").stat().st_size
    assert "nan" not in stdout.lower()


def check_settings(work: Path, stdout: str) -> None:
    """`--print_config` prints settings that mean the same when they are read again."""
    assert isinstance(yaml.safe_load(stdout), dict)


# Smallest settings of each command, for files of settings and mutated options
SETTINGS = {
    "build-prm800k": f"prm800k.jsonl {BUILD}",
    "build-math-shepherd": f"shepherd.jsonl {BUILD} --view prm",
    "build-stepwise": f"steps.jsonl {BUILD} --view hrm --max_merge 2",
    "build-grid": GRID.partition(" ")[2],
    "annotate": f"{ANNOTATE.partition(' ')[2]} --output_dir OUT",
    "export": f"run {BUILD} --labels soft",
    "judge": f"steps.jsonl {JUDGE} --output_dir OUT",
    "inspect": "run --problem 0 --html page.html",
    "select-raft": f"--candidates solutions.jsonl {MODEL} {BUILD}",
    "push-dataset": "dataset --repo_id me/dataset --dry_run",
    "best-of-n": f"--candidates candidates.jsonl {MODEL} --n 1 2 --output_dir OUT",
    "evaluate": f"{EVALUATE} --output_dir OUT",
    "step-search": f"{STEP_SEARCH} --output_dir OUT",
    "benchmark": f"processbench.jsonl --suite processbench --validation_size 0.0 {MODEL} --output_dir OUT",
    "report": "results --output page.html",
    "table": "layout.yaml --runs . --output table.md",
    "score": f"steps.jsonl {MODEL} --output scores.jsonl",
    "app": "--reward_model model --port 7861",
    "solve": "grid puzzles.txt --output answers.jsonl",
    "reason": "--size 4 --systems loop hrm --output_dir OUT",
    "demo": "--profile quick --seed 1 --output_dir OUT",
    "quickstart": "--output_dir OUT --max_steps 1",
    "env": "",
}


def settings(name: str) -> dict[str, Any]:
    """Return the settings of a command as in a file."""
    from trl_hrm.command_parser import CommandParser

    config, _ = CommandParser(getattr(trl_hrm, COMMANDS[name].config)).read(words(SETTINGS[name]))
    return config.settings()


def targets() -> list[Target]:
    """Return all targets."""

    def target(command: str, file: str, check: Callable, weight: float = 1.0, about: str = "") -> Target:
        return Target(command, file, check, weight, about)

    found = [
        target(f"build-prm800k prm800k.jsonl {BUILD}", "prm800k.jsonl", check_dataset, 2),
        target(f"build-prm800k prm800k.jsonl {BUILD} --exclude exclude.jsonl", "exclude.jsonl", check_dataset),
        target(f"build-math-shepherd shepherd.jsonl {BUILD}", "shepherd.jsonl", check_dataset, 2),
        target(f"build-stepwise steps.jsonl {BUILD}", "steps.jsonl", check_dataset, 2),
        target(f"build-stepwise trees.jsonl {BUILD} --view hrm", "trees.jsonl", check_dataset),
        target(f"build-stepwise trees.jsonl {BUILD} --view prm", "trees.jsonl", check_dataset),
        target(f"build-stepwise steps.jsonl {BUILD} --view orm", "steps.jsonl", check_dataset),
        target(f"build-stepwise array.json {BUILD}", "array.json", check_dataset),
        target(f"build-stepwise steps.jsonl.gz {BUILD}", "steps.jsonl.gz", check_dataset),
        target(f"build-stepwise rows {BUILD}", "rows/*.parquet", check_dataset, about="rows"),
        target(f"{ANNOTATE} --output_dir OUT", "problems.jsonl", check_run, 0.5),
        target(f"{ANNOTATE} --output_dir OUT --prompt prompt.txt", "prompt.txt", check_run, 0.2),
        target(f"{ANNOTATE} --output_dir OUT", "policy/*.json", check_run, 0.3, "policy"),
        target(f"{ANNOTATE} --output_dir OUT", "policy/*.safetensors", check_run, 0.3, "policy"),
        target(f"{ANNOTATE} --limit 2 --num_children 4 --max_depth 4 --max_step_tokens 30 --output_dir run", "run/*.json*", check_run, 0.3),
        target(f"{MORE} --output_dir OUT", "run/*.json*", check_run, 0.3, "run"),
        target(f"export run {BUILD}", "run/*.json*", check_dataset, 1, "run"),
        target(f"export run {BUILD} --labels entropy --eta 2", "run/*.parquet", check_dataset, 1, "run"),
        target(f"export run {BUILD} --labels progress --view hrm", "run/*.parquet", check_dataset, 1, "run"),
        target(f"export agreed {BUILD} --consensus", "agreed/judges/judge/*.jsonl", check_dataset, 1, "agreed"),
        target(f"export agreed {BUILD} --consensus --disagreement weight", "agreed/*.parquet", check_dataset, 1, "agreed"),
        target(f"export run {BUILD} --view sft", "run/*.parquet", check_dataset, 1, "run"),
        target(f"export run {BUILD} --view sft --prefixes --min_mc_score 0.5 --hnc", "run/*.parquet", check_dataset, 1, "run"),
        target(f"export openr.jsonl --format openr {BUILD}", "openr.jsonl", check_dataset),
        target(f"judge steps.jsonl {JUDGE} --output_dir OUT", "steps.jsonl", check_verdicts, 0.5),
        target(f"judge trees.jsonl {JUDGE} --output_dir OUT", "trees.jsonl", check_verdicts, 0.3),
        target(f"judge candidates.jsonl {JUDGE} --output_dir OUT", "candidates.jsonl", check_verdicts, 0.3),
        target(f"judge steps.jsonl {JUDGE} --output_dir OUT", "judge.json", check_verdicts, 0.3),
        target(f"judge steps.jsonl {JUDGE} --output_dir verdicts", "verdicts/*.json*", check_verdicts, 0.3, "verdicts"),
        target("inspect run --problem 0 --html page.html", "run/*", check_page, 1, "run"),
        target(f"select-raft --candidates solutions.jsonl {MODEL} {BUILD}", "solutions.jsonl", check_dataset),
        target(f"select-raft --candidates pool {MODEL} {BUILD}", "pool/*.parquet", check_dataset, 0.5, "pool"),
        target(f"select-raft --candidates run {MODEL} {BUILD}", "run/*", check_dataset, 0.5, "run"),
        target("push-dataset dataset --repo_id me/dataset --dry_run", "dataset/*.json", check_printed, 1, "dataset"),
        target("push-dataset dataset --repo_id me/dataset --dry_run", "dataset/data/*.parquet", check_printed, 1, "dataset"),
        target("push-dataset dataset --repo_id me/dataset --dry_run", "dataset/README.md", check_printed, 1, "dataset"),
        target(f"{PARTED} --output_dir OUT", "candidates.jsonl", check_results),
        target(f"{PARTED} --output_dir parted", "parted/*.jsonl", check_results, about="parted"),
        target(f"best-of-n {BEST_OF_N} --output_dir results --overwrite", "results/samples/*", check_results, 0.3, "results"),
        target(f"evaluate {EVALUATE} --output_dir evaluated --overwrite", "evaluated/samples/*", check_evaluation, 0.3, "evaluated"),
        target(f"evaluate {EVALUATE} --output_dir evaluated --overwrite", "evaluated/*", check_evaluation, 0.3, "evaluated"),
        target(f"evaluate {EVALUATE} --output_dir OUT", "problems.jsonl", check_evaluation, 0.3),
        target("report results evaluated --output page.html", "evaluated/*.json*", check_page, 0.5, "evaluated"),
        target(f"step-search {STEP_SEARCH} --output_dir searched --overwrite", "searched/n-2/*", check_results, 0.3, "searched"),
        target(f"best-of-n {BEST_OF_N} --output_dir results --overwrite", "results/*", check_results, 0.3, "results"),
        target(f"step-search {STEP_SEARCH} --output_dir searched --overwrite", "searched/*", check_results, 0.3, "searched"),
        target(f"step-search {STEP_SEARCH} --output_dir OUT", "problems.jsonl", check_results, 0.3),
        target("report results given judged searched --output page.html", "results/*.json*", check_page, 0.5, "results"),
        target("report results given judged --output page.html", "judged/*.json*", check_page, 0.5, "judged"),
        target("report searched --output page.html", "searched/*.json*", check_page, 0.5, "searched"),
        target("table layout.yaml --runs . --output table.md", "layout.yaml", check_table, 0.5),
        target("table layout.yaml --runs . --output table.md", "results/results.json", check_table, 0.3, "results"),
        target(f"score steps.jsonl {MODEL} --output scores.jsonl", "steps.jsonl", check_scores),
        target(f"score trees.jsonl {MODEL}", "trees.jsonl", check_printed),
        target(f"score steps.jsonl {MODEL} --output scores.jsonl", "model/*.json", check_scores, 1, "model"),
        target(f"score steps.jsonl {MODEL} --output scores.jsonl", "model/*.safetensors", check_scores, 1, "model"),
        target(f"reward --model_name_or_path model --dataset_name dataset {TRAIN}", "dataset/data/*.parquet", check_model, 0.3, "dataset"),
        target(f"implicit-prm --model_name_or_path policy --dataset_name outcomes {TRAIN}", "outcomes/*.parquet", check_model, 0.2, "outcomes"),
        target("score steps.jsonl --reward_model implicit --output scores.jsonl", "implicit/*.json", check_scores, 0.5, "implicit"),
        target(f"kl-self --model_name_or_path policy --dataset_name pairs {TRAIN}", "pairs/*.parquet", check_model, 0.1, "pairs"),
        target(GRID, "grids.csv", check_grids, 2),
        target("solve grid puzzles.txt --output answers.jsonl", "puzzles.txt", check_answers),
        target("solve grid puzzles.txt --output answers.jsonl", "grid/*.json", check_answers, 1, "grid"),
        target("solve grid puzzles.txt --output answers.jsonl", "grid/*.safetensors", check_answers, 1, "grid"),
        target(f"train-grid --dataset_name grids --hidden_size 16 --num_attention_heads 2 {TRAIN_GRID}", "grids/data/train-*.parquet", check_model, 0.2, "grids"),
        target(f"grpo --model_name_or_path policy {GRPO} {MODEL} {TRAIN}", "problems.jsonl", check_model, 0.1),
        target(f"grpo --model_name_or_path policy {GRPO} {MODEL} {TRAIN}", "model/*.json", check_model, 0.1, "model"),
    ]  # fmt: skip
    for suite, name in (("processbench", "processbench"), ("prmbench", "prmbench"), ("bigbenchmistake", "mistake")):
        line = f"benchmark {name}.jsonl --suite {suite} --validation_size 0.0 {MODEL} --output_dir OUT"
        found.append(target(line, f"{name}.jsonl", check_benchmark))
    for name in SETTINGS:
        if name != "env":
            found.append(target(f"{name} --config {name}.yaml --print_config", f"{name}.yaml", check_settings, 0.3))
    runnable = [
        name
        for name in SETTINGS
        if name not in ("app", "demo", "quickstart", "reason", "env", "step-search", "annotate", "evaluate")
    ]
    checks = {"judge": check_verdicts, "score": check_scores, "report": check_page, "table": check_table, "inspect": check_page, "push-dataset": check_printed, "build-grid": check_grids, "solve": check_answers,
              "best-of-n": check_results, "benchmark": check_benchmark}  # fmt: skip
    found += [target(f"{name} --config {name}.yaml", "", checks.get(name, check_dataset), 0.3) for name in runnable]
    found += [
        target(f"{name} --config {name}.yaml --print_config", "", check_settings, 0.3)
        for name in SETTINGS
        if name != "env"
    ]
    return found
