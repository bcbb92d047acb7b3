"""HDF5 files as images: made in memory, written and read at once, compared with their sum before HDF5 parses them.

    bytes 0 … 511     the user block, text: what the file is, how long, and the SHA-256 of all that follows
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

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.whole import open_regular, reason, regular_descriptor, replace_whole

USER_BLOCK = 512
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
HEADER = "qnewton_mpi {kind}\nsha256 of the {size} bytes that follow these 512: {digest}\n"
PATTERN = re.compile(
    rb"qnewton_mpi ([a-z ]+)\nsha256 of the (\d{1,18}) bytes that follow these 512: ([0-9a-f]{64})\n +\n"
)
OLD, OLD_MARK, OLD_MOST = "run or study", b"version_qnewton_mpi", 1 << 26  # in the first bytes of earlier versions
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
    header = HEADER.format(kind=kind, size=len(image), digest=hashlib.sha256(image).hexdigest()).encode()
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
    with open_regular(path) as (opened, size):
        start = opened.read(USER_BLOCK)
        header = PATTERN.fullmatch(start)
        if header is None and not start.startswith(HDF5_SIGNATURE):
            what = "its beginning is damaged, or it was written by another program" if start else "it is empty"
            raise UserError(f"{printable(path)}: is not the file of a {kind} ({what})")
        if header is not None and header[1].decode() != kind:
            raise UserError(f"{printable(path)}: is the file of a {header[1].decode()}, not of a {kind}")
        if header is not None and size != USER_BLOCK + int(header[2]):  # seen before it is read: it may be endless
            raise UserError(f"{printable(path)}: is damaged: it has {size:,} of {USER_BLOCK + int(header[2]):,} bytes")
        raw = start + opened.read()
    if header is not None and hashlib.sha256(memoryview(raw)[USER_BLOCK:]).hexdigest().encode() != header[3]:
        raise UserError(f"{printable(path)}: is damaged: it was changed after it was written (sums differ)")
    try:
        with h5py.File(io.BytesIO(raw), "r") as file:
            yield file
    except HDF5_ERRORS as error:
        raise UserError(f"{printable(path)}: is not the file of a {kind} ({reason(error)})") from error


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
    with io.FileIO(regular_descriptor(path), "rb") as raw:
        if hashlib.file_digest(raw, "sha256").hexdigest() != digest:
            raise ValueError(f"{path.name} does not match its checksum")
        with Exact(raw) as exact, h5py.File(exact, "r") as file:
            yield file


def kind_of(path: Path) -> str:
    """Return what a file says that it is; "" where that is nothing. Local.

    Of a run and a study from before there were user blocks, "run or study".
    """
    with open_regular(path) as (file, _):
        start = file.read(USER_BLOCK)
        header = PATTERN.fullmatch(start)
        if header is not None:
            return header[1].decode()
        return OLD if start.startswith(HDF5_SIGNATURE) and OLD_MARK in file.read(OLD_MOST) else ""


def child(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """Return what a group holds under a name, in this very file: no link to another place is followed. Local.

    Raises
    ------
    KeyError, ValueError
        Where there is none.
    """
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{name} is missing" if link is None else f"{name} is a link")
    return group[name]


def subgroup(group: h5py.Group, name: str) -> h5py.Group:
    """Return a group within a group. Local.

    Raises
    ------
    KeyError, ValueError
        Where there is none.
    """
    found = child(group, name)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{name} is no group")
    return found


def stored(group: h5py.Group, name: str) -> h5py.Dataset:
    """Return a data set whose data is in this very file: no link is followed on the way, none virtual, none external.

    Local.

    Raises
    ------
    KeyError, ValueError
        Where there is none.
    """
    *groups, last = name.split("/")
    for part in groups:
        group = subgroup(group, part)
    found = child(group, last)
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external or found.shape is None:
        raise ValueError(f"{name} is not an array in this file")
    return found


def dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """Return a stored data set of numbers or text as it was written here, as large as the file at most. Local.

    No filter or compound type is accepted. Where the data is missing, HDF5 would give zeros, as many as declared.

    Raises
    ------
    KeyError, ValueError
        Where there is none.
    """
    found = stored(group, name)
    if found.dtype.kind not in "biufS":
        raise ValueError(f"{name} is not an array of numbers in this file")
    if found.id.get_create_plist().get_nfilters():
        raise ValueError(f"{name} is filtered")
    if found.nbytes > min(found.id.get_storage_size(), found.file.id.get_filesize()):
        raise ValueError(f"{name} is not all there")
    return found


def attributes_of(group: h5py.Group) -> dict[str, bool | int | float | str]:
    """Return the attributes, each a number or text, as Python has them. Local.

    Raises
    ------
    KeyError, ValueError
        Where one is something else.
    """
    found: dict[str, bool | int | float | str] = {}
    for name in group.attrs:
        stored = group.attrs.get_id(name)
        if stored.shape != () or (stored.dtype.kind not in "biufS" and h5py.check_string_dtype(stored.dtype) is None):
            raise ValueError(f"the attribute {name} is no number or text")
        value = group.attrs[name]
        found[name] = value.item() if isinstance(value, np.number | np.bool_) else text_of(value)
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
