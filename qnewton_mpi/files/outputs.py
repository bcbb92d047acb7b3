"""What a command may replace: nothing but what is of the kind that is to be written."""

from __future__ import annotations

import os
from pathlib import Path

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.images import OLD, kind_of
from qnewton_mpi.files.whole import check_replaceable, open_regular

# How files begin, by kind: pictures by their suffix, the other ones that are no HDF5.
PICTURES = {
    ".png": b"\x89PNG",
    ".pdf": b"%PDF",
    ".svg": b"<?xml",
    ".jpg": b"\xff\xd8\xff",
    ".jpeg": b"\xff\xd8\xff",
}
BEGINNINGS = {
    "picture": tuple(set(PICTURES.values())),
    "table": (b"| row |",),
    "table of predictions": (b"sample,label,",),
    "table of runs": (b"run,row,stage,",),
    "batch script": (b"#!/usr/bin/env b",),
}
OLD_KINDS = {"run", "study"}


def check_output(path: Path, kind: str, overwrite: bool) -> None:
    """Raise `UserError` unless a file can be put at a path, and nothing is lost but what may be replaced. Local.

    Parameters
    ----------
    path : Path
    kind : str
        A key of `BEGINNINGS`, or what an HDF5 image is: "run", "study", "spectrum", "benchmark", "predictions".
    overwrite : bool
        Whether a file of this kind, or an empty one, may be replaced.
    """
    if kind == "picture" and path.suffix.lower() not in PICTURES:
        raise UserError(f"{printable(path)}: a picture cannot be written with this suffix: use {', '.join(PICTURES)}")
    check_replaceable(path)
    other = "folder" if kind == "batch script" else "--output"
    if not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{printable(path)}: cannot be written (no permission in {printable(folder)})")
    elif not overwrite:
        raise UserError(f"{printable(path)} exists: name another {other}, or replace it with --overwrite")
    elif path.stat().st_size and not _is_of(path, kind):
        raise UserError(f"{printable(path)}: is not a {kind}, which alone is replaced: name another {other}")


def _is_of(path: Path, kind: str) -> bool:
    """Tell by its beginning whether a file is of a kind. Local."""
    if kind not in BEGINNINGS:
        found = kind_of(path)
        return found == kind or (found == OLD and kind in OLD_KINDS)
    with open_regular(path) as (file, _):
        return file.read(16).startswith(BEGINNINGS[kind])
