"""What all optimizers share: evaluating the replicas' gradients, moving the parameters, the figures of a step."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array, to_device, to_host
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.core.exchange.cost import Traffic
from qnewton_mpi.core.kernels import checksum, combination, square_norms
from qnewton_mpi.core.noise_scale import NoiseScale
from qnewton_mpi.core.rate import LossTrend
from qnewton_mpi.core.settings import NOT_NEGATIVE, POSITIVE, setting
from qnewton_mpi.core.state import Kind, Memory, objects
from qnewton_mpi.errors import NonFiniteGradientError, UserError

LossAndGradient = Callable[[Array, int], tuple[float, Array]]
"""`loss, gradient = f(w, replica)`: mean loss, and its gradient (N,), at w (N,) on the current batch of a replica.

It may have methods for several replicas at once, which are then called instead:
`losses, gradients = f.at_once(w, replicas)`, w (N,) or (R, N), losses (R,), gradients (R, N), and
`losses = f.losses(w, replicas)`, w (N,), where only losses are needed.
"""

Figures = dict[str, float]


@dataclass(frozen=True)
class Piggyback:
    """What else the ranks tell each other where they evaluate gradients: it travels with their losses.

    Attributes
    ----------
    send : callable
        Returns the words of this rank (k,), as many on every rank, once its gradients are there. Local.
    receive : callable
        Takes in those of all ranks, (n, k). Collective: what it raises, it raises on every rank.
    """

    send: Callable[[], NDArray[np.int64]]
    receive: Callable[[NDArray[np.int64]], None]


@dataclass(frozen=True)
class Batch:
    """What all replicas have evaluated, each on its own samples.

    Attributes
    ----------
    rows : (R, N)
        The gradients of this rank's replicas, in an array that is used again at the next evaluation.
    losses, squares : (M,)
        Every replica's loss, and the squared norm of its gradient.
    """

    rows: Array
    losses: NDArray[np.float64]
    squares: NDArray[np.float64]

    @property
    def loss(self) -> float:
        """The mean loss."""
        return float(self.losses.mean())

    @property
    def square(self) -> float:
        """The mean of the squared norms."""
        return float(self.squares.mean())

    def noise(self, gg: float) -> float:
        """Return tr C, C the covariance of the mean gradient, from ḡᵀḡ."""
        return (self.square - gg) / (len(self.squares) - 1)


@dataclass(frozen=True)
class Step:
    """w ← w − c α d, c the factor of a schedule, and what is to be told of it.

    Attributes
    ----------
    mean, direction : (held,)
        ḡ and d.
    rate : float
        α, before a schedule's factor.
    figures : dict
        Those that only the method has, and the loss.
    norms : tuple of float, optional
        ḡᵀḡ, dᵀd and ḡᵀd, where they are known.
    batch : Batch, optional
        Of which ḡ is the mean, where all replicas stood at w: their differences are noise. Its rows may hold others.
    everywhere : (N,), optional
        d, where it has been collected.
    """

    mean: Array
    direction: Array
    rate: float
    figures: Figures
    norms: tuple[float, float, float] | None = None
    batch: Batch | None = None
    everywhere: Array | None = None


@dataclass(frozen=True)
class Group:
    """Coordinates with a rate and a weight decay of their own.

    Attributes
    ----------
    span : slice
        Of the N coordinates.
    share : float
        Of their part of a step that they take; 0: they rest.
    decay : float
        lr·λ; λ, where the rate is "auto".
    """

    span: slice
    share: float = 1.0
    decay: float = 0.0


AUTO: tuple[str, ...] = ("auto",)


@dataclass(frozen=True)
class Settings:
    """What every optimizer has: the learning rate α of w ← w − α d, and a decay of w beside it.

    The decay is decoupled from the step (Loshchilov and Hutter 2019, arXiv 1711.05101), as in PyTorch's AdamW, with c
    the factor of a schedule: w ← (1 − c α λ) w − c α d. There α is about what a step changes each parameter by. A
    measured rate has another meaning, and another size in another unit of the loss. So with "auto" ‖Δw‖/√N takes its
    place: w ← (1 − λ ‖Δw‖/√N) w + Δw, and λ has the size that it has for AdamW.
    """

    lr: float | str = setting(0.3, "learning rate", POSITIVE)
    weight_decay: float = setting(
        0.0, "decoupled λ: a step takes lr·λ of w off, at lr auto ‖Δw‖/√N·λ; 0 is off", NOT_NEGATIVE
    )

    @property
    def shrinkage(self) -> float:
        """lr·λ; λ, where the rate is "auto"."""
        return self.weight_decay * (1.0 if isinstance(self.lr, str) else self.lr)


S = TypeVar("S", bound=Settings)


class Optimizer(ABC, Generic[S]):
    """One step at a time: `figures = optimizer.step(loss_and_gradient)`.

    Building one is collective, and so are its methods but for `pieces`, `fixed_rate` and `normal`, and those that say
    local.

    Parameters
    ----------
    settings : Settings
    parameters : (N,) float32 or float64
        The same on every rank; copied.
    exchange : Exchange
    samples : int, optional
        b, how many samples each replica's loss is the mean of.
    seed : int, optional
        For what a method draws at random.
    shapes : sequence of tuple of int, optional
        Of the tensors that the parameters are the concatenation of, for methods that know layers; default: one vector.

    Attributes
    ----------
    parameters : (N,)
        The current parameters, the same on every rank. Valid until the next step, which may change them in place.
    steps : int
        Steps done.
    rate_factor : float
        By which the learning rate is multiplied, as a schedule wants it; 1 at first.
    rate : float
        The learning rate α of the last step, its factor included.
    groups : sequence of Group
        Of coordinates that no two have in common; what is in none moves as a whole and does not decay. The same on
        every rank. At first one of all, where the settings have a decay. May still be set while the gradients of a step
        are evaluated.
    rows : list of (N,)
        Where the gradients of this rank's replicas go. A `loss_and_gradient` that writes there and returns the row
        saves a copy.
    gradient_seconds : float
        Time that this rank has spent in `loss_and_gradient`.
    evaluations : int
        Gradients that all replicas together have evaluated, those of probes included.
    trials : int
        Losses that they have evaluated without the gradients.
    piggyback : Piggyback or None
        None at first.
    alike : int
        Steps up to the last one in which all replicas had the same loss and gradient norm, so the same batch.
    most_alike : float
        How many samples the replicas may so have in common before it is an error, or a warning where the method does
        not look at their differences; infinite at first.
    """

    settings_type: ClassVar[type[Settings]]
    minimum_replicas: ClassVar[int] = 1
    state: ClassVar[Mapping[str, Kind]] = {
        "held": Kind.HELD,
        "steps": Kind.SHARED,
        "evaluations": Kind.SHARED,
        "trials": Kind.SHARED,
    }
    figures: ClassVar[tuple[str, ...]] = ("loss", "gradient_norm", "step_norm", "cosine", "rate", "noise_scale")

    def __init__(
        self,
        settings: S,
        parameters: Array,
        exchange: Exchange,
        samples: int = 1,
        seed: int = 0,
        shapes: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        self.settings = settings
        self.exchange = exchange
        self.samples = samples
        self.seed = seed
        self.steps = 0
        self.shapes = shapes or [(exchange.size,)]
        self.rate_factor = 1.0
        self.rate = math.nan
        self.groups: Sequence[Group] = (
            [Group(slice(0, exchange.size), 1.0, settings.shrinkage)] if settings.shrinkage else []
        )
        self.trend = LossTrend()
        self.noise_scale = NoiseScale()
        self.gradient_seconds = 0.0
        self.evaluations = 0
        self.trials = 0
        self.piggyback: Piggyback | None = None
        self.alike = 0
        self.most_alike = math.inf
        self.xp = array_namespace(parameters)
        exchange.divide(self.pieces())
        self.held = exchange.hold(parameters)
        self.parameters = exchange.collect(self.held)
        self.gradients = self.xp.empty(
            (len(exchange.local), exchange.size), dtype=parameters.dtype, device=device(parameters)
        )
        self.rows = [self.gradients[r, :] for r in range(len(exchange.local))]
        self.start()
        self._stateful = [*objects(self), exchange]

    def pieces(self) -> Sequence[int]:
        """Return the lengths of the parts of the parameters that one rank has to hold whole; () if there are none."""
        return ()

    @classmethod
    def least_replicas(cls, settings: S) -> int:
        """Return how many replicas are needed; a rate "auto" sees their noise. Local."""
        return max(cls.minimum_replicas, 2 if settings.lr == "auto" else 1)

    @classmethod
    def traffic(cls, settings: S) -> Traffic:
        """Return what a step moves besides the new parameters. Local."""
        return Traffic()

    def fixed_rate(self, rate: float) -> float:
        """Return the learning rate that a number in the settings means for this batch."""
        return rate

    @property
    def adaptive(self) -> bool:
        """Whether the rate is "auto"."""
        return self.settings.lr == "auto"

    def chosen_rate(self) -> float:
        """Return the rate of the settings, where that is a number. Local."""
        return self.fixed_rate(float(self.settings.lr))

    def parts(self) -> Mapping[str, Any]:
        """Return the objects that have state of the method. Local."""
        return {"trend": self.trend, "noise_scale": self.noise_scale}

    def start(self) -> None:
        """Create the state that the method carries from step to step. Collective."""

    def step(self, loss_and_gradient: LossAndGradient) -> Figures:
        """Do one step.

        Parameters
        ----------
        loss_and_gradient : LossAndGradient
            Called for each replica of this rank, in their order, or its `at_once` for all; by methods that probe once
            more, at other parameters.

        Returns
        -------
        dict
            A float for each name in `figures`: the mean loss of the replicas before the step, ‖ḡ‖, ‖Δw‖,
            cos(Δw, −ḡ), α, the noise scale, and those of the method. The same on every rank.

        Raises
        ------
        NonFiniteGradientError
            On every rank. The state is what it was, as after all that is raised here or by `loss_and_gradient`.
        UserError
            On every rank: where the ranks are not at one step, rate factor or point, and
            where all replicas have the same batch and the method needs their differences.
        """
        before = Memory(self._stateful)
        try:
            self.steps += 1
            self.note = self.noted()
            step = self.bound(self.propose(loss_and_gradient), loss_and_gradient)
        except BaseException:
            before.recall()
            raise
        return self.move(step)

    @abstractmethod
    def propose(self, loss_and_gradient: LossAndGradient) -> Step:
        """Evaluate the gradients, take them into the state, and return a step. Collective.

        Where this or `bound` raises, all attributes are set to what they were. So they change no array in its place.
        """

    def bound(self, step: Step, loss_and_gradient: LossAndGradient) -> Step:
        """Return the step made as short as it has to be. Collective."""
        return step

    def move(self, step: Step) -> Figures:
        """Do w ← (1 − u) w − c α s d, c a schedule's factor, s a group's share, u what it decays by. Collective.

        Return the figures, which are of the step without the decay.
        """
        direction = self.shared_out(step.direction)
        self.rate = self.rate_factor * step.rate
        pairs = (step.mean, step.mean), (direction, direction), (step.mean, direction)
        gg, dd, gd = self.exchange.dots(*pairs) if direction is not step.direction or step.norms is None else step.norms
        self.decay(self.rate * math.sqrt(dd / self.exchange.size) if self.adaptive else self.rate_factor)
        self.held = combination(1.0, self.held, -self.rate, direction, out=self.held)
        whole = direction is step.direction and not any(group.decay for group in self.groups)
        if step.everywhere is None or not whole:
            self.parameters = self.exchange.collect(self.held)
        elif self.parameters is not self.held:  # what the others do to theirs: nothing has to cross again
            combination(1.0, self.parameters, -self.rate, step.everywhere, out=self.parameters)
        self.exchange.communicator.halfway(False)
        if step.batch is not None and self.exchange.replicas > 1:
            noise = step.batch.noise(gg)
            self.noise_scale.add(self.batch * noise, gg - noise)
        norms = math.sqrt(gg * dd)
        return {
            "gradient_norm": math.sqrt(gg),
            "step_norm": self.rate * math.sqrt(dd),
            "cosine": gd / norms if norms > 0 else math.nan,
            "rate": self.rate,
            **self.noise_scales,
            **step.figures,
        }

    @property
    def noise_scales(self) -> Figures:
        """The figures that tell how many samples a batch is worth. Local.

        Not a number where there is one replica, or where the replicas stand apart.
        """
        return {"noise_scale": self.noise_scale.value}

    @property
    def batch(self) -> int:
        """Samples a step."""
        return self.samples * self.exchange.replicas

    def shared_out(self, direction: Array) -> Array:
        """Return s d, (held,), s the shares of the groups; d itself where all are 1. Local."""
        parts = [group for group in self.groups if group.share != 1]
        if parts:
            direction = self.xp.asarray(direction, copy=True)
        for group in parts:
            own = self.held_part(group.span)
            direction[own] = group.share * direction[own] if group.share else 0
        return direction

    def decay(self, unit: float) -> None:
        """Do w ← (1 − u) w, u the decays of the groups in a unit, but no more than w. Local."""
        for group in self.groups:
            if group.decay:
                self.held[self.held_part(group.span)] *= max(0.0, 1 - unit * group.decay)

    def held_part(self, span: slice) -> slice:
        """Return where a span of the N coordinates is among those held. Local."""
        first = self.exchange.held.start
        return slice(max(span.start - first, 0), max(span.stop - first, 0))

    def evaluate(
        self, loss_and_gradient: LossAndGradient, displacements: Array | None = None, trial: bool = False
    ) -> Batch:
        """Evaluate this rank's replicas at w̄ + their displacements.

        Parameters
        ----------
        loss_and_gradient : LossAndGradient
        displacements : (R, N), optional
            Of this rank's replicas.
        trial : bool
            Whether the step may be too long: a replica with a loss or gradient that is not finite then has the loss ∞,
            and the gradient zero.

        Raises
        ------
        NonFiniteGradientError
            On every rank, unless it is a trial.
        """
        local = self.exchange.local
        self.evaluations += self.exchange.replicas
        at_once = getattr(loss_and_gradient, "at_once", None)
        with self.evaluating():
            if at_once:
                points = self.parameters if displacements is None else self.parameters + displacements
                losses, gradients = at_once(points, local)
                if gradients is not self.gradients:
                    self.gradients[...] = gradients
            else:
                losses = np.empty(len(local))
                for r, replica in enumerate(local):
                    point = self.parameters if displacements is None else self.parameters + displacements[r, :]
                    losses[r], gradient = loss_and_gradient(point, replica)
                    if gradient is not self.rows[r]:
                        self.gradients[r, :] = gradient
            squares = to_host(square_norms(self.gradients))
        everyone = self.shared(losses, squares, piggyback=self.piggyback)
        finite = np.logical_and.reduce(np.isfinite(everyone), axis=1)
        if trial:
            everyone[~finite] = np.inf, 0
            for row in np.flatnonzero(~finite[list(local)]):
                self.gradients[int(row), ...] = 0
        elif not finite.all():
            first = int(np.argmin(finite))
            raise NonFiniteGradientError(self.steps, first, *everyone[first])
        if displacements is None:
            self.look_for_differences(everyone)
        return Batch(self.gradients, everyone[:, 0], everyone[:, 1])

    def losses_at(self, loss_and_gradient: LossAndGradient, rate: float, direction: Array) -> NDArray[np.float64]:
        """Return all replicas' losses (M,) at w − α d, d of all coordinates; ∞ for what is not finite. Collective.

        Where `loss_and_gradient` has no `losses`, its gradients are evaluated and lost, `gradients` among them.
        """
        local, point = self.exchange.local, combination(1.0, self.parameters, -rate, direction)
        losses_of = getattr(loss_and_gradient, "losses", None)
        if losses_of:
            self.trials += self.exchange.replicas
        else:
            self.evaluations += self.exchange.replicas
        losses: Array = np.full(len(local), np.inf)
        # Wherever a trial leads, and however the program says that it cannot compute a loss there.
        with self.evaluating("trial"), np.errstate(all="ignore"), contextlib.suppress(ArithmeticError, ValueError):
            if losses_of:
                losses = np.asarray(losses_of(point, local), np.float64)
            else:
                losses = np.array([loss_and_gradient(point, replica)[0] for replica in local])
        everyone = self.shared(losses)[:, 0]
        return np.where(np.isfinite(everyone), everyone, np.inf)

    @contextlib.contextmanager
    def evaluating(self, phase: str = "gradient") -> Iterator[None]:
        """While the program's own function is called."""
        self.exchange.communicator.halfway(False)  # others wait for what follows in a gate
        self.exchange.communicator.enter(phase)
        started = time.perf_counter()
        with np.errstate(over="ignore", invalid="ignore"):  # a divergence is told later, once
            yield
        self.gradient_seconds += time.perf_counter() - started
        self.exchange.communicator.enter("algebra")

    def shared(self, *figures: Array, piggyback: Piggyback | None = None) -> NDArray[np.float64]:
        """Return the figures (R,) of this rank's replicas for all, (M, figures), and compare the ranks' notes."""
        own = np.stack([to_host(figure) for figure in figures], axis=1, dtype=np.float64)
        words = self.note if piggyback is None else np.concatenate([self.note, piggyback.send()])
        everyone, words = self.exchange.share(own, words, self.steps)
        if piggyback is not None:
            piggyback.receive(words[:, len(self.note) :])
        self.compare(words[:, : len(self.note)])
        self.exchange.communicator.halfway(True)
        return everyone

    def noted(self) -> NDArray[np.int64]:
        """Return what has to be the same on all ranks at a step, as bits: its number, the rate factor, w. Local."""
        several = self.exchange.communicator.size > 1
        factor = np.float64(self.rate_factor).view(np.int64)
        return np.array([self.steps, factor, checksum(self.parameters) if several else 0])

    def compare(self, notes: NDArray[np.int64]) -> None:
        """Raise `UserError` where the ranks' notes (n, 3) differ. Local: all ranks have the same."""
        differ = notes != notes[0]
        if not differ.any():
            return
        rank, what = np.argwhere(differ)[0]
        steps, factors = notes[:, 0], notes[:, 1].view(np.float64)
        raise UserError(
            (
                f"rank {rank} is at step {steps[rank]}, rank 0 at step {steps[0]}: let all ranks take the same steps, "
                "from checkpoints of one step",
                f"step {steps[0]}: rank {rank} has {factors[rank]:g} times the learning rate, rank 0 {factors[0]:g} "
                "times: let a schedule see the same on all ranks, as the loss that step() returns",
                f"step {steps[0]}: the parameters of rank {rank} differ from those of rank 0: change and load them on "
                "all ranks alike; where no one did, keep to nodes of one kind, or take exchange='sliced'",
            )[what]
        )

    def look_for_differences(self, everyone: NDArray[np.float64]) -> None:
        """Count the steps in which all replicas' losses and squared norms (M, 2) are the same; tell if it goes on."""
        others = self.exchange.replicas - 1
        same = others > 0 and everyone[0, 1] > 0 and bool((everyone == everyone[0]).all())
        self.alike = self.alike + 1 if same else 0
        if others * self.samples * self.alike < self.most_alike:
            return
        text = (
            f"all {others + 1} replicas have the same batch: give each rank samples of its own, as by a "
            "DistributedSampler or a seed with the rank in it"
        )
        if self.least_replicas(self.settings) > 1:  # without any noise the curvature or the rate is wrong
            raise UserError(f"step {self.steps}: {text}")
        self.most_alike = math.inf
        if self.exchange.communicator.rank == 0:
            warnings.warn(text, stacklevel=2)

    def normal(self, step: int) -> Array:
        """Return standard normal numbers (M, held) from the seed and the step alone."""
        held = []
        for replica in range(self.exchange.replicas):
            numbers = np.random.default_rng([self.seed, step, replica]).standard_normal(self.exchange.size)
            held.append(self.exchange.hold(to_device(numbers, self.parameters)))
        return self.xp.stack(held)
