"""How a group of a study that fails, or is told to stop, has the other groups end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from qnewton_mpi.parallel.communicator import Communicator

LATER, AT_ONCE = 1, 2  # tags: after the run under way, after its present step


class Halt:
    """Messages without contents between the first ranks of the groups, which never wait for each other.

    Parameters
    ----------
    world : Communicator
    leaders : sequence of int
        The first rank of each group.
    """

    def __init__(self, world: Communicator, leaders: Sequence[int]) -> None:
        self._world, self._leaders = world, leaders
        self._leads = world.rank in leaders
        self._sent = 0
        self._requests: list[MPI.Request] = []

    def send(self, at_once: bool) -> None:
        """Tell the other groups to end, once. Collective over this one, of which the leader speaks."""
        if not self._leads:
            return
        self._sent = AT_ONCE if at_once else LATER
        for leader in set(self._leaders) - {self._world.rank}:
            self._requests.append(self._world.mpi.Isend(np.zeros(0, "u1"), leader, self._sent))

    def came(self) -> bool:
        """Tell whether another group has told this one to end. Local; only the leader hears."""
        return self._leads and any(self._world.mpi.Iprobe(tag=tag) for tag in (LATER, AT_ONCE))

    def came_at_once(self) -> bool:
        """Tell whether another group has told this one to end after the present step. Local, as `came`."""
        return self._leads and self._world.mpi.Iprobe(tag=AT_ONCE)

    def end(self) -> None:
        """Take what was sent from the network. Collective over the world, when all groups have ended."""
        sent = self._world.mpi.allgather(self._sent)
        if self._leads:
            for leader in set(self._leaders) - {self._world.rank}:
                if sent[leader]:
                    self._world.mpi.Recv(np.zeros(0, "u1"), leader, sent[leader])
        MPI.Request.Waitall(self._requests)
