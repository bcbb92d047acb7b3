"""The parts of a data set, to train on, to choose by (validation), to judge by (test), and what must hold of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.errors import UserError, printable

TRAIN, VALIDATION, TEST = "train", "validation", "test"
WORDS = {TRAIN: ("train",), VALIDATION: ("val", "valid", "validation"), TEST: ("test",)}  # of files and folders

Part = tuple[NDArray[Any], NDArray[Any]]
"""Images (n, C, H, W), uint8 or float32, and labels (n,)."""
Parts = dict[str, Part]
"""Those that there are, by their names."""


def check_parts(parts: Parts, where: str) -> None:
    """Raise `UserError` unless each part has as many labels as images, one at least, all of one shape. Local."""
    (first, shape), *_ = ((name, images.shape[1:]) for name, (images, _) in parts.items())
    for name, (images, labels) in parts.items():
        if len(images) != len(labels) or not len(images):
            raise UserError(f"{where}: the {name} part has {len(images)} images and {len(labels)} labels")
        if images.shape[1:] != shape or 0 in shape:
            found, wanted = ("×".join(map(str, sides)) for sides in (images.shape[1:], shape))
            raise UserError(
                f"{where}: images of the {name} part are {found} (channels×height×width), of the {first} part {wanted}"
            )


def with_classes(parts: Parts, where: str) -> tuple[Parts, tuple[str, ...]]:
    """Return the parts with indices for labels, and the classes, sorted, as text. Local.

    Parameters
    ----------
    parts : Parts
        Labels are integers or text, of any values.
    where : str
        For messages.

    Raises
    ------
    UserError
        Where numbers and text are mixed.

    Examples
    --------
    >>> parts, classes = with_classes({"train": (np.zeros((3, 1, 2, 2)), np.array(["dog", "cat", "dog"]))}, "here")
    >>> parts["train"][1].tolist(), classes
    ([1, 0, 1], ('cat', 'dog'))
    """
    if len({labels.dtype.kind for _, labels in parts.values()}) > 1:
        raise UserError(f"{where}: labels are numbers in one part and text in another")
    values, indices = np.unique(np.concatenate([labels for _, labels in parts.values()]), return_inverse=True)
    classes = tuple(printable(value) for value in values.tolist())
    indices = indices.astype(np.min_scalar_type(len(classes) - 1))
    found, start = {}, 0
    for name, (images, _) in parts.items():
        found[name] = images, indices[start : start + len(images)]
        start += len(images)
    return found, classes


def check_classes(parts: Parts, classes: tuple[str, ...], where: str) -> None:
    """Raise `UserError` for a class that images of another part have, and none to train on; for one class. Local."""
    if len(classes) < 2:
        raise UserError(f"{where}: all images are of one class, {classes[0]}: there is nothing to tell apart")
    for name, (_, labels) in parts.items():
        unknown = np.setdiff1d(labels, parts[TRAIN][1])
        if len(unknown):
            raise UserError(
                f"{where}: images of the {name} part are of class {classes[unknown[0]]}, and none to train on: add "
                "some, or leave the class out"
            )


def hold_out(part: Part, fraction: float, where: str) -> tuple[Part, Part]:
    """Return what is left of a part, in its order, and the validation part that is cut from it. Local.

    Of each class the fraction, to rounding; the same samples whatever the seed of a run.

    Raises
    ------
    UserError
        Where the fraction is less than one sample.
    """
    images, labels = part
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    taken = np.floor(fraction * np.arange(1, len(order) + 1) + 0.5)
    held = np.zeros(len(order), bool)
    held[order[np.diff(taken, prepend=0.0) > 0]] = True
    if not held.any():
        raise UserError(f"{where}: {fraction:g} of {len(labels)} images is none: use a larger --validation")
    return (images[~held], labels[~held]), (images[held], labels[held])
