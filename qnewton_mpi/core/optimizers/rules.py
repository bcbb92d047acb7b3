"""The small parts that a step of the natural-gradient methods is made of, each with a value that turns it off."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.core.kernels import combination
from qnewton_mpi.core.state import Kind
from qnewton_mpi.parallel.device import Array

RUNNING = 0.02  # weight of a step in running means
NOISE_WEIGHT = 0.1  # of a step in the running share of noise
FARTHEST = 1e3  # times 1/χ is the rate, where the bounds of the layers leave it without one
HALVINGS = 40  # of that range: to rounding
LEAST_NOISE = 0.03  # ν, as far as it can be told from zero: it is a mean over some ten steps
CURVATURE_WEIGHT = 0.3  # of a measurement in the running mean of log χ
FIRST_TRIALS = 12  # of the first step at most
FIRST_STEPS = 10  # in which χ is measured at each step
LONGER = 2.0  # times the length that was measured is as far as a measurement holds
GROWING = 30  # steps in which a step is at most twice as long as the last one


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

    def add(self, noise: float, dz: float) -> None:
        """Take in a step's dᵀz, and the part of it that is expected of noise. Local."""
        # dᵀz far below the noise: there is none, as where the batch is all there is. Then nearer to 0 again.
        share = min(noise / dz, dz / noise) if dz > 0 and noise > 0 else 0.0
        self.value += NOISE_WEIGHT * (share - self.value)
        self.weight += NOISE_WEIGHT * (1 - self.weight)


class Curvature:
    """χ, the curvature of the loss along a step as a multiple of what P says, and 1/χ, LeCun's rate along it.

        c = 2 [f_B(w + Δw) − f_B(w) − g_BᵀΔw],    χ = |c|/(Δwᵀ P Δw),    α ≤ C/χ

    on the batch that made the step: one loss more, no gradient. It is measured in each of the first ten steps, then
    every few, and where a step is twice as long as the one that was measured last. log χ is a running mean, but that χ
    falls by no more than a mean of χ itself would: along a slow direction it may be next to nothing, and the next one
    is another. Along negative curvature, which P has not, |c| is as good a measure of how far the quadratic model goes
    (Dauphin et al. 2014). Off: C = ∞.
    """

    state: ClassVar = {"logarithm": Kind.SHARED, "known": Kind.SHARED, "length": Kind.SHARED}

    def __init__(self, factor: float) -> None:
        self.factor, self.logarithm, self.known, self.length = factor, 0.0, False, 0.0

    @property
    def value(self) -> float:
        """χ; 1 before it is known."""
        return math.exp(self.logarithm)

    def due(self, step: int, every: int, length: float) -> bool:
        """Tell whether it is to be measured at a step, from 1, of this length."""
        return step <= FIRST_STEPS or step % every == 0 or length > LONGER * self.length

    def add(self, logarithm: float, step: int, length: float) -> None:
        """Take in log χ of a step, from 1, of this length."""
        self.length = length
        weight = max(CURVATURE_WEIGHT, 1 / step) if self.known else 1.0
        change = weight * (logarithm - self.logarithm)
        self.logarithm += max(change, math.log(1 - weight)) if self.known else logarithm
        self.known = True


class SuccessiveGradients:
    """χ of steps whose losses cannot be had again, from the gradients that there are anyway.

        (ḡ_{t+1} − ḡ_t)ᵀΔw_t = Δw_tᵀ H Δw_t + noise,    mean of the noise a_0 α tr(S P⁻¹C)

    The newest gradient is in Δw_t by a_0, with its noise, whose covariance C the replicas' differences tell; S are the
    layers' shares. The noise of the two batches is far larger than on one batch, so that only running means of both
    curvatures over some fifty steps say anything: it takes that long to see a change.
    """

    state: ClassVar = {"change": Kind.HELD} | dict.fromkeys(
        ("count", "before", "expected", "predicted", "curvature", "metric"), Kind.SHARED
    )

    def __init__(self, exchange: Exchange, held: Array) -> None:
        self.exchange, self.change = exchange, array_namespace(held).zeros_like(held)
        self.count = 0
        self.before = self.expected = self.predicted = 0.0  # ḡᵀΔw, the mean noise and ΔwᵀPΔw of the last step
        self.curvature = self.metric = 0.0  # running means

    def add(self, mean: Array) -> None:
        """Take in the gradient after the last step. Collective."""
        if self.predicted > 0:
            curvature = self.exchange.dots((mean, self.change))[0] - self.before - self.expected
            self.count += 1
            weight = max(1 / self.count, RUNNING)
            self.curvature += weight * (curvature - self.curvature)
            self.metric += weight * (self.predicted - self.metric)

    def follow(self, change: Array, before: float, expected: float, predicted: float) -> None:
        """Keep a step Δw: ḡᵀΔw, the mean of the noise and Δwᵀ P Δw. Local."""
        self.change, self.before, self.expected, self.predicted = change, before, expected, predicted

    @property
    def logarithm(self) -> float:
        """Log χ; 0 before it is known."""
        return math.log(abs(self.curvature) / self.metric) if self.metric > 0 and self.curvature != 0 else 0.0


