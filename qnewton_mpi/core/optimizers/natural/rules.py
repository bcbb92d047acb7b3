"""The small parts that a step of the natural-gradient methods is made of, each with a value that turns it off."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace

from qnewton_mpi.arrays import Array
from qnewton_mpi.core.kernels import combination
from qnewton_mpi.core.secants import Matrix
from qnewton_mpi.core.state import Kind

RUNNING = 0.02  # weight of a step in running means
NOISE_WEIGHT = 0.1  # of a step in the running share of noise
LEAST_NOISE = 0.03  # ν, as far as it can be told from zero: it is a mean over some ten steps
CURVATURE_WEIGHT = 0.3  # of a measurement in the running mean of log χ
FIRST_TRIALS = 12  # of the first step at most
FIRST_STEPS = 10  # in which χ is measured at each step
MORE = 2.0  # times what the step that was measured promised is as far as a measurement holds
FIRST_CHANGE = 5.0  # times as much may noise change a layer in the first step
DOWN = 100.0  # χ is taken to fall by no more from one measurement to the next


class Momentum:
    """z = Σ_k a_k ḡ_{t−k}, Σ_k a_k = 1: Nesterov's momentum, unbiased. Off: β = 0.

    m ← β m + (1 − β) ḡ,    z = (β m + (1 − β) ḡ)/(1 − βᵗ⁺¹)
    """

    state: ClassVar = {"mean": Kind.HELD}

    def __init__(self, beta: float, like: Array) -> None:
        xp = array_namespace(like)
        self.beta, self.mean, self.spare = beta, xp.zeros_like(like), xp.empty_like(like)

    def add(self, g: Array, step: int) -> Array:
        """Take in the gradient (held,) of a step, from 1; return z, (held,). Local."""
        beta = self.beta
        self.mean, self.spare = combination(beta, self.mean, 1 - beta, g, out=self.spare), self.mean
        unbiased = 1 / (1 - beta ** (step + 1))
        return combination(beta * unbiased, self.mean, (1 - beta) * unbiased, g)

    def newest(self, step: int) -> float:
        """Return a_0, the weight of the newest gradient. Local."""
        return (1 - self.beta**2) / (1 - self.beta ** (step + 1))

    def noise(self, step: int) -> float:
        """Return the noise of z as a multiple of that of one ḡ, Σ_k a_k². Local.

        a_k is (1 − β)/(1 − βᵗ⁺¹) times 1 + β for k = 0 and βᵏ⁺¹ for k = 1 … t − 1.

        Examples
        --------
        >>> [round(Momentum(0.9, np.zeros(1)).noise(step), 3) for step in (1, 2, 1000)]  # soon a 14th
        [1.0, 0.581, 0.071]
        """
        beta = self.beta
        past = beta**4 * (1 - beta ** (2 * (step - 1))) / (1 - beta**2)
        return ((1 - beta) / (1 - beta ** (step + 1))) ** 2 * ((1 + beta) ** 2 + past)


class NoiseShare:
    """ν, the share of noise in dᵀz, a running mean: 0 where a step is signal alone, 1 where it is noise alone.

    It starts from 0: a run is taken for signal until it is known to be noise.

    Attributes
    ----------
    value : float
    unbiased : float
        The mean of what has been seen.
    """

    state: ClassVar = {"value": Kind.SHARED, "weight": Kind.SHARED}

    def __init__(self) -> None:
        self.value = self.weight = 0.0

    @property
    def unbiased(self) -> float:
        return self.value / self.weight if self.weight > 0 else 0.0

    @property
    def least(self) -> float:
        """ν, and no less than can be told from zero."""
        return max(self.value, LEAST_NOISE)

    def add(self, noise: float, dz: float) -> None:
        """Take in a step's dᵀz, and the part of it that is expected of noise. Local."""
        # dᵀz far below the noise: there is none, as where the batch is all there is. Then nearer to 0 again.
        share = min(noise / dz, dz / noise) if dz > 0 and noise > 0 else 0.0
        self.value += NOISE_WEIGHT * (share - self.value)
        self.weight += NOISE_WEIGHT * (1 - self.weight)


class Curvature:
    """χ, the curvature of the loss along a step as a multiple of what P says, and the rate that it allows.

        c = 2 [f_B(w + Δw) − f_B(w) − g_BᵀΔw],    χ = |c|/(Δwᵀ P Δw),    α ≤ C (ς + ν)/χ

    on the batch that made the step: one loss more, no gradient. Where that step is the gradient's, ς = 1, 1/χ leads to
    the minimum along it (LeCun, Simard and Pearlmutter 1993). Of a step with momentum that is ς/χ, ς = ḡᵀd/dᵀz: none
    where it leads uphill, as in the restarts of O'Donoghue and Candès (2015, arXiv 1204.3982). So far goes a step of
    signal. A step of noise, ν = 1, need not lower the loss of its batch: the noise of many is averaged out, or bounded
    elsewhere.

    It is measured in each of the first ten steps, then every few, and where a step promises, by α dᵀz, twice the fall
    of the one that was measured last: it is longer, or the gradient has grown, as after one too long. log χ is a
    running mean. Along negative curvature, which P has not, |c| is as good a measure of how far the quadratic model
    goes (Dauphin et al. 2014, arXiv 1406.2572); where c crosses zero, log |c| says nothing. So a measurement counts as
    no less than a hundredth of χ. Off: C = ∞.
    """

    state: ClassVar = dict.fromkeys(("logarithm", "measured", "promise", "newest"), Kind.SHARED)

    def __init__(self, factor: float) -> None:
        self.factor, self.logarithm = factor, 0.0
        self.measured, self.promise = 0, 0.0  # the step that was measured last, from 1, and its α dᵀz
        self.newest = 0.0  # the rate that it allowed

    @property
    def value(self) -> float:
        """χ; 1 before it is known."""
        return math.exp(self.logarithm)

    def limit(self, reach: float) -> float:
        """Return the largest rate, given ς + ν."""
        return self.allows(self.logarithm, reach)

    def allows(self, logarithm: float, reach: float) -> float:
        """Return the largest rate by one log χ, given ς + ν."""
        return self.factor * reach * math.exp(-logarithm)

    def due(self, step: int, every: int, promise: float) -> bool:
        """Tell whether it is to be measured at a step of this α dᵀz, as every so many are after the first ten."""
        return step <= FIRST_STEPS or step % every == 0 or promise > MORE * self.promise

    def add(self, logarithm: float, step: int, promise: float, reach: float, rate: float) -> None:
        """Take in log χ of a step of this α dᵀz, ς + ν and rate, beyond which it does not go."""
        change = max(logarithm - self.logarithm, -math.log(DOWN))
        self.logarithm += max(CURVATURE_WEIGHT, 1 / step) * change if self.measured else logarithm
        self.measured, self.promise = step, promise
        self.newest = min(rate, self.allows(logarithm, reach))


