"""Readers of the published file layouts, plain or gzip: IDX (MNIST, Fashion-MNIST) and CIFAR-10's binary records.

No more is read or unpacked than a file's header promises, and one byte, which shows whether there is more.
"""

from __future__ import annotations

import contextlib
import gzip
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.whole import open_regular

Bytes = NDArray[np.uint8]

CLASSES = 10
IDX_UNSIGNED_BYTE = 0x08
CIFAR_RECORD = 1 + 3 * 32 * 32
CIFAR_RECORDS = 10_000  # of each file as published
GZIP = b"\x1f\x8b"
GZIP_RATIO = 1032  # the most that DEFLATE can save

Read = Callable[[int], bytes]  # up to so many bytes


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[tuple[Read, int]]:
    """Open a file, unpacked where it begins as gzip does, whatever it is called. Local.

    Gives its `read`, and the bytes that it can hold at most.

    Raises
    ------
    UserError
        For a file that cannot be read or is not sound gzip, also within the context.
    """
    with open_regular(path) as (file, size):
        packed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        yield (gzip.GzipFile(fileobj=file).read, GZIP_RATIO * size) if packed else (file.read, size)


def read_idx(path: Path, dimensions: int) -> Bytes:
    """Return the array of an IDX file of unsigned bytes.

    Parameters
    ----------
    path : Path
    dimensions : int
        3 for images, 1 for labels.

    Raises
    ------
    UserError
        For another magic number, or a length that contradicts the header.
    """
    magic = bytes([0, 0, IDX_UNSIGNED_BYTE, dimensions])
    with unpacked(path) as (read, most):
        found, sides = read(len(magic)), read(4 * dimensions)
        if found != magic:
            raise UserError(
                f"{printable(path)}: magic number is {found.hex()}, not {magic.hex()}: "
                "this is not the IDX file expected"
            )
        whole = len(sides) == 4 * dimensions
        shape = np.frombuffer(sides, ">u4").tolist() if whole else []
        promised = math.prod(shape)
        # Not asked for where it cannot be there: memory for it would be taken at once.
        values = read(promised + 1) if whole and promised <= most else b""
    if not whole or len(values) != promised:
        held = "more" if len(values) > promised else "fewer"
        raise UserError(
            f"{printable(path)}: holds {held} bytes than its header promises: truncated or damaged? fetch it again"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_cifar(path: Path) -> tuple[Bytes, Bytes]:
    """Return images (n, 3, 32, 32) and labels (n,) of a CIFAR-10 file of up to 10,000 records of 3,073 bytes.

    Raises
    ------
    UserError
        For an empty file, one that is no whole number of records, or one of more than are published in a file.
    """
    most = CIFAR_RECORDS * CIFAR_RECORD
    with unpacked(path) as (read, _):
        raw = read(most + 1)
    if len(raw) > most:
        raise UserError(f"{printable(path)}: holds more than the {CIFAR_RECORDS:,} records of a CIFAR-10 file")
    if not raw or len(raw) % CIFAR_RECORD:
        raise UserError(
            f"{printable(path)}: {len(raw)} bytes are no whole number of {CIFAR_RECORD}-byte records: truncated? "
            "fetch it again"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, CIFAR_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def check_pair(where: Path, images: Bytes, labels: Bytes) -> None:
    """Raise `UserError` unless there are as many labels as images, at least one, all of them 0 … 9."""
    if len(images) != len(labels) or not len(images):
        raise UserError(
            f"{printable(where)}: {len(images)} images but {len(labels)} labels: the files do not belong together"
        )
    if labels.max() >= CLASSES:
        raise UserError(
            f"{printable(where)}: label {labels.max()} of sample {int(labels.argmax())} is out of range "
            f"0 … {CLASSES - 1}"
        )
