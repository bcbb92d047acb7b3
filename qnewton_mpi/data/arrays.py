"""Arrays in a .npz or HDF5 file: which names hold which part, and which axis the channels.

Nothing is unpickled, no link is followed to another file, and HDF5 takes no lock: it reads through a descriptor.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.data.parts import TRAIN, WORDS, Part, Parts
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.images import HDF5_ERRORS, Exact, stored, text_of
from qnewton_mpi.files.whole import open_regular, reason

# Of the images and labels of a part: Keras's, MedMNIST's, a group of HDF5 for each part.
NAMINGS = (("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}/images", "{}/labels"))
ALONE = ("images", "labels")
LAYOUT, LAYOUTS = "layout", ("NHWC", "NCHW")
CHANNELS = (1, 3, 4)  # an axis of such a length holds the channels, if only one does
ZIP = b"PK\x03\x04"
MOST_PACKED = 10_000  # times that a filter may save, so that what is declared and not there takes no memory


@dataclass(frozen=True)
class Members:
    """The arrays of an open file: their names at the top, whether one is there, one of them, and the layout."""

    names: list[str]
    has: Callable[[str], bool]
    read: Callable[[str], NDArray[Any]]
    layout: str | None


def read_arrays(path: Path) -> Parts:
    """Return the parts of a .npz or HDF5 file, whatever it is called. Local.

    Raises
    ------
    UserError
        For a file that cannot be read, lacks labels, or has arrays that are no images or no labels.
    """
    with open_regular(path) as (file, _):
        packed = file.read(len(ZIP)) == ZIP
        file.seek(0)
        try:
            with open_npz(file) if packed else open_hdf5(io.FileIO(file.fileno(), closefd=False)) as members:
                return read_members(members)
        except UserError as error:
            raise UserError(f"{printable(path)}: {error}") from error


@contextlib.contextmanager
def open_npz(file: BinaryIO) -> Iterator[Members]:
    """Give the arrays of a .npz file. Local.

    Raises
    ------
    UserError
        For what is none, also within the context.
    """

    def read(name: str) -> NDArray[Any]:
        try:
            return np.asarray(arrays[name])
        except ValueError as error:
            if "pickle" not in str(error):
                raise
            raise UserError(
                f"{name} holds Python objects, which are not unpickled: save it as numbers or as text, .astype(str)"
            ) from error

    try:
        with np.load(file, allow_pickle=False) as arrays:
            layout = str(read(LAYOUT)) if LAYOUT in arrays else None
            yield Members(arrays.files, arrays.__contains__, read, layout)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"is no sound .npz file ({reason(error)})") from error


@contextlib.contextmanager
def open_hdf5(file: Any) -> Iterator[Members]:
    """Give the arrays of an HDF5 file, an open one without a buffer or bytes in memory. Local.

    Raises
    ------
    UserError
        For what is none, also within the context.
    """
    try:
        with Exact(file) as exact, h5py.File(exact, "r") as opened:

            def read(name: str) -> NDArray[Any]:
                found = stored(opened, name)
                if found.nbytes > MOST_PACKED * found.id.get_storage_size():
                    raise ValueError(f"{name} is not all there")
                return np.asarray(found.asstr()[()] if found.dtype.kind == "O" else found[()])

            layout = text_of(opened.attrs[LAYOUT]) if LAYOUT in opened.attrs else None
            yield Members(list(opened), opened.__contains__, read, layout)
    except HDF5_ERRORS as error:
        raise UserError(f"is no sound .npz or HDF5 file of images ({reason(error)})") from error


def read_members(members: Members) -> Parts:
    """Return the parts that are among arrays. Local.

    Raises
    ------
    UserError
        Where there are no images, or those of a part twice, or without labels, or arrays that are neither.
    """
    parts: Parts = {}
    for part, words in WORDS.items():
        named = [(i.format(word), la.format(word)) for word in words for i, la in NAMINGS]
        named += [ALONE] if part == TRAIN else []
        there = [names for names in named if members.has(names[0])]
        if len(there) > 1:
            raise UserError(f"has {there[0][0]} and {there[1][0]}, both the {part} part: leave one of them")
        if there:
            parts[part] = _part(members, *there[0])
    if not parts:
        found = ", ".join(printable(name) for name in members.names[:8]) or "nothing"
        raise UserError(f"has no x_train and y_train, nor other names of images and labels, but {found}")
    return parts


def _part(members: Members, images: str, labels: str) -> Part:
    if not members.has(labels):
        raise UserError(f"has {images}, but no {labels}")
    return as_images(members.read(images), images, members.layout), as_labels(members.read(labels), labels)


def as_images(array: NDArray[Any], name: str, layout: str | None) -> NDArray[Any]:
    """Return images (n, C, H, W), bytes as they are, other numbers as float32. Local.

    Parameters
    ----------
    array : (n, H, W), (n, H, W, C) or (n, C, H, W)
    name : str
        For messages.
    layout : {"NHWC", "NCHW"} or None
        None: the axis of 1, 3 or 4 is the channels'.

    Raises
    ------
    UserError
        For another shape, one whose channels are not plain, or values that are no finite numbers.
    """
    if layout not in (None, *LAYOUTS):
        raise UserError(f"its layout is {printable(layout)}, and must be {' or '.join(LAYOUTS)}")
    if array.dtype.kind not in "biuf" or array.ndim not in (3, 4):
        raise UserError(
            f"{name} is {array.shape} of {array.dtype}: images are numbers, (n, height, width) or with an axis of "
            "channels, the second or the last"
        )
    if array.ndim == 3:
        array = array[:, None]
    else:
        may_be = [known for known in LAYOUTS if array.shape[known.index("C")] in CHANNELS]
        if layout is None and len(may_be) != 1:
            raise UserError(
                f"{name} is {array.shape}: which axis holds the channels? say it by a text {LAYOUT} in the file, "
                f"{' or '.join(LAYOUTS)} (.npz: an array, HDF5: an attribute)"
            )
        if (layout or may_be[0]) == "NHWC":
            array = array.transpose(0, 3, 1, 2)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.uint8 if array.dtype.kind == "b" or array.dtype == np.uint8 else "f4")
    if array.dtype != np.uint8 and not np.isfinite(array).all():
        raise UserError(f"{name} has values that are not finite, or too large for single precision")
    return array


def as_labels(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Return labels (n,): integers of 64 bits, or text. Local.

    Raises
    ------
    UserError
        For anything but a column of integers or text.
    """
    if array.ndim == 2 and array.shape[1] == 1:  # as Keras and MedMNIST have them
        array = array[:, 0]
    if array.dtype.kind == "O" and all(isinstance(value, str) for value in array.ravel()):
        array = array.astype(str)
    if array.ndim != 1 or array.dtype.kind not in "biuSU":
        raise UserError(
            f"{name} is {array.shape} of {array.dtype}: labels are one whole number or text for each image (of rows "
            "with a single 1, .argmax(axis=1))"
        )
    if array.dtype.kind in "SU":
        return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
    if len(array) and array.max() > np.iinfo(np.int64).max:
        raise UserError(f"{name} has a label of more than 63 bits")
    return array.astype(np.int64)
