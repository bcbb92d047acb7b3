"""The curvature along a step, from losses at points of it: trials, on the batch that made the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qnewton_mpi.arrays import Vector
from qnewton_mpi.core.optimizers.natural.bounds import Curvature
from qnewton_mpi.core.optimizers.natural.values import NaturalStep
from qnewton_mpi.core.optimizers.values import Batch
from qnewton_mpi.core.state import Kind

FIRST_TRIALS = 12  # of the first step at most
CHECK_EVERY = 50  # steps between looks at whether the loss is quadratic
QUARTERS = 10  # of a rate, at most, to where it is
FARTHER = 100.0  # times as far is looked where the loss is linear
ROUNDING = 4.0  # units of the loss


@dataclass(frozen=True)
class Line:
    """The loss along a step, w − α d.

    Attributes
    ----------
    step : NaturalStep
    losses : callable
        Returns all replicas' losses (M,) at a rate; ∞ for what is not finite. Collective.
    rate_factor : float
        Of a schedule.
    epsilon : float
        Unit of the parameters' rounding.
    """

    step: NaturalStep
    losses: Callable[[float], Vector]
    rate_factor: float
    epsilon: float

    def curvature(self, rate: float) -> float:
        """Return log χ along the step of a rate, ∞ where the loss is not finite there. Collective.

        Not a number where the loss's curvature is rounding.
        """
        slope, predicted = self.step.along(rate)
        curvature = abs(2 * (float(self.losses(rate).mean() - self.step.batch.losses.mean()) - slope))
        if not math.isfinite(curvature):
            return math.inf
        ratio = curvature / predicted if predicted > 0 else 0.0
        if ratio == 0:
            return math.nan
        logarithm = math.log(ratio)
        return logarithm if logarithm > self.rounding(size_of(self.step.batch), rate) else math.nan

    def rounding(self, loss: float, rate: float) -> float:
        """Return log χ that the rounding of a loss of this size makes along the step of a rate. Local."""
        predicted = self.step.along(rate)[1]
        ratio = ROUNDING * self.epsilon * loss / predicted if predicted > 0 else 0.0
        return math.log(ratio) if ratio > 0 else -math.inf

    def is_of_gradient(self, rate: float, logarithm: float) -> bool:
        """Tell whether the loss changes along the step as its gradient says, to an eighth, given log χ there. Local."""
        slope, predicted = self.step.along(rate)
        if math.isnan(logarithm):
            logarithm = self.rounding(size_of(self.step.batch), rate)
        return math.isfinite(logarithm) and math.exp(min(logarithm, 700.0)) * predicted < abs(slope) / 4


class Measurements:
    """Measures χ along steps, as long as losses say what it is.

    Parameters
    ----------
    curvature : Curvature
        What is measured goes there.

    Attributes
    ----------
    repeats : bool
        Whether the losses of a batch can be had again, at other parameters.
    largest_loss : float
        So far.
    """

    state: ClassVar = {"repeats": Kind.SHARED, "largest_loss": Kind.SHARED}

    def __init__(self, curvature: Curvature) -> None:
        self.curvature = curvature
        self.repeats, self.largest_loss = True, 0.0

    def see(self, batch: Batch) -> None:
        """Take in how large losses are. Local."""
        self.largest_loss = max(self.largest_loss, size_of(batch))

    def first(self, line: Line, others: float) -> bool:
        """Measure χ where the first step leads, after a look at whether the losses can be had again. Collective.

        They cannot where they are others at the same point, or the same wherever the step leads. The rate is the one
        that allows itself, given the largest one by all other bounds. A schedule's factor plays no part.

        Returns
        -------
        bool
            False where the losses are had again, but are not those of the gradient: no rate allows itself.
        """
        again, rate = line.losses(0.0), 1.0
        self.repeats = np.allclose(again, line.step.batch.losses, rtol=1e-6, atol=0)
        for _ in range(FIRST_TRIALS if self.repeats else 0):
            once = line.losses(rate)
            if not (once == again).all():
                self.repeats = bool((once == line.losses(rate)).all())
                break
            rate *= FARTHER
        else:
            self.repeats = False
        if not self.repeats:
            return True

        def allowed(rate: float) -> float:  # 0 where the loss is not finite
            logarithm = line.curvature(rate)
            along = 0.0 if math.isinf(logarithm) else self.curvature.allows(logarithm, line.step.reach)
            return min(FARTHER * rate if math.isnan(along) else along, others)

        found = fixed_point(allowed, math.sqrt(line.epsilon))
        if found is not None:
            return self.measure(line, found, 1.0)
        return line.is_of_gradient(rate, line.curvature(rate))

    def measure(self, line: Line, rate: float, factor: float) -> bool:
        """Take χ in, at a rate times a factor, or where the loss is quadratic from there down. Collective.

        That is looked for where χ is more than twice what is known, and at every 50th step.

        Returns
        -------
        bool
            False where the loss is not the one of the gradient: it does not change as that says, down to rounding.
        """
        logarithm, t, curvature = line.curvature(factor * rate), line.step.number, self.curvature
        known = curvature.logarithm if curvature.measured else -math.inf
        if logarithm > known + math.log(2) or t % CHECK_EVERY == 0:
            rate, logarithm, sound = quadratic(line, rate, factor, logarithm)
            if not sound:  # where targets are met to rounding, that of larger losses is left
                return not logarithm > line.rounding(self.largest_loss, factor * rate)
        if math.isfinite(logarithm):
            curvature.add(logarithm, t, line.rate_factor * rate * line.step.dz, line.step.reach, rate)
        return True


def quadratic(line: Line, rate: float, factor: float, logarithm: float) -> tuple[float, float, bool]:
    """Return the largest of a rate and its quarters from which down the loss is quadratic, and log χ there. Collective.

    Of a curvature h ∝ α² a quarter of the rate has a sixteenth. Where it has more than an eighth, a rate that much
    shorter is looked at. A loss with kinks is quadratic nowhere, and measured where the step leads, or where it is
    finite. The third is whether the loss was anywhere found to change as its gradient says.
    """
    shorter, found, sound = rate, logarithm, False
    for k in range(QUARTERS):
        quarter = line.curvature(factor * shorter / 4)
        sixteenth = math.isfinite(found) and quarter < found + math.log(2)
        if sixteenth or (k == 0 and math.isnan(quarter)):
            return shorter, found, True
        sound = sound or line.is_of_gradient(factor * shorter / 4, quarter)
        if math.isnan(quarter):  # never, down to rounding
            break
        if k < QUARTERS - 1:
            shorter, found = shorter / 4, quarter
            if not math.isfinite(logarithm):
                rate, logarithm = shorter, found
    return rate, logarithm, sound


def size_of(batch: Batch) -> float:
    """Return the mean of the losses' sizes."""
    return float(np.abs(batch.losses).mean())


