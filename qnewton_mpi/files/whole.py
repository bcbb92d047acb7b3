"""Reading a file at once, and replacing one by a rename: a reader sees the old file or the new one, never a part.

Only regular files are read, so that a FIFO or a device blocks nobody, and only regular files are replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qnewton_mpi.errors import UserError, printable


def read_whole(path: Path, most: int | None = None) -> bytes:
    """Return the contents of a regular file. Local.

    Parameters
    ----------
    path : Path
    most : int, optional
        Bytes that a file of this kind can have.

    Raises
    ------
    UserError
        For a file that is missing, not regular, not readable, or longer.
    """
    with open_regular(path) as (file, size):
        if most is not None and size > most:
            raise UserError(f"{printable(path)}: has {size:,} bytes, and {most:,} at most are expected")
        return file.read()


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading; give it and the bytes that it has. What reading it raises is told. Local.

    Raises
    ------
    UserError
        For a file that is missing, not regular or not readable, also within the context.
    """
    try:
        with os.fdopen(regular_descriptor(path), "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise UserError(f"{printable(path)}: no such file") from error
    except (OSError, EOFError, ValueError, MemoryError, zlib.error) as error:  # ValueError: a NUL in the path
        raise UserError(f"{printable(path)}: cannot be read ({reason(error)})") from error


def regular_descriptor(path: Path) -> int:
    """Open a regular file for reading, and wait for nobody; return its descriptor. Local.

    Raises
    ------
    OSError
        For a file that is missing, not readable, or not regular.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a FIFO, open would wait for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return descriptor


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses while the context lasts into a `UserError`. Local."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path)}: cannot be written ({reason(error)}): name another --output") from error


def replace_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file under another name, have the system put it on its disk, and give it its name. Local.

    The folder is made where it is not there. The file under the other name is a new one with a random name, which is
    created and not opened, so that no link that somebody laid there is followed; it is removed where writing fails.

    Raises
    ------
    OSError
        Where there is no room or no permission; the file is then as it was.
    UserError
        Where there is something that is not a regular file.
    """
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fchmod(descriptor, 0o666 & ~_umask())
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    sync_folder(path.parent)


def check_replaceable(path: Path) -> None:
    """Raise `UserError` where there is something that is no regular file: a folder, a link, a device. Local."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path)}: cannot be written ({reason(error)})") from error
    if not stat.S_ISREG(found.st_mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a symbolic link"))
        what = next((name for test, name in kinds if test(found.st_mode)), "no regular file")
        raise UserError(f"{printable(path)}: is {what}: name another file")


def sync_folder(folder: Path) -> None:
    """Have the system write a folder's entries to its disk, where it can. Local."""
    with contextlib.suppress(OSError):  # some file systems sync no folders
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason(error: BaseException) -> str:
    """Return why an operation failed, in one line."""
    return str(getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__)


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
