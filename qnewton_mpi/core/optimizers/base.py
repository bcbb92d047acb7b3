"""What all optimizers share: a step is proposed, bounded, and done."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from array_api_compat import array_namespace

from qnewton_mpi.arrays import Columns, Rows, Whole, to_device
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.core.exchange.cost import Traffic
from qnewton_mpi.core.kernels import combination
from qnewton_mpi.core.noise_scale import NoiseScale
from qnewton_mpi.core.optimizers.groups import Group, decay, shared_out
from qnewton_mpi.core.optimizers.oracle import Oracle
from qnewton_mpi.core.optimizers.settings import Settings
from qnewton_mpi.core.optimizers.values import Batch, Figures, LossAndGradient, Piggyback, Step
from qnewton_mpi.core.rate import LossTrend
from qnewton_mpi.core.state import Kind, Memory, objects
from qnewton_mpi.errors import UserError

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
    oracle : Oracle
        Which evaluates the gradients; `rows`, `gradients`, `gradient_seconds`, `evaluations` and `trials` are its own.
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
    }
    figure_names: ClassVar[tuple[str, ...]] = ("loss", "gradient_norm", "step_norm", "cosine", "rate", "noise_scale")

    def __init__(
        self,
        settings: S,
        parameters: Whole,
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
        self.piggyback: Piggyback | None = None
        self.alike = 0
        self.most_alike = math.inf
        self.xp = array_namespace(parameters)
        exchange.divide(self.pieces())
        self.held = exchange.hold(parameters)
        self.parameters = exchange.collect(self.held)
        self.oracle = Oracle(exchange, parameters)
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
        return {"oracle": self.oracle, "trend": self.trend, "noise_scale": self.noise_scale}

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
            A float for each name in `figure_names`: the mean loss of the replicas before the step, ‖ḡ‖, ‖Δw‖,
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
            self.oracle.begin(self.steps, self.rate_factor, self.parameters)
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
        """Do w ← (1 − u) w − c α d, c a schedule's factor, of d each group its share, u what it decays by. Collective.

        Return the figures, which are of the step without the decay.
        """
        direction = shared_out(step.direction, self.groups, self.exchange.held)
        self.rate = self.rate_factor * step.rate
        pairs = (step.mean, step.mean), (direction, direction), (step.mean, direction)
        gg, dd, gd = self.exchange.dots(*pairs) if direction is not step.direction or step.norms is None else step.norms
        unit = self.rate * math.sqrt(dd / self.exchange.size) if self.adaptive else self.rate_factor
        decay(self.held, unit, self.groups, self.exchange.held)
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

    def evaluate(
        self, loss_and_gradient: LossAndGradient, displacements: Rows | None = None, trial: bool = False
    ) -> Batch:
        """Evaluate this rank's replicas at w̄ + their displacements (R, N), as `Oracle.batch`."""
        batch = self.oracle.batch(loss_and_gradient, displacements, trial, self.piggyback)
        if displacements is None:
            self.look_for_differences(batch)
        return batch

    @property
    def rows(self) -> list[Whole]:
        """Where the gradients of this rank's replicas go, each (N,).

        A `loss_and_gradient` that writes there and returns the row saves a copy.
        """
        return self.oracle.rows

    @property
    def gradients(self) -> Rows:
        """The rows as one array, (R, N)."""
        return self.oracle.gradients

    @property
    def gradient_seconds(self) -> float:
        """Time that this rank has spent in `loss_and_gradient`."""
        return self.oracle.seconds

    @property
    def evaluations(self) -> int:
        """Gradients that all replicas together have evaluated, those of probes included."""
        return self.oracle.evaluations

    @property
    def trials(self) -> int:
        """Losses that they have evaluated without the gradients."""
        return self.oracle.trials

    def look_for_differences(self, batch: Batch) -> None:
        """Count the steps in which all replicas have the same batch; tell if it goes on."""
        others = self.exchange.replicas - 1
        self.alike = self.alike + 1 if batch.alike else 0
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

    def normal(self, step: int) -> Columns:
        """Return standard normal numbers (M, held) from the seed and the step alone."""
        held = []
        for replica in range(self.exchange.replicas):
            numbers = np.random.default_rng([self.seed, step, replica]).standard_normal(self.exchange.size)
            held.append(self.exchange.hold(to_device(numbers, self.parameters)))
        return self.xp.stack(held)
