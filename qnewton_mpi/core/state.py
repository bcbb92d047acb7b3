"""What an object carries from step to step, found by name: for checkpoints. No MPI, no files.

An object with state has

    state : ClassVar[Mapping[str, Kind]]           its attributes that are state
    parts() -> Mapping[str, object], optional      objects of its own that have state, by name

so that a class lists each attribute once, and saving and restoring are the same walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.parallel.device import to_device, to_host


class Kind(Enum):
    """Who has an attribute, and so how it is put together when the number of ranks changes."""

    SHARED = "shared"
    """The same on all ranks: a number, None, or an array."""
    HELD = "held"
    """(…, held): each rank its coordinates."""
    OWNED = "owned"
    """The same on all ranks that hold a layer."""
    PARTIAL = "partial"
    """A sum over the ranks that hold a layer, each with the part of its own replicas."""


def entries(thing: Any, prefix: str = "") -> Iterator[tuple[str, Kind, Any, str]]:
    """Yield (path, kind, object, attribute) of all state, that of an object before that of its parts."""
    for name, kind in thing.state.items():
        yield prefix + name, kind, thing, name
    for name, part in getattr(thing, "parts", dict)().items():
        yield from entries(part, f"{prefix}{name}/")


def value(thing: Any, name: str) -> NDArray[Any] | None:
    """Return an attribute as a host array; None as it is."""
    found = getattr(thing, name)
    if found is None:
        return None
    return np.asarray(found) if isinstance(found, (bool, int, float)) else to_host(found)


def restore(thing: Any, read: Callable[[str, Kind], NDArray[Any] | None], prefix: str = "") -> None:
    """Set all state from `read(path, kind)`, where None says that there is none. As `entries`, parts last.

    An array becomes one of the library of the attribute it replaces; a number a Python number.

    Raises
    ------
    ValueError
        For an entry that is missing, or does not have the shape that it should.
    """
    for path, kind, owner, name in entries(thing, prefix):
        found, before = read(path, kind), getattr(owner, name)
        if found is None and before is None:
            continue
        if found is None:
            raise ValueError(f"{path} is missing")
        if not _fits(found, before, kind):
            raise ValueError(f"{path} has shape {found.shape}")
        if isinstance(before, (bool, int, float)):
            setattr(owner, name, type(before)(found[()]))
        elif kind is Kind.SHARED and (before is None or isinstance(before, np.ndarray)):
            setattr(owner, name, found)
        else:
            setattr(owner, name, to_device(found, before))


def _fits(found: NDArray[Any], before: Any, kind: Kind) -> bool:
    """Whether an array may replace what is there: how many rows of held coordinates there are may have changed."""
    if before is None:
        return True
    shape = tuple(getattr(before, "shape", ()))
    if kind is Kind.HELD:
        return found.shape[-1:] == shape[-1:] and found.ndim == len(shape)
    return found.ndim == len(shape) if kind is Kind.SHARED else found.shape == shape
