"""Room on a disk, asked for before HDF5 writes: HDF5 cannot bear a disk that fills up under it, not even to close."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def reserved(folder: Path, size: int) -> Iterator[None]:
    """Hold room for so many bytes in a folder while the context lasts. Local.

    Raises
    ------
    OSError
        Where there is none, or a quota says so.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".room-") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
        yield
