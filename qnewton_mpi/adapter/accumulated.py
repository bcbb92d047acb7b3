"""Gradients of backward passes before the step, taken for those of the replicas. Local."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from qnewton_mpi.adapter.binding import Binding
from qnewton_mpi.adapter.closures import number
from qnewton_mpi.adapter.one_by_one import OneByOne
from qnewton_mpi.adapter.present import Present
from qnewton_mpi.adapter.surroundings import without_traces
from qnewton_mpi.arrays import Array
from qnewton_mpi.errors import UserError


class Accumulated:
    """The gradients that are there, and the loss that the closure tells for all replicas.

    Parameters
    ----------
    binding : Binding
    one_by_one : OneByOne
    """

    def __init__(self, binding: Binding, one_by_one: OneByOne) -> None:
        self._binding, self._one_by_one = binding, one_by_one

    def losses_and_gradients(
        self, present: Present, points: Array, replicas: range
    ) -> tuple[NDArray[np.float64], Array]:
        """Return the closure's loss for each replica (R,), and the core's rows (R, N) with the gradients."""
        present.attempt(self._take_passes, present, points)
        self._binding.tensors.note_gradients()
        self._one_by_one.check(present)
        return np.full(len(replicas), present.told_loss), self._binding.core.gradients

    def _take_passes(self, present: Present, points: Array) -> None:
        binding = self._binding
        core, passes = binding.core, binding.passes
        if points is not core.parameters or (binding.whole and core.exchange.communicator.size > 1):
            raise UserError(
                "there are gradients from before the step: for methods that evaluate at other parameters, and with "
                "replicas=… on several ranks, the closure must compute all of them, after optimizer.zero_grad()"
            )
        binding.settle()
        before = passes.number
        with binding.surroundings.of(0), torch.enable_grad():
            loss = number(present.closure())
        present.found |= passes.finish()
        binding.settle()
        present.told_loss, present.again = loss, passes.number == before

    def lacking_slope(self, present: Present) -> torch.Tensor | None:
        """Return ḡ − ∇c(w), (N,), c the loss that the closure computes; None where it computes none.

        So c(w') + (ḡ − ∇c(w))ᵀ(w' − w) has the gradient of all passes at w, and the curvature of those samples of which
        the closure computes the loss.
        """
        binding = self._binding
        moved, spans = binding.tensors.moved, binding.tensors.spans
        free = [k for k, p in enumerate(moved) if p.requires_grad and p.grad is not None]
        slope = torch.zeros_like(binding.flat)
        try:
            with binding.surroundings.of(0), without_traces(True, binding.surroundings.module):
                own = torch.autograd.grad(present.closure(), [moved[k] for k in free], allow_unused=True)
        except Exception:  # as there is nothing to derive, or no longer
            return None
        for k, gradient in zip(free, own, strict=True):
            whole = moved[k].grad
            slope[spans[k]] = (whole if gradient is None else whole - gradient).reshape(-1)
        return slope
