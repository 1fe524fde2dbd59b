"""Shared code of the training commands: launching with accelerate, help, loading data and model, saving and pushing."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import trl_hrm

from ..data.sources import load_rows
from ..errors import error_line, is_debug
from ..io import read_yaml, shown
from ..processes import StopSignals, end_with_parent
from ..terminal import printable, say


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import ModelConfig, TrlParser

LAUNCHER = "TRL_HRM_LAUNCHER"  # environment variable with the process id of the launcher, such as `trl-hrm reward`
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
USAGE = "%(prog)s [--config FILE] [OPTION ...]"  # argparse would list all 300 options in front of every error
COMMON_OPTIONS = """\
options of transformers.TrainingArguments that most trainings need:
  --output_dir                    folder of the trained model
  --num_train_epochs, --max_steps
  --per_device_train_batch_size, --gradient_accumulation_steps
  --learning_rate, --lr_scheduler_type, --warmup_steps
  --eval_strategy, --eval_steps, --save_strategy, --save_steps, --load_best_model_at_end
  --bf16, --gradient_checkpointing, --use_cpu, --seed
  --report_to, --run_name, --push_to_hub, --hub_model_id
"""
MODEL_OPTIONS = """\
options of trl.ModelConfig:
  --model_name_or_path            model to train: folder or Hub id
  --dtype, --attn_implementation
  --use_peft, --lora_r, --lora_alpha, --lora_target_modules, --load_in_4bit
