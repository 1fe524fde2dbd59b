"""Train a policy on its best solutions, with log-scaled KL regularisation towards a reference model."""

from tempfile import TemporaryDirectory

from .training import USAGE, check_inputs, end_together, finish, load_splits, model_init_kwargs, run_script, say_plan
from .training import TrainingScriptArguments as ScriptArguments


CONFIG = "KLSelfConfig"


def main(script_args, training_args, model_args, callbacks=None):
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import get_peft_config

    from trl_hrm import KLSelfTrainer
    from trl_hrm.loading import load_tokenizer

    check_inputs(script_args, training_args, model_args)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    train_dataset, eval_dataset = load_splits(script_args, training_args)
    if script_args.plan:
        # The rows depend on the tokenizer only, so a small random model takes the place of the policy
        revision = training_args.model_init_kwargs["revision"]
        tokenizer = load_tokenizer(model_args.model_name_or_path, revision, training_args.trust_remote_code)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        training_args.model_init_kwargs = None
        training_args.kl_coef, training_args.precompute_ref_hidden = 0.0, False
        training_args.push_to_hub = False
        with TemporaryDirectory() as training_args.output_dir:
            trainer = KLSelfTrainer(
                model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)),
                args=training_args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
            )
        say_plan(training_args, trainer.train_dataset)
        return end_together(trainer.args, trainer)
    trainer = KLSelfTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        callbacks=callbacks,
    )
    trainer.dataset_name = script_args.dataset_name  # for the model card
    say_plan(trainer.args, trainer.train_dataset)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish(trainer)


def make_parser(prog: str | None = None):
    from trl import ModelConfig, TrlParser

    from trl_hrm import KLSelfConfig

    return TrlParser((ScriptArguments, KLSelfConfig, ModelConfig), prog=prog, usage=USAGE)


if __name__ == "__main__":
    # `launch` has checked that unknown keys of the YAML file are options of `accelerate launch`
    run_script(main, make_parser(), fail_with_unknown_args=False)
