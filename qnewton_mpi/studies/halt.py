"""How a group of a study that fails, or is told to stop, has the other groups end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI

from qnewton_mpi.parallel.communicator import Communicator

LATER, AT_ONCE = 1, 2  # tags: after the run under way, after its present step
LOOK_EVERY = 0.05  # seconds, while waiting for other groups


class Halt:
    """Messages without contents to the first ranks of the groups, which never wait for each other before the end.

    Parameters
    ----------
    world : Communicator
    leaders : sequence of int
        The first rank of each group.
    """

    def __init__(self, world: Communicator, leaders: Sequence[int]) -> None:
        self._world, self._leaders = world, leaders
        self._leads = world.rank in leaders
        self._sent: list[int] = []
        self._requests: list[MPI.Request] = []

    def send(self, at_once: bool) -> None:
        """Tell the other groups to end, once. Collective over this one, of which the leader speaks."""
        if self._leads:
            self._tell(AT_ONCE if at_once else LATER)

    def came(self) -> bool:
        """Tell whether another group has told this one to end. Local; only the leader hears."""
        return self._leads and any(self._world.mpi.Iprobe(tag=tag) for tag in (LATER, AT_ONCE))

    def came_at_once(self) -> bool:
        """Tell whether another group has told this one to end after the present step. Local, as `came`."""
        return self._leads and self._world.mpi.Iprobe(tag=AT_ONCE)

    def end(self, told: Callable[[], object]) -> None:
        """Wait until all groups have ended, and take what was sent from the network. Collective over the world.

        Parameters
        ----------
        told : callable
            Asked meanwhile on each rank whether it was told to stop, for the groups that have not ended. Local.
        """
        ended = self._world.mpi.Ibarrier()
        while not ended.Test():
            if told() and AT_ONCE not in self._sent:
                self._tell(AT_ONCE)
            time.sleep(LOOK_EVERY)
        for rank, tags in enumerate(self._world.mpi.allgather(self._sent)):
            for tag in tags if self._leads and rank != self._world.rank else ():
                self._world.mpi.Recv(np.zeros(0, "u1"), rank, tag)
        MPI.Request.Waitall(self._requests)

    def _tell(self, tag: int) -> None:
        """Send a message to the first ranks of the groups. Local."""
        self._sent.append(tag)
        for leader in set(self._leaders) - {self._world.rank}:
            self._requests.append(self._world.mpi.Isend(np.zeros(0, "u1"), leader, tag))
