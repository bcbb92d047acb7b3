"""Settings that validate themselves: frozen dataclasses built from flat mappings (TOML, command line)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar, get_type_hints

from qnewton_mpi.errors import UserError

S = TypeVar("S")
Check = tuple[Callable[[Any], bool], str]

POSITIVE: Check = (lambda v: v > 0, "must be greater than 0")
NOT_NEGATIVE: Check = (lambda v: v >= 0, "must be at least 0")
FRACTION: Check = (lambda v: 0 <= v < 1, "must be at least 0 and less than 1")


def one_of(*choices: str) -> Check:
    """Return the check that a value is one of `choices`."""
    return (lambda v: v in choices, f"must be one of {', '.join(choices)}")


def setting(default: Any, text: str, check: Check | None = None, words: tuple[str, ...] = ()) -> Any:
    """Declare a dataclass field with its help text and the check of its value.

    None passes where it is the default, and so do the `words`.
    """
    return field(default=default, metadata={"help": text, "check": check, "words": words})


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
            raise UserError(f"unknown option {name!r}; known are {', '.join(sorted(known))}")
    converted = {}
    for name, value in values.items():
        metadata = known[name].metadata
        if value in metadata["words"]:
            converted[name] = value
            continue
        converted[name] = _convert(name, value, hints[name], metadata["words"])
        check = metadata["check"]
        if check and converted[name] is not None and not check[0](converted[name]):
            raise UserError(f"{name} = {value}: {check[1]}")
    return kind(**converted)


def base_type(hint: Any) -> type:
    """Return T of a field declared as T, `T | None` or `T | Literal[…]`."""
    options = [t for t in getattr(hint, "__args__", (hint,)) if t is not type(None)]
    return options[0]  # type: ignore[no-any-return]


# What a field's type accepts, strings being those of a command line, and how to say so.
ACCEPTED: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int, str), "an integer"),
    float: ((int, float, str), "a finite number"),
    str: ((str,), "a string"),
}


def _convert(name: str, value: Any, hint: Any, words: tuple[str, ...]) -> Any:
    if value is None:
        return None
    target = base_type(hint)
    accepted, wanted = ACCEPTED[target]
    if isinstance(value, accepted) and isinstance(value, bool) == (target is bool):
        with contextlib.suppress(ValueError):
            converted = target(value)
            if target is not float or math.isfinite(converted):
                return converted
    raise UserError(f"{name} = {value}: must be {' or '.join([wanted, *words])}")
