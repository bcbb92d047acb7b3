"""What a program gives a step to compute the loss, and how the core calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qnewton_mpi.adapter.shares import Shares
from qnewton_mpi.adapter.tensors import Tensors
from qnewton_mpi.arrays import Array
from qnewton_mpi.errors import UserError

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Evaluations:
    """A closure as the core calls it: for the gradient of a replica, or for the losses of all of this rank's."""

    loss_and_gradient: Callable[[Array, int], tuple[float, Array]]
    losses: Callable[[Array, range], NDArray[np.float64]]
    at_once: Callable[[Array, range], tuple[NDArray[np.float64], Array]] | None = None

    def __call__(self, point: Array, replica: int) -> tuple[float, Array]:
        return self.loss_and_gradient(point, replica)


class BatchLoss:
    """The loss of a batch's rows as a closure: called, it leaves the gradients of the present replica's. Local.

    Parameters
    ----------
    loss_of : callable
        The mean loss of rows of the batch's tensors.
    batch : tuple of Tensor
    shares : Shares
    tensors : Tensors
    """

    def __init__(
        self, loss_of: Callable[..., Any], batch: tuple[torch.Tensor, ...], shares: Shares, tensors: Tensors
    ) -> None:
        self._loss_of, self._batch, self._shares, self._tensors = loss_of, batch, shares, tensors

    def __call__(self) -> float:
        loss = self._of_share()
        value = number(loss)
        if torch.is_grad_enabled():
            if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
                raise UserError("the loss of a batch must be a tensor that depends on the parameters")
            torch.autograd.backward(loss.reshape(()))
        return value

    def of(self, replica: torch.Tensor) -> torch.Tensor:
        """Return the loss of a replica of this rank, which vmap has for all."""
        self._shares.turn = replica
        try:
            loss: torch.Tensor = self._of_share()
            return loss.reshape(())
        finally:
            self._shares.turn = 0

    def _of_share(self) -> Any:
        """Return the loss of the present replica's rows of the batch."""
        loss = self._loss_of(*self._shares.of(*self._batch))
        if any(p.grad is not None for p in self._tensors.moved if p.requires_grad):
            raise UserError("the loss of a batch is to be returned alone: leave out its backward()")
        return loss


def number(loss: Any) -> float:
    """Return the loss that a closure has returned; `UserError` for what is none."""
    try:
        return float(loss.item() if isinstance(loss, torch.Tensor) else loss)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"{loss!r:.60}"
        raise UserError(f"the closure must return the loss, one number, and has returned {kind}") from error
