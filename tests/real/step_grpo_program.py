"""
Train SmolLM2 with LoRA and `StepGRPOTrainer`, for a test that runs it as a program.

    python tests/real/step_grpo_program.py POLICY REWARD_MODEL PROBLEMS.jsonl OUTPUT_DIR [--resume] [--kill_at_step N]

With `--kill_at_step`, the process kills itself with SIGKILL after this optimizer step, before it is saved. Writes the
log to `log.json` in the output folder.
"""

import argparse
import json
import os
import signal
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

from trl_hrm import StepGRPOConfig, StepGRPOTrainer, StepReward, extract_answer


class KillAtStep(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def is_right(completions: list, answer: list[str], **_) -> list[float]:
    found = [extract_answer(messages[0]["content"], ("last_number",)) for messages in completions]
    return [float(one == reference) for one, reference in zip(found, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("policy", "reward_model", "problems", "output_dir"):
        parser.add_argument(name)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill_at_step", type=int)
    given = parser.parse_args()
    rows = [json.loads(line) for line in Path(given.problems).read_text(encoding="utf-8").splitlines()]
    request = "Solve this problem in at most three short sentences: "
    trainer = StepGRPOTrainer(
        model=given.policy,
        reward_funcs=[is_right],
        step_reward=StepReward(
            given.reward_model, problem_column="problem", segmentation="sentence", min_steps=1, dtype="float32"
        ),
        args=StepGRPOConfig(
            given.output_dir,
            step_credit="min_form",
            use_cpu=True,
            bf16=False,
            report_to="trackio",
            project="step-grpo",
            run_name="run",
            log_completions=True,
            num_completions_to_print=0,
            disable_tqdm=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=48,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            max_steps=5,
        ),
        train_dataset=Dataset.from_list(
            [row | {"prompt": [{"role": "user", "content": request + row["problem"]}]} for row in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(given.policy),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "down_proj"]),
        callbacks=[] if given.kill_at_step is None else [KillAtStep(given.kill_at_step)],
    )
    trainer.train(resume_from_checkpoint=given.resume or None)
    trainer.save_model()
    Path(given.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")


if __name__ == "__main__":
    main()
