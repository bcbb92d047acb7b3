"""The closure's losses at other parameters, where a step may lead, without a trace. Local."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from qnewton_mpi.adapter.accumulated import Accumulated
from qnewton_mpi.adapter.binding import Binding
from qnewton_mpi.adapter.closures import number
from qnewton_mpi.adapter.present import Present
from qnewton_mpi.adapter.surroundings import without_traces
from qnewton_mpi.adapter.tensors import to_tensor
from qnewton_mpi.adapter.together import Together
from qnewton_mpi.arrays import Array
from qnewton_mpi.errors import printable


class Trials:
    """Losses without gradients, of this rank's replicas.

    Parameters
    ----------
    binding : Binding
    together : Together
    accumulated : Accumulated
    """

    def __init__(self, binding: Binding, together: Together, accumulated: Accumulated) -> None:
        self._binding, self._together, self._accumulated = binding, together, accumulated
        self._graph = False  # whether one is needed
        self._told = False  # that the closure cannot be called for its loss alone

    def losses(self, present: Present, point: Array, replicas: range) -> NDArray[np.float64]:
        """Return the closure's losses (R,) at a point (N,); not a number where it cannot be called again.

        With the slope of the gradients that count, where those are not the loss's. Where they are of passes before the
        step, the closure may compute the loss of the last one anew.
        """
        if present.accumulated and present.again:
            present.again, present.slope = False, self._accumulated.lacking_slope(present)
        if present.accumulated and present.slope is None:  # as one number, wherever a step leads
            return np.full(len(replicas), present.told_loss)
        binding, moved = self._binding, self._binding.tensors.moved
        gradients = [p.grad for p in moved]
        here = torch.equal(to_tensor(point), binding.flat)
        losses = np.full(len(replicas), np.nan)
        try:
            with binding.at(point, present.frozen) as kept:
                self._fill(losses, present, here)
                if present.slope is not None and not (present.accumulated and losses[0] == present.told_loss):
                    losses += float(torch.sum(present.slope * (binding.flat - kept), dtype=torch.float64))
        finally:
            for p, gradient in zip(moved, gradients, strict=True):
                p.grad = gradient
            binding.settle()
        return losses

    def _fill(self, losses: NDArray[np.float64], present: Present, here: bool) -> None:
        """Fill in the losses at the parameters as they are; here: where the closure has just been called."""
        at_once = self._together.losses(present)
        for k in range(1 if present.accumulated else len(losses)):
            losses[k] = self._loss(present, k, here) if at_once is None else at_once[k]
        if present.accumulated:
            losses[1:] = losses[0]

    def _loss(self, present: Present, replica: int, here: bool) -> float:
        """Return the closure's loss, not a number where it fails.

        Without a graph, unless it turns out to need one, for derivatives in the loss.
        """
        binding = self._binding
        binding.shares.turn = replica
        for graph in (True,) if self._graph else (False, True):
            for p in binding.tensors.moved:
                p.grad = None
            try:
                with binding.surroundings.of(replica), without_traces(graph, binding.surroundings.module):
                    loss = number(present.closure())
                self._graph = graph
                return loss
            except Exception as error:
                failure = error
        if here and binding.core.exchange.communicator.rank == 0 and not self._told:
            self._told = True
            warnings.warn(
                f"the closure cannot be called again for its loss alone ({type(failure).__name__}: "
                f"{printable(str(failure)):.200}): the curvature is taken from successive gradients, a slower start",
                stacklevel=2,
            )
        return math.nan
