"""Who has left: no rank waits for ever in a collective for one whose program has ended.

Each rank counts, for each group of ranks, the gates that it has entered: the collectives in which it may have to wait
for another rank's program. At its end it sends the counts to the next rank of each communicator. A rank that waits
looks for such messages: one that left having entered fewer gates will never come, which no time has to prove. Where
some ranks have left and others wait, one of those that wait comes right after one of those that left, and hears of it.

A rank that has waited for some time asks the next one where it waits, too: ranks that wait at different gates, as where
one alone builds an optimizer or loads a state, would do so for ever. Of a ring of ranks that do not all wait at one
gate, two neighbours do not.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from mpi4py import MPI

from qnewton_mpi.parallel.ending import GRACE, abort

# On duplicates, and on the world by ranks that have none of those: below the 32,767 that MPI promises.
FAREWELL, WHO_WAITS, I_WAIT = 32_749, 32_750, 32_751
LOOK_EVERY = 0.1  # seconds between looks for messages, while waiting
NAP = 1e-4  # seconds between tries, from then on: the core is free for others
ANSWERS_WITHIN = 1.0  # seconds in which those that wait too say so
ASK_AFTER = 2.0  # seconds of waiting, after which the next rank is asked where it waits
SET_UP, AGREEMENT = "the set-up", "an agreement"  # purposes of gates, besides the steps
DUPLICATE = MPI.Comm.Create_keyval()  # of a communicator: the `Duplicate` that all that is built on it shares

Group = tuple[int, ...]
"""Ranks, as the world numbers them."""

Where = tuple[int, int, str]
"""The hash of a group, the number of a gate, and its purpose."""


@dataclass
class Place:
    """How far a rank is with a group.

    Attributes
    ----------
    entered : int
        Gates.
    purpose : str
        Of the last of them.
    halfway : bool
        Whether more collectives follow on that gate, without which the others cannot go on.
    """

    entered: int = 0
    purpose: str = ""
    halfway: bool = False


class Duplicate:
    """A private duplicate of a communicator, freed with the last reference to it. Building one is collective.

    Parameters
    ----------
    parent : MPI.Comm

    Attributes
    ----------
    mpi : MPI.Comm
    agreements : MPI.Comm
        For the gates of agreements alone: where a rank comes to one and another to a step, MPI would take the one's
        collective for the other's.
    rank, size : int
    node_rank : int
        Position among the ranks that share this node's memory.
    answers : dict
        Where others have said that they wait, by their ranks; None where they did not.
    asked : bool
        Whether the next rank owes an answer.
    """

    def __init__(self, parent: MPI.Comm) -> None:
        self.mpi, self.agreements = parent.Dup(), parent.Dup()
        self.rank, self.size = self.mpi.Get_rank(), self.mpi.Get_size()
        node = self.mpi.Split_type(MPI.COMM_TYPE_SHARED)
        self.node_rank = node.Get_rank()
        node.Free()
        self.answers: dict[int, Where | None] = {}
        self.asked = False
        DUPLICATES.add(self)

    def __del__(self) -> None:
        if not MPI.Is_finalized():
            self.mpi.Free()
            self.agreements.Free()

    def tell(self, tag: int, ranks: Iterable[int], content: Any) -> None:
        """Send a small message to some ranks, without waiting for anything. Local."""
        SENT[:] = [request for request in SENT if not request.Test()]  # a long wait asks again and again
        SENT.extend(self.mpi.isend(content, rank, tag) for rank in ranks)


DUPLICATES: weakref.WeakSet[Duplicate] = weakref.WeakSet()
PLACES: dict[Group, Place] = {}  # of this rank
LEFT: dict[int, dict[int, Place]] = {}  # of those that have left, by rank, and by the hash of the group
SENT: list[MPI.Request] = []
PROCESS = os.getpid()  # not one that it forks


class Gates:
    """The gates of a communicator. Building them is collective, and a gate where there is no duplicate yet.

    Parameters
    ----------
    parent : MPI.Comm
    stall_timeout : float, optional
        Seconds after which a wait ends the job, whoever has left or not.

    Attributes
    ----------
    duplicate : Duplicate
    """

    def __init__(self, parent: MPI.Comm, stall_timeout: float | None) -> None:
        watch()
        self.stall_timeout = stall_timeout
        group, world = parent.Get_group(), MPI.COMM_WORLD.Get_group()
        self.group: Group = tuple(group.Translate_ranks(None, world))
        group.Free()
        world.Free()
        self.place = PLACES.setdefault(self.group, Place())
        shared = cast("Duplicate | None", parent.Get_attr(DUPLICATE))
        if shared is None:
            self.enter(parent.Ibarrier, SET_UP)
            shared = Duplicate(parent)
            parent.Set_attr(DUPLICATE, shared)
        self.duplicate = shared

    def enter(self, collective: Callable[[], MPI.Request], purpose: str) -> None:
        """Do a collective; end the job where a rank cannot come to it. Collective.

        Parameters
        ----------
        collective : callable
            Begins it.
        purpose : str
            For those that wait in vain, as "step 3".
        """
        place = self.place
        place.entered += 1
        place.purpose = purpose
        if len(self.group) == 1:
            return
        request, started = collective(), time.monotonic()
        look, asked = started + LOOK_EVERY, None
        while not request.Test():
            now = time.monotonic()
            if now < started + LOOK_EVERY:
                os.sched_yield()  # there may be more ranks than cores
                continue
            time.sleep(NAP)
            if now < look:
                continue
            look = now + LOOK_EVERY
            here = hash(self.group), place.entered, purpose
            receive(here)
            self._end_without_one_that_left()
            if purpose != SET_UP and now > started + ASK_AFTER:
                self._end_where_another_waits_elsewhere(here)
            if self.stall_timeout is None or now < started + self.stall_timeout:
                continue
            if asked is None:
                asked = now
                if purpose != SET_UP:
                    self.duplicate.tell(WHO_WAITS, range(len(self.group)), here)
            elif now > asked + ANSWERS_WITHIN:
                answers = {} if purpose == SET_UP else self.duplicate.answers
                self._end_stalled({rank for rank, where in answers.items() if where == here}, now - started)

    def agree(self) -> None:
        """Wait for all ranks to come to an agreement, as `enter`. Collective."""
        self.enter(self.duplicate.agreements.Ibarrier, AGREEMENT)

    def _end_without_one_that_left(self) -> None:
        """End the job where a rank has left before the gate that this one waits in. Local."""
        rank, place = MPI.COMM_WORLD.Get_rank(), self.place
        for other in LEFT.keys() & set(self.group):
            last = LEFT[other].get(hash(self.group), Place())
            if last.entered >= place.entered:
                continue
            if rank != min(set(self.group) - LEFT.keys()):
                time.sleep(1)  # in which the first that waits ends the job, if it has heard of one that left
            told = f"rank {other} has left before rank {rank}, which waits for it in {place.purpose}"
            if last.entered:
                told = f"rank {other} has left after {last.purpose}, rank {rank} waits for it in {place.purpose}"
            advice = (
                "give all ranks as many steps (drop_last=True, a DistributedSampler), and let none end before another"
            )
            abort(f"qnewton-mpi: {told}: {advice}", code=2)

    def _end_where_another_waits_elsewhere(self, here: Where) -> None:
        """End the job where the next rank waits for this one at another gate; ask it where it waits. Local."""
        duplicate = self.duplicate
        following = (duplicate.rank + 1) % duplicate.size
        there = duplicate.answers.get(following)
        if there is not None and there[:2] == here[:2] and there != here:
            # The one that waits elsewhere sees it too, or the one before it: one of them is to end the job.
            time.sleep(duplicate.rank % 2 if following else 2)
            abort(
                f"qnewton-mpi: rank {self.group[duplicate.rank]} waits in {here[2]}, rank {self.group[following]} in "
                f"{there[2]}: let all ranks build optimizers, load states and take steps alike, in the same order",
                code=2,
            )
        if not duplicate.asked:
            duplicate.asked = True
            duplicate.tell(WHO_WAITS, [following], here)

    def _end_stalled(self, waiting: set[int], seconds: float) -> NoReturn:
        """End the job, some ranks of which, as the group numbers them, have said that they wait. Local."""
        rank = MPI.COMM_WORLD.Get_rank()
        if waiting and rank != self.group[min(waiting)]:
            time.sleep(1)  # in which that one ends the job
        missing = ", ".join(str(other) for k, other in enumerate(self.group) if k not in waiting)
        whom = f"rank(s) {missing}" if waiting else "another rank"
        abort(
            f"qnewton-mpi: stalled: rank {rank} has waited for {whom} in {self.place.purpose} for {seconds:.0f} s; the "
            "job is ended (stall_timeout)",
            code=1,
        )


def receive(here: Where | None = None) -> None:
    """Take in the messages that have come, and say where this rank waits, if it does, to who has asked. Local."""
    status = MPI.Status()
    for mpi in (MPI.COMM_WORLD, *(duplicate.mpi for duplicate in DUPLICATES)):
        while mpi.Iprobe(tag=FAREWELL):
            rank, places = mpi.recv(tag=FAREWELL)
            LEFT[rank] = places
    for duplicate in DUPLICATES:
        while duplicate.mpi.Iprobe(tag=WHO_WAITS, status=status):
            group, *_ = duplicate.mpi.recv(source=status.source, tag=WHO_WAITS)
            duplicate.tell(I_WAIT, [status.source], here if here and here[0] == group else None)
        while duplicate.mpi.Iprobe(tag=I_WAIT, status=status):
            duplicate.answers[status.source] = duplicate.mpi.recv(source=status.source, tag=I_WAIT)
            duplicate.asked = False


def bid_farewell() -> None:
    """Tell the next ranks that this one has left, and how far it came. Local."""
    if os.getpid() != PROCESS or MPI.Is_finalized():
        return
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    content = rank, {hash(group): place for group, place in PLACES.items()}
    for duplicate in DUPLICATES:
        duplicate.tell(FAREWELL, [(duplicate.rank + 1) % duplicate.size], content)
    if not PLACES:  # else the world's messages are left to the program, which may take any
        SENT.append(world.isend(content, (rank + 1) % size, FAREWELL))
    started = time.monotonic()
    for group, place in PLACES.items():
        before = group[group.index(rank) - 1]
        while place.halfway and before not in LEFT:  # where all leave, nobody waits
            receive()
            if time.monotonic() > started + GRACE:
                abort(f"qnewton-mpi: rank {rank} has left in the middle of {place.purpose}; others wait", code=2)


@functools.cache
def watch() -> None:
    """Have this rank bid farewell when it ends, with the end of Python or of MPI. Local."""
    if MPI.COMM_WORLD.Get_size() > 1:
        atexit.register(bid_farewell)
        # The attributes of this communicator are deleted first of all in MPI_Finalize.
        MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=lambda *_: bid_farewell()), None)
