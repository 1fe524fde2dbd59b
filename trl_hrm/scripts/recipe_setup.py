"""What the recipes share: the data they train on, and how the model is loaded."""

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import ModelConfig


@dataclass
class DatasetArguments:
    """
    The data of a recipe.

    Args:
        dataset_name (`str`): Folder or Hub id of the dataset.
        dataset_config (`str`, *optional*): Configuration of the dataset.
        dataset_train_split (`str`, *optional*, defaults to `"train"`): Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`): Split to evaluate on, if `eval_strategy` is set.
    """

    dataset_name: str = field(metadata={"help": "Folder or Hub id of the dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, if `eval_strategy` is set."}
    )


def model_init_kwargs(model_args: "ModelConfig", training_args: "TrainingArguments") -> dict[str, Any]:
    """Keyword arguments for `from_pretrained`; those of `training_args.model_init_kwargs` win."""
    from trl import get_quantization_config

    quantization_config = get_quantization_config(model_args)
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **({} if quantization_config is None else {"quantization_config": quantization_config}),
        **(training_args.model_init_kwargs or {}),
    }


def load_splits(
    script_args: DatasetArguments, training_args: "TrainingArguments"
) -> tuple["Dataset", "Dataset | None"]:
    """
    The splits to train and to evaluate on, the latter `None` without an `eval_strategy`.

    Args:
        script_args ([`DatasetArguments`]):
            Names the data.
        training_args ([`~transformers.TrainingArguments`]):
            Tells whether it evaluates.

    Raises:
        `ValueError`: If a split does not exist.
    """
    from datasets import load_dataset

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    evaluates = training_args.eval_strategy != "no"
    wanted = {script_args.dataset_train_split} | ({script_args.dataset_test_split} if evaluates else set())
    missing = wanted - set(dataset)
    if missing:
        raise ValueError(
            f"{script_args.dataset_name} has the splits {list(dataset)}, but {sorted(missing)} is asked for. Set "
            "`dataset_train_split` and `dataset_test_split`, or `eval_strategy: no`."
        )
    return dataset[script_args.dataset_train_split], dataset[script_args.dataset_test_split] if evaluates else None


def finish(trainer: "Trainer") -> None:
    """
    Save, evaluate and push a trained model, and end together. The last call of a script.

    The push comes last: if it fails, the model is saved and its metrics are known, and the script fails with a
    [`~trl_hrm.hub.PushError`].
    """
    trainer.save_model(_internal_call=True)  # without it, `save_model` pushes, before there are metrics for the card
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}.")
    if trainer.args.eval_strategy != "no":
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(f"Pushed to {trainer.hub_model_id}.")
    else:
        trainer.create_model_card()  # with the metrics
    end_together(trainer)


def end_together(trainer: "Trainer") -> None:
    """
    Finish the trackers and the process group, once every process is there, and leave.

    With gloo (several processes on CPU) a thread of the process group may still be freeing the tensors of the last collective,
    for which it needs the interpreter. If that is being shut down meanwhile, now and then the process aborts ("terminate called
    without an active exception") or hangs. So there the process leaves without shutting the interpreter down.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    if trainer.accelerator.num_processes > 1 and trainer.args.device.type == "cpu":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
