"""What the methods share that look at the Hessian: probes by the replicas, tracked Ritz pairs, a bound of the rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from qnewton_mpi.arrays import Held, Vector
from qnewton_mpi.core.exchange.cost import Traffic
from qnewton_mpi.core.optimizers.base import Optimizer
from qnewton_mpi.core.optimizers.settings import AUTO, Settings
from qnewton_mpi.core.optimizers.values import Batch, LossAndGradient
from qnewton_mpi.core.rate import noise_limited_rate
from qnewton_mpi.core.ritz import RitzPairs
from qnewton_mpi.core.settings import FRACTION, POSITIVE, setting

FIRST_PROBES = 6


@dataclass(frozen=True)
class ProbingSettings(Settings):
    """Settings that the methods share; each sets its own rate."""

    lr: float | str = setting(0.3, "learning rate", POSITIVE, AUTO)
    probe_every: int = setting(20, "steps between probes, each one gradient more a replica", POSITIVE)
    probe_scale: float = setting(0.05, "ρ, length of a probe's displacement", POSITIVE)
    smoothing: float = setting(0.7, "of the probes' Rayleigh quotients, per probe", FRACTION)


S = TypeVar("S", bound=ProbingSettings)


class Probing(Optimizer[S]):
    """Knows the leading eigenpairs of the Hessian by gradients at displaced parameters.

        replica i:  y_i = (∇f_i(w + ρ q_i) − ∇f_i(w))/ρ        every few steps, on the batch of the step's own gradient

    A gradient and its probe are of one batch, so that their difference is curvature and not sampling noise; the
    batches of the replicas differ, which the running mean of the Rayleigh quotients averages (`RitzPairs`).
    """

    ritz: RitzPairs  # where the method probes; from random directions at first
    always_probes: ClassVar[bool] = False
    gain_share: ClassVar[float] = 0.7  # κ of the rate "auto"
    curvature_factor: ClassVar[float] = 1.0  # times 1/|λ| is the largest rate "auto"

    @classmethod
    def traffic(cls, settings: S) -> Traffic:
        probes = (cls.always_probes or settings.lr == "auto") / settings.probe_every
        return Traffic(columns=probes, rows=probes)

    @property
    def probes(self) -> bool:
        """Whether the method probes at all."""
        return self.adaptive or self.always_probes

    def start(self) -> None:
        super().start()
        if self.probes:
            self.ritz = RitzPairs(self.exchange, self.normal(0), self.settings.smoothing)

    def parts(self) -> Mapping[str, Any]:
        return {**super().parts(), "ritz": self.ritz} if self.probes else super().parts()

    def probe_if_due(self, loss_and_gradient: LossAndGradient, batch: Batch) -> None:
        """Have each replica multiply its direction by the Hessian of its batch, every few steps from the first on.

        `batch` is of w; its rows are overwritten. Where the rate depends on it, the first directions,
        which are random, go through several power iterations at once: their curvature is far below the largest.
        """
        if (self.steps - 1) % self.settings.probe_every:
            return
        ritz, scale = self.ritz, self.settings.probe_scale
        base = self.xp.asarray(batch.rows, copy=True)
        for _ in range(FIRST_PROBES if self.steps == 1 and self.adaptive else 1):
            displaced = self.evaluate(loss_and_gradient, self.exchange.rows(scale * ritz.directions)).rows
            ritz.update(self.exchange.columns((displaced - base) / scale), first=self.steps == 1)

    def probed_rate(
        self,
        loss_and_gradient: LossAndGradient,
        batch: Batch,
        mean: Held,
        momentum: float = 0.0,
        choose: Callable[[Vector], float] = np.max,
    ) -> float:
        """Probe if it is due, then return min((1 − β) α_noise, c/|λ|), for a momentum β and the chosen |λ|.

        c is `curvature_factor`.
        """
        self.trend.add(batch.losses)
        noise = batch.noise(self.exchange.dots((mean, mean))[0])
        self.probe_if_due(loss_and_gradient, batch)
        bound = self.curvature_factor / self.curvature(choose)
        return min(noise_limited_rate(self.trend, noise / (1 - momentum), self.gain_share), bound)

    def curvature(self, choose: Callable[[Vector], float]) -> float:
        """Return one of the |λ| of the Ritz values, as `min` or `max`; not zero, so that it can be divided by."""
        return max(float(choose(np.abs(self.ritz.values))), float(np.finfo(np.float64).tiny))
