"""First-order methods on the mean gradient: the baselines, and what is left of the others when replicas agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qnewton_mpi.core.kernels import combination
from qnewton_mpi.core.optimizers.base import Optimizer
from qnewton_mpi.core.optimizers.probing import Probing, ProbingSettings
from qnewton_mpi.core.optimizers.settings import AUTO, Settings
from qnewton_mpi.core.optimizers.values import LossAndGradient, Step
from qnewton_mpi.core.settings import FRACTION, POSITIVE, setting
from qnewton_mpi.core.state import Kind


class SGDSettings(ProbingSettings):
    """Settings of `sgd`."""


class SGD(Probing[SGDSettings]):
    """Synchronous stochastic gradient descent: w ← w − α ḡ.

    The rate "auto" is that of `noise_limited_rate` with κ = 0.2, at most 1.8/λ_max, with λ_max from probes as in LeCun,
    Simard and Pearlmutter (1993). Only then are there any. Their 1/λ_max is best on a quadratic, where steps diverge
    beyond 2/λ_max. But a network's λ_max rises until that is the rate (Cohen et al. 2021, arXiv 2103.00065): a bound
    far below follows it down.

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> exchange = AllgatherExchange(Communicator(), replicas=2, size=1)
    >>> optimizer = SGD(SGD.settings_type(lr=0.5), np.array([1.0]), exchange)
    >>> figures = optimizer.step(lambda w, replica: (float(w @ w) / 2, w + replica))  # gradients 1 and 2
    >>> figures["loss"], optimizer.parameters.tolist()
    (0.5, [0.25])
    """

    settings_type = SGDSettings
    gain_share = 0.2  # less than where steps are preconditioned: near 2/λ noise along λ counts 1/(1 − αλ/2) times
    curvature_factor = 1.8

    def propose(self, loss_and_gradient: LossAndGradient) -> Step:
        batch = self.evaluate(loss_and_gradient)
        mean = self.exchange.mean(batch.rows)
        rate = self.probed_rate(loss_and_gradient, batch, mean) if self.adaptive else self.chosen_rate()
        return Step(mean, mean, rate, {"loss": batch.loss}, batch=batch)


@dataclass(frozen=True)
class MomentumSettings(ProbingSettings):
    """Settings of `momentum`."""

    lr: float | str = setting(0.05, "learning rate", POSITIVE, AUTO)
    momentum: float = setting(0.9, "momentum β", FRACTION)
    nesterov: bool = setting(False, "Nesterov's momentum")


class Momentum(Probing[MomentumSettings]):
    """Heavy-ball momentum, v ← β v + ḡ, w ← w − α v; with `nesterov`, w ← w − α (ḡ + β v). As in PyTorch's SGD.

    The rate "auto" is that of `noise_limited_rate` with κ = 0.35 and the noise of α/(1 − β), at which the sum of steps
    moves, at most 1/λ_max.

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> exchange = AllgatherExchange(Communicator(), replicas=1, size=1)
    >>> optimizer = Momentum(Momentum.settings_type(lr=0.1, momentum=0.5), np.array([0.0]), exchange)
    >>> steps = [optimizer.step(lambda w, _: (float(w[0]), np.ones(1))) for _ in range(3)]  # down a slope of 1
    >>> [round(figures["step_norm"], 3) for figures in steps]
    [0.1, 0.15, 0.175]
    """

    settings_type = MomentumSettings
    gain_share = 0.35
    state: ClassVar = {**Probing.state, "velocity": Kind.HELD}

    def start(self) -> None:
        super().start()
        self.velocity = self.xp.zeros_like(self.held)
        self.spare = self.xp.empty_like(self.held)  # for the next one: a step that raises must find this one

    def propose(self, loss_and_gradient: LossAndGradient) -> Step:
        batch = self.evaluate(loss_and_gradient)
        mean = self.exchange.mean(batch.rows)
        beta = self.settings.momentum
        rate = self.probed_rate(loss_and_gradient, batch, mean, beta) if self.adaptive else self.chosen_rate()
        self.velocity, self.spare = combination(beta, self.velocity, 1.0, mean, out=self.spare), self.velocity
        d = combination(1.0, mean, beta, self.velocity) if self.settings.nesterov else self.velocity
        return Step(mean, d, rate, {"loss": batch.loss}, batch=batch)


@dataclass(frozen=True)
class AdamSettings(Settings):
    """Settings of `adam`."""

    lr: float = setting(0.003, "learning rate", POSITIVE)
    beta1: float = setting(0.9, "decay of the first moment", FRACTION)
    beta2: float = setting(0.999, "decay of the second moment", FRACTION)
    epsilon: float = setting(1e-8, "added to the root of the second moment", POSITIVE)
    momentum_decay: float = setting(0.004, "of NAdam's momentum schedule", POSITIVE)
    nesterov: bool = setting(False, "NAdam")


class Adam(Optimizer[AdamSettings]):
    """Adam (Kingma and Ba 2015); with `nesterov`, NAdam (Dozat 2016), momentum schedule included, as in PyTorch.

        m ← β₁ m + (1 − β₁) ḡ,   v ← β₂ v + (1 − β₂) ḡ²                 elementwise
        w ← w − α [m/(1 − β₁ᵗ)]/[√(v/(1 − β₂ᵗ)) + ε]

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> exchange = AllgatherExchange(Communicator(), replicas=1, size=2)
    >>> optimizer = Adam(Adam.settings_type(lr=0.1), np.zeros(2), exchange)
    >>> figures = optimizer.step(lambda w, _: (0.0, np.array([100.0, -0.01])))
    >>> optimizer.parameters.round(6).tolist()  # whatever the gradient's size
    [-0.1, 0.1]
    """

    settings_type = AdamSettings
    state: ClassVar = {**Optimizer.state, "first": Kind.HELD, "second": Kind.HELD, "product": Kind.SHARED}

    def start(self) -> None:
        self.first = self.xp.zeros_like(self.held)
        self.second = self.xp.zeros_like(self.held)
        self.spares = self.xp.empty_like(self.held), self.xp.empty_like(self.held)  # for the next ones
        self.product = 1.0  # of NAdam's momenta so far

    def propose(self, loss_and_gradient: LossAndGradient) -> Step:
        batch = self.evaluate(loss_and_gradient)
        mean = self.exchange.mean(batch.rows)
        settings, t = self.settings, self.steps
        first, second = self.spares
        self.spares = self.first, self.second
        self.first = combination(settings.beta1, self.first, 1 - settings.beta1, mean, out=first)
        self.second = combination(settings.beta2, self.second, 1 - settings.beta2, mean * mean, out=second)
        scale = (self.second / (1 - settings.beta2**t)) ** 0.5 + settings.epsilon
        if settings.nesterov:
            now, coming = (settings.beta1 * (1 - 0.5 * 0.96 ** (k * settings.momentum_decay)) for k in (t, t + 1))
            self.product *= now
            moment = coming / (1 - self.product * coming) * self.first + (1 - now) / (1 - self.product) * mean
        else:
            moment = self.first / (1 - settings.beta1**t)
        return Step(mean, moment / scale, self.chosen_rate(), {"loss": batch.loss}, batch=batch)
