"""`StepGRPOTrainer` with completions from vLLM in the same process ("colocate"). Slow: needs vLLM."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from trl_hrm import StepFormat

from ..helpers import save_checkpoint, tiny_model, tiny_tokenizer
from ..search.serving import ENVIRONMENT


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM; `make test-slow` installs it"),
]
PROGRAM = Path(__file__).with_name("step_grpo_vllm_program.py")


def test_three_steps(tmp_path):
    """
    TRL corrects the difference between the log-probabilities of vLLM and of the policy per sequence, and its correction must fit
    advantages per token. vLLM must sample with the weights of the last step.
    """
    policy, reward_model = tmp_path / "policy", tmp_path / "reward"
    tiny_model(StepFormat(head="lm"), initializer_range=0.1).save_pretrained(policy)
    tiny_tokenizer().save_pretrained(policy)
    reward_model.mkdir()
    save_checkpoint(reward_model)
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(policy), str(reward_model), str(tmp_path / "run")],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    facts = json.loads((tmp_path / "run" / "facts.json").read_text(encoding="utf-8"))
    assert len(facts["batches"]) == 3
    for batch in facts["batches"]:
        assert batch["advantages"] == batch["completions"] and batch["ratio"] == [8, 1]
        assert batch["difference"] < 1e-4  # with the weights of an earlier step, it would be larger
    assert facts["moved"] > 1e-4
    logs = [log for log in facts["log"] if "loss" in log]
    assert [log["sampling/importance_sampling_ratio/mean"] for log in logs] == pytest.approx([1] * 3, abs=1e-3)
    assert any(abs(log["loss"]) > 1e-3 for log in logs)