class SuccessiveGradients:
    """χ of steps whose losses cannot be had again, from the gradients that there are anyway.

        (ḡ_{t+1} − ḡ_t)ᵀΔw_t = Δw_tᵀ H Δw_t + noise,    mean of the noise a_0 α tr(P⁻¹C)

    The newest gradient is in Δw_t by a_0, with its noise, whose covariance C the replicas' differences tell. The noise
    of the two batches is far larger than on one batch, so that only running means of both curvatures over some fifty
    steps say anything: it takes that long to see a change.
    """

    state: ClassVar = {"change": Kind.HELD} | dict.fromkeys(
        ("count", "before", "expected", "predicted", "curvature", "metric"), Kind.SHARED
    )

    def __init__(self, held: Array) -> None:
        self.change = array_namespace(held).zeros_like(held)
        self.count = 0
        self.before = self.expected = self.predicted = 0.0  # ḡᵀΔw, the mean noise and ΔwᵀPΔw of the last step
        self.curvature = self.metric = 0.0  # running means

    def add(self, after: float) -> None:
        """Take in ḡᵀΔw of the gradient after the last step. Local."""
        if self.predicted > 0:
            curvature = after - self.before - self.expected
            self.count += 1
            weight = max(1 / self.count, RUNNING)
            self.curvature += weight * (curvature - self.curvature)
            self.metric += weight * (self.predicted - self.metric)

    def begin(self, chi: float, predicted: float) -> None:
        """Go on from a χ that is known, as if from ten steps. Local."""
        self.count, self.curvature, self.metric = 10, chi * predicted, predicted

    def follow(self, change: Array, before: float, expected: float, predicted: float) -> None:
        """Keep a step Δw: ḡᵀΔw, the mean of the noise and Δwᵀ P Δw. Local."""
        self.change, self.before, self.expected, self.predicted = change, before, expected, predicted

    @property
    def logarithm(self) -> float:
        """Log χ; 0 before it is known."""
        ratio = abs(self.curvature) / self.metric if self.metric > 0 else 0.0
        return math.log(ratio) if ratio > 0 else 0.0


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


class RelativeChange:
    """The noise of a step may change a layer by η, relatively, in the root mean square over the layers. Off: ∞.

        α √ν r ≤ η max(1, 5/√t),    r² = mean over l of (‖d_l‖/‖w_l‖)²

    In the first 25 steps it may change it by more: a random walk from random parameters, of which there is little to be
    lost, shorter as they become worth more.

    over the coordinates that were not zero at the start: those have no scale. ‖w_l‖ counts as no less than at the
    start, so that a layer may pass through zero. √ν is the noise's part of the length of a step. A relative change of
    each layer is what LARS and LAMB prescribe (You, Gitman and Ginsburg 2017, arXiv 1708.03888; You et al. 2020, arXiv
    1904.00962). One factor for all keeps the direction what P⁻¹ made it.
    """

    state: ClassVar = {"start": Kind.HELD}

    def __init__(self, eta: float, spans: Sequence[slice], held: Array) -> None:
        self.xp = array_namespace(held)
        self.eta, self.spans = eta, spans
        self.start = self.xp.asarray(held, copy=True)

    def products(self, d: Array, held: Array) -> list[tuple[Array, Array, Sequence[slice]]]:
        """Return that whose sums, as of `Exchange.dots_of_parts`, `squared` takes. Local."""
        scaled = self.xp.astype(self.start != 0, held.dtype)
        return [(x, y, self.spans) for x, y in ((d * scaled, d), (held * scaled, held), (self.start, self.start))]

    def squared(self, changes: Matrix, sizes: Matrix, before: Matrix) -> float:
        """Return r², 0 where no layer has a scale. Local."""
        known = before > 0
        return float(np.mean(changes[known] / np.maximum(sizes, before)[known])) if known.any() else 0.0

    def limit(self, squared: float, noise: float, step: float) -> float:
        """Return the largest rate, given r², ν and the step, from 1. Local."""
        eta = self.eta * max(1.0, FIRST_CHANGE / math.sqrt(step))
        return eta / math.sqrt(squared * noise) if squared * noise > 0 else math.inf
