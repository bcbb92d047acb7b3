"""The best weights of a run so far, by the loss of the part that was held out to choose by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from qnewton_mpi.arrays import Array
from qnewton_mpi.core.state import Kind


class Best:
    """The iterate with the lowest validation NLL of all evaluations, and how many there were since. Local.

    Parameters
    ----------
    weights : (N + K,)
        The first iterate.

    Attributes
    ----------
    weights : (N + K,)
    nll : float
        nats; 0 before any evaluation.
    step : int
        After which.
    since : int
        Evaluations after that one: none was better.
    found : bool
        Whether there was one that is a number.
    judged : int
        The step of the last evaluation, which counts once, though a new file has it again; -1 before any.
    """

    state: ClassVar = dict.fromkeys(("weights", "nll", "step", "since", "found", "judged"), Kind.SHARED)

    def __init__(self, weights: Array) -> None:
        self.weights = 1 * weights
        self.nll, self.step, self.since, self.found, self.judged = 0.0, 0, 0, False, -1

    def add(self, weights: Array, nll: float, step: int) -> None:
        """Take in an evaluation after a step."""
        if step == self.judged:
            return
        self.judged = step
        self.since += 1
        if math.isfinite(nll) and (not self.found or nll < self.nll):
            self.weights, self.nll, self.step, self.since, self.found = 1 * weights, nll, step, 0, True

    def among(
        self, averages: Mapping[str, Array], figures: Mapping[str, float], step: int
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the best weights by their name in a run's file, if there are any, and what it says of them.

        Parameters
        ----------
        averages : mapping
            By their names, "ema_" and so on, of the last evaluation, which may be better.
        figures : mapping
            Of that evaluation.
        step : int
            After which it was.
        """
        if not self.found:
            return {}, {}
        best = self.nll, self.step, "last", self.weights
        for name, weights in averages.items():
            if figures[f"{name}validation_nll"] < best[0]:
                best = figures[f"{name}validation_nll"], step, name.rstrip("_"), weights
        nll, where, iterate, weights = best
        return {"best_": weights}, {"best_validation_nll": nll, "best_step": where, "best_iterate": iterate}
