"""Learning-rate schedules: the factor that multiplies the rate of every method alike."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def factor(schedule: str, warmup: int, step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step.

    Parameters
    ----------
    schedule : {"constant", "cosine"}
        Cosine: ½ (1 + cos(π p)), p the part of the run that is done after the warm-up (Loshchilov and Hutter 2017).
    warmup : int
        The factor grows linearly over so many steps first, from 1/warmup to 1.
    step : int
        From 0.
    steps : int
        In the whole run.

    Examples
    --------
    >>> [round(factor("cosine", 2, step, 6), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))
