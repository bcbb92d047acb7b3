"""One run: an optimizer with batches of a size until the training loss is down to the target, and the record of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from benchmarks import store
from benchmarks.figures import steps_to
from benchmarks.workloads import optimizers
from benchmarks.workloads.problems import Problem
from benchmarks.workloads.running import do_step, versions

JUDGED, APART = 4096, 50  # samples of the training set; evaluations are a fiftieth of the steps done apart


@dataclass(frozen=True)
class Key(store.Key):
    """What makes a run.

    Attributes
    ----------
    lr : float, optional
    batch, replicas : int
        Samples of a step; the default has them in shares.
    seed : int
    target : float
        Training loss at which the run ends.
    most : int
        Steps after which it ends without.
    """

    lr: float | None
    batch: int
    replicas: int
    seed: int
    target: float
    most: int

    def __str__(self) -> str:
        what = f" M = {self.replicas}" if self.lr is None else f" {self.lr:g}"
        return f"{self.workload} {self.optimizer}{what} batch {self.batch} seed {self.seed}"


@dataclass(frozen=True)
class Record(store.Record):
    """What became of a run.

    Attributes
    ----------
    key : Key
    steps : float
        To the target: between two evaluations the loss is taken to go down evenly. ∞, where it was not reached.
    losses : list
        Of the fixed samples, at the `places` that the run came to; ∞ where it diverged.
    versions : dict
    """

    key: Key
    steps: float
    losses: list[float]
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """The steps, or the loss at the end."""
        return f"{self.steps:.1f} steps" if self.steps < math.inf else f"not reached, {self.losses[-1]:.4g}"


def places(most: int) -> Iterator[int]:
    """Yield the steps after which the loss is evaluated: every one at first, then 2% apart, and the last."""
    done = 0
    while done < most:
        yield done
        done += max(1, done // APART)
    yield most


def run(problem: Problem, key: Key, device: str = "cpu") -> Record:
    """Do a run, on a device of PyTorch's.

    The loss that is compared with the target is that of the same samples of the training set at all batches, methods
    and seeds: the loss of a batch would be the noisier, the smaller the batch.

    Raises
    ------
    UserError
        For an optimizer that cannot be had, or data that are not there.
    """
    problem, judged = replace(problem, samples=key.batch), next(replace(problem, samples=JUDGED).batches(-1))
    model, batches = problem.model(key.seed).to(device), problem.batches(key.seed)
    trainer = optimizers.build(key.optimizer, problem, model, key.lr, key.most, key.replicas)
    done, at, losses = 0, [], []
    for place in places(key.most):
        finite = True
        while finite and done < place:
            finite = math.isfinite(do_step(trainer, tuple(part.to(device) for part in next(batches))))
            done += 1
        with trainer.averaged():
            loss = problem.evaluate(model, [judged]) if finite else math.inf
        at.append(place)
        losses.append(float(f"{loss:.6g}") if math.isfinite(loss) else math.inf)
        if losses[-1] <= key.target or losses[-1] == math.inf:
            break
    return Record(key, steps_to(key.target, at, losses), losses, versions(key.optimizer))
