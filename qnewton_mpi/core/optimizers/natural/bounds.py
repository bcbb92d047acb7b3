"""How long a step may be: a class for each bound of the rate, which the table BOUNDS names by its setting.

One more is a class here, its setting among `NaturalGradientSettings`, and a line of the table, the last: the figure
`limit` counts the lines. docs/explanation/architecture.md has the pages that name the bounds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace, device

from qnewton_mpi.arrays import Array, Held, Vector
from qnewton_mpi.core.layers import LayerShape
from qnewton_mpi.core.means import Mean, at_least, constant
from qnewton_mpi.core.optimizers.natural.settings import bound_of
from qnewton_mpi.core.optimizers.natural.values import NaturalStep
from qnewton_mpi.core.state import Kind

CURVATURE_WEIGHT = 0.3  # of a measurement in the running mean of log χ
FIRST_STEPS = 10  # in which χ is measured at each step
MORE = 2.0  # times what the step that was measured promised is as far as a measurement holds
FIRST_CHANGE = 5.0  # times as much may noise change a layer in the first step
LITTLE = 0.1  # of the steps, by a running mean, when it is told that a bound leaves no more
SHORTENED_WEIGHT = 0.02  # of a step in that mean
DOWN = 100.0  # χ is taken to fall by no more from one measurement to the next


class Bound(ABC):
    """The largest rate by one rule. Local.

    What it has to know of a step, it has as the sums of some products, which cross the network with the others of the
    step (`Exchange.dots_of_parts`).

    Parameters
    ----------
    value : float
        Its setting; 0: no bound.
    layers : sequence of LayerShape
        The layers, and where they are among the N coordinates.
    held : (held,)
        The first parameters.
    """

    state: ClassVar[Mapping[str, Kind]] = {}

    def __init__(self, value: float, layers: Sequence[LayerShape], held: Held) -> None:
        self.value = bound_of(value)

    def products(self, d: Held, held: Held) -> list[tuple[Array, Array, Sequence[slice]]]:
        """Return that whose sums `size` takes, of a direction and the parameters, (held,)."""
        return []

    def size(self, *sums: Vector) -> float:
        """Return what a step of α = 1 has of what is bounded: `NaturalStep.sizes`."""
        return 0.0

    @abstractmethod
    def limit(self, step: NaturalStep, size: float) -> float:
        """Return the largest rate of a step, of which α = 1 has this size."""


class Curvature(Bound):
    """χ, the curvature of the loss along a step as a multiple of what P says, and the rate that it allows.

        h = 2 [f_B(w + Δw) − f_B(w) − g_BᵀΔw],    χ = |h|/(Δwᵀ P Δw),    α ≤ (ς + ν)/χ

    times the setting, on the batch that made the step: one loss more, no gradient. Where that step is the gradient's,
    ς = 1, 1/χ leads to the minimum along it (LeCun, Simard and Pearlmutter 1993). Of a step with momentum that is ς/χ,
    ς = ḡᵀd/dᵀz: none where it leads uphill, as in the restarts of O'Donoghue and Candès (2015, arXiv 1204.3982). So far
    goes a step of signal. A step of noise, ν = 1, need not lower the loss of its batch: the noise of many is averaged
    out, or bounded elsewhere.

    It is measured in each of the first ten steps, then every few, and where a step promises, by α dᵀz, twice the fall
    of the one that was measured last: it is longer, or the gradient has grown, as after one too long. A step that is
    measured goes no further than this measurement allows by itself. log χ is a running mean. Along negative curvature,
    which P has not, |h| is as good a measure of how far the quadratic model goes (Dauphin et al. 2014, arXiv
    1406.2572); where h crosses zero, log |h| says nothing. So a measurement counts as no less than a hundredth of χ.
    Off: ∞.
    """

    state: ClassVar = dict.fromkeys(("measured", "promise", "newest"), Kind.SHARED)

    def __init__(self, value: float, layers: Sequence[LayerShape], held: Held) -> None:
        super().__init__(value, layers, held)
        self._mean = Mean(at_least(CURVATURE_WEIGHT))
        self.measured, self.promise = 0, 0.0  # the step that was measured last, from 1, and its α dᵀz
        self.newest = 0.0  # the rate that it allowed

    def parts(self) -> Mapping[str, Mean]:
        """Return the mean of log χ."""
        return {"logarithm": self._mean}

    @property
    def logarithm(self) -> float:
        """Log χ."""
        return self._mean.value

    @logarithm.setter
    def logarithm(self, value: float) -> None:
        self._mean.know(value, 1)

    @property
    def chi(self) -> float:
        """χ; 1 before it is known."""
        return math.exp(self.logarithm)

    def limit(self, step: NaturalStep, size: float) -> float:
        along = self.allows(self.logarithm, step.reach)
        return min(along, self.newest) if self.measured == step.number else along

    def allows(self, logarithm: float, reach: float) -> float:
        """Return the largest rate by one log χ, given ς + ν."""
        return self.value * reach * math.exp(-logarithm)

    def due(self, step: int, every: int, promise: float) -> bool:
        """Tell whether it is to be measured at a step of this α dᵀz, as every so many are after the first ten."""
        return step <= FIRST_STEPS or step % every == 0 or promise > MORE * self.promise

    def add(self, logarithm: float, step: int, promise: float, reach: float, rate: float) -> None:
        """Take in log χ of a step of this α dᵀz, ς + ν and rate, beyond which it does not go."""
        least = self.logarithm - math.log(DOWN) if self.measured else -math.inf
        self._mean.add(max(logarithm, least), step if self.measured else 1)
        self.measured, self.promise = step, promise
        self.newest = min(rate, self.allows(logarithm, reach))


class RelativeChange(Bound):
    """The noise of a step may change a layer by η, relatively, in the root mean square over the layers. Off: ∞.

        α √ν r ≤ η max(1, 5/√t),    r² = mean over l of (‖d_l‖/‖w_l‖)²

    over the coordinates that were not zero at the start: those have no scale. In the first 25 steps it may change it by
    more: a random walk from random parameters, of which there is little to be lost, shorter as they become worth more.
    ‖w_l‖ counts as no less than at the start, so that a layer may pass through zero. √ν is the noise's part of the
    length of a step. A relative change of each layer is what LARS and LAMB prescribe (You, Gitman and Ginsburg 2017,
    arXiv 1708.03888; You et al. 2020, arXiv 1904.00962). One factor for all keeps the direction what P⁻¹ made it.

    A model of one matrix and its bias has no such bound where its curvature can be measured: no layer stands on its
    features, and nothing tells how large its weights have to become, as those of sparse inputs. A vector may be
    anything, a whole network too.
    """

    state: ClassVar = {"start": Kind.HELD}

    def __init__(self, value: float, layers: Sequence[LayerShape], held: Held) -> None:
        super().__init__(value, layers, held)
        self.xp, self.spans = array_namespace(held), [layer.span for layer in layers]
        self.linear = len(layers) == 1 and layers[0].inputs > 1
        self.start = self.xp.asarray(held, copy=True)

    def products(self, d: Held, held: Held) -> list[tuple[Array, Array, Sequence[slice]]]:
        known, zero = self.start != 0, self.xp.zeros((), dtype=held.dtype, device=device(held))
        pairs = [(self.xp.where(known, x, zero), x) for x in (d, held)]
        return [(x, y, self.spans) for x, y in (*pairs, (self.start, self.start))]

    def size(self, *sums: Vector) -> float:
        """Return r², 0 where no layer has a scale."""
        changes, sizes, before = sums
        known = before > 0
        return float(np.mean(changes[known] / np.maximum(sizes, before)[known])) if known.any() else 0.0

    def limit(self, step: NaturalStep, size: float) -> float:
        if self.linear and step.measurable:
            return math.inf
        # Where no curvature is measured, all of a step may change what else its noise may, the first steps no more.
        noise, t = (step.noise, step.number) if step.measurable else (1.0, math.inf)
        eta = self.value * max(1.0, FIRST_CHANGE / math.sqrt(t))
        return eta / math.sqrt(size * noise) if size * noise > 0 else math.inf


class Shortening(Mean):
    """What the bound of the relative change leaves of the steps, a running mean that starts from all of them. Local."""

    def __init__(self) -> None:
        super().__init__(constant(SHORTENED_WEIGHT), 1.0)
        self.told = False

    def take(self, shrink: float) -> bool:
        """Take in what is left of a step; tell whether that has become little, once."""
        self.add(shrink)
        new = self.value < LITTLE and not self.told
        self.told = self.told or new
        return new


BOUNDS: dict[str, type[Bound]] = {"curvature": Curvature, "relative_change": RelativeChange}
