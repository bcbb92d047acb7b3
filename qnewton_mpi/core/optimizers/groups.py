"""Groups of coordinates that take a part of a step, or decay by themselves. Local."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from array_api_compat import array_namespace

from qnewton_mpi.arrays import Held


@dataclass(frozen=True)
class Group:
    """Coordinates with a rate and a weight decay of their own.

    Attributes
    ----------
    span : slice
        Of the N coordinates.
    share : float
        Of their part of a step that they take; 0: they rest.
    decay : float
        lr·λ; λ, where the rate is "auto".
    """

    span: slice
    share: float = 1.0
    decay: float = 0.0

    def among(self, held: slice) -> slice:
        """Return where the group is among the coordinates that a rank holds."""
        return slice(max(self.span.start - held.start, 0), max(self.span.stop - held.start, 0))


def shared_out(direction: Held, groups: Sequence[Group], held: slice) -> Held:
    """Return of d each group its share, (held,); d itself where all are 1."""
    parts = [group for group in groups if group.share != 1]
    if parts:
        direction = array_namespace(direction).asarray(direction, copy=True)
    for group in parts:
        own = group.among(held)
        direction[own] = group.share * direction[own] if group.share else 0
    return direction


def decay(w: Held, unit: float, groups: Sequence[Group], held: slice) -> None:
    """Do w ← (1 − u) w in its place, (held,), u the decays of the groups in a unit, but no more than w."""
    for group in groups:
        if group.decay:
            w[group.among(held)] *= max(0.0, 1 - unit * group.decay)