def fixed_point(allowed: Callable[[float], float], tolerance: float) -> float:
    """Return the rate that allows itself, by the secant method in logarithms, from 1.

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
    x, points = 0.0, []
    for _ in range(FIRST_TRIALS):
        rate = allowed(math.exp(x))
        if rate == 0:
            x -= math.log(100)
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
    return math.exp(min(points)[1] if points else x)


class Lengths:
    """No step is much longer than those before it, before layers are shortened. Off: ∞.

    In the first 30 steps, when χ is measured on what has hardly begun, at most twice as long as the last; later at most
    three times the root mean square. That is for where nearly all samples are learnt: what one that is not asks for is
    off F's span.
    """

    state: ClassVar = {"last": Kind.SHARED, "square": Kind.SHARED}

    def __init__(self, growth: float, longest: float) -> None:
        self.growth, self.longest, self.last, self.square = growth, longest, 0.0, 0.0

    def limit(self, step: int) -> float:
        """Return the largest ‖Δw‖ of a step, from 1."""
        limit = self.longest * math.sqrt(self.square) if self.square > 0 else math.inf
        return min(limit, self.growth * self.last) if 1 < step <= GROWING else limit

    def add(self, asked: float, done: float, step: int) -> None:
        """Take in the length of a step, from 1, before and after layers were shortened."""
        self.last = asked
        self.square += max(1 / step, RUNNING) * (done**2 - self.square)


@dataclass(frozen=True)
class Parts:
    """What is known of a step d of all layers before it is bounded. Each (layers,).

    Attributes
    ----------
    dz, dd, gd
        d_lᵀz_l, d_lᵀd_l and ḡ_lᵀd_l.
    caps
        The largest rate of each layer; infinite where there is no bound.
    scaled
        Whether the layer has a scale: was not all zero at the start.
    """

    dz: NDArray[np.float64]
    dd: NDArray[np.float64]
    gd: NDArray[np.float64]
    caps: NDArray[np.float64]
    scaled: NDArray[np.bool_]

    def rates(self, rate: float) -> NDArray[np.float64]:
        """Return a_l = min(α, caps); of layers without a scale the root mean square of the others, weighted by d."""
        rates, squares = np.minimum(rate, self.caps), self.dd[self.scaled]
        if squares.sum() > 0:
            rates[~self.scaled] = math.sqrt(rates[self.scaled] ** 2 @ squares / squares.sum())
        return rates

    def lowest(self, chi: float) -> float:
        """Return the largest α whose step, with a curvature of χ, does not lead beyond the minimum along itself.

        That is Σ_l a_l d_lᵀz_l ≥ χ Σ_l a_l² d_lᵀz_l; 1/χ where no layer is bounded. It may be infinite where all are.
        """

        def short(logarithm: float) -> bool:
            rates = self.rates(math.exp(logarithm))
            return bool(rates @ self.dz >= chi * (rates**2 @ self.dz))

        low, high = -math.log(chi), -math.log(chi) + math.log(FARTHEST)
        if not (self.rates(math.exp(low)) < math.exp(low)).any():
            return 1 / chi
        if short(high):
            return math.exp(high)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if short(middle) else (low, middle)
        return math.exp(low)


class RelativeChange:
    """The noise of a step may change a layer by η, relatively; or the layer moves as far as it has until now. Off: ∞.

        Δw_l = −a_l d_l,    a_l ‖d_l‖ ≤ max(η ‖w_l‖/√ν, ρ_l),    ρ_l = max_t ‖w_l(t) − w_l(0)‖/√(t (1 + β)/(1 − β))

    with ‖w_l‖ and its ‖d_l‖ over the coordinates that were not zero at the start. √ν is the noise's part of a step's
    length. ρ_l is the length of the steps that would have led as far as the layer has come, if they were a random walk
    with momentum β (the distance over gradients of Ivgi, Hinder and Carmon 2023, arXiv 2302.12022): a layer that moves
    in one direction may go faster.
    """

    state: ClassVar = {"start": Kind.HELD, "farthest": Kind.SHARED}

    def __init__(self, eta: float, beta: float, exchange: Exchange, spans: Sequence[slice], held: Array) -> None:
        xp = array_namespace(held)
        self.eta, self.exchange, self.spans = eta, exchange, spans
        self.walk = math.sqrt((1 + beta) / (1 - beta))
        self.start = xp.asarray(held, copy=True)
        self.farthest = np.zeros(len(spans))

    def of(self, d: Array, z: Array, mean: Array, held: Array, step: int, noise: Callable[[float], float]) -> Parts:
        """Return what is known of a step d from w, all (held,); `noise` returns ν, given dᵀz. Collective."""
        xp = array_namespace(held)
        free = xp.astype(self.start != 0, held.dtype)
        moved, own, changed = held - self.start, held * free, d * free
        pairs = (d, z), (d, d), (mean, d), (changed, changed), (own, own), (moved, moved), (free, free)
        dz, dd, gd, changes, sizes, distances, counts = self.exchange.dots_of_parts(self.spans, *pairs)
        self.farthest = np.maximum(self.farthest, np.sqrt(distances))
        bounded = (sizes > 0) & (changes > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            near = self.eta / math.sqrt(max(noise(float(dz.sum())), LEAST_NOISE)) * np.sqrt(sizes / changes)
            far = self.farthest / (self.walk * math.sqrt(step)) / np.sqrt(dd)
            caps = np.where(bounded, np.maximum(near, far), np.inf)
        return Parts(dz, dd, gd, caps, counts > 0)

    def scaled(self, d: Array, rates: NDArray[np.float64]) -> Array:
        """Return a_l d_l of all layers, (held,). Local."""
        if (rates == rates[0]).all():
            return float(rates[0]) * d
        d, first = array_namespace(d).asarray(d, copy=True), self.exchange.held.start
        for span, rate in zip(self.spans, rates, strict=True):
            own = slice(max(0, span.start - first), max(0, span.stop - first))
            d[own] = float(rate) * d[own]
        return d
