"""The momentum of the gradients, and how much of a step along it is noise."""

from __future__ import annotations

from typing import ClassVar

from array_api_compat import array_namespace

from qnewton_mpi.arrays import Held
from qnewton_mpi.core.kernels import combination
from qnewton_mpi.core.means import Mean, constant
from qnewton_mpi.core.state import Kind

NOISE_WEIGHT = 0.1  # of a step in the running share of noise
LEAST_NOISE = 0.03  # ν, as far as it can be told from zero: it is a mean over some ten steps


class Momentum:
    """z = Σ_k a_k ḡ_{t−k}, Σ_k a_k = 1: Nesterov's momentum, unbiased. Off: β = 0.

    m ← β m + (1 − β) ḡ,    z = (β m + (1 − β) ḡ)/(1 − βᵗ⁺¹)
    """

    state: ClassVar = {"mean": Kind.HELD}

    def __init__(self, beta: float, like: Held) -> None:
        xp = array_namespace(like)
        self.beta, self.mean, self.spare = beta, xp.zeros_like(like), xp.empty_like(like)

    def add(self, g: Held, step: int) -> Held:
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
        >>> import numpy as np
        >>> [round(Momentum(0.9, np.zeros(1)).noise(step), 3) for step in (1, 2, 1000)]  # soon a 14th
        [1.0, 0.581, 0.071]
        """
        beta = self.beta
        past = beta**4 * (1 - beta ** (2 * (step - 1))) / (1 - beta**2)
        return ((1 - beta) / (1 - beta ** (step + 1))) ** 2 * ((1 + beta) ** 2 + past)


class NoiseShare(Mean):
    """ν, the share of noise in dᵀz, a running mean: 0 where a step is signal alone, 1 where it is noise alone.

    It starts from 0: a run is taken for signal until it is known to be noise.

    Attributes
    ----------
    value : float
        With that start: φ of `kronecker`, and the figure `noise_share`.
    least : float
        The same, but no less than can be told from zero: the bound by noise.
    unbiased : float
        The mean of what has been seen: the bounds by curvature and by the relative change.
    """

    def __init__(self) -> None:
        super().__init__(constant(NOISE_WEIGHT))

    @property
    def least(self) -> float:
        """ν, and no less than can be told from zero."""
        return max(self.value, LEAST_NOISE)

    def take(self, noise: float, dz: float) -> None:
        """Take in a step's dᵀz, and the part of it that is expected of noise. Local."""
        # dᵀz far below the noise: there is none, as where the batch is all there is. Then nearer to 0 again.
        self.add(min(noise / dz, dz / noise) if dz > 0 and noise > 0 else 0.0)
