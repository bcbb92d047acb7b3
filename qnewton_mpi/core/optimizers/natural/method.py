"""What `fisher` and `kronecker` share: momentum, the preconditioned step, and how long it may be."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from qnewton_mpi.arrays import Held
from qnewton_mpi.core.layers import layer_shapes
from qnewton_mpi.core.means import lasting
from qnewton_mpi.core.noise_scale import NoiseScale
from qnewton_mpi.core.optimizers.base import Optimizer
from qnewton_mpi.core.optimizers.groups import shared_out
from qnewton_mpi.core.optimizers.natural.bounds import BOUNDS, Curvature, Shortening
from qnewton_mpi.core.optimizers.natural.measurements import Line, Measurements
from qnewton_mpi.core.optimizers.natural.momentum import Momentum, NoiseShare
from qnewton_mpi.core.optimizers.natural.settings import NaturalGradientSettings, bound_of
from qnewton_mpi.core.optimizers.natural.successive import SuccessiveGradients
from qnewton_mpi.core.optimizers.natural.values import NaturalStep, Update
from qnewton_mpi.core.optimizers.values import Batch, Figures, LossAndGradient, Step
from qnewton_mpi.core.rate import noise_limited_rate
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import UserError

# Steps between measurements of χ: they cost 3 and 4% of the gradients, a loss alone being a third of one.
LOSSES_EVERY, GRADIENTS_EVERY = 10, 25
OUTLIER = 100.0  # times tr F is as large as the noise of a gradient may be
FIGURES = ("noise_scale_preconditioned", "shrink", "noise_share", "curvature", "limit")

S = TypeVar("S", bound=NaturalGradientSettings)


class NaturalGradient(Optimizer[S]):
    """w ← w − α P⁻¹ z, P the replicas' Fisher matrix F, damped, and z Nesterov's momentum of the mean gradient.

    All replicas stand at the same w, so G = [g_i − ḡ] is sampling noise, and its covariance is the Fisher matrix of the
    log-likelihood: b/(M−1) G Gᵀ with b samples a replica. How its running mean is held is up to the method.

        ḡ, F     the replicas' mean gradient, and F ← (1 − γ) F + γ b/(M−1) G Gᵀ every few steps
        z        momentum of ḡ, shortened where it is an outlier
        d        P⁻¹ z
        ν        the share of noise in dᵀz, a running mean (`NoiseShare` says which bound takes it how)
        ς        the share of ḡᵀd in dᵀz, of this step, from 0 to 1
        χ        2 |f_B(w − α d) − f_B(w) + α ḡᵀd|/(α² dᵀz), a running mean, measured every few steps
        α        the least of   4 κ max(−t dL/dt, its standard error)/(ν tr P⁻¹C)       what noise allows
                                (ς + ν)/χ, times the setting `curvature`                what curvature allows
                                η max(1, 5/√t)/√(ν mean_l (‖d_l‖/‖w_l‖)²)               what the noise may change
        w        w − α d, and the weight decay of `Settings`

    Nothing of it changes where a constant is added to the loss, or the loss multiplied by one. The bounds but the first
    are in the table `BOUNDS`.
    """

    minimum_replicas = 2
    state: ClassVar[Mapping[str, Kind]] = {
        **Optimizer.state,
        "updates": Kind.SHARED,
        "trace": Kind.SHARED,
        "known": Kind.SHARED,
    }

    figure_names = (*Optimizer.figure_names, *FIGURES)

    def start(self) -> None:
        settings, bounds = self.settings, (*BOUNDS, "gain_share")
        if self.adaptive and not any(getattr(settings, name) for name in bounds):
            raise UserError(f"the rate auto has no bound: let one of {', '.join(bounds)} be more than 0")
        layers = layer_shapes(self.shapes)
        self.momentum = Momentum(settings.momentum, self.held)
        self.noise_share = NoiseShare()
        self.noise_scale_preconditioned = NoiseScale()
        self.bounds = {name: bound(getattr(settings, name), layers, self.held) for name, bound in BOUNDS.items()}
        curvature = self.bounds["curvature"]
        assert isinstance(curvature, Curvature)
        self.curvature, self.measurements, self.shortening = curvature, Measurements(curvature), Shortening()
        self.successive = SuccessiveGradients(self.held)
        self.updates, self.trace = 0, 0.0  # of F: how many, tr F
        self.known = 0.0  # tr P⁻¹F, as of the last update: the noise of one sample

    def parts(self) -> Mapping[str, Any]:
        own = {
            "momentum": self.momentum,
            "noise_share": self.noise_share,
            "noise_scale_preconditioned": self.noise_scale_preconditioned,
            "measurements": self.measurements,
            "successive": self.successive,
            "shortening": self.shortening,
        }
        return {**super().parts(), **own, **self.bounds}

    @property
    def repeats(self) -> bool:
        """Whether the losses of a batch can be had again, at other parameters."""
        return self.measurements.repeats

    @property
    def noise_scales(self) -> Figures:
        return {**super().noise_scales, "noise_scale_preconditioned": self.noise_scale_preconditioned.value}

    def propose(self, loss_and_gradient: LossAndGradient) -> NaturalStep:
        t, batch, due = self.steps, self.evaluate(loss_and_gradient), self.update_is_due()
        self.trend.add(batch.losses)
        self.measurements.see(batch)

        mean = self.learn(batch) if due else self.exchange.mean(batch.rows)  # ḡ, F
        z = self.momentum.add(self.clipped(batch, mean), t)
        d = self.apply_inverse(z, self.momentum.noise(t) / self.batch if due else None)
        (gg, dz, dd, gd), sizes = self.products(mean, z, d)
        self.noise_share.take(self.known / self.batch * self.momentum.noise(t), dz)
        noise = self.noise_share.unbiased  # ν
        signal = min(1.0, max(0.0, gd / dz)) if dz > 0 else 1.0  # ς
        rate = self.noise_limited() if self.adaptive else self.chosen_rate()
        return NaturalStep(
            mean,
            d,
            rate,
            {"loss": batch.loss, "noise_share": self.noise_share.value, **self.fisher_figures()},
            norms=(gg, dd, gd),
            batch=batch,
            number=t,
            z=z,
            dz=dz,
            sizes=sizes,
            noise=noise,
            reach=signal + noise,
            measurable=self.repeats,
        )

    def learn(self, batch: Batch) -> Held:
        """Take the gradients into F; return ḡ, (held,). Collective."""
        self.updates += 1
        mean, self.trace, self.known, seen = self.update(batch, self.noise_share.value)
        if seen:
            noise, square = seen
            self.noise_scale_preconditioned.add(noise, square - noise / self.batch)
        return mean

    def products(self, mean: Held, z: Held, d: Held) -> tuple[list[float], dict[str, float]]:
        """Return ḡᵀḡ, dᵀz, dᵀd and ḡᵀd, and of what is bounded how much a step has, by the bounds' names. Collective.

        ḡᵀΔw of the last step, where that is looked at, goes into the successive gradients.
        """
        pairs = [(mean, mean), (d, z), (d, d), (mean, d)]
        if not self.repeats:
            pairs.append((mean, self.successive.change))
        asked = {name: bound.products(d, self.held) for name, bound in self.bounds.items()}
        wanted = [(x, y, [self.exchange.whole]) for x, y in pairs] + [p for found in asked.values() for p in found]
        sums = iter(self.exchange.dots_of_parts(*wanted))
        dots = [float(next(sums)[0]) for _ in pairs]
        if not self.repeats:
            self.successive.add(dots.pop())
            self.curvature.logarithm = self.successive.logarithm
        return dots, {name: self.bounds[name].size(*(next(sums) for _ in found)) for name, found in asked.items()}

    def noise_limited(self) -> float:
        """Return the rate auto. The noise counts as far as the steps are noise, of which there is no less than seen."""
        noise = self.noise_share.least * self.known / self.batch
        return noise_limited_rate(self.trend, noise, bound_of(self.settings.gain_share))

    def bound(self, step: Step, loss_and_gradient: LossAndGradient) -> Step:
        assert isinstance(step, NaturalStep)
        step = self.measured(step, loss_and_gradient)
        limits = self.limits(step)
        rate = min(limits.values())
        if not math.isfinite(rate):
            raise UserError(
                "the rate auto has no bound at this step: the loss has no curvature that could be measured, or "
                "curvature=0; give a number as lr, or let gain_share be more than 0"
            )
        if not step.measurable:
            self.follow(step, self.rate_factor * rate)
        wanted = min(limit for name, limit in limits.items() if name != "relative_change")
        shrink = rate / wanted if 0 < wanted < math.inf else 1.0
        if self.shortening.take(shrink):
            self.tell(
                f"the bound of the relative change leaves {self.shortening.value:.0%} of the steps: if the loss falls "
                f"too slowly, try relative_change={2 * self.settings.relative_change:g}"
            )
        place = float(list(limits.values()).index(rate))
        figures = {"shrink": shrink, "curvature": self.curvature.chi, "limit": place}
        return replace(step, rate=rate, figures={**step.figures, **figures})

    def limits(self, step: NaturalStep) -> dict[str, float]:
        """Return the largest rates by noise, or the settings, and by each bound. Local.

        The figure `limit` is the place of the least of them.
        """
        bounds = {name: bound.limit(step, step.sizes[name]) for name, bound in self.bounds.items()}
        return {"noise": step.rate, **bounds}

    def measured(self, step: NaturalStep, loss_and_gradient: LossAndGradient) -> NaturalStep:
        """Measure the curvature along the step, where that is due and can be. Collective."""
        first = not self.curvature.measured
        if not (self.settings.curvature > 0 and step.measurable and self.rate_factor > 0 and step.dz > 0):
            return step
        limits = self.limits(step)
        rate = min(limits.values())
        promise = self.rate_factor * rate * step.dz
        every = LOSSES_EVERY if hasattr(loss_and_gradient, "losses") else GRADIENTS_EVERY
        if not (first or self.curvature.due(step.number, every, promise)):
            return step
        everywhere = self.exchange.collect(step.direction, "direction")
        line = Line(
            step,
            lambda rate: self.oracle.losses(loss_and_gradient, rate, everywhere),
            self.rate_factor,
            float(self.xp.finfo(self.held.dtype).eps),
        )
        others = min(limits[name] for name in self.bounds if name != "curvature")
        found = self.measurements
        if not (found.first(line, others) if first else found.measure(line, rate, self.rate_factor)):
            self.stop_measuring(step)
        return replace(step, everywhere=everywhere, measurable=self.repeats)

    def stop_measuring(self, step: NaturalStep) -> None:
        """Go on by successive gradients: the loss is not the one of this gradient. Local."""
        self.measurements.repeats = False
        if self.curvature.measured:
            self.successive.begin(self.curvature.chi, step.dz)
        self.tell(
            "the loss does not change along a step as its gradient says (clipped, scaled, decayed in the closure? "
            "other samples at each call? a large constant?): its curvature is taken from successive gradients"
        )

    def follow(self, step: NaturalStep, rate: float) -> None:
        """Have the next gradient tell the curvature along the step of a rate, as the groups take it. Collective."""
        noise = self.momentum.newest(step.number) * rate * self.known / self.batch
        slope, predicted = step.along(rate)
        groups, held = self.groups, self.exchange.held
        d = shared_out(step.direction, groups, held)
        if d is not step.direction and step.dz > 0:
            pairs = (d, step.z), (shared_out(d, groups, held), step.z), (step.mean, d)
            sz, ssz, gd = self.exchange.dots(*pairs)
            noise, slope, predicted = noise * sz / step.dz, -rate * gd, rate * rate * ssz
        self.successive.follow(-rate * d, slope, noise, predicted)

    def tell(self, message: str) -> None:
        """Warn on rank 0. Local."""
        if self.exchange.communicator.rank == 0:
            warnings.warn(message, stacklevel=3)

    def clipped(self, batch: Batch, mean: Held) -> Held:
        """Return ḡ √min(1, 100 tr F/tr F̂), F̂ of this step alone: no batch is worth more than ten in the momentum.

        F does not see every batch, and the momentum keeps what it is given: one with broken samples, a thousand times
        as large, would lead hundreds of steps. Collective; where ḡ is left alone whatever ḡᵀḡ is, nothing crosses the
        network.
        """
        most = OUTLIER * self.trace / self.batch if self.trace > 0 else math.inf
        if batch.noise(0.0) <= most:
            return mean
        noise = batch.noise(self.exchange.dots((mean, mean))[0])
        rounding = 100 * float(self.xp.finfo(self.held.dtype).eps) * batch.square
        return mean if noise <= max(most, rounding) else math.sqrt(most / noise) * mean

    def rounding(self, batch: Batch) -> float:
        """Return the trace that F has of equal gradients, whose differences are rounding: some ten units. Local."""
        return float(batch.squares.sum()) * (10 * self.scale * float(self.xp.finfo(self.held.dtype).eps)) ** 2

    @property
    def weight(self) -> float:
        """γ = 1/(1 + s (t − 1)) of the t-th update, F ← (1 − γ) F + γ new: the mean of the last s of the run.

        A memory of so many steps forgets the samples that are learnt, in the end all but a few: F falls far below what
        it is where one of those is met again, and the step there is as much too long.
        """
        return lasting(self.settings.memory)(self.updates)

    @property
    def scale(self) -> float:
        """√(b/(M−1)), by which centred gradients are multiplied so that their Gram or outer products add up to F."""
        return math.sqrt(self.samples / (self.exchange.replicas - 1))

    @abstractmethod
    def update_is_due(self) -> bool:
        """Tell whether this step updates F. Local."""

    @abstractmethod
    def update(self, batch: Batch, noise: float) -> Update:
        """Take the gradients into F, given ν of the steps so far. Collective."""

    @abstractmethod
    def apply_inverse(self, z: Held, noise: float | None = None) -> Held:
        """Return P⁻¹ z, (held,). Collective.

        Parameters
        ----------
        z : (held,)
        noise : float, optional
            At an update Σ_k a_k²/b: the noise of this momentum in units of one sample's. z is then taken in, where F is
            compared with it.
        """

    @abstractmethod
    def fisher_figures(self) -> Figures:
        """Return the figures of F. Local."""
