"""Momentum with the leading eigenpairs of the Hessian deflated: Newton steps along them, which the replicas track."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qnewton_mpi.core.kernels import combination
from qnewton_mpi.core.optimizers.base import Optimizer
from qnewton_mpi.core.optimizers.probing import Probing, ProbingSettings
from qnewton_mpi.core.optimizers.settings import AUTO
from qnewton_mpi.core.optimizers.values import LossAndGradient, Step
from qnewton_mpi.core.settings import FRACTION, POSITIVE, setting
from qnewton_mpi.core.state import Kind


@dataclass(frozen=True)
class DeflatedSettings(ProbingSettings):
    """Settings of `deflated`."""

    lr: float | str = setting(0.1, "learning rate", POSITIVE, AUTO)
    momentum: float = setting(0.9, "momentum β", FRACTION)
    newton_rate: float = setting(0.2, "rate of the Newton step along the Ritz vectors", POSITIVE)
    probe_every: int = setting(10, "steps between probes, each one gradient more a replica", POSITIVE)


class Deflated(Probing[DeflatedSettings]):
    """Nesterov's momentum with the M leading eigenpairs (λ_k, r_k) of the Hessian taken out of it.

        z = ḡ + β v,   v ← β v + ḡ
        d = z^⊥ + Σ_k min(1, α_N/(α |λ_k|)) r_k r_kᵀz,   w ← w − α d

    with the Ritz pairs that the replicas track by probes. So w moves by α_N/|λ_k| along r_k: Newton's step where
    λ_k > 0, and away from the saddle where λ_k < 0 (Dauphin et al. 2014, arXiv 1406.2572). The rate "auto" is as for
    `momentum`, but that only curvature which is not deflated bounds it: 1/|λ| of the smallest Ritz value.

    Examples
    --------
    The rate is far above the 2/100 at which descent along the first coordinate would diverge:

    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> curvatures = np.array([100.0, 1.0, 1.0])
    >>> exchange = AllgatherExchange(Communicator(), replicas=2, size=3)
    >>> optimizer = Deflated(Deflated.settings_type(lr=0.1, probe_every=2), np.ones(3), exchange)
    >>> def loss_and_gradient(w, replica):
    ...     return float(w @ (curvatures * w)) / 2, curvatures * w
    >>> figures = [optimizer.step(loss_and_gradient) for _ in range(100)]
    >>> round(figures[-1]["largest_eigenvalue"], 1), figures[-1]["loss"] < 1e-3
    (100.0, True)
    """

    settings_type = DeflatedSettings
    always_probes = True
    state: ClassVar = {**Probing.state, "velocity": Kind.HELD}
    figure_names = (*Optimizer.figure_names, "largest_eigenvalue", "smallest_eigenvalue", "residual")

    def start(self) -> None:
        super().start()
        self.velocity = self.xp.zeros_like(self.held)
        self.spare = self.xp.empty_like(self.held)  # for the next one: a step that raises must find this one

    def propose(self, loss_and_gradient: LossAndGradient) -> Step:
        batch = self.evaluate(loss_and_gradient)
        mean = self.exchange.mean(batch.rows)
        beta = self.settings.momentum
        if self.adaptive:
            rate = self.probed_rate(loss_and_gradient, batch, mean, beta, np.min)
        else:
            rate = self.chosen_rate()
            self.probe_if_due(loss_and_gradient, batch)

        self.velocity, self.spare = combination(beta, self.velocity, 1.0, mean, out=self.spare), self.velocity
        z = combination(1.0, mean, beta, self.velocity)
        ritz = self.ritz
        values = ritz.values
        along = rate * np.abs(values)
        d = ritz.apply(self.settings.newton_rate / np.maximum(along, self.settings.newton_rate), z)
        figures = {
            "loss": batch.loss,
            "largest_eigenvalue": float(values[-1]),
            "smallest_eigenvalue": float(values[0]),
            "residual": float(ritz.residuals[-1]),
        }
        return Step(mean, d, rate, figures, batch=batch)
