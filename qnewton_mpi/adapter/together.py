"""The replicas of a rank evaluated together, once that is seen to be the same as one after the other."""

from __future__ import annotations

import contextlib
import math
import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from qnewton_mpi.adapter.at_once import AtOnce, NotAtOnceError
from qnewton_mpi.adapter.binding import Binding
from qnewton_mpi.adapter.one_by_one import OneByOne
from qnewton_mpi.adapter.present import Present
from qnewton_mpi.adapter.surroundings import in_float32, without_traces
from qnewton_mpi.adapter.tensors import to_tensor
from qnewton_mpi.arrays import Array
from qnewton_mpi.errors import UserError, printable

TO_BE_SEEN, AT_ONCE, ONE_BY_ONE = "to be seen", "at once", "one by one"  # the replicas of a rank, by rows
ALL = -1  # for a replica, whose random numbers are those of all


class Together:
    """The losses of a batch's rows, and their gradients, of all replicas of this rank. Local.

    Parameters
    ----------
    binding : Binding
    one_by_one : OneByOne
    module : Module, optional
        Whose the parameters are.

    Attributes
    ----------
    way : str
        TO_BE_SEEN, AT_ONCE or ONE_BY_ONE.
    reason : str or None
        Why they are one by one on this rank, where it is this one that has to.
    """

    def __init__(self, binding: Binding, one_by_one: OneByOne, module: torch.nn.Module | None) -> None:
        self._binding, self._one_by_one = binding, one_by_one
        self._at_once = AtOnce(binding.tensors.moved, module)
        self.way = TO_BE_SEEN if binding.several else ONE_BY_ONE
        self.reason: str | None = None
        self._told = False

    def losses_and_gradients(
        self, present: Present, points: Array, replicas: range
    ) -> tuple[NDArray[np.float64], Array]:
        """Evaluate this rank's replicas: at once, where that is seen to be the same, or one after the other.

        Returns
        -------
        losses : (R,)
        gradients : (R, N)
            The core's rows.
        """
        core = self._binding.core
        here = points is core.parameters
        if here and self.way == AT_ONCE and present.failure is None:
            found = self._evaluated(present)
            if found is not None:
                self._one_by_one.check(present)
                return found, core.gradients
        if here and self.way == TO_BE_SEEN:
            return self._to_be_seen(present, points, replicas), core.gradients
        return self._one_after_the_other(present, points, replicas), core.gradients

    def losses(self, present: Present) -> NDArray[np.float64] | None:
        """Return the losses (R,) at the parameters as they are; nothing where they are to be one by one, or fail."""
        if present.batch is None or self.way != AT_ONCE:
            return None
        binding = self._binding
        for p in binding.tensors.moved:
            p.grad = None
        try:
            with binding.surroundings.of(ALL), without_traces(False, binding.surroundings.module):
                return self._at_once.losses(present.batch.of, len(binding.core.rows)).double().cpu().numpy()
        except Exception:  # as where they are one by one
            return None

    def give_up(self, rank: int) -> None:
        """Have all ranks do as one has to, and let the first say why."""
        self.way = ONE_BY_ONE
        if rank == 0 and not self._told:
            self._told = True
            warnings.warn(
                "the replicas of a rank are evaluated one after the other, which takes longer: "
                + (self.reason or "another rank cannot do otherwise"),
                stacklevel=2,
            )

    def _one_after_the_other(self, present: Present, points: Array, replicas: range) -> NDArray[np.float64]:
        """Return the losses, with the gradients in the core's rows."""
        losses = np.empty(len(replicas))
        for k, replica in enumerate(replicas):
            point = points[k, :] if points.ndim > 1 else points
            losses[k], _ = self._one_by_one.loss_and_gradient(present, point, replica)
        return losses

    def _to_be_seen(self, present: Present, points: Array, replicas: range) -> NDArray[np.float64]:
        """Do the same, and see whether all at once would do; what counts is rounded as the program has it."""
        surroundings = self._binding.surroundings
        with (
            in_float32(self._binding.flat.device) as otherwise,
            surroundings.on_trial() if otherwise else contextlib.nullcontext(),
        ):
            with self._at_once.watching() as called:
                losses = self._one_after_the_other(present, points, replicas)
            losses = self._seen(present, losses)
        if not otherwise or present.failure is not None:
            return losses
        called.put_back()  # where no module was given
        present.slope = None
        found = self._evaluated(present) if self.way == AT_ONCE else None
        return self._one_after_the_other(present, points, replicas) if found is None else found

    def _evaluated(self, present: Present) -> NDArray[np.float64] | None:
        """Return the losses, with the gradients in the core's rows; nothing where that cannot be done."""
        binding = self._binding
        rows = to_tensor(binding.core.gradients)
        binding.settle()
        assert present.batch is not None
        try:
            with binding.surroundings.of(ALL), without_traces(True, binding.surroundings.module):
                losses, gradients = self._at_once.losses_and_gradients(present.batch.of, len(rows), present.frozen)
        except UserError as error:
            present.failure = error
            return np.full(len(rows), math.nan)
        except NotAtOnceError:
            self.way = TO_BE_SEEN  # there may be other modules now
            return None
        except Exception as error:  # of a loss, or of vmap, there is no end of kinds
            self._go_on_one_by_one(error)
            return None
        present.found |= binding.tensors.take_rows(rows, gradients)
        binding.settle()
        return losses.double().cpu().numpy()

    def _seen(self, present: Present, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """See whether all replicas at once are what they have just been one by one; return the losses.

        If so they count, so that a run that is gone on with is to the bit the one that never stopped.
        """
        binding = self._binding
        rows = to_tensor(binding.core.gradients)
        if not (np.isfinite(losses).all() and bool(rows.isfinite().all())):
            return losses  # to be seen at the next step
        binding.tensors.drop_gradients(unused=True)
        assert present.batch is not None
        try:
            with binding.surroundings.of(ALL), without_traces(True, binding.surroundings.module):
                expected = torch.from_numpy(losses)
                found, gradients = self._at_once.check(present.batch.of, expected, rows, present.frozen)
        except Exception as error:
            self._go_on_one_by_one(error)
            return losses
        self.way = AT_ONCE
        binding.tensors.take_rows(rows, gradients)
        binding.settle()
        return found.double().cpu().numpy()

    def _go_on_one_by_one(self, error: Exception) -> None:
        """Evaluate the replicas one after the other from now on, and on all ranks from the next step."""
        self.way = ONE_BY_ONE
        kind = "" if isinstance(error, NotAtOnceError) else f"{type(error).__name__}: "
        self.reason = f"{kind}{printable(str(error)):.200}"
