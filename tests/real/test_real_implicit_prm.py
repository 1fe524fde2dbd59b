"""An implicit process reward model from SmolLM2-135M: five steps on outcomes, then scores against the logits of both models."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_hrm import ImplicitPRMConfig, ImplicitPRMTrainer, StepFormat, StepScorer


pytestmark = pytest.mark.real_model

ROWS = [
    {"prompt": f"What is {a} + {b} + 1?", "completion": f"We add {a} and {b}.\n\n{a} + {b} = {c}.\n\n{c} + 1 = {c + 1}.", "label": c == a + b}
    for a, b, c in ((2, 3, 5), (2, 3, 6), (4, 4, 8), (4, 4, 7), (1, 6, 7), (1, 6, 5), (9, 3, 12), (9, 3, 11))
]  # fmt: skip


def test_five_steps_and_scores(real_folder, tmp_path):
    base = str(real_folder("smollm2"))
    args = ImplicitPRMConfig(
        str(tmp_path / "out"),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_length=128,
        packing=False,
        prompt_style="chat",
        precompute_ref_log_probs=True,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = ImplicitPRMTrainer(
        base, args, train_dataset=Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(ROWS)
    )
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(0.6931, abs=1e-4)  # the policy is the reference
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.evaluate()["eval_loss"] < before - 0.005
    trainer.save_model()

    scorer = StepScorer.from_pretrained(str(tmp_path / "out"))
    step_format = StepFormat.from_pretrained(tmp_path / "out")
    solution = ROWS[1]["completion"].split("\n\n")
    [[scores]] = scorer.score([ROWS[1]["prompt"]], [[solution]])
    prompt_ids, step_ids = step_format.encode(AutoTokenizer.from_pretrained(base), ROWS[1]["prompt"], solution)
    ids = torch.tensor([prompt_ids + sum(step_ids, [])])
    log_probs = []
    for path in (tmp_path / "out", base):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)(input_ids=ids).logits[0, :-1]
        log_probs.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    ratios = (log_probs[0] - log_probs[1])[len(prompt_ids) - 1 :].split([len(one) for one in step_ids])
    expected = [(step_format.beta * one.sum()).sigmoid().item() for one in ratios]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert any(abs(score - 0.5) > 1e-3 for score in scores)
