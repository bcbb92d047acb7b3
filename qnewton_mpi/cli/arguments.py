"""What the commands share: the parser that raises, and types of arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from qnewton_mpi.errors import UserError, printable

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """Takes options by their full names alone, and raises `UserError` where argparse would print its usage and exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


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
