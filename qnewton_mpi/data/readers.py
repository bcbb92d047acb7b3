"""Readers of the published file layouts, plain or gzip: IDX (MNIST, Fashion-MNIST) and CIFAR-10's binary records."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.errors import UserError

Bytes = NDArray[np.uint8]

CLASSES = 10
IDX_UNSIGNED_BYTE = 0x08
CIFAR_RECORD = 1 + 3 * 32 * 32


def read_bytes(path: Path) -> bytes:
    """Return a file's contents, unpacked where they begin as gzip does, whatever the file is called.

    Raises
    ------
    UserError
        For a file that cannot be read or is not sound gzip.
    """
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}): fetch the file again, or name another folder with --data-dir"
        ) from error


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
    raw = read_bytes(path)
    magic = bytes([0, 0, IDX_UNSIGNED_BYTE, dimensions])
    if raw[:4] != magic:
        raise UserError(
            f"{path}: magic number is {raw[:4].hex()}, not {magic.hex()}: this is not the IDX file expected"
        )
    header = 4 + 4 * dimensions
    complete = len(raw) >= header
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dimensions, offset=4)) if complete else ()
    expected = header + int(np.prod(shape, dtype=np.int64)) if complete else header
    if not complete or len(raw) != expected:
        raise UserError(
            f"{path}: holds {len(raw)} bytes where its header promises {expected}: truncated? fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_cifar(path: Path) -> tuple[Bytes, Bytes]:
    """Return images (n, 3, 32, 32) and labels (n,) of a CIFAR-10 file of 3,073-byte records.

    Raises
    ------
    UserError
        For an empty file or one that is no whole number of records.
    """
    raw = read_bytes(path)
    if not raw or len(raw) % CIFAR_RECORD:
        raise UserError(
            f"{path}: {len(raw)} bytes are no whole number of {CIFAR_RECORD}-byte records: truncated? fetch it again"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, CIFAR_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def check_pair(where: Any, images: Bytes, labels: Bytes) -> None:
    """Raise `UserError` unless there are as many labels as images, at least one, all of them 0 … 9."""
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{where}: {len(images)} images but {len(labels)} labels: the files do not belong together")
    if labels.max() >= CLASSES:
        raise UserError(
            f"{where}: label {labels.max()} of sample {int(labels.argmax())} is out of range 0 … {CLASSES - 1}"
        )
