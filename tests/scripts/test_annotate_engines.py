"""The command `annotate` must make the same trees with every engine under greedy decoding."""

import json

import pytest

from trl_hrm.cli import main
from trl_hrm.search.nodes import read_trees
from trl_hrm.search.run_folder import node_files

from ..search.policies import KNOWN
from ..search.serving import ENVIRONMENT, serve


pytestmark = pytest.mark.slow

SETTINGS = [
    "--prompt",
    "question",
    "--prompt_style",
    "plain",
    "--segmentation",
    "step_header",
    "--final_stops",
    "# END!",
]
# one child, because several greedy ones would be the same
SETTINGS += ["--num_children", "1", "--max_depth", "4", "--max_step_tokens", "40", "--temperature", "0"]
VLLM = {
    "max_model_len": 256,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
}


def annotate(folder, tmp_path, name, *more) -> dict:
    """Run the command and return its nodes without the fields that identify the engine."""
    problems, run = tmp_path / "problems.jsonl", tmp_path / name
    problems.write_text("".join(json.dumps(row) + "\n" for row in KNOWN))
    command = ["annotate", "--problems", str(problems), "--policy", str(folder), "--output_dir", str(run)]
    assert main([*command, *SETTINGS, *more]) == 0
    trees = [tree for file in node_files(run) for tree in read_trees(file)]
    return {
        tree.problem.problem_id: [
            (n.node_id, n.parent, n.token_ids, n.text, n.tail, n.finish, n.stop_reason, n.answer, n.correct, n.seed)
            for n in tree.nodes
        ]
        for tree in trees
    }


def test_all_engines_make_the_same_trees(tmp_path, policy, monkeypatch):
    """Compares node files, so that no part between the command line and the log may depend on the engine."""
    pytest.importorskip("vllm", reason="needs vLLM; `make test-slow` installs it")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    expected = annotate(policy, tmp_path, "transformers", "--engine", "transformers", "--policy_dtype", "float32")
    assert len(expected) == 4 and sum(map(len, expected.values())) >= 8
    assert {node[8] for nodes in expected.values() for node in nodes} >= {None, True}
    options = json.dumps(VLLM)
    assert (
        annotate(policy, tmp_path, "vllm", "--engine", "vllm", "--policy_dtype", "float32", "--engine_args", options)
        == expected
    )
    flags = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--block-size", "32"]
    flags += ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", policy]
    with serve(tmp_path, "vllm.entrypoints.cli.main", "serve", policy, *flags) as server:
        assert annotate(policy, tmp_path, "http", "--engine", "openai", "--policy_urls", server) == expected
