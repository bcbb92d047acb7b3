"""How long collectives take by the α-β model, and what a method moves in a step. Needs no MPI."""

from __future__ import annotations

import math
from dataclasses import dataclass

WORD = 4  # bytes, float32


@dataclass(frozen=True)
class Network:
    """Seconds of collectives among n ranks, of B bytes a rank (Thakur, Rabenseifner and Gropp 2005).

        Allreduce        min(⌈log₂n⌉ (α + B β), 2 ⌈log₂n⌉ α + 2 (n−1)/n B β)   recursive doubling; Rabenseifner
        Reduce_scatter   ⌈log₂n⌉ α + (n−1)/n B β                                B before
        Allgather        ⌈log₂n⌉ α + (n−1)/n B β                                B after
        Alltoall         min((n−1) α + (n−1)/n B β, ⌈log₂n⌉ (α + B β/2))        B before and after; pairwise; Bruck

    Attributes
    ----------
    latency : float
        α, seconds a message.
    seconds_per_byte : float
        β. The defaults are those of a usual cluster: 5 μs and 5 GB/s.
    """

    latency: float = 5e-6
    seconds_per_byte: float = 2e-10

    def allreduce(self, ranks: int, size: float) -> float:
        """Return the seconds of an Allreduce of this many bytes."""
        rounds, alpha, time = _rounds(ranks), self.latency, self.seconds_per_byte * size
        return min(rounds * (alpha + time), 2 * rounds * alpha + 2 * (ranks - 1) / ranks * time)

    def allgather(self, ranks: int, size: float) -> float:
        """Return the seconds of an Allgather that leaves this many bytes on each rank; as of a Reduce_scatter."""
        return _rounds(ranks) * self.latency + (ranks - 1) / ranks * size * self.seconds_per_byte

    reduce_scatter = allgather

    def alltoall(self, ranks: int, size: float) -> float:
        """Return the seconds of an Alltoall of this many bytes a rank."""
        time = self.seconds_per_byte * size
        pairwise = (ranks - 1) * self.latency + (ranks - 1) / ranks * time
        return min(pairwise, _rounds(ranks) * (self.latency + time / 2))


@dataclass(frozen=True)
class Traffic:
    """What a method moves in a step besides the new parameters, on average.

    Attributes
    ----------
    columns : float
        How often all replicas' columns cross to where they are combined.
    means : float
        How often the mean gradient crosses by itself, and is not had from the columns.
    combinations : int or None
        Of the columns, of which the sums over the ranks, and the mean with them, do in place of columns.
    rows : float
        How often columns go back to their replicas.
    """

    columns: float = 0.0
    means: float = 1.0
    combinations: int | None = None
    rows: float = 0.0


def _rounds(ranks: int) -> int:
    return math.ceil(math.log2(ranks))
