"""Train a step reward model on right and wrong solutions, without labels of steps (implicit PRM)."""

from .reward import ScriptArguments, train_reward_model
from .training import USAGE, run_script


CONFIG = "ImplicitPRMConfig"


def main(script_args, training_args, model_args):
    from trl_hrm import ImplicitPRMTrainer

    train_reward_model(ImplicitPRMTrainer, script_args, training_args, model_args)


def make_parser(prog: str | None = None):
    from trl import ModelConfig, TrlParser

    from trl_hrm import ImplicitPRMConfig

    return TrlParser((ScriptArguments, ImplicitPRMConfig, ModelConfig), prog=prog, usage=USAGE)


if __name__ == "__main__":
    # `launch` has checked that unknown keys of the YAML file are options of `accelerate launch`
    run_script(main, make_parser(), fail_with_unknown_args=False)
