"""
`PRMTrainer` on the rows of a folder. Each process also writes facts that only it knows next to the results.

    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml tests/distributed/prm_probe.py FOLDER OUTPUT_DIR BATCH_SIZE

`FOLDER` holds a model, `train.jsonl` and `test.jsonl`. Each process writes `probe-RANK.json` into the output folder.
"""

import sys
from pathlib import Path

from accelerate.state import PartialState
from datasets import load_dataset
from probing import write_facts
from transformers import AutoModelForTokenClassification, AutoTokenizer

from trl_hrm.prm import PRMConfig, PRMTrainer


folder, output_dir, batch_size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rows = load_dataset("json", data_files={split: str(folder / f"{split}.jsonl") for split in ("train", "test")})
trainer = PRMTrainer(
    AutoModelForTokenClassification.from_pretrained(folder),
    PRMConfig(
        output_dir,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="no",
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
    processing_class=AutoTokenizer.from_pretrained(folder),
)
trainer.evaluate()  # an evaluation before training must not stop the processes from exchanging gradients
trainer.train()
write_facts(trainer)
trainer.save_model()
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
