"""The parsers of the commands' configs, which extend [`~trl.TrlParser`]."""

import argparse
import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from trl import TrlParser

from .io import read_yaml
from .renamed import renamed_option
from .terminal import one_line


VALUE = "\0"  # before a word that is a value, even if it looks like an option. No word of a command line contains it


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show each option under one name, and whether it is required or its default, unless the help text states it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required and action.option_strings:
            return f"{action.help} (required)"
        has_none = action.default is False or action.default in (None, [], argparse.SUPPRESS)
        if "(default:" in action.help or action.required or has_none:
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) > 1 and action.dest != "help":
            action = copy.copy(action)
            action.option_strings = action.option_strings[:1]  # the name with hyphens works, but is not shown
        return super()._format_action_invocation(action)


class ConfigParser(TrlParser):
    """
    [`~trl.TrlParser`] for dataclasses, which may extend [`~config.Config`]. It supports these keys in the metadata of a field:

    - `positional`: the field is a positional argument. It can also be given as an option with its name;
    - `parse`: function that parses an argument, instead of the type of the field;
    - `advanced`: the option is shown by `--help_all`, not by `--help`;
    - the keys that [`~config.Config`] checks.

    Args:
        dataclass_types (`Sequence[type]`):
            Dataclasses of the options.
        show_all (`bool`, *optional*, defaults to `False`):
            Whether to show advanced options in the help.
        **kwargs:
            Passed to [`~trl.TrlParser`].
    """

    def __init__(self, dataclass_types: Sequence[type], show_all: bool = False, **kwargs: Any):
        self.show_all = show_all
        self.positionals: list[str] = []
        super().__init__(dataclass_types, **kwargs)

    def add_argument(
        self,
        *names: str,
        positional: bool = False,
        parse: Callable | None = None,
        advanced: bool = False,
        range: str | None = None,
        may_be_empty: bool = False,
        words: Sequence[str] = (),
        **kwargs: Any,
    ) -> argparse.Action:
        if parse is not None:
            kwargs["type"] = parse
        if advanced and not self.show_all:
            kwargs["help"] = argparse.SUPPRESS
        if positional:
            kwargs.pop("required", None)
            self.positionals.append(names[0])
            names = (names[0].removeprefix("--"),)
        return super().add_argument(*names, **kwargs)


class CommandParser(ConfigParser):
    """
    Parser of the config of a command, with the options that all commands share.

    Args:
        config (`type`):
            Config dataclass.
        **kwargs:
            Passed to [`ConfigParser`].
    """

    def __init__(self, config: type, **kwargs: Any):
        self.settings = [field.name for field in fields(config) if field.init]
        self._words: Sequence[str] = ()
        super().__init__([config], formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        words = [action.metavar or action.dest.upper() for action in self._actions if not action.option_strings]
        self.usage = " ".join(["%(prog)s", *words, "[OPTIONS]"])
        self.add_argument("--help_all", action="help", help="show all options and exit")
        self.add_argument(
            "--config",
            metavar="FILE",
            help="YAML file with options. Options on the command line override it.",
        )
        self.add_argument("--print_config", action="store_true", help="print the resolved settings as YAML and exit")
        self.add_argument("--debug", action="store_true", help="print the traceback of an error")

    def _parse_optional(self, word: str) -> Any:
        """Read words such as `---` and `-2e-1` as values, as no option looks like them."""
        return super()._parse_optional(word) if re.match("--?[A-Za-z]", word) else None

    def _get_value(self, action: argparse.Action, word: str) -> Any:
        return super()._get_value(action, word.removeprefix(VALUE))

    def error(self, message: str) -> None:
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # argparse lists all spellings of an option
        if message.startswith("the following arguments are required"):  # one of them may be there, but misspelled
            known = [*self._option_string_actions, *self.positionals]
            words = [word.split("=")[0] for word in self._words if re.match("--[A-Za-z]", word)]
            unknown = [word for word in words if word not in known]
            if unknown:
                message = f"found {unknown[0]!r}, which is not an option.{nearest(unknown[0], known)}"
        self.exit(2, f"error: {one_line(message)}\nSee `{self.prog} --help`.\n")

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """Set the fields of the config. Other options, such as `--debug`, are unknown in a file."""
        known = {name: value for name, value in settings.items() if name in self.settings}
        super().set_defaults_with_config(**known)
        return [name for name in settings if name not in known]

    def read(self, argv: Sequence[str]) -> tuple[Any, argparse.Namespace]:
        """
        Return the config for a command line, and the options that all commands share.

        Raises:
            `OSError`: If the `--config` file cannot be read.
            `ValueError`: If a value is invalid, or the file contains an unknown option.
        """
        self._words = argv
        file = argv[argv.index("--config") + 1] if "--config" in argv else None
        command = self.prog.split()[-1]
        for word in argv:  # before a missing option with the new name is an error
            new = renamed_option(command, word) if word.startswith("--") else ""
            if new:
                self.error(f"found {word.split('=')[0]!r}, which is not an option.{new}")
        for name in [] if file is None else read_yaml(file):
            if new := renamed_option(command, name):
                raise ValueError(f"{file}: found {name!r}, which is not an option of {self.prog}.{new}")
        words, sources, is_source = [], [], False
        for word in argv:  # `--final_stops=--- x` has two values
            name, equals, value = word.partition("=")
            if name.replace("-", "_").replace("__", "--", 1) in self.positionals:
                is_source = True
                sources += [VALUE + value] if equals else []
                continue
            is_source &= self._parse_optional(word) is None
            takes_values = equals and getattr(self._option_string_actions.get(name), "nargs", 0) != 0
            found = [name, VALUE + value] if takes_values else [word]
            (sources if is_source else words).extend(found)
        words = sources + words  # positional arguments, before options that take several values
        config, options, unknown_settings, unknown_words = self.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
        if unknown_settings:
            name = unknown_settings[0]
            raise ValueError(
                f"{file}: found {name!r}, which is not an option of {self.prog}.{nearest(name, self.settings)}"
            )
        known = sorted({name for action in self._actions for name in action.option_strings[:1]})
        if unknown_words:
            self.error(f"found {unknown_words[0]!r}, which is not an option.{nearest(unknown_words[0], known)}")
        return config, options


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ` Did you mean X?` if a known word is similar, and an empty string otherwise."""
    close = get_close_matches(word.split("=")[0], known, n=1)
    return f" Did you mean {close[0]}?" if close else ""
