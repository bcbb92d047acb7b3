"""What goes into a step of the natural-gradient methods and what comes out of an update of F. Local."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from qnewton_mpi.arrays import Held
from qnewton_mpi.core.optimizers.values import Batch, Step


class Update(NamedTuple):
    """What an update of F tells of it.

    Attributes
    ----------
    mean : (held,)
        ḡ.
    trace : float
        tr F.
    known : float
        tr P⁻¹F: the noise of one sample.
    seen : tuple of float, optional
        tr P⁻¹C₁ and ḡᵀ P⁻¹ ḡ of the batch, with P as it was before; none before the first update. Of a batch that is in
        P already, the noise would seem less than it is where P has it for more than it is.
    """

    mean: Held
    trace: float
    known: float
    seen: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class NaturalStep(Step):
    """A step before it is bounded.

    Attributes
    ----------
    number : int
        t, from 1.
    norms : tuple of float
        ḡᵀḡ, dᵀd and ḡᵀd.
    batch : Batch
        Of w, before the step.
    z : (held,)
    dz : float
        dᵀz.
    sizes : mapping
        For α = 1, by the name of the bound that looks at it (`Bound.size`).
    noise : float
        ν.
    reach : float
        ς + ν.
    measurable : bool
        Whether the curvature along steps can be measured.
    """

    number: int
    norms: tuple[float, float, float]
    batch: Batch
    z: Held
    dz: float
    sizes: Mapping[str, float]
    noise: float
    reach: float
    measurable: bool = True

    def along(self, rate: float) -> tuple[float, float]:
        """Return ḡᵀΔw and Δwᵀ P Δw of a rate."""
        return -rate * self.norms[2], rate * rate * self.dz
