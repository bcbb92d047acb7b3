"""Spread policies: how the replicas are displaced from their mean for the next gradient.

If every replica applied Ĥ⁻¹ to the mean gradient, the displacements W = [w_i − w̄] would stay as they are; if each
applies it to its own gradient, they collapse, W ← (1 − α) W, whatever the curvature. So a rule must spread the replicas
anew, and the poster's "1-step synchronous" can be read as several: docs/explanation/poster.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from qnewton_mpi.arrays import Columns
from qnewton_mpi.core.inverse import InverseHessian

RANDOM_SCALE = 0.01


class SpreadPolicy(ABC):
    """A rule for the displacements W, (M, held), whose mean over the replicas is zero.

    Parameters
    ----------
    scale : float, optional
        η of `local-step`, by default the learning rate; the standard deviation of each random displacement's
        coordinates otherwise, by default 0.01.
    draw : callable
        draw(step) returns centred standard normal columns (M, held) that depend on the seed and the step alone.
    """

    def __init__(self, scale: float | None, draw: Callable[[int], Columns]) -> None:
        self.scale = scale
        self.draw = draw

    def start(self, zeros: Columns) -> Columns:
        """Return the first displacements, in the shape (M, held) of `zeros`."""
        return self.random(0)

    def random(self, step: int) -> Columns:
        """Return random displacements of the policy's scale, (M, held)."""
        return (RANDOM_SCALE if self.scale is None else self.scale) * self.draw(step)

    @abstractmethod
    def advance(
        self, step: int, displacements: Columns, gradients: Columns, inverse: InverseHessian, rate: float
    ) -> Columns:
        """Return the displacements for the next gradient.

        Parameters
        ----------
        step : int
            Index of the step just done, from 1.
        displacements, gradients : (M, held)
            W and G of this step.
        inverse : InverseHessian
            Ĥ⁻¹ of this step.
        rate : float
            The learning rate α.
        """


class LocalStep(SpreadPolicy):
    """Each replica takes one local gradient step from the common parameters: w_i = w̄ − η (g_i − ḡ)."""

    def start(self, zeros: Columns) -> Columns:
        return zeros

    def advance(
        self, step: int, displacements: Columns, gradients: Columns, inverse: InverseHessian, rate: float
    ) -> Columns:
        return -(rate if self.scale is None else self.scale) * gradients


class Independent(SpreadPolicy):
    """Each replica applies the inverse to its own gradient: w_i ← w_i − α Ĥ⁻¹g_i, so W ← W − α Ĥ⁻¹G."""

    def advance(
        self, step: int, displacements: Columns, gradients: Columns, inverse: InverseHessian, rate: float
    ) -> Columns:
        return displacements - rate * inverse.apply(gradients)


class Random(SpreadPolicy):
    """Fresh random displacements before every gradient."""

    def advance(
        self, step: int, displacements: Columns, gradients: Columns, inverse: InverseHessian, rate: float
    ) -> Columns:
        return self.random(step)


SPREADS: dict[str, type[SpreadPolicy]] = {"local-step": LocalStep, "independent": Independent, "random": Random}
