"""What an object carries from step to step, found by name: for checkpoints. No MPI, no files.

An object with state has

    state : ClassVar[Mapping[str, Kind]]           its attributes that are state
    parts() -> Mapping[str, object], optional      objects of its own that have state, by name
    lengths : ClassVar[Mapping[str, str]]          optional: attributes whose first axis grows and shrinks in a run, by
                                                   a name for its length; those of one name are equally long

so that a class lists each attribute once, and saving and restoring are the same walk. What is restored is all read and
checked before any of it is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.arrays import to_device, to_host

Change = tuple[Any, str, NDArray[Any]]
"""An object, the name of an attribute, and what it is to be set to, as a host array."""


class Kind(Enum):
    """Who has an attribute, and so how it is put together when the number of ranks changes."""

    SHARED = "shared"
    """The same on all ranks: a number, None, or an array."""
    HELD = "held"
    """(…, held): each rank its coordinates."""
    OWNED = "owned"
    """The same on all ranks that hold a layer."""


def entries(thing: Any, prefix: str = "") -> Iterator[tuple[str, Kind, Any, str]]:
    """Yield (path, kind, object, attribute) of all state, that of an object before that of its parts."""
    for name, kind in thing.state.items():
        yield prefix + name, kind, thing, name
    for name, part in getattr(thing, "parts", dict)().items():
        yield from entries(part, f"{prefix}{name}/")


def objects(thing: Any) -> Iterator[Any]:
    """Yield an object with state and all its parts."""
    yield thing
    for part in getattr(thing, "parts", dict)().values():
        yield from objects(part)


class Memory:
    """What all attributes of some objects are now, those beside their state too.

    Only references are kept. So what changes an attribute for good gives it a new value, and changes no array or list
    in its place.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> thing = SimpleNamespace(steps=1)
    >>> memory = Memory([thing])
    >>> thing.steps = 2
    >>> memory.recall()
    >>> thing.steps
    1
    """

    def __init__(self, things: Iterable[Any]) -> None:
        self._attributes = [(thing, dict(vars(thing))) for thing in things]

    def recall(self) -> None:
        """Set all attributes to what they were."""
        for thing, attributes in self._attributes:
            vars(thing).clear()
            vars(thing).update(attributes)


def value(thing: Any, name: str) -> NDArray[Any] | None:
    """Return an attribute as a host array; None as it is."""
    found = getattr(thing, name)
    if found is None:
        return None
    return np.asarray(found) if isinstance(found, (bool, int, float)) else to_host(found)


def check_finite(path: str, array: NDArray[Any]) -> None:
    """Raise `ValueError` where state has a number that is not finite: no method can go on with one. Local."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{path} is not finite")


def restore(thing: Any, read: Callable[[str, Kind], NDArray[Any] | None], prefix: str = "") -> None:
    """Set all state from `read(path, kind)`, where None says that there is none.

    Raises
    ------
    ValueError
        As `checked`; nothing has been set.
    """
    assign(checked(thing, read, prefix))


def checked(thing: Any, read: Callable[[str, Kind], NDArray[Any] | None], prefix: str = "") -> list[Change]:
    """Return what is to be set from `read(path, kind)`. Nothing is changed.

    Raises
    ------
    ValueError
        For an entry that is missing or not expected, not finite, or not of the shape and dtype of what is there.
    """
    changes = []
    lengths: dict[tuple[int, str], int] = {}
    for path, kind, owner, name in entries(thing, prefix):
        found, before = read(path, kind), getattr(owner, name)
        if found is None and before is None:
            continue
        if found is None or before is None:
            raise ValueError(f"{path} is {'missing' if found is None else 'not expected'}")
        number = isinstance(before, (bool, int, float))
        shape, dtype = (() if number else tuple(before.shape)), _dtype(before)
        length = getattr(owner, "lengths", {}).get(name)
        if length is not None:
            shape = (lengths.setdefault((id(owner), length), len(found) if found.ndim else 0), *shape[1:])
        if (found.shape, found.dtype) != (shape, dtype):
            raise ValueError(f"{path} is {found.dtype} {found.shape}, not {dtype} {shape}")
        check_finite(path, found)
        changes.append((owner, name, found))
    return changes


def assign(changes: list[Change]) -> None:
    """Set what `checked` returned: an array as one of the library of what was there, a number as a Python number."""
    for owner, name, found in changes:
        before = getattr(owner, name)
        number = isinstance(before, (bool, int, float))
        setattr(owner, name, type(before)(found[()]) if number else to_device(found, before))


def _dtype(present: Any) -> np.dtype[Any]:
    """Return the dtype that an attribute has as a host array."""
    return np.asarray(present).dtype if isinstance(present, (bool, int, float)) else to_host(present[..., :0]).dtype
