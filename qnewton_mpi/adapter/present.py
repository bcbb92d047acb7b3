"""What one rank knows of the step that it is in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qnewton_mpi.adapter.closures import BatchLoss, Closure
from qnewton_mpi.core.optimizers.groups import Group
from qnewton_mpi.errors import UserError


@dataclass
class Present:
    """The present step.

    Attributes
    ----------
    closure : callable
        Which leaves the gradients and returns the loss.
    batch : BatchLoss or None
        That closure, where it is a loss of a batch's rows.
    accumulated : bool
        Whether the gradients are of backward passes before the step.
    found : (tensors,) bool
        Which have had a gradient in this step.
    frozen : list of bool
        Which are frozen now.
    groups : list of Group
        Each tensor's share of the step, and its decay.
    told_loss : float
        With gradients of passes before, what the closure has returned; not a number until then.
    again : bool
        Whether it may then compute that again.
    slope : (N,) Tensor or None
        What the slope of the losses lacks to that of the gradients that count.
    failure : UserError or None
        Of this rank.
    """

    closure: Closure
    batch: BatchLoss | None
    accumulated: bool
    found: NDArray[np.bool_]
    frozen: list[bool]
    groups: list[Group] = field(default_factory=list)
    told_loss: float = math.nan
    again: bool = False
    slope: torch.Tensor | None = None
    failure: UserError | None = None

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do what may fail on this rank alone, unless something has already; all ranks are told as they agree."""
        if self.failure is None:
            try:
                return action(*arguments)
            except UserError as error:
                self.failure = error
        return math.nan

    def fail(self) -> None:
        """Raise what has failed, if anything has."""
        if self.failure is not None:
            raise self.failure
