"""
`HRMReasoningTrainer` on the rows of a folder. Each process also writes facts that only it knows next to the results.

    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml tests/distributed/reasoning_probe.py FOLDER OUTPUT_DIR BATCH_SIZE

`FOLDER` holds a model, `train.jsonl` and `test.jsonl`. With `PROBE_RESUME`, it resumes from this checkpoint.
"""

import os
import sys
from pathlib import Path

from accelerate.state import PartialState
from datasets import load_dataset
from probing import write_facts

from trl_hrm.reasoning import HRMReasoningConfig, HRMReasoningTrainer


folder, output_dir, batch_size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rows = load_dataset("json", data_files={split: str(folder / f"{split}.jsonl") for split in ("train", "test")})
trainer = HRMReasoningTrainer(
    str(folder),
    HRMReasoningConfig(
        output_dir,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        optim="adamw",
        learning_rate=3e-3,
        weight_decay=0.1,
        puzzle_learning_rate=0.01,
        warmup_steps=0,
        ema=0.8,
        halt_exploration_prob=0.5,
        max_steps=10,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
)
trainer.evaluate()  # an evaluation before training must not stop the processes from exchanging gradients
trainer.train(resume_from_checkpoint=os.environ.get("PROBE_RESUME"))
write_facts(trainer)
trainer.save_model()
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
