"""The settings that the natural-gradient methods share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qnewton_mpi.core.optimizers.settings import AUTO, Settings
from qnewton_mpi.core.settings import FRACTION, NOT_NEGATIVE, POSITIVE, SHARE, setting


@dataclass(frozen=True)
class NaturalGradientSettings(Settings):
    """Settings that the methods share, of which each sets some anew. 0 turns a rule off."""

    lr: float | str = setting("auto", "learning rate", POSITIVE, AUTO)
    momentum: float = setting(0.9, "momentum β; 0 is off", FRACTION)
    memory: float = setting(0.5, "share of the run that the Fisher matrix is the mean of; 0: one step alone", SHARE)
    update_every: int = setting(4, "steps between updates of F, but for the first ones", POSITIVE)
    curvature: float = setting(1.0, "times (ς + ν)/χ is the largest rate; 0: no bound", NOT_NEGATIVE)
    relative_change: float = setting(
        0.02, "η, of a layer, by a step's noise, at first 5 times that; 0: no bound", NOT_NEGATIVE
    )
    gain_share: float = setting(0.45, "κ of the rate auto; 0: no bound", NOT_NEGATIVE)


def bound_of(value: float) -> float:
    """Return the bound that a setting means: none for 0."""
    return value if value > 0 else math.inf
