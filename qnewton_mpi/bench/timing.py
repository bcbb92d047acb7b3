"""Times of actions: one by one on a rank, or of all ranks and in turn, so that what changes meanwhile is shared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qnewton_mpi.parallel.communicator import Communicator

Clock = Callable[[Callable[[], object]], float]  # seconds of an action


@dataclass
class Case:
    """An action to be timed, in turn with others. `action(k)` does it k times. Collective."""

    action: Callable[[int], None]
    times: list[float] = field(default_factory=list)


def time_in_turn(cases: Sequence[Case], rounds: int, communicator: Communicator, seconds: float) -> None:
    """Give each case `rounds` times: seconds of one repetition, of the slowest rank. Collective."""
    counts = []
    for case in cases:
        started = time.perf_counter()
        case.action(1)
        guess = communicator.allgather(np.array([time.perf_counter() - started]), [1] * communicator.size).max()
        count = max(1, min(200, round(seconds / guess)))
        counts.append(count if type(case) is Case else max(20, count // 20 * 20))
    for _ in range(rounds):
        for case, count in zip(cases, counts, strict=True):
            communicator.mpi.Barrier()
            started = time.perf_counter()
            case.action(count)
            mine = np.array([time.perf_counter() - started]) / count
            case.times.append(float(communicator.allgather(mine, [1] * communicator.size).max()))


def seconds_of(action: Callable[[], object], count: int, rounds: int) -> list[float]:
    """Return the mean times of `count` actions, `rounds` of them, after one to warm up."""
    action()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(count):
            action()
        times.append((time.perf_counter() - started) / count)
    return times
