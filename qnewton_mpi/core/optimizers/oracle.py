"""The replicas as a first-order oracle: each one's loss and gradient on its own samples, told to all ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array, Matrix, Rows, Vector, Whole, to_host
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.core.kernels import checksum, combination, square_norms
from qnewton_mpi.core.optimizers.values import Batch, LossAndGradient, Piggyback
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import NonFiniteGradientError, UserError


class Oracle:
    """Evaluates losses and gradients near the parameters of a step. Collective, but for `begin`.

    With the losses the ranks compare what has to be the same on all: the step, the rate factor, the parameters.

    Parameters
    ----------
    exchange : Exchange
    like : array
        Of the library, dtype and device of the parameters.

    Attributes
    ----------
    gradients : (R, N)
        Of this rank's replicas, at the last evaluation.
    rows : list of (N,)
        Its rows.
    evaluations : int
        Gradients that all replicas together have evaluated.
    trials : int
        Losses that they have evaluated without the gradients.
    seconds : float
        Time that this rank has spent in `loss_and_gradient`.
    """

    state: ClassVar = {"evaluations": Kind.SHARED, "trials": Kind.SHARED}

    def __init__(self, exchange: Exchange, like: Array) -> None:
        self.exchange, local = exchange, len(exchange.local)
        self.gradients = array_namespace(like).empty((local, exchange.size), dtype=like.dtype, device=device(like))
        self.rows = [self.gradients[r, :] for r in range(local)]
        self.evaluations = self.trials = 0
        self.seconds = 0.0

    def begin(self, step: int, rate_factor: float, parameters: Whole) -> None:
        """Begin a step, from 1, at w (N,); with a schedule's factor, which is compared only. Local."""
        self._step, self._parameters = step, parameters
        factor = np.float64(rate_factor).view(np.int64)
        several = self.exchange.communicator.size > 1
        self._note = np.array([step, factor, checksum(parameters) if several else 0])

    def batch(
        self,
        loss_and_gradient: LossAndGradient,
        displacements: Rows | None = None,
        trial: bool = False,
        piggyback: Piggyback | None = None,
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
        piggyback : Piggyback, optional

        Raises
        ------
        NonFiniteGradientError
            On every rank, unless it is a trial.
        UserError
            On every rank, where the ranks are not at one step, rate factor or point.
        """
        self.evaluations += self.exchange.replicas
        with self._evaluating():
            losses = self._evaluate(loss_and_gradient, displacements)
            squares = to_host(square_norms(self.gradients))
        everyone = self._shared(losses, squares, piggyback=piggyback)
        finite = np.logical_and.reduce(np.isfinite(everyone), axis=1)
        if trial:
            everyone[~finite] = np.inf, 0
            for row in np.flatnonzero(~finite[list(self.exchange.local)]):
                self.gradients[int(row), ...] = 0
        elif not finite.all():
            first = int(np.argmin(finite))
            raise NonFiniteGradientError(self._step, first, *everyone[first])
        return Batch(self.gradients, everyone[:, 0], everyone[:, 1])

    def _evaluate(self, loss_and_gradient: LossAndGradient, displacements: Rows | None) -> Array:
        """Have the gradients at w̄ + the displacements in their rows; return the losses (R,). Local."""
        local = self.exchange.local
        at_once = getattr(loss_and_gradient, "at_once", None)
        if at_once:
            points = self._parameters if displacements is None else self._parameters + displacements
            losses, gradients = at_once(points, local)
            if gradients is not self.gradients:
                self.gradients[...] = gradients
            return losses
        losses = np.empty(len(local))
        for r, replica in enumerate(local):
            point = self._parameters if displacements is None else self._parameters + displacements[r, :]
            losses[r], gradient = loss_and_gradient(point, replica)
            if gradient is not self.rows[r]:
                self.gradients[r, :] = gradient
        return losses

    def losses(self, loss_and_gradient: LossAndGradient, rate: float, direction: Whole) -> Vector:
        """Return all replicas' losses (M,) at w − α d, d of all coordinates; ∞ for what is not finite.

        Where `loss_and_gradient` has no `losses`, its gradients are evaluated and lost, `gradients` among them.

        Raises
        ------
        UserError
            As `batch`.
        """
        local, point = self.exchange.local, combination(1.0, self._parameters, -rate, direction)
        losses_of = getattr(loss_and_gradient, "losses", None)
        if losses_of:
            self.trials += self.exchange.replicas
        else:
            self.evaluations += self.exchange.replicas
        losses: Array = np.full(len(local), np.inf)
        # Wherever a trial leads, and however the program says that it cannot compute a loss there.
        with self._evaluating("trial"), np.errstate(all="ignore"), contextlib.suppress(ArithmeticError, ValueError):
            if losses_of:
                losses = on_host(losses_of(point, local)).astype(np.float64)
            else:
                losses = np.array([loss_and_gradient(point, replica)[0] for replica in local])
        everyone = self._shared(losses)[:, 0]
        return np.where(np.isfinite(everyone), everyone, np.inf)

    @contextlib.contextmanager
    def _evaluating(self, phase: str = "gradient") -> Iterator[None]:
        """While the program's own function is called."""
        self.exchange.communicator.halfway(False)  # others wait for what follows in a gate
        self.exchange.communicator.enter(phase)
        started = time.perf_counter()
        with np.errstate(over="ignore", invalid="ignore"):  # a divergence is told later, once
            yield
        self.seconds += time.perf_counter() - started
        self.exchange.communicator.enter("algebra")

    def _shared(self, *own: Array, piggyback: Piggyback | None = None) -> Matrix:
        """Return numbers (R,) of this rank's replicas for all, (M, numbers), and compare the ranks' notes."""
        numbers = np.stack([on_host(each) for each in own], axis=1, dtype=np.float64)
        words = self._note if piggyback is None else np.concatenate([self._note, piggyback.send()])
        everyone, words = self.exchange.share(numbers, words, self._step)
        if piggyback is not None:
            piggyback.receive(words[:, len(self._note) :])
        compare(words[:, : len(self._note)])
        self.exchange.communicator.halfway(True)
        return everyone


def on_host(numbers: Array) -> Vector:
    """Return what a program gives as its losses, an array anywhere or a list of numbers, as NumPy's. Local."""
    return to_host(numbers) if hasattr(numbers, "__dlpack__") else np.asarray(numbers)


def compare(notes: NDArray[np.int64]) -> None:
    """Raise `UserError` where the ranks' notes (n, 3) differ: step, rate factor, parameters. Local: all have all."""
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
