"""The poster's method as printed: the differences of the replicas' gradients as secants of the Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import device

from qnewton_mpi.arrays import Columns
from qnewton_mpi.core.exchange.cost import Traffic
from qnewton_mpi.core.inverse import InverseHessian
from qnewton_mpi.core.optimizers.base import Optimizer
from qnewton_mpi.core.optimizers.settings import Settings
from qnewton_mpi.core.optimizers.values import LossAndGradient, Step
from qnewton_mpi.core.settings import NOT_NEGATIVE, POSITIVE, one_of, setting
from qnewton_mpi.core.spread import SPREADS
from qnewton_mpi.core.state import Kind


@dataclass(frozen=True)
class MultisecantSettings(Settings):
    """Settings of `multisecant`."""

    lr: float = setting(0.1, "learning rate", POSITIVE)
    spread: str = setting("local-step", "how replicas are displaced", one_of(*SPREADS))
    spread_scale: float | None = setting(
        None, "η of local-step (default: the rate); standard deviation of random displacements (default 0.01)", POSITIVE
    )
    tolerance: float = setting(1e-4, "secants with σ ≤ tolerance · σ_max are dropped", NOT_NEGATIVE)
    tikhonov: float = setting(0.0, "Tikhonov damping of the secants, relative to σ_max²", NOT_NEGATIVE)


class Multisecant(Optimizer[MultisecantSettings]):
    """w̄ ← w̄ − α Ĥ⁻¹ḡ with Ĥ⁻¹z = z + (W − G) a, a = V Σ⁻² Vᵀ Gᵀz (Arnold and Wang 2017).

    W = [w_i − w̄] and G = [g_i − ḡ] are the centred parameters and gradients of the replicas, GᵀG = V Σ² Vᵀ. Where the
    replicas span nothing (one replica, or all equal) the step is SGD's.

    Examples
    --------
    Without noise, on the span of the displacements, the step of α = 1 is Newton's:

    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> settings = Multisecant.settings_type(lr=1.0, spread="random")
    >>> optimizer = Multisecant(settings, np.array([3.0]), AllgatherExchange(Communicator(), replicas=2, size=1))
    >>> figures = optimizer.step(lambda w, replica: (2 * float(w @ w), 4 * w))
    >>> abs(optimizer.parameters.round(6).tolist()[0])
    0.0
    """

    settings_type = MultisecantSettings
    state: ClassVar = {**Optimizer.state, "displacements": Kind.HELD}
    minimum_replicas = 2
    figure_names = (*Optimizer.figure_names, "spread_norm", "kept_rank", "condition")

    @classmethod
    def traffic(cls, settings: MultisecantSettings) -> Traffic:
        return Traffic(columns=1, means=0, rows=1)

    def start(self) -> None:
        self.spread = SPREADS[self.settings.spread](self.settings.spread_scale, self.draw)
        shape = self.exchange.replicas, *self.held.shape
        self.displacements = self.spread.start(self.xp.zeros(shape, dtype=self.held.dtype, device=device(self.held)))

    def propose(self, loss_and_gradient: LossAndGradient) -> Step:
        W, rate = self.displacements, self.chosen_rate()
        batch = self.evaluate(loss_and_gradient, self.exchange.rows(W))
        mean, G = self.exchange.centred(batch.rows)
        inverse = InverseHessian(self.exchange, W, G, self.settings.tolerance, self.settings.tikhonov)
        d = inverse.apply(mean[None, :])[0, :]
        self.displacements = self.spread.advance(self.steps, W, G, inverse, self.rate_factor * rate)
        figures = {
            "loss": batch.loss,
            "spread_norm": math.sqrt(self.exchange.dots((W, W))[0]),
            "kept_rank": inverse.rank,
            "condition": inverse.condition,
        }
        return Step(mean, d, rate, figures)

    def draw(self, step: int) -> Columns:
        """Return centred standard normal columns, (M, held), from the seed and the step alone."""
        columns = self.normal(step)
        return columns - self.xp.mean(columns, axis=0)
