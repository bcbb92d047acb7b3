"""Random crops and flips of the images of a step: a function of the seed, the step and the place in the batch alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.data.order import BatchOrder

KINDS = ("crop", "flip")
MARGIN = 8  # a crop moves an image by up to an eighth of its side, each way


def kinds_of(text: str) -> tuple[str, ...]:
    """Return the kinds of augmentation that an option names, in the order of `KINDS`; ValueError for others."""
    named = [name.strip() for name in text.split(",")]
    if not set(named) <= set(KINDS):
        raise ValueError(text)
    return tuple(kind for kind in KINDS if kind in named)


def are_kinds(text: str) -> bool:
    """Tell whether an option names kinds of augmentation."""
    try:
        return bool(kinds_of(text))
    except ValueError:
        return False


class Augmentation:
    """Which pixels of its images each replica sees at each step. Local.

    They do not depend on the number of replicas or ranks, as little as the batches do.

    Parameters
    ----------
    kinds : sequence of str
        Of `KINDS`. Crop: moved by up to an eighth of height and width, the pixels at the edge repeated. Flip: left and
        right exchanged, with probability ½.
    image : (int, int)
        Height and width.
    order : BatchOrder
    """

    def __init__(self, kinds: Sequence[str], image: tuple[int, int], order: BatchOrder) -> None:
        self._kinds, self._image, self._order = kinds, image, order

    def pixels(self, step: int, replicas: Sequence[int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return which rows (R, B, H) and columns (R, B, W) of the images some replicas see at a step (from 0)."""
        batch, share = self._order.batch, self._order.share
        random = np.random.default_rng([self._order.seed, 3, step])
        found = []
        for side in self._image:
            most = side // MARGIN
            moves = random.integers(-most, most, batch, endpoint=True)
            places = np.arange(side) + ("crop" in self._kinds) * moves[:, None]
            found.append(np.clip(places, 0, side - 1))
        flipped = (random.random(batch) < 0.5) & ("flip" in self._kinds)
        found[1] = np.where(flipped[:, None], found[1][:, ::-1], found[1])
        mine = np.stack([np.arange(replica * share, (replica + 1) * share) for replica in replicas])
        rows, columns = (places[mine] for places in found)
        return rows, columns
