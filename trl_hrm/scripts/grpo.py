"""Train a policy with GRPO and process rewards: the steps of each completion are scored by a step reward model."""

import pkgutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from ..config import COUNT
from ..data.problems_config import ProblemsConfig
from ..errors import is_foreseen
from ..io import shown
from ..scoring.reward_model_config import RewardModelConfig
from ..search.policy_config import PromptConfig
from ..terminal import say
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


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from ..data.problem_sets import ProblemSet
    from ..rewards import StepReward

CONFIG = "StepGRPOConfig"
ACCURACY = "accuracy"


@dataclass(kw_only=True)
class ScriptArguments(ProblemsConfig, PromptConfig, RewardModelConfig, TrainingScriptArguments):
    """
    Arguments of this script, next to [`StepGRPOConfig`] and [`~trl.ModelConfig`]. It also has the fields of [`ProblemsConfig`],
    [`PromptConfig`] and [`RewardModelConfig`], except those that do not apply to training.

    The prompts are either problems, which the template `prompt` turns into prompts, or a dataset with a column `prompt`.

    Args:
        problems (`str`, *optional*):
            Problems with answers to train on. See [`ProblemsConfig`]. The reward model is shown the problem without the template.
        split (`str`, *optional*, defaults to `"train"`):
            Dataset split to train on. Ignored for files. Unlike in the other commands, it is not `"test"` for `"math500"` and `"gsm8k"`.
        test_problems (`str`, *optional*):
            Held-out problems to evaluate on, if `eval_strategy` is set. They are read like `problems`, from the split
            `dataset_test_split`, and are excluded from `problems`.
        dataset_name (`str`, *optional*):
            Path or Hub id of a dataset with a column `prompt` (texts or messages), instead of `problems`.
        problem_column (`str`, *optional*):
            Column of `dataset_name` with the problem to show to the reward model. Defaults to the prompt. See [`StepReward`].
        answer_column (`str`, *optional*):
            Column of `dataset_name` with the reference answers, for the reward `accuracy`. Defaults to `"answer"`.
        reward_funcs (`list[str]`, *optional*):
            Rewards of whole completions: `"accuracy"` for [`AccuracyReward`], or names such as `trl.rewards.think_format_reward` or
            `my_module.my_reward`. `reward_weights` has their weights. Defaults to `accuracy`, if there are answers.
        segmentation (`str`, *optional*):
            Rule that splits completions into steps. Defaults to the rule of the prompt, or with `dataset_name` to the separator of the
            reward model. See [`StepReward`].
        aggregate (`str`, *optional*, defaults to `"min"`):
            How the step scores become the reward of a completion, which is logged. Only with `step_credit: outcome` does the policy
            learn from it.
        keep_thinking (`bool`, *optional*):
            Whether to score the thinking of a reasoning model like the rest of the completion. Defaults to `True` with
            `segmentation="thinking"` and to `False` otherwise.
        guard_reward (`float`, *optional*, defaults to `0.0`):
            Reward of a completion that a guard rejects.
        guard_min_steps (`int`, *optional*, defaults to `2`), guard_max_steps (`int`, *optional*, defaults to `64`):
            Minimum and maximum number of steps of a completion. `null` in a YAML file disables the maximum, and also the next limits.
        guard_max_repeated (`float`, *optional*, defaults to `0.25`):
            Maximum share of steps that repeat an earlier step.
        guard_max_blank (`int`, *optional*, defaults to `4`):
            Maximum number of blank steps.
        guard_max_tokens (`int`, *optional*):
            Maximum number of tokens of a completion, with the tokenizer of the reward model. Defaults to its number of positions.

    Raises:
        `ValueError`: If there are neither problems nor a dataset, or both, or if an option has no effect with the others.
    """

    # Not the default of `ProblemsConfig`, which is the test split of some datasets
    split: str = field(default="train", metadata={"help": "Dataset split to train on. Ignored for files."})
    test_problems: str | None = field(
        default=None,
        metadata={
            "help": "Held-out problems to evaluate on, if `eval_strategy` is set. They are read like --problems, from the split "
            "--dataset_test_split, and are excluded from --problems."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Path or Hub id of a dataset with a column `prompt` (texts or messages), instead of --problems."
        },
    )
    problem_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of --dataset_name with the problem to show to the reward model (default: the prompt)."
        },
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of --dataset_name with the reference answers, for the reward accuracy (default: answer)."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards of whole completions: accuracy, or names such as trl.rewards.think_format_reward or "
            "my_module.my_reward. --reward_weights has their weights (default: accuracy, if there are answers).",
            "metavar": "NAME",
        },
    )
    segmentation: Literal["step_header", "blank_line", "sentence", "formula", "thinking"] | None = field(
        default=None,
        metadata={
            "help": "Rule that splits completions into steps. thinking also splits the thinking of a reasoning model (default: the rule of the prompt, or with --dataset_name the "
            "separator of the reward model)."
        },
    )
    aggregate: Literal["min", "prod", "last", "mean", "max"] = field(
        default="min",
        metadata={
            "help": "How the step scores become the reward of a completion, which is logged. Only with --step_credit outcome "
            "does the policy learn from it."
        },
    )
    keep_thinking: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",  # `--keep_thinking` alone means true
            "const": True,
            "help": "Score the thinking of a reasoning model like the rest of the completion (default: only with --segmentation "
            "thinking).",
        },
    )
    guard_reward: float = field(default=0.0, metadata={"help": "Reward of a completion that a guard rejects."})
    guard_min_steps: int = field(
        default=2, metadata={"help": "Minimum number of steps of a completion.", "range": COUNT}
    )
    guard_max_steps: int | None = field(
        default=64,
        metadata={
            "help": "Maximum number of steps of a completion. null in a YAML file disables it, and also the next limits.",
            "range": COUNT,
        },
    )
    guard_max_repeated: float | None = field(
        default=0.25, metadata={"help": "Maximum share of steps that repeat an earlier step.", "range": "[0, 1]"}
    )
    guard_max_blank: int | None = field(
        default=4, metadata={"help": "Maximum number of blank steps.", "range": "[0, inf)"}
    )
    guard_max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of a completion, with the tokenizer of the reward model (default: its number of "
            "positions).",
            "range": COUNT,
        },
    )

    # `StepGRPOConfig` has its own
    chat_template_kwargs: None = field(default=None, init=False)
    # The chat template is applied by TRL, which stops at the end of the sequence
    chat_template_date: str = field(default=PromptConfig.chat_template_date, init=False)
    final_stops: None = field(default=None, init=False)
    step_pattern: None = field(default=None, init=False)
    # A judge is too slow for training, and vLLM cannot run a second model in a training process
    reward_model_args: None = field(default=None, init=False)
    judge_template: str | None = field(default=None, init=False)
    judge_samples: None = field(default=None, init=False)
    judge_max_tokens: None = field(default=None, init=False)
    judge_temperature: None = field(default=None, init=False)
    judge_seed: None = field(default=None, init=False)
    judge_log: None = field(default=None, init=False)

    def __post_init__(self):
        super().__post_init__()
        if (self.problems is None) == (self.dataset_name is None):
            found = "neither is set" if self.problems is None else "both are set"
            raise ValueError(
                f"Set `problems` to train on problems with answers, or `dataset_name` for a dataset with prompts: {found}."
            )
        of_dataset = ("dataset_config", "dataset_train_split", "problem_column", "answer_column")
        of_problems = ("test_problems", "prompt", "prompt_style", "system_prompt")
        of_problems += tuple(one.name for one in fields(ProblemsConfig))
        given, others = ("problems", of_dataset) if self.problems else ("dataset_name", of_problems)
        defaults = {one.name: [] if one.default_factory is list else one.default for one in fields(self)}
        for name in others:
            if getattr(self, name) != defaults[name]:
                needed = "dataset_name" if given == "problems" else "problems"
                raise ValueError(f"`{name}` only applies to `{needed}`, but `{given}` is set. Remove `{name}`.")
        if self.judge_template is not None:
            raise ValueError(
                f"`reward_model` is {self.reward_model}, a judge, which is too slow for training. Use a step reward model."
            )
        if self.reward_model_engine == "vllm":
            raise ValueError(
                "`reward_model_engine` is vllm, which cannot run in a training process. Run `vllm serve` with the reward model on "
                "another GPU, and set `reward_model_engine` to its URL."
            )
        if self.guard_max_steps is not None and self.guard_min_steps > self.guard_max_steps:
            raise ValueError(
                f"`guard_min_steps` is {self.guard_min_steps} and `guard_max_steps` is {self.guard_max_steps}, so every completion would "
                "be rejected."
            )
        funcs = self.reward_funcs or []
        for name in funcs:
            if name != ACCURACY and "." not in name:
                raise ValueError(
                    f"`reward_funcs` contains {shown(name)}. It must be {ACCURACY}, or the name of a function with its module, such as "
                    "trl.rewards.think_format_reward."
                )
        for name in ("answer_column", "extractors"):
            if self.reward_funcs is not None and ACCURACY not in funcs and getattr(self, name) is not None:
                raise ValueError(f"`{name}` only applies to the reward {ACCURACY}. Remove it, or add {ACCURACY}.")

    def load_prompts(
        self, training_args: "TrainingArguments", tokenizer: "PreTrainedTokenizerBase"
    ) -> tuple["Dataset", "Dataset | None"]:
        """
        Return the training and evaluation rows. Rows of problems have the columns `prompt`, `problem` and `answer`.

        Args:
            training_args ([`~transformers.TrainingArguments`]):
                Training arguments, for their `eval_strategy`.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the policy, to check that its chat template works with the prompt.

        Raises:
            `ValueError`: If problems to evaluate on are missing or not used, or a split, column or prompt is invalid.
        """
        evaluates = training_args.eval_strategy != "no"
        if self.dataset_name is not None:
            splits = load_splits(self, training_args)
            for columns in [rows.column_names for rows in splits if rows is not None]:
                if "prompt" not in columns:
                    raise ValueError(
                        f"{self.dataset_name} has the columns {columns}, but `prompt` is needed. To make prompts from problems, set "
                        "`problems` instead of `dataset_name`."
                    )
                # TRL passes the columns to the rewards by name, next to `prompts` and `completions`
                if taken := {"prompts", "completions"} & {*columns}:
                    raise ValueError(
                        f"{self.dataset_name} has the columns {columns}, but GRPO uses the names {shown(sorted(taken))} itself. Is it a "
                        "dataset for a reward model? If not, rename them."
                    )
            return splits
        from datasets import Dataset

        from ..data.problems import exclusion_key, read_problem_keys
        from ..search.prompts import NO_SYSTEM_NOTE

        if evaluates != (self.test_problems is not None):
            raise ValueError(
                "`eval_strategy` is set, but `test_problems` is missing. Set it to problems to evaluate on."
                if evaluates
                else "`test_problems` has no effect without an `eval_strategy`. Set it to steps or epoch."
            )
        exclude, held_out, sets = read_problem_keys(self.exclude), frozenset(), {}
        if evaluates:
            sets["test_problems"] = test = self._read(self.test_problems, self.dataset_test_split)
            held_out = frozenset(exclusion_key(problem.prompt) for problem in test.problems)
        sets["problems"] = self._read(self.problems, self.split, exclude | held_out, self.limit)
        sets["problems"].num_to_exclude = len(exclude)  # no warning if no problem is held out from training
        prompt = self.make_prompt()[0].for_tokenizer(tokenizer)
        is_main = training_args.process_index == 0
        if is_main and self.system_prompt is not None and prompt.system_prompt is None:
            say(NO_SYSTEM_NOTE)
        rows = {}
        for name, found in sets.items():
            if is_main:
                say(f"{name}: {found.describe()}")
            prompt.encode(tokenizer, found.problems[0].prompt)  # raises if the chat template does not work
            make = prompt.messages if prompt.style == "chat" else prompt.text
            rows[name] = Dataset.from_list(
                [{"prompt": make(one.prompt), "problem": one.prompt, "answer": one.answer} for one in found.problems]
            )
        return rows["problems"], rows.get("test_problems")

    def _read(
        self, source: str, split: str | None, exclude: frozenset[bytes] = frozenset(), limit: int | None = None
    ) -> "ProblemSet":
        from ..data.problem_sets import read_problems

        return read_problems(
            source,
            format=self.problem_format,
            split=split,
            config=self.problems_config if source == self.problems else None,
            limit=limit,
            exclude=exclude,
            columns=self.columns or {},
            strict=self.strict,
            where=self.where,
        )

    def make_reward_funcs(self, rows: "Dataset", stack: ExitStack) -> list[Callable]:
        """
        Return the rewards of whole completions. Worker processes are closed with the `stack`.

        Raises:
            `ValueError`: If a function does not exist, or the rows have no answers.
        """
        from ..accuracy_reward import AccuracyReward

        column = self.answer_column or "answer"
        names = self.reward_funcs
        if names is None:
            names = [ACCURACY] if column in rows.column_names or self.answer_column is not None else []
        if ACCURACY in names and column not in rows.column_names:
            raise ValueError(
                f"{self.dataset_name} has the columns {rows.column_names}, but the reward {ACCURACY} needs {shown(column)}. Set "
                "`answer_column` to the column with the reference answers."
            )
        funcs = []
        for name in names:
            if name == ACCURACY:
                options = {} if self.extractors is None else {"extractors": self.extractors}
                funcs.append(stack.enter_context(AccuracyReward(column, **options)))
                continue
            try:
                funcs.append(pkgutil.resolve_name(name))
            except (ImportError, AttributeError) as error:
                raise ValueError(
                    f"`reward_funcs` contains {shown(name)}, which cannot be imported: {error}. Run the command in the folder of the "
                    "module, or install its package."
                ) from error
        return funcs

    def make_step_reward(self) -> "StepReward":
        """Load the reward model, or connect to its server."""
        from ..loading import without_zero3
        from ..rewards import StepReward

        if self.is_served():
            model, kwargs = self.load_scorer(), {}
        else:
            model, kwargs = self.reward_model, self._settings() | {"step_format": self.step_format}
        with without_zero3():
            return StepReward(
                model,
                aggregate=self.aggregate,
                problem_column="problem" if self.problems else self.problem_column,
                segmentation=self.make_prompt()[1] if self.problems or self.segmentation else None,
                spans=self.spans,
                combine=self.combine,
                guard_reward=self.guard_reward,
                min_steps=self.guard_min_steps,
                max_steps=self.guard_max_steps,
                max_repeated=self.guard_max_repeated,
                max_blank=self.guard_max_blank,
                max_tokens=self.guard_max_tokens,
                keep_thinking=self.keep_thinking,
                **kwargs,
            )


