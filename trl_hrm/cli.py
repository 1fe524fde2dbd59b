"""The command `trl-hrm`. Only the module of the chosen command is imported, so that `--help` answers at once."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__
from .scripts.settings_file import add_config_argument, with_settings


COMMANDS = {
    "build-prm800k": ("build_prm800k", "build a dataset of judged steps from PRM800K"),
    "build-math-shepherd": ("build_math_shepherd", "build a dataset of judged steps from Math-Shepherd"),
    "build-stepwise": ("build_stepwise", "build a dataset of judged steps from rows in TRL's stepwise format"),
    "annotate": ("annotate", "search solutions of problems with a policy and grade them"),
    "export": ("export", "make a dataset of judged steps of searched trees"),
    "inspect": ("inspect", "show the search tree of a problem, in the terminal and as a page"),
    "select-raft": ("select_raft", "choose the best of several solutions of each problem with a reward model"),
    "push-dataset": ("push_dataset", "push built datasets to the Hub, each as a configuration of a repository"),
    "best-of-n": (
        "best_of_n",
        "choose among N solutions with a reward model, and measure how accuracy grows with N",
    ),
    "benchmark": ("benchmark", "measure how well a reward model finds wrong steps, on benchmarks of judging"),
    "report": ("report", "put results of several runs on one page: curves, hacking gap, calibration, cost"),
    "score": ("score", "score steps with a trained reward model"),
    "demo": ("demo", "both papers from end to end on a small world of arithmetic, on CPU, with a report"),
    "env": ("env", "print the versions that a bug report needs"),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each option's help, except where the help states it and where there is none to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if "(default:" in action.help or action.required or action.default is None:
            return action.help
        return super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Command line without the program's name. By default that of the process.

    Returns:
        `int`: 0, 1 after an error in the user's input, which is printed as one line, or 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="trl-hrm", description="Hierarchical Reward Models for TRL.")
    parser.add_argument("--version", action="version", version=f"trl_hrm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in argv if word in COMMANDS), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=HelpFormatter, allow_abbrev=False
        )
        if name == asked:
            chosen = importlib.import_module(f".scripts.{module}", __package__)
            own = command
            add_config_argument(command)
            chosen.add_arguments(command)
    try:
        if asked:
            place = argv.index(asked) + 1
            argv = argv[:place] + with_settings(own, argv[place:])
        args = parser.parse_args(argv)
        chosen.run(args)
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
