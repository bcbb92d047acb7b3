"""What the commands share: the parser that raises, and types of arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from qnewton_mpi.errors import UserError, did_you_mean, printable

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Layout(argparse.RawDescriptionHelpFormatter):
    """Help with room for long names, and examples that stay as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


class Parser(argparse.ArgumentParser):
    """Takes options by their full names alone, and raises `UserError` where argparse would print its usage and exit.

    A word that resembles one that it knows is told with that.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Layout, **settings}, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{' See' if message.endswith('?') else '; see'} `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Take no unknown ones: told here, by the command's own parser, they are compared with its options."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(word, self._option_string_actions)}")
        return known, []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            like = did_you_mean(str(value), action.choices)
            choices = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value!r} must be one of {choices}{like}")


def add_command(commands: Commands, name: str, says: str, examples: Sequence[str], usage: str | None = None) -> Parser:
    """Return a new command's parser, whose help has examples. Local.

    Parameters
    ----------
    commands : action of subparsers
    name, says : str
        What it is called, and what it does.
    examples : sequence of str
        Lines as one would type them.
    usage : str, optional
        In place of all options, where these are many.
    """
    epilog = "\n".join(["examples:", *(f"  {line}" for line in examples)])
    description = f"{says[0].upper()}{says[1:]}."
    return commands.add_parser(name, help=says, description=description, epilog=epilog, usage=usage)


def number(text: str) -> int:
    """Return the whole number that a word is; -1 for what is none, or has more than 12 digits."""
    return int(text) if text.isdecimal() and len(text) <= 12 else -1


def at_least_one(option: str) -> Callable[[str], int]:
    """Return the type of an option that counts something.

    Raises
    ------
    UserError
        Where it is called with anything but a positive whole number.
    """

    def convert(text: str) -> int:
        if number(text) < 1:
            raise UserError(f"{option} {printable(text)}: a whole number from 1 to 999,999,999,999")
        return number(text)

    return convert


def file_path(text: str) -> Path:
    """Return the path of a file.

    Raises
    ------
    UserError
        For one that can be none's, as that of an empty variable of the shell.
    """
    if not Path(text).name:
        raise UserError(f"'{printable(text)}' is the name of no file")
    return Path(text)
