"""What a checkpoint has, and what its files are called."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qnewton_mpi.files.images import HDF5_ERRORS
from qnewton_mpi.files.whole import regular_descriptor

SCHEMA = 3
MASTER, SUMS = "checkpoint.h5", "SHA256SUMS"
TOGETHER = "ranks.h5"  # in place of a file a rank, where h5py has parallel HDF5
MOST_SUMS = 2**26  # bytes, of a million ranks' sums
UNREADABLE = (*HDF5_ERRORS, IndexError)


@dataclass(frozen=True)
class Entry:
    """What checkpoint.h5 says of an entry of the state.

    Attributes
    ----------
    kind : str
        Of `Kind`.
    shape : sequence of int
        Of a HELD one without the last axis, which is a rank's coordinates.
    dtype : str
    ranks : list of int
        Those that wrote it.
    """

    kind: str
    shape: Sequence[int]
    dtype: str
    ranks: list[int] = field(default_factory=list)


def rank_name(rank: int, ranks: int) -> str:
    """Return the name of a rank's file, without its suffix, or of its group."""
    return f"rank-{rank:05d}-of-{ranks:05d}"


def file_names(ranks: int, together: bool) -> list[str]:
    """Return the name of the file of each rank."""
    return [TOGETHER if together else f"{rank_name(rank, ranks)}.h5" for rank in range(ranks)]


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:010d}"


def sums_in(folder: Path) -> dict[str, str]:
    """Return what SHA256SUMS says, by the names of the files."""
    with os.fdopen(regular_descriptor(folder / SUMS), "rb") as file:
        text = file.read(MOST_SUMS).decode("ascii", "replace")
    sums = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)}
    if lines_of(sums) != text:
        raise ValueError(f"{SUMS} is damaged")
    return sums


def lines_of(sums: Mapping[str, str]) -> str:
    """Return the text of SHA256SUMS."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def is_whole(folder: Path) -> bool:
    """Tell whether all files of a checkpoint are there, whatever is in them."""
    try:
        return all((folder / name).is_file() for name in (MASTER, *sums_in(folder)))
    except UNREADABLE:
        return False
