"""Small settings for every command, on the inputs of the fixture `work`."""

import contextlib
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

from transformers import AutoTokenizer

import trl_hrm
from trl_hrm.cli import COMMANDS

from ..helpers import save_checkpoint
from ..reasoning.grids import save_grid_model
from ..search.policies import KNOWN


POLICY = {
    "policy": "policy",
    "engine": "transformers",
    "prompt": "question",
    "prompt_style": "plain",
    "segmentation": "step_header",
    "final_stops": ["# END!"],
}
PROBLEMS = {"problems": "problems.jsonl", "limit": 2}
REWARD_MODEL = {"reward_model": "model", "reward_model_max_length": 512}
COMPLETION = {"text": "a", "rating": 0, "flagged": False}
PRM800K = {
    "question": {"problem": "q", "ground_truth_answer": "1"},
    "label": {
        "steps": [{"completions": [COMPLETION], "chosen_completion": 0, "human_completion": None}],
        "finish_reason": "solution",
    },
}
SHEPHERD = {
    "input": "1+2? Step 1: so 3 ки\nStep 2: thus 3 ки",
    "label": "1+2? Step 1: so 3 +\nStep 2: thus 3 -",
    "task": "GSM8K",
}
JUDGED = {
    "id": "a",
    "problem": "1+2?",
    "steps": ["so 3", "thus 4"],
    "label": 1,
    "generator": "g",
    "final_answer_correct": False,
}
LAYOUT = """
title: Best of N
source: a paper
points: [1, 2]
series:
  - {label: lowest score, results: results, curve: best_of_n/min, paper: [0.5, null]}
"""
# ordered so that each finds its input
SETTINGS = {
    "build-prm800k": {"inputs": ["prm800k.jsonl"], "output_dir": "OUT", "neutral": "0.25", "test_size": 0.0},
    "build-math-shepherd": {"inputs": ["shepherd.jsonl"], "output_dir": "OUT", "view": "prm", "test_size": 0.0},
    "build-stepwise": {
        "inputs": ["rows.jsonl"],
        "output_dir": "OUT",
        "view": "hrm",
        "merge_separator": " | ",
        "columns": {"prompt": "question"},
    },
    "build-grid": {
        "family": "sudoku",
        "size": 4,
        "num_train": 4,
        "num_validation": 2,
        "num_test": 2,
        "num_few_blanks": 0,
        "output_dir": "OUT",
    },
    "annotate": {
        **POLICY,
        **PROBLEMS,
        "output_dir": "OUT",
        "num_children": 2,
        "max_depth": 2,
        "max_step_tokens": 30,
        "engine_args": {"batch_size": 8},
    },
    "export": {"inputs": ["run"], "output_dir": "OUT", "labels": "entropy", "eta": 2.0, "hnc": True, "hnc_rule": "per_child", "hnc_min_children": 2, "balance": 2, "balance_by": "value_and_depth", "test_size": 0.5},
    "judge": {"input": "rows.jsonl", "judge": "judge", "engine": "transformers", "template": "judge.json", "num_votes": 2, "max_response_tokens": 8, "columns": {"prompt": "question"}, "output_dir": "OUT"},
    "inspect": {"input": "run", "problem": "0", "html": "OUT/page.html", "breadth": 3},
    "select-raft": {"candidates": "solutions.jsonl", "output_dir": "OUT", "max_kept": 2, "spans": [1, 2], "test_size": 0.0, **REWARD_MODEL},
    "push-dataset": {"inputs": ["dataset"], "repo_id": "me/dataset", "dry_run": True},
    "evaluate": {**POLICY, **PROBLEMS, "policy": ["policy"], "output_dir": "OUT", "n": [1, 2], "max_solution_tokens": 30},
    "best-of-n": {**POLICY, **PROBLEMS, **REWARD_MODEL, "output_dir": "OUT", "n": [1, 2], "max_solution_tokens": 30},
    "step-search": {**POLICY, **PROBLEMS, **REWARD_MODEL, "output_dir": "OUT", "n": [2], "max_depth": 2, "max_step_tokens": 20},
    "benchmark": {"data": ["judged.jsonl"], "suite": ["processbench"], "output_dir": "OUT", "validation_size": 0.0, **REWARD_MODEL},
    "report": {"inputs": ["results"], "output": "OUT/report.html"},
    "table": {"layout": "layout.yaml", "runs": ".", "output": "OUT/table.md"},
    "solve": {"model": "grid", "file": "puzzles.txt", "votes": 2, "output": "OUT/answers.jsonl"},
    "score": {"input": "rows.jsonl", "output": "OUT/scores.jsonl", "columns": {"prompt": "question"}, **REWARD_MODEL},
    "env": {},
}  # fmt: skip


