"""The commands `best-of-n` and `step-search` sample with one vLLM engine and score with another. Slow: real vLLM."""

import json

import pytest

from trl_hrm import StepFormat, StepScorer
from trl_hrm.cli import main
from trl_hrm.evaluation.results import load_candidates, load_results

from ..helpers import tiny_model, tiny_tokenizer
from ..search.policies import KNOWN
from ..search.serving import ENVIRONMENT


pytestmark = pytest.mark.slow

PROMPT = "--prompt question --prompt_style plain --segmentation step_header".split() + ["--final_stops", "# END!"]
VLLM = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "block_size": 32}


@pytest.fixture
def command(tmp_path, policy, monkeypatch) -> list[str]:
    """The command's problems, policy and reward model, both run by vLLM."""
    pytest.importorskip("vllm", reason="needs vLLM; `make test-slow` installs it")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    tiny_model().save_pretrained(tmp_path / "hrm")
    tiny_tokenizer().save_pretrained(tmp_path / "hrm")
    StepFormat().save(tmp_path / "hrm")
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in KNOWN))
    words = ["--problems", str(tmp_path / "problems.jsonl"), "--reward_model", str(tmp_path / "hrm")]
    words += ["--policy", policy, "--engine", "vllm", "--policy_dtype", "float32", *PROMPT]
    words += ["--engine_args", json.dumps(VLLM | {"max_model_len": 256})]
    return [*words, "--reward_model_engine", "vllm", "--reward_model_args", json.dumps(VLLM | {"max_model_len": 512})]


def test_best_of_n(command, tmp_path):
    """The solutions written by vLLM have the scores that transformers gives them, and these scores choose the winners."""
    out = tmp_path / "out"
    options = ["--n", "1", "2", "6", "--max_solution_tokens", "60", "--aggregate", "min"]
    assert main(["best-of-n", *command, *options, "--output_dir", str(out)]) == 0
    results, problems = load_results(out), list(load_candidates(out))
    assert results.num_problems == 4 and results.n == [1, 2, 6]
    assert (results.policy["engine"], results.reward_model["scorer"]) == ("vllm", "vllm")
    found = [candidate for problem in problems for candidate in problem.candidates]
    assert results.cost["policy"]["num_sequences"] == len(found) == 24
    assert results.cost["policy"]["num_tokens"] == sum(candidate.num_tokens for candidate in found)
    assert {candidate.correct for candidate in found} >= {True, False}
    scorer = StepScorer.from_pretrained(str(tmp_path / "hrm"))
    for problem in problems:
        expected = scorer.score([problem.problem], [[candidate.steps for candidate in problem.candidates]])[0]
        for candidate, scores in zip(problem.candidates, expected, strict=True):
            assert candidate.scores == pytest.approx(scores, abs=1e-4)
    assert len({score for candidate in found for score in candidate.scores}) > 8
    for point in results.curves["best_of_n/min"]:
        groups = [problem.candidates[: point["n"]] for problem in problems]
        chosen = [min(group, key=lambda candidate: (-min(candidate.scores), candidate.text)) for group in groups]
        assert point["accuracy"] == pytest.approx(sum(bool(candidate.correct) for candidate in chosen) / 4)

    words = ["best-of-n", "--candidates", str(out / "samples"), "--reward_model", str(tmp_path / "hrm")]
    words += ["--n", "1", "2", "6", "--aggregate", "min", "--output_dir", str(tmp_path / "again")]
    assert main(words) == 0
    assert load_results(tmp_path / "again").curves == results.curves


def test_step_search(command, tmp_path):
    """Both engines are in memory at once, and a thread calls the scorer at every depth."""
    options = ["--n", "3", "--max_step_tokens", "30", "--max_depth", "5"]
    assert main(["step-search", *command, *options, "--output_dir", str(tmp_path / "out")]) == 0
    results = load_results(tmp_path / "out")
    assert results.num_problems == 4 and results.cost["scorer"]["num_calls"] >= 2
    scorer = StepScorer.from_pretrained(str(tmp_path / "hrm"))
    problems = list(load_candidates(tmp_path / "out", "candidates-n3.jsonl"))
    for problem in problems:
        [chosen] = problem.candidates
        [[expected]] = scorer.score([problem.problem], [[chosen.steps]])
        assert chosen.scores == pytest.approx(expected, abs=1e-4)
    assert len({score for problem in problems for score in problem.candidates[0].scores}) > 4
