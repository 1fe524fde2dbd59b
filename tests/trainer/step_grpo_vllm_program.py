"""
Train a tiny policy with `StepGRPOTrainer` and vLLM in the same process, for a test that runs it as a program.

    python tests/trainer/step_grpo_vllm_program.py POLICY REWARD_MODEL OUTPUT_DIR

Writes `facts.json` to the output folder.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch


# The engine runs in this process, so that its weights can be read and written
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from datasets import Dataset  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402

from trl_hrm import StepGRPOConfig, StepGRPOTrainer, StepReward  # noqa: E402


def sync_weights(self: vllm_generation.VLLMGeneration) -> None:
    """On a CPU, vLLM packs weights when it loads them, so TRL's `load_weights` fails there. This reloads them."""
    runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
    runner.reload_weights(weights_iterator=((name, p.detach().clone()) for name, p in self._iter_named_params()))
    self.llm.reset_prefix_cache()


def main(policy: str, reward_model: str, output_dir: str) -> None:
    vllm_generation.VLLMGeneration.sync_weights = sync_weights
    # On a CPU, vLLM would take most of the memory, compile for half a minute, and compute in bfloat16
    small = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True, "dtype": "float32", "block_size": 32}
    vllm_generation.LLM = partial(vllm_generation.LLM, **small)
    trainer = StepGRPOTrainer(
        model=policy,
        reward_funcs=[lambda completions, **_: [float("3" in text) for text in completions]],
        step_reward=StepReward(reward_model, min_steps=1, segmentation="sentence"),
        args=StepGRPOConfig(
            output_dir,
            step_credit="min_form",
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=128,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=24,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            max_steps=3,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{i} + 2 = ? "} for i in range(8)]),
    )
    batches: list[dict[str, Any]] = []
    compute_loss = trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        mask = inputs["completion_mask"].bool()
        batches.append(
            {
                "advantages": list(inputs["advantages"].shape),
                "completions": list(inputs["completion_ids"].shape),
                "ratio": list(inputs["importance_sampling_ratio"].shape),
                "difference": (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"])[mask]
                .abs()
                .max()
                .item(),
                "loss": loss.item(),
            }
        )
        return loss

    trainer.compute_loss = recording
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = max((weight - before[name]).abs().max().item() for name, weight in trainer.model.named_parameters())
    facts = {"batches": batches, "moved": moved, "log": trainer.state.log_history}
    Path(output_dir, "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
