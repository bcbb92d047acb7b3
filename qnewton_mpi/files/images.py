"""HDF5 files as images: made in memory, written and read at once, compared with their sum before HDF5 parses them.

    bytes 0 … 511     the user block, text: what the file is, and the SHA-256 of all that follows
    bytes 512 …       HDF5; any HDF5 library skips the user block

HDF5 never writes to a disk itself: it cannot bear one that fills up, it takes locks that some file systems do not have,
and it waits for hours at a file that is cut off. A file that is not what was written is an error before HDF5 sees it.

The parts of a checkpoint have no user block, for their sums stand elsewhere, and are too large to be read at once.
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
from qnewton_mpi.files.whole import open_regular, read_whole, reason, replace_whole

USER_BLOCK = 512
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
HEADER = "qnewton_mpi {kind}\nsha256 of what follows these 512 bytes: {digest}\n"
PATTERN = re.compile(rb"qnewton_mpi ([a-z ]+)\nsha256 of what follows these 512 bytes: ([0-9a-f]{64})\n +\n")
HDF5_ERRORS = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, OverflowError, MemoryError)


class Exact(io.BufferedReader):
    """A file that gives HDF5 all that it asks for or an error: h5py would take a short read for a whole one."""

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer. Local."""
        count = super().readinto(buffer)
        if count != memoryview(buffer).nbytes:
            raise OSError("was cut off while it was read")
        return count


def image_of(fill: Callable[[h5py.File], object]) -> memoryview:
    """Return an HDF5 file that is made in memory; `fill` puts into it, open and empty, what it is to have. Local."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest") as file:
        fill(file)
    return buffer.getbuffer()


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
    image = image_of(fill)
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


@contextlib.contextmanager
def open_summed(path: Path, digest: str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, once its SHA-256 has been compared: both through one descriptor. Local.

    So what is read is what was compared, whatever becomes of the path, and little of it is in memory at a time.

    Raises
    ------
    OSError
        For a file that is missing, not regular, not readable, or not HDF5.
    ValueError
        For one with another sum.
    """
    with open_regular(path) as raw:
        if hashlib.file_digest(raw, "sha256").hexdigest() != digest:
            raise ValueError(f"{path.name} does not match its checksum")
        with Exact(raw) as exact, h5py.File(exact, "r") as file:
            yield file


def dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """Return a data set all of whose data is in this very file, of numbers, as large as the file at most. Local.

    No link to another file is followed, no virtual data set, external storage, filter or compound type accepted: what
    they lead to is not what was written here.

    Raises
    ------
    KeyError, ValueError
        Where there is none.
    """
    found = group
    for part in name.split("/"):
        link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{name} is missing" if link is None else f"{name} is a link")
        found = found[part]
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external or found.dtype.kind not in "biufS":
        raise ValueError(f"{name} is not an array of numbers in this file")
    if found.id.get_create_plist().get_nfilters():
        raise ValueError(f"{name} is filtered")
    if found.id.get_storage_size() < found.size * found.dtype.itemsize:
        raise ValueError(f"{name} is not all there")
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
