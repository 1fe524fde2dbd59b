"""Slow: `vllm serve` a checkpoint that the trainer pushed, and score with it under its name on the Hub."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest

from trl_hrm import StepScorer
from trl_hrm.scoring.http_scorer import ServerScorer

from ..helpers import ROOT, load_recipe, make_trainer, random_tree
from ..scoring.solutions import CANDIDATES, PROMPTS, flat
from ..search.serving import ENVIRONMENT


FLAGS = ["--enforce-eager", "--block-size", "32", "--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20)]
pytestmark = pytest.mark.slow


@pytest.fixture
def pushed(hub, repo, tmp_path, monkeypatch) -> str:
    """Return a private repository. The server must read it with the token of its environment."""
    pytest.importorskip("vllm", reason="needs vLLM; `make test-slow` installs it")
    for name, value in ENVIRONMENT.items():
        if name != "HF_HUB_OFFLINE":
            monkeypatch.setenv(name, value)
    trees = [random_tree(random.Random(seed)) for seed in range(4)]
    trainer = make_trainer(tmp_path / "run", trees, hub_model_id=repo, hub_private_repo=True, push_to_hub=True)
    trainer.train()
    trainer.push_to_hub()
    return repo


def test_scores_by_the_name_on_the_hub(hub, pushed, tmp_path, monkeypatch, capsys):
    """Server and client share only the name. A file that was not pushed, or another format, would change scores."""
    expected = StepScorer.from_pretrained(pushed).score(PROMPTS, CANDIDATES, spans=(1, 2))
    assert flat(expected).std() > 0.01
    rows = tmp_path / "solutions.jsonl"
    rows.write_text('{"prompt": "1+2+3?", "completions": ["add 1", "so = 3"]}\n', "utf-8")
    recipe = load_recipe("serve_and_score.py")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # the server has its own cache
    start = len(hub.log)
    with recipe.vllm_server(pushed, FLAGS) as url:
        assert hub.count("GET", "/_(xorb|get)/", start) > 0  # the weights came from the Hub
        scorer = ServerScorer.from_pretrained(pushed, url)
        found = scorer.score(PROMPTS, CANDIDATES, spans=(1, 2))
        np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-4)
        recipe.main(recipe.make_parser().parse_args(["--model", pushed, "--input", str(rows), "--url", url]))
    assert "Largest difference from StepScorer: pipeline " in capsys.readouterr().out
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(url).port))


def test_recipe_starts_and_stops_the_server(pushed, tmp_path):
    """A signal that ends only the recipe would leave a server that holds the GPU's memory."""
    rows = tmp_path / "solutions.jsonl"
    row = {"prompt": "1+2?", "completions": ["so = 3", "x", "thus y"], "parents": [-1, 0, 0]}
    rows.write_text(json.dumps(row) + "\n", "utf-8")
    command = [sys.executable, str(ROOT / "recipes" / "serve_and_score.py"), "--model", pushed, "--input", str(rows)]
    done = subprocess.run([*command, "--", *FLAGS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("StepScorer    pipeline  vllm serve  step") == 2  # a tree with two leaves
    wrong = subprocess.run([*command, "--", "--no-such-option"], capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 1
    assert "`vllm serve` exited with code 2" in wrong.stderr and "--no-such-option" in wrong.stderr
    assert "hf_alice" not in done.stdout + done.stderr + wrong.stdout + wrong.stderr

    process = subprocess.Popen([*command, "--", *FLAGS], stdout=subprocess.PIPE, text=True, bufsize=1)
    while not next(process.stdout).startswith("Starting vLLM"):
        pass
    children = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143 and children and not any(map(is_alive, children))


def children_of(pid: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # the process has ended
            continue
        if parent == pid:
            found.append(int(name))
    return found


def is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