"""
MORE_OPTIONS = """\
The options of `transformers.TrainingArguments` are also accepted. All commands except train-grid accept the options of
`trl.ModelConfig`, kl-self accepts the options of `trl.SFTConfig`, grpo the options of `trl.GRPOConfig`, and implicit-prm the options of `HRMRewardConfig` (`trl-hrm reward --help`). `--help_all` lists all of them. All other options are passed to
`accelerate launch`, for example `--num_processes 2`, or `--cpu` to train on CPUs."""


@dataclass
class TrainingScriptArguments:
    """
    Arguments of a training script, next to the config of its trainer and [`~trl.ModelConfig`].

    Args:
        dataset_name (`str`): Path or Hub id of the dataset.
        dataset_config (`str`, *optional*): Configuration of the dataset.
        dataset_train_split (`str`, *optional*, defaults to `"train"`): Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`): Split to evaluate on, if `eval_strategy` is set.
        plan (`bool`, *optional*, defaults to `False`): Whether to print the training plan (optimizer steps, evaluations
            and checkpoints) and exit. The weights of the model are not loaded.
    """

    dataset_name: str = field(metadata={"help": "Path or Hub id of the dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, if `eval_strategy` is set."}
    )
    plan: bool = field(
        default=False,
        metadata={
            "help": "Print the training plan (optimizer steps, evaluations and checkpoints) and exit. The weights of the "
            "model are not loaded."
        },
    )


def launch(name: str, argv: Sequence[str]) -> None:
    """
    Run a training script with `accelerate launch`, as `trl sft` does.

    Options that the script does not have are passed to `accelerate launch`, for example `--num_processes 2`. They can also be set in
    the YAML file. `--accelerate_config` takes a file, or the name of a TRL configuration such as `zero2`.

    Args:
        name (`str`):
            `"reward"`, `"implicit-prm"`, `"kl-self"`, `"train-grid"` or `"grpo"`.
        argv (`Sequence[str]`):
            Command line after the name.

    Raises:
        `ValueError`: If a value is invalid, or an option is unknown to both the script and `accelerate launch`. It is raised before
        any process is started. Values in the config of the `"grpo"` trainer are checked by the training processes.
        `ChildProcessError`: If a training process was killed. It is an `OSError`.
        `SystemExit`: If a training process failed. It has printed its error.
    """
    argv, prog = list(argv), f"trl-hrm {name}"
    module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    if {"-h", "--help"} & {*argv}:
        say(short_help(module, prog))
        return
    parser = module.make_parser(prog=prog)
    if "--help_all" in argv:
        parser.print_help()
        return

    import torch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl import GRPOConfig

    from .._compat import resolve_accelerate_config_argument, subtract_subsequence
    from ..command_parser import nearest

    _refuse_mixture(argv)
    # Whether the batch sizes of GRPO are valid depends on the number of processes, which this process does not have
    parser.dataclass_types = [kind for kind in parser.dataclass_types if not issubclass(kind, GRPOConfig)]
    *_, of_file, of_argv = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    launch_args = resolve_accelerate_config_argument(of_file) + resolve_accelerate_config_argument(of_argv)
    script_args = subtract_subsequence(argv, of_argv)
    # Run as a module: with a file path, `inspect.py` in this folder would shadow the standard library
    args, unknown = launch_command_parser().parse_known_args(["--module", *launch_args, module.__name__, *script_args])
    if unknown:
        raise ValueError(
            f"Unknown options: {' '.join(unknown)}.{nearest(unknown[0], parser._option_string_actions)} `{prog} --help_all` lists the training options, and `accelerate launch "
            "--help` lists the launcher options. No process was started."
        )
    if args.training_script != module.__name__:
        raise ValueError(
            f"{shown(args.training_script)} in {shown(' '.join(launch_args))} is not the value of an `accelerate launch` option. Pass options "
            "without a value, such as `--multi_gpu`, on the command line. No process was started."
        )
    if args.cpu:
        args.training_script_args.append("--use_cpu")
    is_plain = not any((args.use_deepspeed, args.use_fsdp, args.use_megatron_lm, args.tpu, args.config_file))
    if (args.num_processes or 1) > 1 and is_plain and (args.cpu or not torch.accelerator.is_available()):
        # With `cpu` or without an accelerator, `accelerate launch` ignores `num_processes` without a warning
        args.multi_gpu, args.cpu, args.use_cpu = True, False, True
    machines = args.num_machines or 1
    if machines > 1:
        # Even with a configuration, since its `num_processes` may be those of one machine
        if not args.num_processes or args.num_processes % machines:
            raise ValueError(
                f"`num_machines` is {machines} and `num_processes` is {args.num_processes}. Set `num_processes` to the number of processes of "
                f"all machines, a multiple of {machines}. No process was started."
            )
        # Otherwise machines with one GPU each would not wait for each other, and each would train alone
        if args.config_file is not None and not any(
            (args.use_deepspeed, args.use_fsdp, args.use_megatron_lm, args.tpu)
        ):
            is_plain = load_config_from_file(args.config_file).distributed_type == "NO"
        args.multi_gpu = args.multi_gpu or is_plain
    try:
        with patch_environment(**{LAUNCHER: os.getpid()}):
            launch_command(args)
    except SignalException as stopped:  # of several processes, to which it passes the signal on
        raise KeyboardInterrupt(int(stopped.sigval)) from None
    except subprocess.CalledProcessError as error:
        _end_with(error.returncode)
    except ChildFailedError as error:
        _end_with(error.get_first_failure()[1].exitcode)


def _end_with(code: int) -> NoReturn:
    """End the launcher after a training process has failed. `code` is its exit code, negative after a signal."""
    number = -code if code < 0 else code - 128
    if number not in signal.valid_signals():  # the process has printed its error
        sys.exit(code)
    message = f"A training process was ended by {signal.Signals(number).name}."
    if number == signal.SIGKILL:
        message += " Its memory is probably used up. Lower --per_device_train_batch_size or --max_length (--max_completion_length for grpo)."
    raise ChildProcessError(message)


