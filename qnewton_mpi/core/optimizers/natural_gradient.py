"""What `fisher` and `kronecker` share: momentum, the preconditioned step, and the bound on its KL divergence."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from qnewton_mpi.core.kernels import combination
from qnewton_mpi.core.optimizers.base import AUTO, Batch, Figures, LossAndGradient, Optimizer, Settings, Step
from qnewton_mpi.core.settings import FRACTION, POSITIVE, setting
from qnewton_mpi.core.state import Kind
from qnewton_mpi.parallel.device import Array

BATCH = 256
# The replicas' covariance may be this many times what F makes expect before the gradient counts as an outlier.
OUTLIER = 10.0
# A step may be this many times as long as those before it, by a running mean of their squares with this weight.
LONGEST = 3.0
STEP_WEIGHT = 0.02
NOISE_WEIGHT = 0.1  # of a step in the running share of noise
DIVERGENCE_HELP = f"bound of a step's predicted KL divergence (nats) at a batch of {BATCH}; it grows as √batch"


@dataclass(frozen=True)
class NaturalGradientSettings(Settings):
    """Settings that the methods share, of which each sets some anew."""

    lr: float | str = setting(0.1, "learning rate", POSITIVE, AUTO)
    damping: float = setting(0.1, "ε of (F + ε I)⁻¹", POSITIVE)
    momentum: float = setting(0.9, "momentum β", FRACTION)
    decay: float = setting(0.98, "of the running Fisher matrix, per update", FRACTION)
    max_divergence: float = setting(0.01, DIVERGENCE_HELP, POSITIVE)
    update_every: int = setting(4, "steps between updates of F, but for the first ones", POSITIVE)


S = TypeVar("S", bound=NaturalGradientSettings)


class NaturalGradient(Optimizer[S]):
    """w ← w − α (F + ε I)⁻¹ z, F the Fisher matrix from the replicas and z Nesterov's momentum of the mean gradient.

    All replicas stand at the same w, so G = [g_i − ḡ] is sampling noise, and its covariance is the Fisher matrix of the
    log-likelihood: b/(M−1) G Gᵀ with b samples a replica. How its running mean is held is up to the method.

    A step d of rate α changes the model's distribution by a KL divergence of about α²/2 dᵀ(F + ε I)d = α²/2 dᵀz, which
    is bounded: α is shrunk to it. This matters in the first steps, before F has seen the large directions, and keeps a
    rate too large from diverging (as in K-FAC: Ba, Grosse and Martens 2017). Nor is a step more than three times as
    long as those before it.
    """

    minimum_replicas = 2
    state: ClassVar[Mapping[str, Kind]] = {
        **Optimizer.state,
        "moment": Kind.HELD,
        "updates": Kind.SHARED,
        "trace": Kind.SHARED,
        "known": Kind.SHARED,
        "square_step": Kind.SHARED,
        "noise_share": Kind.SHARED,
    }

    def start(self) -> None:
        self.moment = self.xp.zeros_like(self.held)
        self.spare = self.xp.empty_like(self.held)  # for the next one: a step that raises must find this one
        self.updates = 0
        self.trace = 0.0  # of F
        self.known = 0.0  # tr((F + ε I)⁻¹F), as of the last update: the noise of one sample
        self.square_step = 0.0  # ‖Δw‖², running mean
        self.noise_share = 0.0  # ν, of dᵀz, running mean

    def propose(self, loss_and_gradient: LossAndGradient) -> Step:
        batch = self.evaluate(loss_and_gradient)
        self.trend.add(batch.loss)
        if self.update_is_due():
            self.updates += 1
            mean = self.update(batch.rows)
        else:
            mean = self.exchange.mean(batch.rows)

        gg = self.exchange.dots((mean, mean))[0]
        beta, t, clip = self.settings.momentum, self.steps, self.clip(batch, gg)
        g = clip * mean if clip < 1 else mean
        self.moment, self.spare = combination(beta, self.moment, 1 - beta, g, out=self.spare), self.moment
        unbiased = 1 / (1 - beta ** (t + 1))
        z = combination(beta * unbiased, self.moment, (1 - beta) * unbiased, g)
        d = self.apply_inverse(z)
        dz, dd, gd = self.exchange.dots((d, z), (d, d), (mean, d))
        noise = self.known / self.batch * momentum_noise(beta, t)
        # dᵀz far below the noise: there is none, as where the batch is all there is. Then nearer to 0 again.
        share = min(noise / dz, dz / noise) if dz > 0 and noise > 0 else 0.0
        self.noise_share += NOISE_WEIGHT * (share - self.noise_share)
        wanted = self.auto_rate(self.known / self.batch) if self.adaptive else self.chosen_rate()
        rate = min(wanted, self.bound(dz, dd))
        self.square_step += max(1 / self.steps, STEP_WEIGHT) * (rate**2 * dd - self.square_step)
        figures = {
            "loss": batch.loss,
            "damping": self.damping,
            "clip": clip,
            "shrink": rate / wanted if wanted else 1.0,
            "noise_share": self.noise_share,
            **self.spectrum(),
        }
        return Step(mean, d, rate, figures, (gg, dd, gd))

    def bound(self, dz: float, dd: float) -> float:
        """Return the largest rate of a step: of KL divergence δ, and three times as long as those before. Local.

        The second is for where nearly all samples are learnt. What one that is not asks for is then off F's span, where
        δ allows steps hundreds of times as long as usual.
        """
        bound = math.sqrt(2 * self.divergence / dz) if dz > 0 else 0.0
        if self.square_step > 0 and dd > 0:
            bound = min(bound, LONGEST * math.sqrt(self.square_step / dd))
        return bound

    def clip(self, batch: Batch, gg: float) -> float:
        """Return the factor of an outlier among the gradients, 1 for others: min(1, √(10 tr F/tr F̂)), F̂ of this step.

        F is a mean over the past. Where nearly all samples are learnt, it is far below the gradient of a batch with one
        that is not, and a step along that would be as much too long, and those of the momentum after it. Local.
        """
        noise = batch.noise(gg)
        rounding = 100 * float(self.xp.finfo(self.held.dtype).eps) * batch.square
        if self.trace == 0 or noise <= rounding:
            return 1.0
        return min(1.0, math.sqrt(OUTLIER * self.trace / (self.batch * noise)))

    @property
    def damping(self) -> float:
        """ε of this step."""
        return self.settings.damping

    @property
    def divergence(self) -> float:
        """δ, the bound of this step's predicted KL divergence in nats."""
        return self.settings.max_divergence * math.sqrt(self.batch / BATCH)

    @property
    def batch(self) -> int:
        """Samples a step."""
        return self.samples * self.exchange.replicas

    @property
    def weight(self) -> float:
        """γ = (1 − β)/(1 − βᵗ) of the t-th update, F ← (1 − γ) F + γ new: unbiased from the first on."""
        return (1 - self.settings.decay) / (1 - self.settings.decay**self.updates)

    @property
    def scale(self) -> float:
        """√(b/(M−1)), by which centred gradients are multiplied so that their Gram or outer products add up to F."""
        return math.sqrt(self.samples / (self.exchange.replicas - 1))

    @abstractmethod
    def update_is_due(self) -> bool:
        """Tell whether this step updates F."""

    @abstractmethod
    def update(self, gradients: Array) -> Array:
        """Take this rank's gradients, (R, N), into F, set `trace` and `known`; return ḡ, (held,). Collective."""

    @abstractmethod
    def apply_inverse(self, z: Array) -> Array:
        """Return (F + ε I)⁻¹ z for a held vector. Collective."""

    @abstractmethod
    def spectrum(self) -> Figures:
        """Return the figures of F."""


def momentum_noise(beta: float, steps: int) -> float:
    """Return the noise of z as a multiple of the noise of one ḡ: Σ_k a_k² for z = Σ_k a_k ḡ_{t−k}, t ≥ 1. Local.

    With m = (1 − β) Σ_k βᵏ ḡ_{t−k}, a_k is (1 − β)/(1 − βᵗ⁺¹) times 1 + β for k = 0 and βᵏ⁺¹ for k = 1 … t − 1.

    Examples
    --------
    >>> [round(momentum_noise(0.9, steps), 3) for steps in (1, 2, 1000)]  # soon a 14th
    [1.0, 0.581, 0.071]
    """
    past = beta**4 * (1 - beta ** (2 * (steps - 1))) / (1 - beta**2)
    return ((1 - beta) / (1 - beta ** (steps + 1))) ** 2 * ((1 + beta) ** 2 + past)
