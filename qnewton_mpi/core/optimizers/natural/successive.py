"""The curvature along steps whose losses cannot be had again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from array_api_compat import array_namespace

from qnewton_mpi.arrays import Held
from qnewton_mpi.core.means import Mean, at_least
from qnewton_mpi.core.state import Kind

RUNNING = 0.02  # weight of a step in the running means of the curvatures


class SuccessiveGradients:
    """χ of steps whose losses cannot be had again, from the gradients that there are anyway.

        (ḡ_{t+1} − ḡ_t)ᵀΔw_t = Δw_tᵀ H Δw_t + noise,    mean of the noise a_0 α tr(P⁻¹C)

    The newest gradient is in Δw_t by a_0, with its noise, whose covariance C the replicas' differences tell. The noise
    of the two batches is far larger than on one batch, so that only running means of both curvatures over some fifty
    steps say anything: it takes that long to see a change.
    """

    state: ClassVar = {"change": Kind.HELD} | dict.fromkeys(("before", "expected", "predicted"), Kind.SHARED)

    def __init__(self, held: Held) -> None:
        self.change = array_namespace(held).zeros_like(held)
        self.before = self.expected = self.predicted = 0.0  # ḡᵀΔw, the mean noise and ΔwᵀPΔw of the last step
        self.curvature, self.metric = Mean(at_least(RUNNING)), Mean(at_least(RUNNING))

    def parts(self) -> Mapping[str, Mean]:
        """Return the means of ΔwᵀHΔw and ΔwᵀPΔw."""
        return {"curvature": self.curvature, "metric": self.metric}

    def add(self, after: float) -> None:
        """Take in ḡᵀΔw of the gradient after the last step. Local."""
        if self.predicted > 0:
            self.curvature.add(after - self.before - self.expected)
            self.metric.add(self.predicted)

    def begin(self, chi: float, predicted: float) -> None:
        """Go on from a χ that is known, as if from ten steps. Local."""
        self.curvature.know(chi * predicted, 10)
        self.metric.know(predicted, 10)

    def follow(self, change: Held, before: float, expected: float, predicted: float) -> None:
        """Keep a step Δw: ḡᵀΔw, the mean of the noise and Δwᵀ P Δw. Local."""
        self.change, self.before, self.expected, self.predicted = change, before, expected, predicted

    @property
    def logarithm(self) -> float:
        """Log χ; 0 before it is known."""
        metric = self.metric.value
        ratio = abs(self.curvature.value) / metric if metric > 0 else 0.0
        return math.log(ratio) if ratio > 0 else 0.0
