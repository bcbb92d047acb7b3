"""The files of a checkpoint, written by the ranks side by side."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from qnewton_mpi.core import state
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.core.state import Kind
from qnewton_mpi.files.images import image_of
from qnewton_mpi.files.whole import replace_whole
from qnewton_mpi.parallel.communicator import Communicator, HostArray
from qnewton_mpi.training.checkpoint.layout import (
    MASTER,
    SCHEMA,
    SUMS,
    TOGETHER,
    Entry,
    file_names,
    is_whole,
    lines_of,
    rank_name,
)

Arrays = dict[str, tuple[Kind, HostArray]]


def write_rank(folder: Path, things: Mapping[str, Any], exchange: Exchange) -> tuple[Arrays, dict[str, Any]]:
    """Write what this rank has; return all its arrays by path, and what checkpoint.h5 is to say of its file.

    Collective where h5py has parallel HDF5, else local.
    """
    communicator = exchange.communicator
    arrays = _arrays(things, exchange)
    own = {f"{kind.value}/{path}": array for path, (kind, array) in arrays.items() if kind is not Kind.SHARED}
    name = rank_name(communicator.rank, communicator.size)
    if h5py.get_config().mpi:
        digest = _write_together(folder, name, own, communicator)
    else:
        digest = _write(folder / f"{name}.h5", own)
    entries = {
        path: (kind.value, array.shape[:-1] if kind is Kind.HELD else array.shape, array.dtype.str)
        for path, (kind, array) in arrays.items()
    }
    part = exchange.summed()
    return arrays, {"digest": digest, "length": part.stop - part.start, "entries": entries}


def _arrays(things: Mapping[str, Any], exchange: Exchange) -> Arrays:
    """Return what this rank writes of the state of all things, by path: what is shared, rank 0 alone. Local."""
    arrays: Arrays = {}
    for name, thing in things.items():
        for path, kind, owner, attribute in state.entries(thing, f"{name}/"):
            if (kind is Kind.SHARED and exchange.communicator.rank > 0) or (kind is Kind.OWNED and not exchange.first):
                continue
            array = state.value(owner, attribute)
            if array is not None:
                state.check_finite(path, array)
                arrays[path] = kind, array[..., exchange.summed()] if kind is Kind.HELD else array
    return arrays


def _write_together(folder: Path, own: str, arrays: Mapping[str, HostArray], communicator: Communicator) -> str | None:
    """Write the arrays of all ranks to one file, each rank to a group of its own; return its sum on rank 0.

    Collective. What belongs to the layout of the file is done by all ranks alike, as parallel HDF5 wants it; each
    then writes its data. A rank that cannot ends the job, for the others wait in HDF5: earlier checkpoints are
    sound.
    """
    with communicator.waiting():
        layout = communicator.mpi.allgather((own, [(path, a.shape, a.dtype.str) for path, a in arrays.items()]))
    with h5py.File(folder / TOGETHER, "w", driver="mpio", comm=communicator.mpi) as file:
        try:
            for group, datasets in layout:
                for path, shape, dtype in datasets:
                    file.create_dataset(f"{group}/{path}", shape, dtype)
            for path, array in arrays.items():
                if array.size:
                    file[f"{own}/{path}"][...] = array
        except (OSError, RuntimeError):
            sys.excepthook(*sys.exc_info())
            raise
    if communicator.rank > 0:
        return None
    with (folder / TOGETHER).open("rb") as written:
        os.fsync(written.fileno())
        return hashlib.file_digest(written, "sha256").hexdigest()


def write_common(folder: Path, about: Mapping[str, Any], arrays: Arrays, ranks: Sequence[Mapping[str, Any]]) -> None:
    """Write the common file and the sums, after all ranks have written theirs. Local, on rank 0.

    Parameters
    ----------
    folder : Path
    about : mapping
        What checkpoint.h5 says of the run, besides what is where.
    arrays : mapping
        Those of rank 0, of which the shared ones go there.
    ranks : sequence of mapping
        What `write_rank` has returned on each.
    """
    entries: dict[str, Entry] = {}
    for rank, written in enumerate(ranks):
        for path, said in written["entries"].items():
            entries.setdefault(path, Entry(*said)).ranks.append(rank)
    names = file_names(len(ranks), together=h5py.get_config().mpi)
    files = {name: written["digest"] for name, written in zip(names, ranks, strict=True) if written["digest"]}
    document = {
        "schema": SCHEMA,
        **about,
        "files": files,
        "lengths": [written["length"] for written in ranks],
        "entries": {path: asdict(entry) for path, entry in entries.items()},
    }
    shared = {f"{kind.value}/{path}": array for path, (kind, array) in arrays.items() if kind is Kind.SHARED}
    shared["configuration"] = np.array(json.dumps(document).encode())
    sums = {MASTER: _write(folder / MASTER, shared), **files}
    replace_whole(folder / SUMS, lines_of(sums).encode())
    if not is_whole(folder):
        raise OSError("files of other ranks are not there: it must be a folder that all nodes see")


def _write(path: Path, arrays: Mapping[str, HostArray]) -> str:
    """Write arrays by name to an HDF5 file, which is made in memory; return its SHA-256."""

    def fill(file: h5py.File) -> None:
        for name, array in arrays.items():
            file[name] = array

    image = image_of(fill)
    replace_whole(path, image)
    return hashlib.sha256(image).hexdigest()