def fixed_point(allowed: Callable[[float], float], tolerance: float) -> float | None:
    """Return the rate that allows itself, by the secant method in logarithms, from 1.

    None where none does to a factor of 2; but where the loss is not finite at it, one before.

    Parameters
    ----------
    allowed : callable
        The rate that a measurement at a rate allows; 0 where the loss is not finite.
    tolerance : float
        Relative.

    Examples
    --------
    >>> round(fixed_point(lambda rate: 1 / (4 + rate), 1e-6), 6)  # α (4 + α) = 1
    0.236068
    """
    x, points, wall = 0.0, [], False
    for _ in range(FIRST_TRIALS):
        rate = allowed(math.exp(x))
        if rate == 0:
            x, wall = x - math.log(100), True
            continue
        points.append((abs(x - math.log(rate)), x, math.log(rate)))
        if points[-1][0] < tolerance:
            break
        if len(points) == 1:
            x = math.log(rate)
            continue
        (_, x0, y0), (_, x1, y1) = points[-2:]
        slope = (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0
        x = x1 - (x1 - y1) / (1 - slope) if slope < 0.5 else y1
    distance, x, _ = min(points, default=(math.inf, x, x))
    inside = [x for _, x, y in points if y > x]
    if distance < math.log(2) or (wall and not inside):
        return math.exp(x)
    return math.exp(max(inside)) if wall else None
