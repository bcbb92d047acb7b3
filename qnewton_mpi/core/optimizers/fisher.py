"""The default method: the differences of the replicas' gradients as a running low-rank Fisher matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qnewton_mpi.core.optimizers.base import Figures, LossAndGradient, Optimizer, Settings
from qnewton_mpi.core.secants import leading_eigenpairs
from qnewton_mpi.core.settings import FRACTION, POSITIVE, setting
from qnewton_mpi.parallel.device import Array, to_device


@dataclass(frozen=True)
class FisherSettings(Settings):
    """Settings of `fisher`."""

    lr: float = setting(0.1, "learning rate", POSITIVE)
    rank: int = setting(64, "directions of the Fisher matrix that are kept", POSITIVE)
    decay: float = setting(0.98, "of the running Fisher matrix, per update", FRACTION)
    damping: float = setting(0.1, "ε of (F + ε I)⁻¹", POSITIVE)
    momentum: float = setting(0.9, "momentum β", FRACTION)
    max_divergence: float = setting(0.01, "bound of a step's predicted KL divergence (nats)", POSITIVE)
    update_every: int = setting(4, "steps between updates of F, once its rank is reached", POSITIVE)


class Fisher(Optimizer[FisherSettings]):
    """w ← w − α (F + ε I)⁻¹ z, with F ≈ Lᵀ L from the replicas and z Nesterov's momentum of the mean gradient.

    All replicas stand at the same w, so G = [g_i − ḡ] is sampling noise, and its covariance is the Fisher matrix:

        F ← (1 − γ) F + γ b/(M−1) G Gᵀ         b samples a replica; γ = (1 − β)/(1 − βᵗ) at the t-th update
        F ≈ Σ_k λ_k u_k u_kᵀ                   the leading eigenpairs, from the Gram matrix of L's rows and G
        (F + ε I)⁻¹ z = (z − Σ_k λ_k/(λ_k + ε) u_k u_kᵀ z)/ε

    L (rank × held) has the rows √λ_k u_k. The bulk, outside the span, moves at the rate α/ε. Where the replicas'
    gradients are all equal, F = 0 and the step is that of gradient descent at this rate.

    A step d of rate α changes the model's distribution by a KL divergence of about α²/2 dᵀ(F + ε I)d = α²/2 dᵀz, which
    is bounded: d is shrunk to it. This matters in the first steps, before F has seen the large directions, and keeps a
    rate too large from diverging (as in K-FAC: Ba, Grosse and Martens 2017).

    See docs/method.md for where this comes from; kin are TONGA (Le Roux et al. 2007) and GGT (Agarwal et al. 2019).
    """

    settings_type = FisherSettings
    minimum_replicas = 2
    figures = (*Optimizer.figures, "shrink", "kept_rank", "largest_eigenvalue", "smallest_eigenvalue")

    def start(self) -> None:
        self.moment = self.xp.zeros_like(self.held)
        self.factor = self.xp.zeros((0, *self.held.shape), dtype=self.held.dtype)
        self.eigenvalues = np.zeros(0)  # λ, on the host, descending
        self.updates = 0

    def direction(self, loss_and_gradient: LossAndGradient) -> tuple[Array, Array, Figures]:
        gradients, loss = self.evaluate(loss_and_gradient)
        full = len(self.eigenvalues) == self.settings.rank
        if not full or self.steps % self.settings.update_every == 0:
            mean, G = self.exchange.centred(gradients)
            self.update_factor(G)
        else:
            mean = self.exchange.mean(gradients)

        beta, t = self.settings.momentum, self.steps
        self.moment = beta * self.moment + (1 - beta) * mean
        z = (beta * self.moment + (1 - beta) * mean) / (1 - beta ** (t + 1))
        d = self.apply_inverse(z)
        divergence = self.rate**2 / 2 * self.exchange.dots((d, z))[0]
        shrink = min(1.0, math.sqrt(self.settings.max_divergence / divergence)) if divergence > 0 else 1.0
        d = shrink * d

        values = self.eigenvalues
        kept = len(values)
        figures = {
            "loss": loss,
            "shrink": shrink,
            "kept_rank": kept,
            "largest_eigenvalue": float(values[0]) if kept else math.nan,
            "smallest_eigenvalue": float(values[-1]) if kept else math.nan,
        }
        return mean, d, figures

    def update_factor(self, G: Array) -> None:
        """Take the replicas' centred gradients G, (M, held), into F; keep its leading eigenpairs. Collective."""
        self.updates += 1
        weight = (1 - self.settings.decay) / (1 - self.settings.decay**self.updates)
        G = math.sqrt(weight * self.samples / (self.exchange.replicas - 1)) * G
        columns = self.xp.concat([math.sqrt(1 - weight) * self.factor, G])
        kept, n = len(self.eigenvalues), columns.shape[0]
        S = np.zeros((n, n))
        # The kept rows are eigenvectors, orthogonal to rounding: their block of the Gram matrix is known.
        S[:kept, :kept] = np.diag((1 - weight) * self.eigenvalues)
        S[kept:] = self.exchange.gram(G, columns)
        S[:kept, kept:] = S[kept:, :kept].T
        values, vectors = leading_eigenpairs(S, self.settings.rank)
        values = values[values > n * float(self.xp.finfo(G.dtype).eps) * values[0]]
        self.eigenvalues = values
        self.factor = to_device(vectors[:, : len(values)].T, G) @ columns

    def apply_inverse(self, z: Array) -> Array:
        """Return (F + ε I)⁻¹ z for a held vector. Collective."""
        damping = self.settings.damping
        projections = self.exchange.gram(self.factor, z[None, :])[:, 0]
        coefficients = to_device(projections / (self.eigenvalues + damping), z)
        return (z - coefficients @ self.factor) / damping
