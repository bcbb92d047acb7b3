"""How the replicas' columns reach the ranks that combine them. MPI, no mathematics.

Every rank evaluates R gradients, the rows of an array (R, N). The optimizers' algebra runs on what a rank *holds*: a
range of the N coordinates, of every replica's column and of every vector. An exchange decides which range that is, and
moves data between the two layouts; the algebra is the same for all of them.

============  =======================  ========================================================================
exchange      held by a rank           words received per rank: the mean and the new parameters / all columns
============  =======================  ========================================================================
`allgather`   everything               2N(n−1)/n, an Allreduce / (M−R)N
`sliced`      N/n of the coordinates   2N(n−1)/n, a Reduce_scatter and an Allgather / (M−R)N/n, an Alltoall
`server`      everything on rank 0,    rank 0: (n−1)N, others N; Reduce and Broadcast / rank 0: (M−R)N
              nothing elsewhere
============  =======================  ========================================================================

Where the columns have crossed, the mean is taken from them instead. K combinations of the columns,
where those will do, cross as K + 1 means, the mean among them, or as columns, whichever are fewer words.
"""

from __future__ import annotations

from qnewton_mpi.core.exchange.allgather import AllgatherExchange
from qnewton_mpi.core.exchange.base import Exchange
from qnewton_mpi.core.exchange.cost import Network, Traffic
from qnewton_mpi.core.exchange.server import ServerExchange
from qnewton_mpi.core.exchange.sliced import SlicedExchange

__all__ = ["EXCHANGES", "AllgatherExchange", "Exchange", "ServerExchange", "SlicedExchange", "choose"]

EXCHANGES: dict[str, type[Exchange]] = {kind.name: kind for kind in (AllgatherExchange, SlicedExchange, ServerExchange)}
LEAST_SAVING = 0.9


def choose(traffic: Traffic, ranks: int, replicas: int, parameters: int, network: Network | None = None) -> str:
    """Return `sliced`, which shares out state and algebra, unless `allgather` should save a tenth of the time. Local.

    Parameters
    ----------
    traffic : Traffic
        Of the method.
    ranks, replicas, parameters : int
        n, M, N; float32.
    network : Network, optional
        A usual cluster's by default.
    """
    network = network or Network()
    if ranks == 1:
        return AllgatherExchange.name
    gathered, sliced = (
        kind.seconds(network, traffic, ranks, replicas, parameters) for kind in (AllgatherExchange, SlicedExchange)
    )
    return AllgatherExchange.name if gathered < LEAST_SAVING * sliced else SlicedExchange.name
