"""Settings that validate themselves: frozen dataclasses built from flat mappings (TOML, command line)."""

from __future__ import annotations

import contextlib
import math
import numbers
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, NamedTuple, TypeVar, get_type_hints

from qnewton_mpi.errors import UserError, did_you_mean, printable

S = TypeVar("S")


class Check(NamedTuple):
    """Which values a setting may have, how to say so, and all of them where they are few words."""

    accepts: Callable[[Any], bool]
    says: str
    choices: tuple[str, ...] = ()


MOST = 2**63 - 1  # the largest integer that files and arrays keep

POSITIVE = Check(lambda v: v > 0, "must be greater than 0")
NOT_NEGATIVE = Check(lambda v: v >= 0, "must be at least 0")
SHARE = Check(lambda v: 0 <= v <= 1, "must be from 0 to 1")
FRACTION = Check(lambda v: 0 <= v < 1, "must be at least 0 and less than 1")


def one_of(*choices: str) -> Check:
    """Return the check that a value is one of `choices`."""
    return Check(lambda v: v in choices, f"must be one of {', '.join(choices)}", choices)


def setting(
    default: Any,
    text: str,
    check: Check | tuple[Callable[[Any], bool], str] | None = None,
    words: tuple[str, ...] = (),
    **marks: Any,
) -> Any:
    """Declare a dataclass field with its help text, the check of its value, and marks for those who read its metadata.

    None passes where it is the default, and so do the `words`.
    """
    metadata = {"help": text, "check": None if check is None else Check(*check), "words": words, **marks}
    return field(default=default, metadata=metadata)


def describe(item: Field[Any]) -> str:
    """Return a field's help text with its default."""
    shown = "" if item.default in (None, MISSING, "") else f" (default {item.default})"
    return str(item.metadata["help"]) + shown


def build(kind: type[S], values: Mapping[str, Any]) -> S:
    """Return `kind(**values)` with every value converted to its field's type and checked.

    Parameters
    ----------
    kind : frozen dataclass whose fields were declared with `setting`
    values : mapping
        Strings (from a command line) or TOML values.

    Raises
    ------
    UserError
        For an unknown name, a wrong type, or a value that its check refuses.
    """
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            like = did_you_mean(name, known) or f"; known are {', '.join(sorted(known))}"
            raise UserError(f"unknown option '{printable(name)}'{like}")
    converted = {}
    for name, value in values.items():
        metadata = known[name].metadata
        if isinstance(value, str) and value in metadata["words"]:
            converted[name] = value
            continue
        converted[name] = _convert(name, value, hints[name], metadata["words"])
        check: Check | None = metadata["check"]
        if check and converted[name] is not None and not check.accepts(converted[name]):
            raise UserError(f"{name} = {_shown(value)}: {check.says}{did_you_mean(str(value), check.choices)}")
    return kind(**converted)


def base_type(hint: Any) -> type:
    """Return T of a field declared as T, `T | None` or `T | Literal[…]`."""
    options = [t for t in getattr(hint, "__args__", (hint,)) if t is not type(None)]
    return options[0]  # type: ignore[no-any-return]


def integer(value: int | str) -> int:
    """Return an integer, or what a string says; ValueError beyond 64 bits."""
    number = int(value)
    if abs(number) > MOST:
        raise ValueError
    return number


def check_count(name: str, value: Any, least: int) -> None:
    """Raise `UserError` for an argument of a program that is no integer, or too small. Local.

    Examples
    --------
    >>> check_count("samples", 16, 1)
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= int(value) <= MOST:
        raise UserError(f"{name}={value!r:.60}: must be an integer, at least {least}")


def finite(value: float | str) -> float:
    """Return a number, or what a string says; ValueError where it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def plain(value: str) -> str:
    """Return a string; ValueError for an empty one, or one that files, and those that read messages, cannot take."""
    if not value or any(unicodedata.category(c) in ("Cc", "Cs") for c in value):  # control characters, half a pair
        raise ValueError
    return value


# What a field's type accepts, strings being those of a command line, how it is converted, and how to say so.
ACCEPTED: dict[type, tuple[tuple[type, ...], Callable[[Any], Any], str]] = {
    bool: ((bool,), bool, "true or false"),
    int: ((int, str), integer, "an integer of at most 64 bits"),
    float: ((int, float, str), finite, "a finite number"),
    str: ((str,), plain, "a string, not empty and without control characters"),
}


def _convert(name: str, value: Any, hint: Any, words: tuple[str, ...]) -> Any:
    if value is None:
        return None
    target = base_type(hint)
    accepted, convert, wanted = ACCEPTED[target]
    if isinstance(value, accepted) and isinstance(value, bool) == (target is bool):
        with contextlib.suppress(ValueError, OverflowError):
            return convert(value)
    raise UserError(f"{name} = {_shown(value)}: must be {' or '.join([wanted, *words])}")


def _shown(value: Any) -> str:
    """Return a value, of any type and size, as a message shows it."""
    if isinstance(value, int) and abs(value) > MOST:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | int | float):
        return printable(str(value))
    return "a table" if isinstance(value, Mapping) else f"a {type(value).__name__}"
