"""Averages of the iterates, to be evaluated beside the last one: far less noisy at a constant rate."""

from __future__ import annotations

from typing import ClassVar

from qnewton_mpi.arrays import Array
from qnewton_mpi.core.means import unbiased
from qnewton_mpi.core.state import Kind

TAIL = 0.25


class Averages:
    """The mean of the last quarter of a run's iterates and an exponential mean of all. Local.

    A run that is made longer keeps the second. The first begins anew: where the last quarter of the longer run would
    have begun before, it is of what follows.

    Parameters
    ----------
    parameters : (N,)
        The first iterate, which counts for neither.
    steps : int
        Of the whole run.
    decay : float
        β of the exponential mean, e ← (1 − γ) e + γ w with γ = (1 − β)/(1 − βᵗ): unbiased from the first step on.

    Attributes
    ----------
    exponential, tail : (N,)
        `tail` is none before step `first` + 1.
    steps, first : int
        Of the whole run; the last step before the mean of its last quarter.
    """

    state: ClassVar = dict.fromkeys(("exponential", "tail", "steps", "first"), Kind.SHARED)

    def __init__(self, parameters: Array, steps: int, decay: float) -> None:
        self.exponential, self.tail = 1 * parameters, 1 * parameters
        self._weight = unbiased(decay)
        self.steps = self.first = 0
        self.lengthen(steps, 0)

    def lengthen(self, steps: int, done: int) -> None:
        """Have the whole run so many steps, of which some are done."""
        if steps != self.steps:
            self.steps, self.first = steps, max(done, steps - max(1, round(TAIL * steps)))

    def iterates(self, step: int) -> dict[str, Array]:
        """Return the means that there are after a step, by their names in a run's file."""
        return {"ema_": self.exponential, **({"tail_": self.tail} if step > self.first else {})}

    def add(self, parameters: Array, step: int) -> None:
        """Take in the iterate after a step (from 1)."""
        self.exponential += self._weight(step) * (parameters - self.exponential)
        if step == self.first + 1:
            self.tail = 1 * parameters
        elif step > self.first:
            self.tail += (parameters - self.tail) / (step - self.first)
