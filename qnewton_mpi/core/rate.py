"""The learning rate that noise allows: as large as the noise that it leaves is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from qnewton_mpi.arrays import Vector
from qnewton_mpi.core.means import Mean, at_least, lasting
from qnewton_mpi.core.state import Kind

# Of 4 (L̃₂ − L̃₄) for losses of independent noise σ it is σ/√t times this: the weights 2s/t² and 4s³/t⁴, squared, add up
# to 4/(3t) and 16/(7t), their product to 8/(5t).
SLOPE_ERROR = 4 * math.sqrt(4 / 3 + 16 / 7 - 2 * 8 / 5)
# The slope is so many of its standard errors below zero, and no loss that has stopped falling, where the loss rises.
RISEN = 3.0
VARIANCE_WEIGHT = 0.02  # of a step in the running variance of the losses


class LossTrend:
    """Where the loss is, and how fast it falls, from noisy values at steps 1, 2, …; no memory but running means.

    L̃_c is the mean of the losses so far with weights that grow as t^(c−1) (polynomial-decay averaging, Shamir and
    Zhang 2013, arXiv 1212.1824), kept as L̃_c ← L̃_c + c/(t + c − 1) (L − L̃_c). For L = L_∞ + a t⁻ᵖ it is
    L_∞ + c/(c − p) a t⁻ᵖ, so 4 (L̃₂ − L̃₄) = 8/((2 − p)(4 − p)) · p a t⁻ᵖ, which is about −t dL/dt.

    A constant added to the losses changes nothing of the slope, nor of its standard error, which the differences of the
    replicas' losses tell; where all have one loss, its distance from the recent ones. Where the slope is three of those
    below zero, the loss has risen, and the trend starts anew with t = 1: these means reach back as far as a share of
    the run.

    Attributes
    ----------
    count : int
        t, losses that count.
    level : float
        L̃₄, the recent loss.
    slope : float
        4 (L̃₂ − L̃₄): by how much the loss falls while t grows by a factor e. Noise may make it negative.
    error : float
        Its standard error where the loss has stopped falling, 2.59 σ/√t, σ² the variance of a step's mean loss.

    Examples
    --------
    >>> import numpy as np
    >>> trend = LossTrend()
    >>> for t in range(1, 2001):
    ...     trend.add(np.array([0.1, 0.1]) + t**-0.25)
    >>> round(trend.level, 3), round(trend.slope / (0.25 * 2000**-0.25), 2)
    (0.26, 1.22)
    """

    state: ClassVar[Mapping[str, Kind]] = {}

    def __init__(self) -> None:
        self._long, self._recent, self._variance = (
            Mean(lasting(1 / 2)),
            Mean(lasting(1 / 4)),
            Mean(at_least(VARIANCE_WEIGHT)),
        )

    def parts(self) -> Mapping[str, Mean]:
        """Return L̃₂, L̃₄ and σ²."""
        return {"long": self._long, "recent": self._recent, "variance": self._variance}

    def add(self, losses: Vector) -> None:
        """Take in the replicas' losses (M,) of the next step."""
        if self.slope < -RISEN * self.error:
            for mean in self.parts().values():
                mean.forget()
        loss, before = float(losses.mean()), self.level
        self._long.add(loss)
        self._recent.add(loss)
        variance = float(losses.var(ddof=1)) / len(losses) if len(losses) > 1 else 0.0
        if variance == 0 and self._recent.count > 1:
            variance = (loss - before) ** 2
        self._variance.add(variance)

    @property
    def count(self) -> int:
        return self._variance.count

    @property
    def level(self) -> float:
        return self._recent.value

    @property
    def slope(self) -> float:
        return 4 * (self._long.value - self._recent.value)

    @property
    def error(self) -> float:
        return SLOPE_ERROR * math.sqrt(self._variance.value / max(1, self.count))


def noise_limited_rate(trend: LossTrend, noise: float, share: float) -> float:
    """Return α = 4 κ (−t dL/dt)/tr(P⁻¹C), the rate whose noise is in balance with what the run gains.

    Steps w ← w − α P⁻¹(∇L + noise of covariance C) keep the loss above the minimum of its bowl by α tr(P⁻¹C)/4 (from
    the stationary state, P⁻¹HΣ + ΣHP⁻¹ = α P⁻¹CP⁻¹; Mandt, Hoffman and Blei 2017, arXiv 1704.04289). If the rest of the
    loss falls as (α t)⁻ᵖ, their sum is least where that noise is p times the rest, which is −t dL/dt. So the rate falls
    by itself as the run levels off. What cannot be told from a slope of zero, the standard error, is the least.

    Parameters
    ----------
    trend : LossTrend
    noise : float
        tr(P⁻¹C), C the covariance of the mean gradient.
    share : float
        κ: how much of the loss that the last stretch of the run gained may be given back as noise.

    Returns
    -------
    float
        Infinite without noise, and where nothing is known of the slope, as all losses are the same.

    Examples
    --------
    >>> import numpy as np
    >>> trend = LossTrend()
    >>> trend.add(np.array([1.0, 2.0]))  # the mean is known to 0.5, the slope to 2.59 times that
    >>> round(noise_limited_rate(trend, noise=2.8 * 0.5, share=0.7), 2)
    2.59
    """
    gain = max(trend.slope, trend.error)
    return 4 * share * gain / noise if noise > 0 and gain > 0 else math.inf