@contextmanager
def naming_reward(funcs: Sequence[Callable]) -> Iterator[None]:
    """Context manager that names the reward function in which an error was raised. Otherwise it would be called a bug in trl_hrm."""
    try:
        yield
    except Exception as error:
        called = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
        for func in funcs:
            if getattr(func, "__code__", None) in called and not is_foreseen(error):
                raise ValueError(
                    f"The reward {func.__name__} failed with {type(error).__name__}: {error}. With --log_level debug, the traceback is "
                    "printed."
                ) from error
        raise


def main(script_args: ScriptArguments, training_args: Any, model_args: Any) -> None:
    from trl import get_peft_config

    from trl_hrm import RewardHackingCallback, StepGRPOTrainer
    from trl_hrm.loading import load_tokenizer

    check_inputs(script_args, training_args, model_args)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    revision = training_args.model_init_kwargs["revision"]
    tokenizer = load_tokenizer(model_args.model_name_or_path, revision, training_args.trust_remote_code)
    train_dataset, eval_dataset = script_args.load_prompts(training_args, tokenizer)
    with ExitStack() as stack:
        reward_funcs = script_args.make_reward_funcs(train_dataset, stack)
        if not reward_funcs and training_args.process_index == 0:
            say("Only the process reward trains the policy, because no `reward_funcs` are used.")
        if training_args.stop_on_reward_hacking and ACCURACY in (script_args.reward_funcs or [])[1:]:
            raise ValueError(
                f"`stop_on_reward_hacking` takes the first of the `reward_funcs` as the accuracy, which is {script_args.reward_funcs[0]}. "
                f"Put {ACCURACY} first, also in the order of `reward_weights`."
            )
        if script_args.plan:
            script_args.check_reward_model()
            say_plan(training_args, train_dataset)
            return end_together(training_args)
        trainer = StepGRPOTrainer(
            model=model_args.model_name_or_path,
            reward_funcs=reward_funcs,
            step_reward=script_args.make_step_reward(),
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=get_peft_config(model_args),
        )
        # For the model card
        trainer.dataset_name = script_args.dataset_name or script_args.problems
        trainer.eval_dataset_name = script_args.test_problems
        if (
            eval_dataset is not None
            and ACCURACY in trainer.reward_func_names
            and not training_args.stop_on_reward_hacking
        ):
            trainer.add_callback(RewardHackingCallback(trainer, outcome=ACCURACY))
        say_plan(trainer.args, train_dataset)
        with naming_reward(reward_funcs):
            trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
            finish(trainer)


def make_parser(prog: str | None = None):
    from trl import ModelConfig

    from trl_hrm import StepGRPOConfig

    from ..command_parser import ConfigParser

    return ConfigParser((ScriptArguments, StepGRPOConfig, ModelConfig), show_all=True, prog=prog, usage=USAGE)


if __name__ == "__main__":
    # `launch` has checked that unknown keys of the YAML file are options of `accelerate launch`
    run_script(main, make_parser(), fail_with_unknown_args=False)
