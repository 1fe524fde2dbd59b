"""The `trl-hrm` command line. Each command calls a public function with a config that [`~command_parser.CommandParser`] parses."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import trl_hrm

from .errors import error_line, is_debug
from .io import read_yaml
from .processes import StopSignals
from .terminal import say


class Command(NamedTuple):
    """
    Config class and function of a command, as names in `trl_hrm`, a summary for the help, and whether the same command resumes after a
    stop.
    """

    config: str
    function: str
    summary: str
    resumes: bool = False


COMMANDS = {
    "quickstart": Command(
        "QuickstartConfig", "quickstart", "train a small reward model on CPU and let it find wrong steps, in a minute"
    ),
    "build-prm800k": Command("BuildPRM800KConfig", "build_prm800k", "build a dataset of labelled steps from PRM800K"),
    "build-math-shepherd": Command(
        "BuildMathShepherdConfig", "build_math_shepherd", "build a dataset of labelled steps from Math-Shepherd"
    ),
    "build-stepwise": Command(
        "BuildStepwiseConfig", "build_stepwise", "build a dataset of labelled steps from rows in TRL's stepwise format"
    ),
    "build-grid": Command(
        "BuildGridConfig",
        "build_grid",
        "build a dataset of grid puzzles: Sudoku, mazes or ARC, for the reasoning model",
    ),
    "annotate": Command(
        "AnnotateConfig",
        "annotate",
        "sample search trees of solutions from a policy, and grade the answers",
        resumes=True,
    ),
    "judge": Command(
        "JudgeConfig",
        "judge",
        "find the first wrong step of solutions with a language model, by the majority of several responses",
        resumes=True,
    ),
    "export": Command(
        "ExportConfig", "export", "build a dataset of labelled steps, or of correct solutions, from search trees"
    ),
    "inspect": Command(
        "InspectConfig", "inspect_tree", "show the search tree of a problem in the terminal and as an HTML page"
    ),
    "select-raft": Command(
        "SelectRaftConfig", "select_raft", "build a dataset of the best solutions, selected with a reward model (RAFT)"
    ),
    "push-dataset": Command(
        "PushDatasetConfig",
        "push_dataset",
        "push datasets to the Hub, each as one configuration of a repository",
    ),
    "evaluate": Command(
        "EvaluateConfig",
        "evaluate",
        "measure the accuracy of policies without a reward model: greedy decoding, pass@N and majority vote",
        resumes=True,
    ),
    "best-of-n": Command(
        "BestOfNConfig",
        "best_of_n",
        "select one of N solutions per problem with a reward model, and measure the accuracy for several N",
        resumes=True,
    ),
    "step-search": Command(
        "StepSearchConfig",
        "step_search",
        "search for solutions step by step with a reward model, and measure the accuracy for several N",
        resumes=True,
    ),
    "benchmark": Command(
        "BenchmarkConfig", "benchmark", "measure how well a reward model finds wrong steps, on public benchmarks"
    ),
    "report": Command(
        "ReportConfig",
        "report",
        "show the results of several runs on one HTML page: curves, hacking gap, calibration, cost",
    ),
    "table": Command(
        "TableConfig", "table", "compare the results of several runs with the numbers in a table of a paper"
    ),
    "score": Command("ScoreConfig", "score", "score the steps of solutions with a reward model"),
    "app": Command(
        "AppConfig", "app", "try reward models in the browser: paste a solution, see the scores of its steps"
    ),
    "reason": Command(
        "ReasonConfig",
        "reason",
        "train the Hierarchical Reasoning Model and its controls on grid puzzles, and compare them",
        resumes=True,
    ),
    "solve": Command("SolveConfig", "solve", "solve grid puzzles with a trained reasoning model"),
    "demo": Command(
        "DemoConfig",
        "run_demo",
        "run both papers' methods from end to end on arithmetic problems, on CPU, and write a report",
        resumes=True,
    ),
    "env": Command("EnvConfig", "print_env", "print the versions to include in a bug report"),
}
GROUPS = {
    "start": ("quickstart", "demo", "env"),
    "labelled steps": ("build-prm800k", "build-math-shepherd", "build-stepwise", "judge", "push-dataset"),
    "tree search": ("annotate", "inspect", "export", "select-raft"),
    "training": ("reward", "implicit-prm", "grpo", "kl-self"),
    "scores": ("score", "app"),
    "evaluation": ("evaluate", "best-of-n", "step-search", "benchmark", "report", "table"),
    "Hierarchical Reasoning Model": ("build-grid", "train-grid", "solve", "reason"),
}  # of the help
TRAINING = {
    "reward": "train a step reward model: hierarchical (HRM), process (PRM) or outcome (ORM)",
    "implicit-prm": "train a step reward model on right and wrong solutions, without labels of steps (implicit PRM)",
    "kl-self": "train a policy on its best solutions, with log-scaled KL regularisation towards a reference model",
    "train-grid": "train a Hierarchical Reasoning Model on grid puzzles",
    "grpo": "train a policy with GRPO, with a step reward model that scores each step of its solutions",
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Command line without the program's name. Defaults to `sys.argv[1:]`. Only then are SIGTERM and SIGHUP handled.

    Returns:
        `int`: Exit code: 0 on success, 1 after an error, which is printed on one line, 130 after Ctrl-C, 143 after SIGTERM, 129 after
        SIGHUP. An invalid command line exits with 2.
    """
    stop = StopSignals() if argv is None else None
    argv = list(sys.argv[1:] if argv is None else argv)
    summaries = {name: command.summary for name, command in COMMANDS.items()} | TRAINING
    width = max(map(len, summaries)) + 2
    parser = argparse.ArgumentParser(
        prog="trl-hrm",
        usage="trl-hrm COMMAND [OPTIONS]",
        description="Hierarchical Reward Models for TRL.",
        epilog="\n\n".join(
            "\n".join([f"{title}:", *(f"  {name:<{width}}{summaries[name]}" for name in names)])
            for title, names in GROUPS.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trl_hrm {trl_hrm.__version__}")
    name = argv[0] if argv else None
    if name is None or name.startswith("-"):
        parser.parse_args(argv)
        parser.error("no command given. `trl-hrm --help` lists all commands")
    if name not in summaries:
        from .command_parser import nearest

        parser.error(f"found {name!r}, which is not a command.{nearest(name, list(summaries))}")
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if argv.count("--config") > 1 or argv[-1] == "--config":
        parser.error("--config takes one file.")
    if name in TRAINING:
        to_resume = "Add --resume_from_checkpoint true to resume from the last checkpoint, if one was saved."
    else:
        to_resume = f"Run the same command again to {'resume' if COMMANDS[name].resumes else 'start over'}."
    stopped = f"Stopped. {to_resume}"
    try:
        with nullcontext() if stop is None else stop.ending(stopped):
            if "--config" in argv:
                read_yaml(argv[argv.index("--config") + 1])  # raises on damaged files and duplicate names
            if name in TRAINING:
                from .scripts.training import launch

                launch(name, argv[1:])
                return 0
            run(name, argv[1:])
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130 if stop is None else stop.exit_code
    except BrokenPipeError:  # the reader closed the pipe, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # the border: no traceback leaves it, unless it is asked for
        if is_debug(argv if name in COMMANDS else ()):  # training arguments have a `--debug` of their own
            raise
        debug = "--debug" if name in COMMANDS else "TRL_HRM_DEBUG=1"
        say(error_line(error, f"trl-hrm {name}", debug), sys.stderr)
        return 1
    return 0


def run(name: str, argv: Sequence[str]) -> None:
    """Parse the config of a command and run it."""
    # This imports TRL, for a second in which Ctrl-C should print no traceback
    from .command_parser import CommandParser

    command = COMMANDS[name]
    parser = CommandParser(
        getattr(trl_hrm, command.config),
        show_all="--help_all" in argv,
        prog=f"trl-hrm {name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
    )
    config, options = parser.read(argv)
    if options.print_config:
        import yaml

        settings = config.settings()
        is_printable = json.dumps(settings, ensure_ascii=False).isprintable()
        print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=is_printable), end="")
        return
    result = getattr(trl_hrm, command.function)(config)
    if result is not None:
        say(result)


if __name__ == "__main__":
    sys.exit(main())