@contextmanager
def ending_with_launcher() -> Iterator[None]:
    """
    Context manager of a training process. If [`launch`] has started the process, it ends with the launcher, and without a traceback on
    Ctrl-C and SIGTERM.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        yield
        return
    stop = StopSignals()
    if int(launcher) == os.getppid():  # a launcher for several machines has a process in between
        end_with_parent(int(launcher), signal.SIGTERM)
    try:
        with stop.ending():
            yield
    except KeyboardInterrupt:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # see `end_together`
            os._exit(stop.exit_code)
        sys.exit(stop.exit_code)


def short_help(module: ModuleType, prog: str) -> str:
    """
    Return the help of a training script: its arguments and the docstring of its config.

    The docstring is read from the source file, because importing the config also imports torch.
    """
    from ..command_parser import ConfigParser, HelpFormatter

    has_model = "model_name_or_path" in module.ScriptArguments.__dataclass_fields__  # and no option of `ModelConfig`
    groups = [COMMON_OPTIONS] if has_model else [MODEL_OPTIONS, COMMON_OPTIONS]
    config_module = trl_hrm._NAMES[module.CONFIG]
    path = resources.files("trl_hrm").joinpath(*config_module.split("."))
    source = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
    [config] = [node for node in source.body if isinstance(node, ast.ClassDef) and node.name == module.CONFIG]
    parameters = ast.get_docstring(config).partition("Parameters:\n")[2]
    parameters = re.sub(r"^    (\w+) \(.*?(?:defaults to (`.*`))?\):$", _option, parameters, flags=re.MULTILINE)
    parameters = re.sub(r"^    > ", "    ", parameters, flags=re.MULTILINE)
    parameters = re.sub(r"\[`~?([^`]+)`\]", r"`\1`", parameters)
    parser = ConfigParser(
        [module.ScriptArguments],
        prog=prog,
        usage=USAGE,
        description=module.__doc__,
        epilog="\n".join([*groups, f"options of {module.CONFIG}:\n{parameters}\n", MORE_OPTIONS]),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with options. The command line overrides it.")
    parser.add_argument("--help_all", action="store_true", help="Show all training options.")
    parser.add_argument(
        "--accelerate_config",
        metavar="NAME_OR_FILE",
        help="Accelerate configuration: a file, or one of single_gpu, multi_gpu, fsdp1, fsdp2, zero1, zero2, zero3.",
    )
    return parser.format_help()


def _option(found: re.Match) -> str:
    return f"    --{found[1]}" + (f" (default: {found[2]})" if found[2] else "")


def model_init_kwargs(model_args: "ModelConfig", training_args: "TrainingArguments") -> dict[str, Any]:
    """Return the keyword arguments for `from_pretrained`. `training_args.model_init_kwargs` overrides the others."""
    from trl import get_quantization_config

    quantization_config = get_quantization_config(model_args)
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **({} if quantization_config is None else {"quantization_config": quantization_config}),
        **(training_args.model_init_kwargs or {}),
    }


def check_inputs(
    script_args: TrainingScriptArguments, training_args: "TrainingArguments", model_args: "ModelConfig"
) -> None:
    """
    Check that the trained model does not replace an input, and warn if it will replace another model.

    Raises:
        `FileExistsError`: If `output_dir` is the folder of the model that is trained, of the reference model, of the dataset, or of the
        reward model.
    """
    output = training_args.output_dir
    inputs = {
        "model_name_or_path": model_args.model_name_or_path,
        "ref_model": getattr(training_args, "ref_model", None),
    }
    inputs |= {name: getattr(script_args, name, None) for name in ("dataset_name", "problems", "reward_model")}
    for option, path in inputs.items():
        if path and os.path.isdir(path) and os.path.isdir(output) and os.path.samefile(path, output):
            raise FileExistsError(
                f"{output} is also the `{option}`, which would be replaced. Choose another `output_dir`."
            )
    models = [name for name in WEIGHTS if Path(output, name).is_file()]
    if not models or training_args.process_index:
        return
    if str(training_args.resume_from_checkpoint).lower() in ("none", "false"):
        # the arguments of train-grid have no `use_peft`
        stays = getattr(model_args, "use_peft", False) and not models[0].startswith("adapter")
        what = "stays in the folder, next to the adapter" if stays else "will be replaced at the end of the training"
        say(f"warning: {output} has a model ({models[0]}), which {what}.", sys.stderr)


def load_splits(
    script_args: TrainingScriptArguments, training_args: "TrainingArguments"
) -> tuple["Dataset", "Dataset | None"]:
    """
    Load the training and evaluation splits. Without an `eval_strategy`, the evaluation split is `None`.

    Args:
        script_args ([`TrainingScriptArguments`]):
            Dataset and splits to load.
        training_args ([`~transformers.TrainingArguments`]):
            Training arguments, for their `eval_strategy`.

    Raises:
        `ValueError`: If the dataset is a file, or a split does not exist.
    """
    if os.path.isfile(script_args.dataset_name):
        raise ValueError(
            f"{script_args.dataset_name} is a file. `dataset_name` must be a folder, with files named by their split, such as "
            "train.jsonl and test.jsonl, or a dataset on the Hub. `trl-hrm build-stepwise` builds a folder from files with labelled steps."
        )
    dataset = load_rows(script_args.dataset_name, script_args.dataset_config)
    evaluates = training_args.eval_strategy != "no"
    wanted = {script_args.dataset_train_split} | ({script_args.dataset_test_split} if evaluates else set())
    missing = wanted - set(dataset)
    if missing:
        raise ValueError(
            f"{script_args.dataset_name} has the splits {list(dataset)}, but {sorted(missing)} is needed. Set "
            "`dataset_train_split` and `dataset_test_split`, or `eval_strategy: no`."
        )
    return dataset[script_args.dataset_train_split], dataset[script_args.dataset_test_split] if evaluates else None


def say_plan(args: "TrainingArguments", rows: "Dataset") -> None:
    """Print the training plan once, on the main process. `rows` is the prepared training dataset."""
    from trl_hrm import plan_training

    plan = plan_training(args, rows)
    if args.process_index == 0:
        say(plan)


def finish(trainer: "Trainer") -> None:
    """
    Save, evaluate and push a trained model, and exit. Last call of a training script.

    The model and metrics are saved before the push. If the push fails, the script fails with a [`~trl_hrm.hub.PushError`].
    """
    trainer.save_model(_internal_call=True)  # otherwise `save_model` would push before the card has metrics
    trainer.accelerator.print(printable(f"Model saved to {trainer.args.output_dir}."))
    if trainer.args.eval_strategy != "no":
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(printable(f"Pushed to {trainer.hub_model_id}."))
    else:
        trainer.create_model_card()  # with the metrics
    trainer.save_state()  # the logs, for `trl-hrm table`. A push would upload them
    end_together(trainer.args, trainer)


def run_script(
    main: Callable[..., None],
    parser: "TrlParser",
    argv: Sequence[str] | None = None,
    fail_with_unknown_args: bool = True,
) -> None:
    """
    Run a training script. An error is printed on one line, with the exit code 1. With `--log_level debug` or the environment variable
    `TRL_HRM_DEBUG`, it is raised.

    Args:
        main (`Callable`):
            `main` of the script.
        parser ([`~trl.TrlParser`]):
            Parser of the arguments of `main`.
        argv (`Sequence[str]`, *optional*):
            Command line without the name of the script. Defaults to the arguments of this process.
        fail_with_unknown_args (`bool`, *optional*, defaults to `True`):
            Whether options that the parser does not have are an error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    raises = is_debug()
    try:
        with ending_with_launcher():
            _refuse_mixture(argv)
            if "--config" in argv[:-1]:
                _check_settings(argv[argv.index("--config") + 1], parser)
            parser.set_defaults(do_train=True)  # so that `--do_train false` can be told from the default
            try:
                parsed = parser.parse_args_and_config(argv, fail_with_unknown_args=fail_with_unknown_args)
            except TypeError as error:
                raise ValueError(f"A training option has a value of the wrong type ({error}).") from error
            raises = raises or parsed[1].log_level == "debug"
            _check_tasks(parsed[1])
            main(*parsed)
    except Exception as error:  # the border of the script: no traceback leaves it, unless it is asked for
        if raises:
            raise
        rank = int(os.environ.get("RANK", 0))
        line = error_line(error, parser.prog, "--log_level debug")
        say(f"error on process {rank}{line.removeprefix('error')}" if rank else line, sys.stderr)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            sys.stdout.flush()
            os._exit(1)  # shutting down the interpreter would wait for the other processes
        sys.exit(1)


