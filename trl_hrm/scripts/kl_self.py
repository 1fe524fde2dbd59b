"""Train a policy on its best solutions, with log-scaled KL regularisation towards a reference model."""

from .training import USAGE, check_inputs, finish, load_splits, model_init_kwargs, run_script
from .training import DatasetArguments as ScriptArguments


CONFIG = "KLSelfConfig"


def main(script_args, training_args, model_args, callbacks=None):
    from trl import get_peft_config

    from trl_hrm import KLSelfTrainer

    check_inputs(script_args, training_args, model_args)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    train_dataset, eval_dataset = load_splits(script_args, training_args)
    trainer = KLSelfTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        callbacks=callbacks,
    )
    trainer.dataset_name = script_args.dataset_name  # for the model card
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish(trainer)


def make_parser(prog: str | None = None):
    from trl import ModelConfig, TrlParser

    from trl_hrm import KLSelfConfig

    return TrlParser((ScriptArguments, KLSelfConfig, ModelConfig), prog=prog, usage=USAGE)


if __name__ == "__main__":
    # `launch` has checked that unknown keys of the YAML file are options of `accelerate launch`
    run_script(main, make_parser(), fail_with_unknown_args=False)
