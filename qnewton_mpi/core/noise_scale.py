"""How many samples a batch is worth: the noise of one sample's gradient in units of the signal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from qnewton_mpi.core.means import Mean, lasting
from qnewton_mpi.core.state import Kind

POWER = 4  # of t in the sum of the weights


class NoiseScale:
    """B = ⟨tr C₁⟩/⟨|∇L|²⟩, the simple noise scale (McCandlish et al. 2018, arXiv 1812.06162).

    C₁ is the covariance of one sample's gradient. The gradient of B samples is half noise: of far smaller batches
    nearly as many samples lead to a loss, of far larger ones nearly as many steps. M replicas of b samples tell both
    without bias,

        tr C₁ = b/(M−1) Σ_i ‖g_i − ḡ‖²,    |∇L|² = ‖ḡ‖² − tr C₁/(M b)

    but the second with so much noise that means are kept, of both and not of the ratio. Their weights grow as t³, as
    those of `LossTrend`: over the last quarter of the run so far, about. A method with an inverse P⁻¹ has tr P⁻¹C₁ and
    ∇Lᵀ P⁻¹ ∇L as well. Neither a constant added to the loss nor its unit changes B.

    Attributes
    ----------
    count : int
        Estimates that have been taken in.
    noise, signal : float
        ⟨tr C₁⟩ and ⟨|∇L|²⟩.
    value : float
        B in samples; infinite where no signal is seen above the noise, not a number where nothing is seen.

    Examples
    --------
    >>> scale = NoiseScale()
    >>> scale.value
    nan
    >>> scale.add(noise=10.0, signal=-0.1)  # by chance
    >>> scale.value
    inf
    >>> scale.add(noise=10.0, signal=0.4)
    >>> round(scale.value)
    33
    """

    state: ClassVar[Mapping[str, Kind]] = {}

    def __init__(self) -> None:
        self._noise, self._signal = Mean(lasting(1 / POWER)), Mean(lasting(1 / POWER))

    def parts(self) -> Mapping[str, Mean]:
        """Return both means."""
        return {"noise": self._noise, "signal": self._signal}

    def add(self, noise: float, signal: float) -> None:
        """Take in a step's estimates of tr C₁ and |∇L|². Local."""
        self._noise.add(noise)
        self._signal.add(signal)

    @property
    def count(self) -> int:
        return self._noise.count

    @property
    def noise(self) -> float:
        return self._noise.value

    @property
    def signal(self) -> float:
        return self._signal.value

    @property
    def value(self) -> float:
        if self.signal > 0:
            return max(0.0, self.noise) / self.signal
        return math.inf if self.noise > 0 else math.nan
