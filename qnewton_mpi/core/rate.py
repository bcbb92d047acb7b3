"""The learning rate that needs no tuning: as large as the noise that it leaves allows."""

from __future__ import annotations

from typing import ClassVar

from qnewton_mpi.core.state import Kind

# κ: how much of the loss that the last stretch of the run gained may be given back as noise, by preconditioned steps.
GAIN_SHARE = 0.7
# Where the loss has stopped falling, as if it still fell by this part of itself.
LEAST_SLOPE = 0.02
# The run has been thrown back when of its last 1/RECENT losses, or so, this share is beyond twice the level.
RECENT = 1 / 16
THROWN_BACK = 0.75


class LossTrend:
    """Where the loss is, and how fast it falls, from noisy values at steps 1, 2, …; no memory but running means.

    L̃_c is the mean of the losses so far with weights that grow as t^(c−1) (polynomial-decay averaging, Shamir and
    Zhang 2013, arXiv 1212.1824), kept as L̃_c ← L̃_c + c/(t + c − 1) (L − L̃_c). For L = L_∞ + a t⁻ᵖ it is
    L_∞ + c/(c − p) a t⁻ᵖ, so 4 (L̃₂ − L̃₄) = 8/((2 − p)(4 − p)) · p a t⁻ᵖ, which is about −t dL/dt.

    These means reach back as far as a share of the run. So where the loss has risen to more than twice the level, and
    stays there for some 20 steps, it starts anew with t = 1: a rise is not a loss that has stopped falling.

    Attributes
    ----------
    level : float
        L̃₄, the recent loss.
    slope : float
        4 (L̃₂ − L̃₄): by how much the loss falls while t grows by a factor e. Noise may make it negative.

    Examples
    --------
    >>> trend = LossTrend()
    >>> for t in range(1, 2001):
    ...     trend.add(0.1 + t**-0.25)
    >>> round(trend.level, 3), round(trend.slope / (0.25 * 2000**-0.25), 2)
    (0.26, 1.22)
    """

    state: ClassVar = {"steps": Kind.SHARED, "long": Kind.SHARED, "level": Kind.SHARED, "risen": Kind.SHARED}

    def __init__(self) -> None:
        self.steps = 0
        self.long = self.level = 0.0
        self.risen = 0.0  # the share of the recent losses that are beyond twice the level; a single one is no rise

    def add(self, loss: float) -> None:
        """Take in the loss of the next step."""
        if self.steps > 0:
            self.risen += RECENT * ((loss > self.level + abs(self.level)) - self.risen)
        if self.risen > THROWN_BACK:
            self.steps, self.risen = 0, 0.0
        self.steps += 1
        self.long += 2 / (self.steps + 1) * (loss - self.long)
        self.level += 4 / (self.steps + 3) * (loss - self.level)

    @property
    def slope(self) -> float:
        return 4 * (self.long - self.level)


def noise_limited_rate(trend: LossTrend, noise: float, share: float = GAIN_SHARE) -> float:
    """Return α = 4 κ (−t dL/dt)/tr(P⁻¹C), the rate whose noise is in balance with what the run gains.

    Steps w ← w − α P⁻¹(∇L + noise of covariance C) keep the loss above the minimum of its bowl by α tr(P⁻¹C)/4 (from
    the stationary state, P⁻¹HΣ + ΣHP⁻¹ = α P⁻¹CP⁻¹; Mandt, Hoffman and Blei 2017, arXiv 1704.04289). If the rest of the
    loss falls as (α t)⁻ᵖ, their sum is least where that noise is p times the rest, which is −t dL/dt. So the rate falls
    by itself as the run levels off. Where the loss has stopped falling, it is as if it fell by 2% of itself.

    Parameters
    ----------
    trend : LossTrend
    noise : float
        tr(P⁻¹C), C the covariance of the mean gradient.
    share : float
        κ.

    Returns
    -------
    float
        Infinite without noise.

    Examples
    --------
    >>> trend = LossTrend()
    >>> trend.add(1.0)  # a single loss has no slope: 2% of it
    >>> round(noise_limited_rate(trend, noise=0.28), 6)
    0.2
    """
    gain = max(trend.slope, LEAST_SLOPE * abs(trend.level))  # a loss may be negative, a rate may not
    return 4 * share * gain / noise if noise > 0 else float("inf")
