"""The exchange of a parameter server."""

from __future__ import annotations

from collections.abc import Sequence

from qnewton_mpi.core.exchange.sliced import SlicedExchange


class ServerExchange(SlicedExchange):
    """Rank 0 holds everything and sends back the result: the parameter-server layout, as a baseline only."""

    name = "server"

    def _bounds(self, pieces: Sequence[int]) -> list[int]:
        return [0] + [self.size] * self.communicator.size
