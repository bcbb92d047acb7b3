"""Momentum with the leading eigenpairs of the Hessian deflated: Newton steps along them, which the replicas track."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qnewton_mpi.core.optimizers.base import Figures, LossAndGradient, Optimizer, Settings
from qnewton_mpi.core.ritz import RitzPairs
from qnewton_mpi.core.settings import FRACTION, POSITIVE, setting
from qnewton_mpi.parallel.device import Array


@dataclass(frozen=True)
class DeflatedSettings(Settings):
    """Settings of `deflated`."""

    lr: float = setting(0.1, "learning rate", POSITIVE)
    momentum: float = setting(0.9, "momentum β", FRACTION)
    newton_rate: float = setting(0.2, "rate of the Newton step along the Ritz vectors", POSITIVE)
    probe_every: int = setting(10, "steps between probes, each one gradient more a replica", POSITIVE)
    probe_scale: float = setting(0.05, "ρ, length of a probe's displacement", POSITIVE)
    smoothing: float = setting(0.7, "of the Rayleigh quotients, per probe", FRACTION)


class Deflated(Optimizer[DeflatedSettings]):
    """Nesterov's momentum with the M leading eigenpairs (λ_k, r_k) of the Hessian taken out of it.

        replica i:  y_i = (∇f_i(w + ρ q_i) − ∇f_i(w))/ρ        every few steps, on the batch of the step's own gradient
        (λ_k, r_k): Ritz pairs of H from the directions q_i and the products y_i
        z = ḡ + β v,   v ← β v + ḡ
        d = z^⊥ + Σ_k min(1, α_N/(α |λ_k|)) r_k r_kᵀz,   w ← w − α d

    So w moves by α_N/|λ_k| along r_k: Newton's step where λ_k > 0, and away from the saddle where λ_k < 0 (Dauphin et
    al. 2014, arXiv 1406.2572). A gradient and its probe are of one batch, so that their difference is curvature and not
    sampling noise; the replicas' batches differ, which the running mean of the Rayleigh quotients averages.
    """

    settings_type = DeflatedSettings
    figures = (*Optimizer.figures, "largest_eigenvalue", "smallest_eigenvalue", "residual")

    def start(self) -> None:
        self.velocity = self.xp.zeros_like(self.held)
        self.ritz = RitzPairs(self.exchange, self.normal(0), self.settings.smoothing)

    def direction(self, loss_and_gradient: LossAndGradient) -> tuple[Array, Array, Figures]:
        s = self.settings
        gradients, loss = self.evaluate(loss_and_gradient)
        mean = self.exchange.mean(gradients)
        if (self.steps - 1) % s.probe_every == 0:
            self.probe(loss_and_gradient)

        self.velocity = s.momentum * self.velocity + mean
        z = mean + s.momentum * self.velocity
        values, tiny = self.ritz.values, np.finfo(np.float64).tiny
        d = self.ritz.apply(np.minimum(1.0, s.newton_rate / (self.rate * np.maximum(np.abs(values), tiny))), z)
        figures = {
            "largest_eigenvalue": float(values[-1]),
            "smallest_eigenvalue": float(values[0]),
            "residual": float(self.ritz.residuals[-1]),
        }
        return mean, d, {"loss": loss, **figures}

    def probe(self, loss_and_gradient: LossAndGradient) -> None:
        """Have each replica multiply its direction by the Hessian of its batch."""
        scale = self.settings.probe_scale
        base = self.xp.asarray(self.gradients, copy=True)
        displaced, _ = self.evaluate(loss_and_gradient, self.exchange.rows(scale * self.ritz.directions))
        self.ritz.update(self.exchange.columns((displaced - base) / scale))
