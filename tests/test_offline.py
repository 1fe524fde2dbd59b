"""Commands on local data need no network: all of them run one after another without any connection."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trl_hrm.cli import COMMANDS

from .evaluation.benchmark_rows import process_row
from .fakes import guarded, write_rows
from .helpers import save_checkpoint
from .reasoning.grids import save_grid_model
from .scripts.commands import save_judge
from .search.policies import KNOWN


ELSEWHERE = {
    "app": "it serves until it is stopped: tests/scripts/test_app.py opens its page in a browser",
    "demo": "it takes minutes: tests/demo/test_demo.py runs it behind the same guard",
}
POLICY = (
    "--engine transformers --prompt question --prompt_style plain --segmentation step_header --final_stops".split()
)
LOCAL = {
    "build-prm800k": "build-prm800k phase2.jsonl --output_dir prm800k".split(),
    "build-math-shepherd": "build-math-shepherd shepherd.jsonl --output_dir shepherd".split(),
    "build-stepwise": "build-stepwise rows.jsonl --view hrm --output_dir rows".split(),
    "build-grid": "build-grid sudoku --size 4 --num_train 4 --num_validation 2 --num_test 2 --num_few_blanks 0 --output_dir grids".split(),
    "annotate": [*"annotate --problems problems.jsonl --policy policy --output_dir run".split(), *POLICY, "# END!"],
    "judge": "judge rows.jsonl --judge judge --engine transformers --template judge.json --max_response_tokens 8 --output_dir judged".split(),
    "inspect": "inspect run --problem 0".split(),
    "export": "export run --view hrm --hnc --output_dir search".split(),
    "select-raft": "select-raft --candidates run --reward_model model --aggregate min --output_dir raft".split(),
    "best-of-n": [
        *"best-of-n --problems problems.jsonl --policy policy --reward_model model --output_dir bon --n 1 2".split(),
        *POLICY,
        "# END!",
    ],
    "evaluate": [
        *"evaluate --problems problems.jsonl --policy policy --output_dir evaluated --n 2".split(),
        *POLICY,
        "# END!",
    ],
    "step-search": [
        *"step-search --problems problems.jsonl --policy policy --reward_model model --output_dir steps --n 2".split(),
        *POLICY,
        "# END!",
    ],
    "report": "report bon --output report.html".split(),
    "table": "table layout.yaml --runs . --output table.md".split(),
    "benchmark": "benchmark gsm8k.jsonl --reward_model model --suite processbench --output_dir benchmark".split(),
    "quickstart": "quickstart --max_steps 2 --output_dir quickstart".split(),
    "score": "score rows.jsonl --reward_model model".split(),
    "solve": "solve grid puzzles.txt".split(),
    "reason": "reason --size 4 --num_train 8 --num_validation 2 --num_test 4 --systems loop hrm --seeds 0 --seconds_per_run 1 --num_workers 1 --hidden_size 16 --output_dir reasoned".split(),
    "env": ["env"],
    "push-dataset": "push-dataset rows --repo_id me/rows --private --dry_run".split(),
}
LOCAL["annotate"] += "--num_children 3 --max_depth 4 --max_step_tokens 40 --max_in_flight 24".split()
LOCAL["step-search"] += "--max_depth 3 --max_step_tokens 30".split()
LOCAL["best-of-n"] += "--extractors marker --max_solution_tokens 60".split()
LOCAL["evaluate"] += "--extractors marker --max_solution_tokens 60".split()

DRIVER = """
import json, sys
from trl_hrm.cli import main

for name, words in json.loads(sys.argv[1]).items():
    before = len(open("attempts").readlines())
    code = main(words)
    print("RESULT", json.dumps([name, code, open("attempts").readlines()[before:]]), flush=True)
"""


def run(folder: Path, code: str, *argv: str, offline: bool) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=folder, env=guarded(folder, offline), capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, policy) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    completion = {"text": "a", "rating": 1, "flagged": False}
    step = {"completions": [completion], "chosen_completion": 0, "human_completion": None}
    question = {"problem": "q", "ground_truth_answer": "1"}
    write_rows(
        folder / "phase2.jsonl", [{"question": question, "label": {"steps": [step], "finish_reason": "solution"}}]
    )
    shepherd = {
        "input": "1+2? Step 1: 3. ки\nStep 2: 4. ки",
        "label": "1+2? Step 1: 3. +\nStep 2: 4. -",
        "task": "GSM8K",
    }
    write_rows(folder / "shepherd.jsonl", [shepherd])
    rows = [{"prompt": f"What is {i}?", "completions": ["a", "b"], "labels": [True, False]} for i in range(20)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "problems.jsonl", KNOWN)
    (folder / "layout.yaml").write_text(
        "title: a\nsource: b\npoints: [1, 2]\nseries: [{label: c, results: bon, curve: pass_at_n}]\n"
    )
    write_rows(folder / "gsm8k.jsonl", [process_row(i, i % 4 - 1) for i in range(8)])
    save_checkpoint(folder / "model")
    save_judge(folder, policy)
    save_grid_model(folder / "grid")
    (folder / "puzzles.txt").write_text("1...\n..2.\n.3..\n...4\n")
    shutil.copytree(policy, folder / "policy")
    return folder


@pytest.fixture(
    scope="module",
    params=[pytest.param(True, id="HF_HUB_OFFLINE=1"), pytest.param(False, id="=0", marks=pytest.mark.slow)],
)
def results(request, folder, tmp_path_factory) -> dict[str, tuple[int, list[str]]]:
    """Exit code and attempts of each command. Without HF_HUB_OFFLINE, the libraries may try to use the network."""
    place = tmp_path_factory.mktemp("place") / "copy"
    shutil.copytree(folder, place)
    done = run(place, DRIVER, json.dumps(LOCAL), offline=request.param)
    print(done.stdout, done.stderr)
    found = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if "RESULT" in line]
    return {name: (code, attempts) for name, code, attempts in found}


@pytest.mark.parametrize("command", LOCAL)
def test_command(results, command):
    """Libraries often catch a failed request, so the test checks that no request is made at all."""
    assert results[command] == (0, [])


def test_every_command_is_tested():
    assert sorted([*LOCAL, *ELSEWHERE]) == sorted(COMMANDS)


def test_the_guard_sees_attempts(folder):
    """It must see the Hub clients and child processes. With a guard that sees nothing, every test would pass."""
    code = (
        "import subprocess, sys\n"
        "code = \"from huggingface_hub import HfApi; HfApi(endpoint='http://192.0.2.1').model_info('a/b')\"\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr)"
    )
    run(folder, code, offline=False)
    assert "192.0.2.1" in (folder / "attempts").read_text()