def config_of(name: str, folder: str):
    """Return the config of a command that writes to `folder`."""
    return getattr(trl_hrm, COMMANDS[name].config)(**settings_of(name, folder))


def settings_of(name: str, folder: str) -> dict:
    return {
        key: value.replace("OUT", folder) if isinstance(value, str) else value for key, value in SETTINGS[name].items()
    }


def words_of(config: type, settings: dict) -> list[str]:
    """Return the settings as command-line words."""
    first, rest = [], []
    for field in fields(config):
        if field.name not in settings:
            continue
        value = settings[field.name]
        if field.name == "columns":
            shown = [f"{name}={column}" for name, column in value.items()]
        elif isinstance(value, dict):
            shown = [json.dumps(value)]
        elif value is True:
            shown = []
        else:
            shown = [str(one) for one in (value if isinstance(value, list) else [value])]
        if field.metadata.get("positional"):
            first += shown
        else:
            rest += [f"--{field.name}", *shown]
    return [*first, *rest]


def files_of(folder: Path, name: str) -> dict[str, object]:
    """Return the files that a command wrote, without times and paths."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".md", ".html", ".txt"):
            text = content.decode().replace(name, "OUT")
            content = re.sub(r'"(date|seconds|\w+_seconds|\w+_per_second|busy|spent)": [^,}\n]+', r'"\1": 0', text)
        if path.name.startswith(("log-", "judgements-")):  # concurrent problems finish in any order
            content = sorted(content.splitlines())
        found[str(path.relative_to(folder))] = content
    return found


def save_judge(work: Path, policy: str | Path) -> None:
    """Save the policy with a chat template as `judge`, and a short template in `judge.json`."""
    shutil.copytree(policy, work / "judge")
    tokenizer = AutoTokenizer.from_pretrained(work / "judge")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(work / "judge")
    template = {"scope": "first_error", "user": "{problem} {steps} \\boxed{-1}"}
    (work / "judge.json").write_text(json.dumps(template), encoding="utf-8")


def make_inputs(work: Path, policy: str) -> None:
    """Make the inputs of all commands, each with the command that writes it."""
    (work / "policy").symlink_to(policy)
    (work / "model").mkdir()
    save_checkpoint(work / "model")
    save_judge(work, policy)
    save_grid_model(work / "grid")
    (work / "puzzles.txt").write_text("1...\n..2.\n.3..\n...4\n", encoding="utf-8")
    rows = [{"question": f"{i}+2?", "completions": ["so 3", "thus 3"], "labels": [True, False]} for i in range(8)]
    solutions = [
        {"prompt": "1+2?", "completion": text} for text in ("# Step 1\nso 3", "# Step 1\nso 4", "# Step 1\nx")
    ]
    for name, lines in {
        "prm800k": [PRM800K],
        "shepherd": [SHEPHERD],
        "rows": rows,
        "problems": KNOWN,
        "solutions": solutions,
        "judged": [JUDGED],
    }.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (work / "layout.yaml").write_text(LAYOUT, encoding="utf-8")
    with contextlib.chdir(work):
        for name, folder in (("annotate", "run"), ("export", "dataset"), ("best-of-n", "results")):
            getattr(trl_hrm, COMMANDS[name].function)(config_of(name, folder))
