"""The curvature along steps whose losses cannot be had again."""

from __future__ import annotations

import math
from typing import ClassVar

from array_api_compat import array_namespace

from qnewton_mpi.arrays import Array
from qnewton_mpi.core.state import Kind

RUNNING = 0.02  # weight of a step in the running means of the curvatures


class SuccessiveGradients:
    """χ of steps whose losses cannot be had again, from the gradients that there are anyway.

        (ḡ_{t+1} − ḡ_t)ᵀΔw_t = Δw_tᵀ H Δw_t + noise,    mean of the noise a_0 α tr(P⁻¹C)

    The newest gradient is in Δw_t by a_0, with its noise, whose covariance C the replicas' differences tell. The noise
    of the two batches is far larger than on one batch, so that only running means of both curvatures over some fifty
    steps say anything: it takes that long to see a change.
    """

    state: ClassVar = {"change": Kind.HELD} | dict.fromkeys(
        ("count", "before", "expected", "predicted", "curvature", "metric"), Kind.SHARED
    )

    def __init__(self, held: Array) -> None:
        self.change = array_namespace(held).zeros_like(held)
        self.count = 0
        self.before = self.expected = self.predicted = 0.0  # ḡᵀΔw, the mean noise and ΔwᵀPΔw of the last step
        self.curvature = self.metric = 0.0  # running means

    def add(self, after: float) -> None:
        """Take in ḡᵀΔw of the gradient after the last step. Local."""
        if self.predicted > 0:
            curvature = after - self.before - self.expected
            self.count += 1
            weight = max(1 / self.count, RUNNING)
            self.curvature += weight * (curvature - self.curvature)
            self.metric += weight * (self.predicted - self.metric)

    def begin(self, chi: float, predicted: float) -> None:
        """Go on from a χ that is known, as if from ten steps. Local."""
        self.count, self.curvature, self.metric = 10, chi * predicted, predicted

    def follow(self, change: Array, before: float, expected: float, predicted: float) -> None:
        """Keep a step Δw: ḡᵀΔw, the mean of the noise and Δwᵀ P Δw. Local."""
        self.change, self.before, self.expected, self.predicted = change, before, expected, predicted

    @property
    def logarithm(self) -> float:
        """Log χ; 0 before it is known."""
        ratio = abs(self.curvature) / self.metric if self.metric > 0 else 0.0
        return math.log(ratio) if ratio > 0 else 0.0