def _check_tasks(args: "TrainingArguments") -> None:
    """
    Check the options that say what to do. Trainer ignores them, because they are meant for scripts.

    Raises:
        `ValueError`: If the script does something else.
    """
    if not args.do_train:
        raise ValueError(
            "`do_train` is false, but this script always trains. Remove it. To evaluate a model, use `trl-hrm benchmark`."
        )
    if args.do_predict:
        raise ValueError(
            "`do_predict` is true, but this script only trains. Remove it. To score, use `trl-hrm score`."
        )
    if args.do_eval and args.eval_strategy == "no":
        raise ValueError("`do_eval` is true, but `eval_strategy` is no. Set `eval_strategy` to steps or epoch.")


def _refuse_mixture(argv: Sequence[str]) -> None:
    """
    Refuse the options of TRL's `DatasetMixtureConfig`, which TRL's own commands have.

    TRL concatenates the datasets without weights and splits them by row, so that a problem may be in both splits.

    Raises:
        `ValueError`: If one of the options is given, on the command line or in the file of `--config`.
    """
    names = {word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")}
    if "--config" in argv[:-1]:
        names |= read_yaml(argv[argv.index("--config") + 1]).keys()
    if names & {"datasets", "test_split_size"}:
        raise ValueError(
            "`datasets` and `test_split_size` are options of TRL's commands that this command does not have. Set `dataset_name` to one "
            "dataset. To mix datasets of labelled steps with weights, without a problem in both splits, build it with `trl-hrm "
            "build-stepwise INPUT INPUT --weights 1 1 --output_dir DATA`."
        )
    if "streaming" in names:
        raise ValueError(
            "`streaming` is an option of TRL's commands that this command does not have. Remove it. A dataset does not need to fit in "
            "memory: its rows are read from disk, and prepared rows are written to disk."
        )


def _check_settings(file: str, parser: "TrlParser") -> None:
    """Check that a file is valid YAML and that its numbers are numbers. argparse only checks strings."""
    settings = read_yaml(file)
    for action in parser._actions:
        value = settings.get(action.dest)
        values = value if action.nargs == "+" and isinstance(value, list) else [value]
        if action.type in (int, float) and not all(isinstance(one, str | int | action.type | None) for one in values):
            kind = "a number" if action.type is float else "a whole number"
            kind = f"a list in which each value is {kind}" if action.nargs == "+" else kind
            raise ValueError(f"{file}: `{action.dest}` is {shown(value)}. It must be {kind}.")


def end_together(args: "TrainingArguments", trainer: "Trainer | None" = None) -> None:
    """
    Wait for all processes, then end the trackers of the trainer and the process group, and exit.

    With gloo (several processes on CPU), a thread of the process group may still be freeing tensors when the interpreter shuts down.
    The process then sometimes hangs, or aborts with "terminate called without an active exception". To avoid this, it exits without
    shutting down the interpreter.
    """
    args.distributed_state.wait_for_everyone()
    if trainer is None:
        args.distributed_state.destroy_process_group()
    else:
        trainer.end()
    if args.world_size > 1 and args.device.type == "cpu":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
