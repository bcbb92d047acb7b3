"""Pictures in class folders, by Pillow: FOLDER/train/CLASS/… and FOLDER/test/CLASS/…, or FOLDER/CLASS/… alone."""

from __future__ import annotations

import os
import warnings
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.data.parts import TRAIN, WORDS, Parts
from qnewton_mpi.errors import MissingPackageError, UserError, printable
from qnewton_mpi.files.whole import open_regular, reason
from qnewton_mpi.origin import pip_install

GREY = ("1", "L", "LA", "La")
COLOUR = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")  # of 8 bits; not "I", "I;16", "F"
NO_PICTURES = {"thumbs.db", "desktop.ini"}  # what systems put into folders, beside names with a dot

Size = tuple[int, int]
"""Height and width."""


def read_pictures(folder: Path, size: Size | None) -> Parts:
    """Return the parts of a folder; labels are the names of the class folders. Local.

    The pictures are grey where most of them are, else RGB: the others are converted.

    Parameters
    ----------
    folder : Path
    size : (int, int), optional
        Height and width that all are resized to (bilinear).

    Raises
    ------
    MissingPackageError
        Without Pillow.
    UserError
        Without class folders, for a file that is no picture or of more than 8 bits, for pictures of different
        sizes.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError(f"{printable(folder)}: pictures need Pillow: {pip_install('images')}") from error
    files = {part: pictures_of(where) for part, where in part_folders(folder).items()}
    first: tuple[Path, Size] | None = None
    pictures: deque[NDArray[np.uint8]] = deque()  # let go one by one as they are copied
    for path, _ in (item for part in files.values() for item in part):
        picture, was = read_picture(path, size, first[1] if first and not size else None, Image)
        first = first or (path, was)
        if not size and was != first[1]:
            (one, a), (other, b) = ((printable(path), f"{h}×{w}") for path, (h, w) in (first, (path, was)))
            raise UserError(
                f"{one} has {a} pixels and {other} {b}: resize them, or have it done: --image-size "
                f"{first[1][0]}x{first[1][1]}"
            )
        pictures.append(picture)
    colours = sum(picture.ndim == 3 for picture in pictures)
    channels = 3 if 2 * colours >= len(pictures) else 1
    parts: Parts = {}
    for part, listed in files.items():
        images = np.empty((len(listed), channels, *pictures[0].shape[:2]), np.uint8)
        for image in images:
            image[...] = as_channels(pictures.popleft(), channels, Image)
        parts[part] = images, np.array([name for _, name in listed])
    return parts


def part_folders(folder: Path) -> dict[str, Path]:
    """Return the folder of each part; the folder itself, to train on, where it has no `train` with class folders."""
    inner = {path.name.casefold(): path for path in subfolders(folder)}
    if "train" not in inner or not subfolders(inner["train"]):
        return {TRAIN: folder}
    return {part: inner[word] for part, words in WORDS.items() for word in words if word in inner}


def pictures_of(folder: Path) -> list[tuple[Path, str]]:
    """Return all files of the class folders, in those within them too, in the order of their names, and the classes."""
    found: list[tuple[Path, str]] = []
    classes = subfolders(folder)
    for inner in classes:
        paths = [
            Path(base, name)
            for base, folders, names in os.walk(inner, onerror=_refuse)
            for name in names
            if not any(part.startswith(".") for part in Path(base, name).relative_to(inner).parts)
            and name.casefold() not in NO_PICTURES
        ]
        if not paths:
            raise UserError(f"{printable(inner)}: has no pictures: remove the folder, or put some there")
        found += [(path, inner.name) for path in sorted(paths)]
    if not found:
        raise UserError(
            f"{printable(folder)}: has no class folders: put the pictures of each class into a folder with its name, "
            "as cat/1.png and dog/1.png"
        )
    return found


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        _refuse(error)
        raise


def _refuse(error: OSError) -> None:
    raise UserError(f"{printable(error.filename)}: cannot be read ({reason(error)})") from error


def read_picture(path: Path, size: Size | None, expected: Size | None, image: ModuleType) -> tuple[Any, Size]:
    """Return a picture, (H, W) or (H, W, 3) bytes, and the size that its file says. Local.

    Pixels are not unpacked where the size is not the expected one.
    """
    with open_regular(path) as (file, _), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", image.DecompressionBombWarning)
        try:
            with image.open(file) as picture:
                was = picture.height, picture.width
                if expected not in (None, was):
                    return None, was
                if picture.mode not in GREY + COLOUR:
                    raise UserError(
                        f"{printable(path)}: has pixels of more than 8 bits ({picture.mode}): convert it, or give the "
                        "images as arrays (.npz)"
                    )
                plain = picture.convert("L" if picture.mode in GREY else "RGB")
                if size:
                    plain = plain.resize(size[::-1], image.Resampling.BILINEAR)
                return np.asarray(plain), was
        except image.UnidentifiedImageError as error:
            raise UserError(f"{printable(path)}: is no picture that Pillow knows: remove it or convert it") from error
        except UserError:
            raise
        except Exception as error:  # what a damaged picture makes Pillow raise is not to be foreseen
            raise UserError(f"{printable(path)}: cannot be read as a picture ({reason(error)})") from error


def as_channels(picture: NDArray[np.uint8], channels: int, image: ModuleType) -> NDArray[np.uint8]:
    """Return a picture as (C, H, W), converted where it has other channels."""
    if picture.ndim == 3 and channels == 1:
        picture = np.asarray(image.fromarray(picture).convert("L"))
    return np.broadcast_to(picture, (channels, *picture.shape)) if picture.ndim == 2 else picture.transpose(2, 0, 1)
