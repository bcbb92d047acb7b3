"""A data set, by its name or from one's own files: the arrays that a network is trained and judged on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from qnewton_mpi.arrays import Array
from qnewton_mpi.data.arrays import read_arrays
from qnewton_mpi.data.parts import (
    TEST,
    TRAIN,
    VALIDATION,
    Parts,
    check_classes,
    check_parts,
    hold_out,
    with_classes,
)
from qnewton_mpi.data.pictures import Size, read_pictures
from qnewton_mpi.data.published import EMBEDDED as EMBEDDED
from qnewton_mpi.data.published import NAMES, download, may_download, read_published
from qnewton_mpi.errors import UserError, did_you_mean, printable
from qnewton_mpi.parallel.communicator import Communicator

DEFAULT_VALIDATION = 0.1  # of what has no other part than one to train on
IMAGE_SIZE = re.compile(r"(\d{1,5})[x×](\d{1,5})")
OPTIONS = ("data", "data_dir", "validation", "image_size")  # of `train`, that say what `load` returns
SUFFIXES = (".npz", ".h5", ".hdf5")  # a name goes without
CHUNK = 1024  # images in double precision at a time


@dataclass(frozen=True)
class Split:
    """Images and labels of one purpose, in host or GPU memory.

    Attributes
    ----------
    images : (n, C, H, W) uint8 or float32
    labels : (n,) unsigned integers
        Indices of the data set's classes.
    scale, shift : (C, 1, 1) float
        A pixel p enters the network as p · scale + shift: zero mean and unit variance over the training images.
    """

    images: Array
    labels: Array
    scale: Array
    shift: Array

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Any, pixels: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
        """Return normalised images (…, C, H, W) and labels (…,).

        Parameters
        ----------
        indices : (…,) integers, or a slice
        pixels : ((…, H), (…, W)) integers, optional
            Which rows and columns of each image, instead of all.
        """
        if pixels is None:
            images = self.images[indices]
        else:
            channels = array_namespace(self.images).arange(self.images.shape[1])[:, None, None]
            rows, columns = pixels[0][..., None, :, None], pixels[1][..., None, None, :]
            images = self.images[indices[..., None, None, None], channels, rows, columns]
        return images * self.scale + self.shift, self.labels[indices]


@dataclass(frozen=True)
class Dataset:
    """A data set in its parts.

    Attributes
    ----------
    name : str
    train : Split
    test, validation : Split or None
        Held out, to judge and to choose by.
    classes : tuple of str
        Names, in the order of the labels.
    digest : str
        Of all images and labels, before anything is held out of them: data sets with the same are the same.
    """

    name: str
    train: Split
    test: Split | None
    validation: Split | None
    classes: tuple[str, ...]
    digest: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def splits(self) -> dict[str, Split]:
        """The parts that there are, by their names."""
        named = {TRAIN: self.train, VALIDATION: self.validation, TEST: self.test}
        return {name: split for name, split in named.items() if split is not None}

    def on(self, xp: ModuleType, dtype: Any) -> Dataset:
        """Return the data set in the memory of an array library; batches are of this type. Local."""
        scale, shift = (xp.asarray(c, dtype=dtype) for c in (self.train.scale, self.train.shift))

        def there(split: Split) -> Split:
            return Split(xp.asarray(split.images), xp.asarray(split.labels), scale, shift)

        test, validation = (None if split is None else there(split) for split in (self.test, self.validation))
        return replace(self, train=there(self.train), test=test, validation=validation)


def load(
    data: str,
    data_dir: str | None = None,
    xp: ModuleType = np,
    dtype: Any = np.float32,
    validation: float | None = None,
    image_size: str | None = None,
) -> Dataset:
    """Return a data set. Local.

    Parameters
    ----------
    data : str
        One of `published.NAMES`, or a path: of a .npz or HDF5 file, or a folder of pictures in class folders.
    data_dir : str, optional
        Of the files of a name: see `published.locate`.
    xp, dtype : optional
        The array library, and the type of normalised images.
    validation : float, optional
        The fraction of the training part that is held out; without it a tenth where there is no part but that.
    image_size : str, optional
        "HxW", which pictures in a folder are resized to.

    Raises
    ------
    UserError
        For files that are missing, damaged, or do not hold what they should; labels out of range, one class only, a
        channel whose pixels are all equal.
    """
    where = data if data in NAMES else printable(data)
    parts, classes = read(data, data_dir, image_size)
    if TRAIN not in parts:
        raise UserError(f"{where}: has no images to train on, but a part to {' and '.join(parts)} with")
    if data not in NAMES:
        check_classes(parts, classes, where)
    digest = digest_of(parts)
    if VALIDATION in parts and validation is not None:
        raise UserError(f"{where}: has a validation part of its own: leave out --validation")
    fraction = DEFAULT_VALIDATION if validation is None and parts.keys() == {TRAIN} else validation
    if fraction:
        parts[TRAIN], parts[VALIDATION] = hold_out(parts[TRAIN], fraction, where)
        check_classes(parts, classes, f"{where}, with {fraction:g} of it held out")
    scale, shift = normalisation(parts[TRAIN][0], where)
    splits = {name: Split(*part, scale, shift) for name, part in parts.items()}
    name = short_name(data)
    return Dataset(name, splits[TRAIN], splits.get(TEST), splits.get(VALIDATION), classes, digest).on(xp, dtype)


def load_on_all(communicator: Communicator, xp: ModuleType = np, dtype: Any = np.float32, **options: Any) -> Dataset:
    """Return a data set that rank 0 reads, and downloads if it is missing, on every rank. Collective.

    So a folder of many files is read once, and no rank has other data than the others.

    Parameters
    ----------
    communicator : Communicator
    xp, dtype : optional
    **options
        `OPTIONS`, as for `load`.

    Raises
    ------
    UserError
        On every rank, where it cannot be had.
    """

    def read() -> Dataset:
        name, folder = options["data"], options.get("data_dir")
        if may_download(name, folder):
            download(name)
        return load(**options, dtype=np.float64)

    return communicator.from_root(read).on(xp, dtype)


def read(data: str, data_dir: str | None, image_size: str | None) -> tuple[Parts, tuple[str, ...]]:
    """Return the parts as they are, labels being indices, and the classes; there may be none to train on. Local.

    For errors see `load`.
    """
    check_there(data)
    path = Path(data)
    if image_size is not None and (data in NAMES or not path.is_dir()):
        raise UserError(f"--image-size is for pictures in a folder, which {printable(data)} is not")
    if data in NAMES:
        return read_published(data, data_dir)
    if data_dir is not None:
        raise UserError(f"--data-dir is for data sets by name: {printable(data)} is a path by itself")
    where = printable(path)
    parts = read_pictures(path, parse_size(image_size)) if path.is_dir() else read_arrays(path)
    check_parts(parts, where)
    return with_classes(parts, where)


def check_there(data: str) -> None:
    """Raise `UserError` for what is neither a name nor the path of something. Local."""
    try:
        there = data in NAMES or Path(data).exists()
    except (OSError, ValueError):
        there = False
    if not there:
        raise UserError(
            f"data = {printable(data)}: there is no file or folder of this name, and no data set: these are "
            f"{', '.join(NAMES)}{did_you_mean(data, NAMES)}"
        )


def parse_size(text: str | None) -> Size | None:
    """Return height and width, as of "32x48"; `is_size` has checked it."""
    found = IMAGE_SIZE.fullmatch(text or "")
    return (int(found[1]), int(found[2])) if found else None


def is_size(text: str) -> bool:
    """Tell whether a text is HEIGHTxWIDTH."""
    return 0 not in (parse_size(text) or (0,))


def short_name(data: str) -> str:
    """Return the name of a data set, of a path its last part without suffix, as files and figures are called.

    Examples
    --------
    >>> short_name("mnist"), short_name("/scratch/me/leaves.npz"), short_name("photos/")
    ('mnist', 'leaves', 'photos')
    """
    path = Path(data)
    return data if data in NAMES else (path.stem if path.suffix in SUFFIXES else path.name) or "data"


def normalisation(images: Any, where: str) -> tuple[Any, Any]:
    """Return scale and shift (C, 1, 1), float64, for zero mean and unit variance of each channel. Local.

    Raises
    ------
    UserError
        Where all pixels of a channel are equal.
    """
    channels, pixels = images.shape[1], images[:, 0].size
    if (constant := images.min(axis=(0, 2, 3)) == images.max(axis=(0, 2, 3))).any():
        raise UserError(
            f"{where}: all pixels of channel {int(constant.argmax())} of the training images are equal: nothing to "
            "learn: leave the channel out"
        )

    def mean(power: int, centre: Any) -> Any:
        total = np.zeros(channels)
        for start in range(0, len(images), CHUNK):
            total += ((images[start : start + CHUNK] - centre) ** power).sum(axis=(0, 2, 3), dtype=np.float64)
        return total[:, None, None] / pixels

    centre = mean(1, np.zeros((channels, 1, 1)))
    scale = 1 / np.sqrt(mean(2, centre))
    return scale, -centre * scale


def digest_of(parts: Parts) -> str:
    """Return a digest of the arrays of all parts, their shapes, and their types, but for bytes, which once were all."""
    digest = hashlib.sha256()
    for array in (array for name in (TRAIN, TEST, VALIDATION) for array in parts.get(name, ())):
        kind = "" if array.dtype == np.uint8 else str(array.dtype)
        digest.update(f"{kind}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
