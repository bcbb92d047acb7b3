"""The folder of checkpoints: which there are, which is the newest that is sound, and what is left of others. Local."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from qnewton_mpi.errors import UserError
from qnewton_mpi.files.whole import reason, sync_folder
from qnewton_mpi.training.checkpoint.layout import UNREADABLE, name_of

T = TypeVar("T")
SHORTAGES = {errno.EMFILE: "allow more open files (ulimit -n)", errno.ENFILE: "too many files are open on this machine"}


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, ascending; none where there is no folder.

    Whatever has the name of one counts: a link to one that was moved is no reason to start from the beginning.

    Raises
    ------
    UserError
        Where the folder cannot be read: that is not the same as having none.
    """
    try:
        with os.scandir(folder) as found:
            names = [entry.name for entry in found]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason(error)})") from error
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-([0-9]{10}|[1-9][0-9]{10,17})", name))


def newest_sound(
    folder: Path, steps: Sequence[int], attempt: Callable[[Path, int], tuple[T | None, str | None]]
) -> tuple[int | None, T | None, list[str]]:
    """Return the step of the newest sound checkpoint, what was read of it, and why newer ones are not sound.

    `attempt(source, step)` returns what it reads of a checkpoint, and why it cannot, if so.

    Raises
    ------
    UserError
        Where none of the steps' is sound.
    """
    passed_over: list[str] = []
    for step in reversed(steps):
        source = folder / name_of(step)
        found, problem = attempt(source, step)
        if problem is None:
            return step, found, passed_over
        passed_over.append(f"{source}: {problem}")
    if steps:
        raise UserError(f"no sound checkpoint in {folder}: {'; '.join(passed_over)}")
    return None, None, passed_over


def attempted(source: Path, read: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what is read of a checkpoint, and why it cannot be read, if so. Local.

    Raises
    ------
    UserError
        Where it is not the checkpoint that is at fault: an older one is no better, and this one would be lost.
    """
    try:
        return read(), None
    except UNREADABLE as error:
        number = getattr(error, "errno", None)
        if number in SHORTAGES:
            raise UserError(f"{source}: cannot be read ({reason(error)}): {SHORTAGES[number]}") from error
        if isinstance(error, MemoryError):
            raise UserError(f"{source}: cannot be read: there is not enough memory") from error
        at = getattr(error, "filename", None)
        return None, f"cannot be restored ({f'{Path(at).name}: ' if at else ''}{reason(error)})"


def put_in_place(partial: Path, final: Path) -> Path:
    """Give a checkpoint that was written its name; return where the one is that had it, if there was one."""
    old = final.with_name(f".{final.name}.old")
    remove(old)
    if os.path.lexists(final):
        final.rename(old)
    partial.rename(final)
    sync_folder(final.parent)
    return old


def tidy(folder: Path) -> None:
    """Remove what saves that were cut off have left; a checkpoint that was about to be replaced gets back its name."""
    for partial in folder.glob(".step-*.partial"):
        remove(partial)
    for old in folder.glob(".step-*.old"):
        final = folder / old.stem[1:]
        if os.path.lexists(final):
            remove(old)
        else:
            old.rename(final)


def fresh(folder: Path) -> None:
    """Make a folder, without what is left of an earlier one."""
    remove(folder)
    folder.mkdir()


def remove(path: Path) -> None:
    """Remove a folder and all in it, if there is one; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
