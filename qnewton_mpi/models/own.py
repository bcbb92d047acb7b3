"""A network of one's own, MODULE:FACTORY: what is imported, and called with what (extra `torch`)."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.models.module import ModuleNetwork


def own(
    factory: str,
    input_shape: tuple[int, int, int],
    classes: int,
    seed: int,
    shapes: Mapping[str, Sequence[int]] | None = None,
    constants: Mapping[str, float] | None = None,
    xp: ModuleType = np,
    dtype: Any = np.float32,
    smoothing: float = 0.0,
) -> ModuleNetwork:
    """Return the network of a factory by its name. Local.

    Parameters
    ----------
    factory : str
        "module:name" of a class of modules, or a function that returns one; the module is looked for in the current
        folder, too. Of `input_shape`, `classes` and `num_classes` it is given those that it has as arguments.
    input_shape : (C, H, W)
    classes : int
    seed : int
        Of PyTorch's random numbers when it is called.
    shapes, constants : mapping, optional
        As of `ModuleNetwork`.
    xp, dtype, smoothing : optional
        As of `ModuleNetwork`.

    Raises
    ------
    UserError
        Where there is no such factory, it needs other arguments, or as `ModuleNetwork`.
    """
    make = imported(factory)
    shape = tuple(map(int, input_shape))
    arguments = accepted(make, factory, {"input_shape": shape, "classes": classes, "num_classes": classes})
    about: dict[str, Any] = {"kind": "own", "factory": factory, "input_shape": shape, "classes": classes, "seed": seed}
    before = {"shapes": shapes, "constants": constants}
    about |= {name: said for name, said in before.items() if said is not None}
    return ModuleNetwork(functools.partial(make, **arguments), about, xp, dtype, smoothing)


def imported(factory: str) -> Callable[..., Any]:
    """Return what a name "module:name" is of; `UserError` for what is not there, or cannot be called."""
    where, shown = factory.partition(":"), printable(factory)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: a file there is not to hide a package
    try:
        found: Any = importlib.import_module(where[0])
    except (Exception, SystemExit) as error:  # a script that ends itself is not to end the run in silence
        if isinstance(error, ModuleNotFoundError) and error.name and f"{where[0]}.".startswith(f"{error.name}."):
            hint = ": leave out .py" if where[0].endswith(".py") else ""
            raise UserError(f"model = {shown}: there is no module {error.name}, here or installed{hint}") from error
        said = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        raise UserError(
            f'model = {shown}: importing {where[0]} fails ({said}): python -c "import {where[0]}" tells more'
        ) from error
    place = getattr(found, "__file__", None) or where[0]
    for name in where[2].split("."):
        found = getattr(found, name, None)
    if not callable(found):
        raise UserError(f"model = {shown}: {printable(place)} has no function or class {where[2]}")
    return found  # type: ignore[no-any-return]


def accepted(make: Callable[..., Any], factory: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the known arguments that a factory has by name; `UserError` where it needs others."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # of C
        return {}
    for p in parameters:
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in known:
            raise UserError(
                f"model = {printable(factory)}: needs an argument {p.name}: give it a default; {', '.join(known)} are "
                "given where there are such"
            )
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in known.items() if name in named}
