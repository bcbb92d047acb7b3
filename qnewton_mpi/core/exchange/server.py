"""The exchange of a parameter server."""

from __future__ import annotations

from collections.abc import Sequence

from qnewton_mpi.core.exchange.sliced import SlicedExchange


class ServerExchange(SlicedExchange):
    """Rank 0 holds everything and sends back the result: the parameter-server layout, as a baseline only.

    All ranks together send what they do by `sliced`. So `seconds` is right of the bytes a rank in the mean, and the
    least that the time can be: most of them pass through rank 0.
    """

    name = "server"

    def _bounds(self, pieces: Sequence[int]) -> list[int]:
        return [0] + [self.size] * self.communicator.size
