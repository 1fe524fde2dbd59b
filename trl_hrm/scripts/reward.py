"""Train a step reward model: hierarchical (HRM), process (PRM) or outcome (ORM), depending on the dataset and the options."""

from dataclasses import dataclass, field

from ..terminal import printable, say
from .training import (
    USAGE,
    TrainingScriptArguments,
    check_inputs,
    end_together,
    finish,
    load_splits,
    model_init_kwargs,
    run_script,
    say_plan,
)


CONFIG = "HRMRewardConfig"


@dataclass
class ScriptArguments(TrainingScriptArguments):
    """
    Arguments of this script, next to [`HRMRewardConfig`] and [`~trl.ModelConfig`].

    Args:
        make_tiny_model (`bool`, *optional*, defaults to `False`): Whether to create a small model with random weights at
            `model_name_or_path`, if it does not exist yet. Its tokenizer is trained on the dataset.
    """

    make_tiny_model: bool = field(
        default=False,
        metadata={
            "help": "Create a small model with random weights at `model_name_or_path`, if it does not exist yet. Its "
            "tokenizer is trained on the dataset."
        },
    )


def main(script_args, training_args, model_args):
    from trl_hrm import HRMRewardTrainer

    train_reward_model(HRMRewardTrainer, script_args, training_args, model_args)


def train_reward_model(trainer_class, script_args, training_args, model_args):
    """Train a step reward model with a trainer class. Shared by `trl-hrm reward` and `trl-hrm implicit-prm`."""
    from pathlib import Path

    from trl import get_peft_config

    from trl_hrm.loading import load_tokenizer
    from trl_hrm.trainer.hrm_reward_trainer import find_step_format, prepare_rows

    if script_args.make_tiny_model:
        from trl_hrm.tiny_model import make_tiny_model, read_texts

        step_format = training_args.make_step_format()
        with training_args.main_process_first(desc="making the tiny model"):
            if not Path(model_args.model_name_or_path, "config.json").exists():
                make_tiny_model(
                    read_texts(script_args.dataset_name, script_args.dataset_config),
                    model_args.model_name_or_path,
                    # the heads `mlp` and `value` are added to a causal language model when it is loaded
                    kind="token" if step_format.head in ("classification", "regression") else "causal",
                    num_labels=step_format.num_labels,
                )

    check_inputs(script_args, training_args, model_args)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    train_dataset, eval_dataset = load_splits(script_args, training_args)
    if script_args.plan:
        name, revision = model_args.model_name_or_path, training_args.model_init_kwargs["revision"]
        step_format, _ = find_step_format(name, training_args, revision)
        trainer_class.check_head(name, step_format)
        tokenizer = load_tokenizer(name, revision, training_args.trust_remote_code)
        step_format.check(tokenizer)
        rows, report = prepare_rows(train_dataset, tokenizer, step_format, training_args, "train_dataset")
        if training_args.process_index == 0:
            say(f"train_dataset: {report}")
        say_plan(training_args, rows)
        return end_together(training_args)
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    trainer.dataset_name = script_args.dataset_name  # for the model card
    for name, report in trainer.reports.items():
        trainer.accelerator.print(printable(f"{name}: {report}"))
    say_plan(trainer.args, trainer.train_dataset)

    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish(trainer)


def make_parser(prog: str | None = None):
    from trl import ModelConfig, TrlParser

    from trl_hrm import HRMRewardConfig

    return TrlParser((ScriptArguments, HRMRewardConfig, ModelConfig), prog=prog, usage=USAGE)


if __name__ == "__main__":
    # `launch` has checked that unknown keys of the YAML file are options of `accelerate launch`
    run_script(main, make_parser(), fail_with_unknown_args=False)
