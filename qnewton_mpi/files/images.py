"""HDF5 files as images: made in memory, written and read at once, compared with their sum before HDF5 parses them.

    bytes 0 … 511     the user block, text: what the file is, and the SHA-256 of all that follows
    bytes 512 …       HDF5; any HDF5 library skips the user block

HDF5 never writes to a disk itself: it cannot bear one that fills up, it takes locks that some file systems do not have,
and it waits for hours at a file that is cut off. A file that is not what was written is an error before HDF5 sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.errors import UserError
from qnewton_mpi.files.whole import read_whole, reason, replace_whole

USER_BLOCK = 512
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
HEADER = "qnewton_mpi {kind}\nsha256 of what follows these 512 bytes: {digest}\n"
PATTERN = re.compile(rb"qnewton_mpi ([a-z ]+)\nsha256 of what follows these 512 bytes: ([0-9a-f]{64})\n +\n")
HDF5_ERRORS = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, OverflowError, MemoryError)


def write_image(path: Path, kind: str, fill: Callable[[h5py.File], object]) -> None:
    """Make an HDF5 file and put it in the place of the one that is there. Local.

    Parameters
    ----------
    path : Path
    kind : str
        What the file is, in small letters: "run", "study".
    fill : callable
        Puts into an open, empty file what it is to have.

    Raises
    ------
    OSError, UserError
        As `replace_whole`.
    """
    with h5py.File(f"image-{id(fill)}", "w", driver="core", backing_store=False, libver="latest") as file:
        fill(file)
        file.flush()
        image = file.id.get_file_image()
    header = HEADER.format(kind=kind, digest=hashlib.sha256(image).hexdigest()).encode()
    replace_whole(path, header.ljust(USER_BLOCK - 1) + b"\n", image)


@contextlib.contextmanager
def open_image(path: Path, kind: str) -> Iterator[h5py.File]:
    """Open a file that `write_image` wrote, for reading, from memory: no locks, and no part of it changes. Local.

    Whatever HDF5 or NumPy raise while the context lasts counts as damage of the file. A file without a user block is
    opened without a comparison: those written before there were sums.

    Raises
    ------
    UserError
        For a file that is missing, of another kind, cut off, changed after it was written, or not as it should be.
    """
    raw = read_whole(path)
    header = PATTERN.fullmatch(raw[:USER_BLOCK])
    if header is None and not raw.startswith(HDF5_SIGNATURE):
        what = "is empty" if not raw else "its beginning is damaged, or it was written by another program"
        raise UserError(f"{path}: is not the file of a {kind} ({what})")
    if header is not None:
        found = header[1].decode()
        if found != kind:
            raise UserError(f"{path}: is the file of a {found}, not of a {kind}")
        if hashlib.sha256(memoryview(raw)[USER_BLOCK:]).hexdigest().encode() != header[2]:
            raise UserError(f"{path}: is damaged: it was cut off, or changed after it was written (sums differ)")
    try:
        with h5py.File(io.BytesIO(raw), "r") as file:
            yield file
    except HDF5_ERRORS as error:
        raise UserError(f"{path}: is not the file of a {kind} ({reason(error)})") from error


def dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """Return a data set whose data is in this very file, of numbers, as large as the file at most. Local.

    No link to another file is followed, no virtual data set, external storage, filter or compound type accepted: what
    they lead to is not what was written here.

    Raises
    ------
    KeyError, ValueError
        Where there is none.
    """
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{name} is missing" if link is None else f"{name} is a link")
    found = group[name]
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external or found.dtype.kind not in "biufS":
        raise ValueError(f"{name} is not an array of numbers in this file")
    if found.id.get_create_plist().get_nfilters():
        raise ValueError(f"{name} is filtered")
    return found


def column(group: h5py.Group, name: str) -> NDArray[np.float64]:
    """Return a column of numbers, (rows,). Local.

    Raises
    ------
    KeyError, ValueError
        Where there is none.
    """
    found = dataset(group, name)
    if found.ndim != 1 or found.dtype.kind not in "biuf":
        raise ValueError(f"{name} is not a column of numbers")
    return np.asarray(found[()], np.float64)


def text_of(value: Any) -> str:
    """Return an attribute or scalar that is text. Local.

    Raises
    ------
    ValueError
        Where it is something else.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise ValueError(f"text is expected, not {type(value).__name__}")
    return value
