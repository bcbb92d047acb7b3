"""What goes into a step and what comes out of it: plain values, which have no methods that communicate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array, Held, Rows, Vector, Whole

LossAndGradient = Callable[[Array, int], tuple[float, Array]]
"""`loss, gradient = f(w, replica)`: mean loss, and its gradient (N,), at w (N,) on the current batch of a replica.

It may have methods for several replicas at once, which are then called instead:
`losses, gradients = f.at_once(w, replicas)`, w (N,) or (R, N), losses (R,), gradients (R, N), and
`losses = f.losses(w, replicas)`, w (N,), where only losses are needed.
"""

Figures = dict[str, float]


@dataclass(frozen=True)
class Piggyback:
    """What else the ranks tell each other where they evaluate gradients: it travels with their losses.

    Attributes
    ----------
    send : callable
        Returns the words of this rank (k,), as many on every rank, once its gradients are there. Local.
    receive : callable
        Takes in those of all ranks, (n, k). Collective: what it raises, it raises on every rank.
    """

    send: Callable[[], NDArray[np.int64]]
    receive: Callable[[NDArray[np.int64]], None]


@dataclass(frozen=True)
class Batch:
    """What all replicas have evaluated, each on its own samples.

    Attributes
    ----------
    rows : (R, N)
        The gradients of this rank's replicas, in an array that is used again at the next evaluation.
    losses, squares : (M,)
        Every replica's loss, and the squared norm of its gradient.
    """

    rows: Rows
    losses: Vector
    squares: Vector

    @property
    def loss(self) -> float:
        """The mean loss."""
        return float(self.losses.mean())

    @property
    def square(self) -> float:
        """The mean of the squared norms."""
        return float(self.squares.mean())

    @property
    def alike(self) -> bool:
        """Whether all replicas, if there are several, have one loss and one norm, which is not zero: one batch."""
        same = len(self.losses) > 1 and all((values == values[0]).all() for values in (self.losses, self.squares))
        return bool(same and self.squares[0] > 0)

    def noise(self, gg: float) -> float:
        """Return tr C, C the covariance of the mean gradient, from ḡᵀḡ."""
        return (self.square - gg) / (len(self.squares) - 1)


@dataclass(frozen=True)
class Step:
    """w ← w − c α d, c the factor of a schedule, and what is to be told of it.

    Attributes
    ----------
    mean, direction : (held,)
        ḡ and d.
    rate : float
        α, before a schedule's factor.
    figures : dict
        Those that only the method has, and the loss.
    norms : tuple of float, optional
        ḡᵀḡ, dᵀd and ḡᵀd, where they are known.
    batch : Batch, optional
        Of which ḡ is the mean, where all replicas stood at w: their differences are noise. Its rows may hold others.
    everywhere : (N,), optional
        d, where it has been collected.
    """

    mean: Held
    direction: Held
    rate: float
    figures: Figures
    norms: tuple[float, float, float] | None = None
    batch: Batch | None = None
    everywhere: Whole | None = None
