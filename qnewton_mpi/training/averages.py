"""Averages of the iterates, to be evaluated beside the last one: far less noisy at a constant rate."""

from __future__ import annotations

from typing import ClassVar

from qnewton_mpi.core.state import Kind
from qnewton_mpi.parallel.device import Array

TAIL = 0.25


class Averages:
    """The mean of the last quarter of a run's iterates and an exponential mean of all. Local.

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
        `tail` is the first iterate until the last quarter of the run begins.
    """

    state: ClassVar = {"exponential": Kind.SHARED, "tail": Kind.SHARED}

    def __init__(self, parameters: Array, steps: int, decay: float) -> None:
        self.exponential, self.tail = 1 * parameters, 1 * parameters
        self._first, self._decay = steps - max(1, round(TAIL * steps)), decay

    def add(self, parameters: Array, step: int) -> None:
        """Take in the iterate after a step (from 1)."""
        self.exponential += (1 - self._decay) / (1 - self._decay**step) * (parameters - self.exponential)
        if step > self._first:
            self.tail += (parameters - self.tail) / (step - self._first)
