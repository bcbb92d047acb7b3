"""The study: workloads and targets, the series that are compared, and which runs there are to be.

A peer is tuned at each batch: with seed 0, at rates half a decade apart, by the fewest steps to the target, or, where
no rate gets there, by the loss at the end. At the smallest batch the grid is where the optimizer is commonly used and a
run has `MOST` steps; at each other one it is around the best rate of half the batch, and a run has twice the steps that
this took. As long as the best is at an edge, there is one more rate beyond it. The other seeds repeat the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from benchmarks.batches.running import Key, Record
from benchmarks.grid import grid, half_decades
from benchmarks.workloads import networks, problems
from benchmarks.workloads.optimizers import DEFAULT, PEERS
from benchmarks.workloads.problems import Problem
from qnewton_mpi.errors import UserError

BATCHES = [256 << k for k in range(7)]
FEWEST, MOST_REPLICAS, SHARE = 8, 64, 32  # replicas at the smallest batch and at most; samples of one until then
MOST, LONGER = 1000, 2.0
OPTIMIZERS = [DEFAULT, "nesterov", "adamw", "soap"]
Records = Mapping[Key, Record]


class Narrow(problems.Mlp):
    """Dense layers a core has time for."""

    def network(self) -> nn.Module:
        """Return 784-64-64-10."""
        return networks.dense(784, 64, 64, 10)


@dataclass(frozen=True)
class Workload:
    """What is learnt, and down to which training loss."""

    problem: Problem
    target: float

    @property
    def name(self) -> str:
        return self.problem.name


# Targets that AdamW with batches of 256 takes some 250 steps to.
WORKLOADS: dict[str, Callable[[str | None], Workload]] = {
    "mlp-64": lambda folder: Workload(
        Narrow("mlp-64", "784-64-64-10, ReLU, MNIST", MOST, BATCHES[0], data="mnist", folder=folder), 0.125
    ),
    "characters": lambda folder: Workload(problems.load("characters", folder), 1.8),
}


def load(name: str, folder: str | None = None) -> Workload:
    """Return a workload by name.

    Raises
    ------
    UserError
        For a name that there is not.
    """
    if name not in WORKLOADS:
        raise UserError(f"no workload is called {name!r:.60}: there are {', '.join(WORKLOADS)}")
    return WORKLOADS[name](folder)


@dataclass(frozen=True)
class Series:
    """An optimizer over the batches, and how many replicas it has at each: a peer has one."""

    title: str
    optimizer: str
    replicas: Callable[[int], int]


def series(optimizer: str) -> list[Series]:
    """Return the series of an optimizer: of a method of this package, with more replicas in larger batches and not."""
    if optimizer in PEERS:
        return [Series(optimizer, optimizer, lambda batch: 1)]
    return [
        Series(f"{optimizer}, M = {FEWEST} to {MOST_REPLICAS}", optimizer, lambda b: min(b // SHARE, MOST_REPLICAS)),
        Series(f"{optimizer}, M = {FEWEST}", optimizer, lambda batch: FEWEST),
    ]


def cost(record: Record | None) -> tuple[float, float] | None:
    """Return what tuning makes as small as it can: steps to the target, then the loss at the end."""
    return None if record is None else (record.steps, record.losses[-1])


def chosen(records: Records, workload: Workload, of: Series, batch: int) -> tuple[list[Key], Key | None]:
    """Return the runs of seed 0 that can be done now, and, where there are none, the one that other seeds repeat."""
    most, lowest = MOST, PEERS[of.optimizer].lowest if of.optimizer in PEERS else None
    if batch > BATCHES[0]:
        missing, half = chosen(records, workload, of, batch // 2)
        if half is None:
            return missing, None
        steps = records[half].steps
        most = math.ceil(LONGER * steps) if steps < math.inf else half.most
        lowest = None if half.lr is None else half_decades(half.lr) - 1

    def key(lr: float | None) -> Key:
        return Key(workload.name, of.optimizer, lr, batch, of.replicas(batch), 0, workload.target, most)

    rates, lr = ([], None) if lowest is None else grid(lowest, lambda lr: cost(records.get(key(lr))))
    if lowest is None and key(None) not in records:
        rates = [None]
    return [key(rate) for rate in rates], None if rates else key(lr)


def repeated(best: Key, seeds: int) -> list[Key]:
    """Return the runs of all seeds of a rate."""
    return [replace(best, seed=seed) for seed in range(seeds)]


def wanted(records: Records, workload: Workload, optimizers: Sequence[str], seeds: int) -> Iterator[Key]:
    """Yield the runs that can be done now and were not: of one series after the other, the smallest batch first."""
    for of in (one for optimizer in optimizers for one in series(optimizer)):
        for batch in BATCHES:
            missing, best = chosen(records, workload, of, batch)
            yield from missing
            if best is None:
                break
            yield from (key for key in repeated(best, seeds) if key not in records)
