"""Which runs there are to be: the same rule for every peer, and none for the package's methods.

A peer's rates are half decades apart. At each schedule, with seed 0, four around where the optimizer is commonly used;
as long as the best is the lowest or the highest, one more beyond it, up to four more. The other seeds then take the
better schedule at its best rate, by the training loss at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from benchmarks.grid import grid
from benchmarks.workloads.optimizers import CONSTANT, COSINE, PEERS
from benchmarks.workloads.running import Key, Record

TIMED = 40  # steps of a trial


def chosen(records: Mapping[Key, Record], workload: str, optimizer: str, steps: int) -> tuple[list[Key], Key | None]:
    """Return the runs of seed 0 that are missing, and, where none is, the one that the other seeds are to repeat."""
    if optimizer not in PEERS:
        return [], Key(workload, optimizer, None, CONSTANT, 0, steps)
    missing, best = [], []
    for schedule in PEERS[optimizer].schedules:

        def key(lr: float, schedule: str = schedule) -> Key:
            return Key(workload, optimizer, lr, schedule, 0, steps)

        def loss(lr: float, key: Callable[[float], Key] = key) -> float | None:
            return records[key(lr)].loss if key(lr) in records else None

        rates, lr = grid(PEERS[optimizer].lowest, loss)
        missing += [key(lr) for lr in rates]
        best += [] if lr is None else [key(lr)]
    if missing:
        return missing, None
    return [], min(best, key=lambda key: records[key].loss if math.isfinite(records[key].loss) else math.inf)


def wanted(records: Mapping[Key, Record], workload: str, optimizer: str, steps: int, seeds: int) -> list[Key]:
    """Return the runs that can be done now and were not; none, where all is done."""
    missing, best = chosen(records, workload, optimizer, steps)
    if best is None:
        return missing
    schedules = [best.schedule] if optimizer in PEERS else [CONSTANT, COSINE]
    keys = [Key(workload, optimizer, best.lr, schedule, seed, steps) for schedule in schedules for seed in range(seeds)]
    return [key for key in keys if key not in records]


def missing(
    records: Mapping[Key, Record], workload: str, optimizer: str, steps: int, seeds: int, device: str
) -> list[Key]:
    """Return what is `wanted` and, on the CPU, where nothing is, the run that times those of a GPU."""
    keys = wanted(records, workload, optimizer, steps, seeds)
    return keys or (untimed(records, workload, optimizer, steps) if device == "cpu" else [])


def untimed(records: Mapping[Key, Record], workload: str, optimizer: str, steps: int) -> list[Key]:
    """Return the trial that times an optimizer where all its runs were on a GPU; none, where one was not."""
    if timings(records, optimizer):
        return []
    best = chosen(records, workload, optimizer, steps)[1]
    return [] if best is None else [Key(workload, optimizer, best.lr, best.schedule, 0, min(TIMED, steps - 1))]


def timings(records: Mapping[Key, Record], optimizer: str) -> list[float]:
    """Return the CPU milliseconds a step of a workload's runs of an optimizer, at any rate."""
    return [r.cpu_ms for key, r in records.items() if key.optimizer == optimizer and r.cpu_ms is not None]
