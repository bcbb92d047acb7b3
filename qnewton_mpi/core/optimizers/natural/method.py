"""What `fisher` and `kronecker` share: momentum, the preconditioned step, and how long it may be."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from qnewton_mpi.arrays import Array
from qnewton_mpi.core.layers import layer_shapes
from qnewton_mpi.core.noise_scale import NoiseScale
from qnewton_mpi.core.optimizers.base import Optimizer
from qnewton_mpi.core.optimizers.groups import shared_out
from qnewton_mpi.core.optimizers.natural.rules import (
    FIRST_TRIALS,
    RUNNING,
    Curvature,
    Momentum,
    NoiseShare,
    RelativeChange,
    SuccessiveGradients,
    fixed_point,
)
from qnewton_mpi.core.optimizers.settings import AUTO, Settings
from qnewton_mpi.core.optimizers.values import Batch, Figures, LossAndGradient, Step
from qnewton_mpi.core.rate import noise_limited_rate
from qnewton_mpi.core.settings import FRACTION, NOT_NEGATIVE, POSITIVE, setting
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import UserError

BATCH = 256
# Steps between measurements of χ: they cost 3 and 4% of the gradients, a loss alone being a third of one.
LOSSES_EVERY, GRADIENTS_EVERY = 10, 25
LITTLE = 0.1  # of the steps, by a running mean, when it is told that a bound leaves no more
CHECK_EVERY = 50  # steps between looks at whether the loss is quadratic
QUARTERS = 10  # of a rate, at most, to where it is
FARTHER = 100.0  # times as far is looked where the loss is linear
ROUNDING = 4.0  # units of the loss


@dataclass(frozen=True)
class NaturalGradientSettings(Settings):
    """Settings that the methods share, of which each sets some anew. 0 turns a rule off."""

    lr: float | str = setting("auto", "learning rate", POSITIVE, AUTO)
    momentum: float = setting(0.9, "momentum β; 0 is off", FRACTION)
    decay: float = setting(0.98, "of the running Fisher matrix, per update", FRACTION)
    update_every: int = setting(4, "steps between updates of F, but for the first ones", POSITIVE)
    curvature: float = setting(1.0, "C, of the largest rate C (ς + ν)/χ; 0: no bound", NOT_NEGATIVE)
    relative_change: float = setting(
        0.02, "η, of a layer, by a step's noise, at first 5 times that; 0: no bound", NOT_NEGATIVE
    )
    outlier: float = setting(10.0, "times tr F is as large as a gradient's noise may be; 0: no bound", NOT_NEGATIVE)
    gain_share: float = setting(0.45, "κ of the rate auto; 0: no bound", NOT_NEGATIVE)


S = TypeVar("S", bound=NaturalGradientSettings)


@dataclass(frozen=True, kw_only=True)
class NaturalStep(Step):
    """A step before it is bounded.

    Attributes
    ----------
    batch : Batch
        Of w, before the step.
    z : (held,)
    dz : float
        dᵀz.
    change : float
        r², the squared relative change of a layer for α = 1, mean over the layers.
    noise : float
        ν.
    reach : float
        ς + ν.
    """

    batch: Batch
    z: Array
    dz: float
    change: float
    noise: float
    reach: float


class NaturalGradient(Optimizer[S]):
    """w ← w − α P⁻¹ z, P from the Fisher matrix F of the replicas and z Nesterov's momentum of the mean gradient.

    All replicas stand at the same w, so G = [g_i − ḡ] is sampling noise, and its covariance is the Fisher matrix of the
    log-likelihood: b/(M−1) G Gᵀ with b samples a replica. How its running mean is held is up to the method.

        ḡ, F     the replicas' mean gradient, and F ← (1 − γ) F + γ b/(M−1) G Gᵀ every few steps
        z        momentum of ḡ, an outlier clipped
        d        P⁻¹ z
        ν        the share of noise in dᵀz, a running mean
        ς        the share of ḡᵀd in dᵀz, of this step, from 0 to 1
        χ        2 [f_B(w − α d) − f_B(w) + α ḡᵀd]/(α² dᵀz), a running mean, measured every few steps
        α        the least of   4 κ max(−t dL/dt, its standard error)/(ν tr P⁻¹C)       what noise allows
                                C (ς + ν)/χ                                             what curvature allows
                                η max(1, 5/√t)/√(ν mean_l (‖d_l‖/‖w_l‖)²)               what the noise may change
        w        w − α d, and the weight decay of `Settings`

    Nothing of it changes where a constant is added to the loss, or the loss multiplied by one.
    """

    minimum_replicas = 2
    state: ClassVar[Mapping[str, Kind]] = {
        **Optimizer.state,
        "updates": Kind.SHARED,
        "trace": Kind.SHARED,
        "known": Kind.SHARED,
        "repeats": Kind.SHARED,
        "shortened": Kind.SHARED,
        "largest_loss": Kind.SHARED,
    }

    figures = (*Optimizer.figures, "noise_scale_preconditioned", "clip", "shrink", "noise_share", "curvature", "limit")

    def start(self) -> None:
        if self.adaptive and not any(
            (self.settings.curvature, self.settings.relative_change, self.settings.gain_share)
        ):
            raise UserError(
                "the rate auto has no bound: let one of curvature, relative_change, gain_share be more than 0"
            )
        s, spans = self.settings, [slice(layer.start, layer.stop) for layer in layer_shapes(self.shapes)]
        self.momentum = Momentum(s.momentum, self.held)
        self.noise_share = NoiseShare()
        self.noise_scale_preconditioned = NoiseScale()
        self.curvature = Curvature(bound_of(s.curvature))
        self.successive = SuccessiveGradients(self.held)
        self.change = RelativeChange(bound_of(s.relative_change), spans, self.held)
        self.updates = 0
        self.trace = 0.0  # of F
        self.known = 0.0  # tr P⁻¹F, as of the last update: the noise of one sample
        self.shortened = 1.0  # what the bound of the change leaves of a step, a running mean
        self.largest_loss = 0.0  # so far
        self.told = False
        self.repeats = True  # whether the losses of a batch can be had again, at other parameters

    def parts(self) -> Mapping[str, Any]:
        own = {
            "momentum": self.momentum,
            "noise_share": self.noise_share,
            "noise_scale_preconditioned": self.noise_scale_preconditioned,
            "curvature": self.curvature,
            "successive": self.successive,
            "change": self.change,
        }
        return {**super().parts(), **own}

    @property
    def noise_scales(self) -> Figures:
        return {**super().noise_scales, "noise_scale_preconditioned": self.noise_scale_preconditioned.value}

    def compare_noise(self, noise: float, square: float) -> None:
        """Take tr P⁻¹C₁ and ḡᵀ P⁻¹ ḡ of a batch that P has not seen into the noise scale. Local.

        Of a batch that is in P already, the noise would seem less than it is where P has it for more than it is.
        """
        self.noise_scale_preconditioned.add(noise, square - noise / self.batch)

    def propose(self, loss_and_gradient: LossAndGradient) -> NaturalStep:
        batch = self.evaluate(loss_and_gradient)
        self.trend.add(batch.losses)
        self.largest_loss = max(self.largest_loss, float(np.abs(batch.losses).mean()))
        if self.update_is_due():
            self.updates += 1
            mean = self.update(batch)
        else:
            mean = self.exchange.mean(batch.rows)

        t, clip = self.steps, self.clip(batch, mean)
        z = self.momentum.add(clip * mean if clip < 1 else mean, t)
        d = self.apply_inverse(z)
        (gg, dz, dd, gd, *after), change = self.products(mean, z, d)
        for slope in after:
            self.successive.add(slope)
            self.curvature.logarithm = self.successive.logarithm
        self.noise_share.add(self.known / self.batch * self.momentum.noise(t), dz)
        figures = {"loss": batch.loss, "clip": clip, "noise_share": self.noise_share.value, **self.spectrum()}
        rate = self.noise_limited() if self.adaptive else self.chosen_rate()
        return NaturalStep(
            mean,
            d,
            rate,
            figures,
            (gg, dd, gd),
            batch=batch,
            z=z,
            dz=dz,
            change=change,
            noise=(noise := self.noise_share.unbiased),
            reach=(min(1.0, max(0.0, gd / dz)) if dz > 0 else 1.0) + noise,
        )

    def products(self, mean: Array, z: Array, d: Array) -> tuple[list[float], float]:
        """Return ḡᵀḡ, dᵀz, dᵀd, ḡᵀd, and ḡᵀΔw of the last step where that is looked at; and r². Collective."""
        pairs = [(mean, mean), (d, z), (d, d), (mean, d)]
        if not self.repeats:
            pairs.append((mean, self.successive.change))
        whole = [(x, y, [self.exchange.whole]) for x, y in pairs]
        sums = self.exchange.dots_of_parts(*whole, *self.change.products(d, self.held))
        return [float(of_all[0]) for of_all in sums[: len(pairs)]], self.change.squared(*sums[len(pairs) :])

    def noise_limited(self) -> float:
        """Return the rate auto. The noise counts as far as the steps are noise, of which there is no less than seen."""
        noise = self.noise_share.least * self.known / self.batch
        return noise_limited_rate(self.trend, noise, bound_of(self.settings.gain_share))

    def bound(self, step: Step, loss_and_gradient: LossAndGradient) -> Step:
        assert isinstance(step, NaturalStep)
        assert step.norms is not None
        if self.measures and step.dz > 0:
            first = not self.curvature.measured
            promise = self.promise(step, self.rate_of(step))
            if first or self.curvature.due(self.steps, self.interval(loss_and_gradient), promise):
                step = replace(step, everywhere=self.exchange.collect(step.direction, "direction"))
                if first:
                    self.measure_first(step, loss_and_gradient)
                else:
                    self.measure(step, loss_and_gradient, self.rate_of(step), self.rate_factor)
        limits = self.limits(step)
        rate = min(limits)
        if not math.isfinite(rate):
            raise UserError(
                "the rate auto has no bound at this step: the loss has no curvature that could be measured, or "
                "curvature=0; give a number as lr, or let gain_share be more than 0"
            )
        if not self.repeats:
            self.follow(step, self.rate_factor * rate)
        wanted = min(limits[:2])
        shrink = rate / wanted if 0 < wanted < math.inf else 1.0
        self.note_shortening(shrink)
        figures = {"shrink": shrink, "curvature": self.curvature.value, "limit": float(np.argmin(limits))}
        return replace(step, rate=rate, figures={**step.figures, **figures})

    def follow(self, step: NaturalStep, rate: float) -> None:
        """Have the next gradient tell the curvature along the step of a rate, as the groups take it. Collective."""
        noise = self.momentum.newest(self.steps) * rate * self.known / self.batch
        slope, predicted = self.along(step, rate)
        groups, held = self.groups, self.exchange.held
        d = shared_out(step.direction, groups, held)
        if d is not step.direction and step.dz > 0:
            sz, ssz, gd = self.exchange.dots((d, step.z), (shared_out(d, groups, held), step.z), (step.mean, d))
            noise, slope, predicted = noise * sz / step.dz, -rate * gd, rate * rate * ssz
        self.successive.follow(-rate * d, slope, noise, predicted)

    def limits(self, step: NaturalStep) -> tuple[float, float, float]:
        """Return the largest rates by noise or the settings, by curvature, and by the change. Local.

        The figure `limit` is the place of the least of them.

        Where no curvature is measured, all of a step may change what else its noise may, the first steps no more.
        """
        now = self.curvature.measured == self.steps
        along = min(self.curvature.limit(step.reach), self.curvature.newest if now else math.inf)
        noise, t = (step.noise, self.steps) if self.repeats else (1.0, math.inf)
        return step.rate, along, self.change.limit(step.change, noise, t)

    def rate_of(self, step: NaturalStep) -> float:
        return min(self.limits(step))

    def promise(self, step: NaturalStep, rate: float) -> float:
        """Return α dᵀz: by how much the loss is to fall, but for its curvature. Local."""
        return self.rate_factor * rate * step.dz

    def note_shortening(self, shrink: float) -> None:
        """Take in what part of a step the bound of its change leaves; tell once where that is little at most steps."""
        self.shortened += RUNNING * (shrink - self.shortened)
        if self.shortened < LITTLE and not self.told:
            self.told = True
            self.tell(
                f"the bound of the relative change leaves {self.shortened:.0%} of the steps: if the loss falls too "
                f"slowly, try relative_change={2 * self.settings.relative_change:g}"
            )

    def tell(self, message: str) -> None:
        """Warn on rank 0. Local."""
        if self.exchange.communicator.rank == 0:
            warnings.warn(message, stacklevel=3)

    @property
    def measures(self) -> bool:
        """Whether the curvature along this step can be measured."""
        return self.settings.curvature > 0 and self.repeats and self.rate_factor > 0

    def interval(self, loss_and_gradient: LossAndGradient) -> int:
        """Return the steps between measurements. Local."""
        return LOSSES_EVERY if hasattr(loss_and_gradient, "losses") else GRADIENTS_EVERY

    def measure_first(self, step: NaturalStep, loss_and_gradient: LossAndGradient) -> None:
        """Measure χ where the first step leads, after a look at whether the losses can be had again. Collective.

        They cannot where they are others at the same point, or the same wherever the step leads; nor are they of the
        gradient where no rate allows itself. A schedule's factor plays no part.
        """
        again, rate = self.oracle.losses(loss_and_gradient, 0.0, step.everywhere), 1.0
        self.repeats = np.allclose(again, step.batch.losses, rtol=1e-6, atol=0)
        for _ in range(FIRST_TRIALS if self.repeats else 0):
            once = self.oracle.losses(loss_and_gradient, rate, step.everywhere)
            if not (once == again).all():
                self.repeats = bool((once == self.oracle.losses(loss_and_gradient, rate, step.everywhere)).all())
                break
            rate *= FARTHER
        else:
            self.repeats = False
        if not self.repeats:
            return
        tolerance = math.sqrt(float(self.xp.finfo(self.held.dtype).eps))
        found = fixed_point(lambda rate: self.allowed(step, loss_and_gradient, rate), tolerance)
        if found is not None:
            self.measure(step, loss_and_gradient, found, 1.0)
        elif not self.is_of_gradient(step, rate, self.measured(step, loss_and_gradient, rate)):
            self.stop_measuring(step)

    def allowed(self, step: NaturalStep, loss_and_gradient: LossAndGradient, rate: float) -> float:
        """Return the rate that is allowed by what is measured at a rate; 0: the loss is not finite. Collective."""
        logarithm = self.measured(step, loss_and_gradient, rate)
        along = 0.0 if math.isinf(logarithm) else self.curvature.allows(logarithm, step.reach)
        return min(FARTHER * rate if math.isnan(along) else along, self.limits(step)[2])

    def measure(self, step: NaturalStep, loss_and_gradient: LossAndGradient, rate: float, factor: float) -> None:
        """Take χ along the step in, at a rate or where the loss is quadratic from there down. Collective.

        Of a curvature c ∝ α² a quarter of the rate has a sixteenth. Where it has more than an eighth, a rate that much
        shorter is looked at. That is done where χ is more than twice what is known, and at every 50th step. A loss with
        kinks is quadratic nowhere, and measured where the step leads.
        """
        logarithm, t = self.measured(step, loss_and_gradient, factor * rate), self.steps
        known = self.curvature.logarithm if self.curvature.measured else -math.inf
        if logarithm > known + math.log(2) or t % CHECK_EVERY == 0:
            shorter, found, honest = rate, logarithm, False
            for k in range(QUARTERS):
                quarter = self.measured(step, loss_and_gradient, factor * shorter / 4)
                quadratic = math.isfinite(found) and quarter < found + math.log(2)
                if quadratic or (k == 0 and math.isnan(quarter)):
                    rate, logarithm = shorter, found
                    break
                honest = honest or self.is_of_gradient(step, factor * shorter / 4, quarter)
                if math.isnan(quarter) or k == QUARTERS - 1:  # never, down to rounding
                    if honest:
                        break
                    # Where targets are met to rounding, that of larger losses is left.
                    if logarithm > self.rounding_of(self.largest_loss, self.along(step, factor * rate)[1]):
                        self.stop_measuring(step)
                    return
                shorter, found = shorter / 4, quarter
                if not math.isfinite(logarithm):
                    rate, logarithm = shorter, found
        if math.isfinite(logarithm):
            self.curvature.add(logarithm, t, self.promise(step, rate), step.reach, rate)

    def is_of_gradient(self, step: NaturalStep, rate: float, logarithm: float) -> bool:
        """Tell whether the loss changes along a step as its gradient says, to an eighth, given log χ there. Local."""
        slope, predicted = self.along(step, rate)
        if math.isnan(logarithm):
            logarithm = self.rounding_of(np.abs(step.batch.losses).mean(), predicted)
        return math.isfinite(logarithm) and math.exp(min(logarithm, 700.0)) * predicted < abs(slope) / 4

    def stop_measuring(self, step: NaturalStep) -> None:
        """Go on by successive gradients: the loss is not the one of this gradient. Local."""
        self.repeats = False
        if self.curvature.measured:
            self.successive.begin(self.curvature.value, step.dz)
        self.tell(
            "the loss does not change along a step as its gradient says (clipped, scaled, decayed in the closure? "
            "other samples at each call? a large constant?): its curvature is taken from successive gradients"
        )

    def along(self, step: NaturalStep, rate: float) -> tuple[float, float]:
        """Return ḡᵀΔw and Δwᵀ P Δw of a rate. Local."""
        assert step.norms is not None
        return -rate * step.norms[2], rate * rate * step.dz

    def measured(self, step: NaturalStep, loss_and_gradient: LossAndGradient, rate: float) -> float:
        """Return log χ along the step of a rate, ∞ where the loss is not finite there. Collective.

        Not a number where the loss's curvature is rounding.
        """
        slope, predicted = self.along(step, rate)
        losses = self.oracle.losses(loss_and_gradient, rate, step.everywhere)
        curvature = abs(2 * (float(losses.mean() - step.batch.losses.mean()) - slope))
        if not math.isfinite(curvature):
            return math.inf
        ratio = curvature / predicted if predicted > 0 else 0.0
        if ratio == 0:
            return math.nan
        logarithm, rounding = math.log(ratio), self.rounding_of(np.abs(step.batch.losses).mean(), predicted)
        return logarithm if logarithm > rounding else math.nan

    def rounding_of(self, loss: float, predicted: float) -> float:
        """Return log χ that the rounding of a loss of this size makes where P says Δwᵀ P Δw. Local."""
        rounding = ROUNDING * float(self.xp.finfo(self.held.dtype).eps) * loss
        ratio = rounding / predicted if predicted > 0 else 0.0
        return math.log(ratio) if ratio > 0 else -math.inf

    def clip(self, batch: Batch, mean: Array) -> float:
        """Return the factor of an outlier among the gradients, 1 for others: min(1, √(10 tr F/tr F̂)), F̂ of this step.

        F is a mean over the past. Where nearly all samples are learnt, it is far below the gradient of a batch with one
        that is not, and a step along that would be as much too long, and those of the momentum after it. Collective:
        where the gradients are so small that it is 1 whatever ḡᵀḡ, nothing crosses the network.
        """
        most = bound_of(self.settings.outlier) * self.trace / self.batch if self.trace > 0 else math.inf
        if batch.noise(0.0) <= most:
            return 1.0
        noise = batch.noise(self.exchange.dots((mean, mean))[0])
        rounding = 100 * float(self.xp.finfo(self.held.dtype).eps) * batch.square
        return 1.0 if noise <= rounding else min(1.0, math.sqrt(most / noise))

    def rounding(self, batch: Batch) -> float:
        """Return the trace that F has of equal gradients, whose differences are rounding: some ten units. Local."""
        return float(batch.squares.sum()) * (10 * self.scale * float(self.xp.finfo(self.held.dtype).eps)) ** 2

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
    def update(self, batch: Batch) -> Array:
        """Compare noise with P⁻¹ as it is, take the gradients into F, set `trace` and `known`; return ḡ, (held,).

        Collective.
        """

    @abstractmethod
    def apply_inverse(self, z: Array) -> Array:
        """Return (F + ε I)⁻¹ z for a held vector. Collective."""

    @abstractmethod
    def spectrum(self) -> Figures:
        """Return the figures of F."""


def bound_of(value: float) -> float:
    """Return the bound that a setting means: none for 0."""
    return value if value > 0 else math.inf
