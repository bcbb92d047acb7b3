"""Run a study whose rows may spoil what `fisher` and `kronecker` read from the replicas, one thing at a time.

Usage: mpiexec -n 2 python scripts/ablations.py STUDY.toml STUDY.h5

It is `qnewton-mpi compare` with the methods fisher-X, kronecker-X and deflated-X more. X says what becomes of the
differences of gradients before the method sees them; the mean gradient stays as it is.

random      normal numbers with each coordinate's standard deviation: no correlation of coordinates is left
shuffled    each coordinate's differences in an order of their own over the replicas: the same
uncentred   (fisher) the gradients themselves instead of their differences from the mean
batches     (deflated) gradient and probe of a secant are of different batches
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
from extended_study import run

from qnewton_mpi.core.optimizers import Deflated, Fisher, Kronecker, Optimizer
from qnewton_mpi.core.optimizers.values import Array, Batch, LossAndGradient


def random(differences: Array, generator: np.random.Generator) -> Array:
    """Return centred normal numbers of each coordinate's standard deviation; (M, N) as the argument."""
    numbers = generator.standard_normal(differences.shape).astype(differences.dtype)
    numbers -= numbers.mean(axis=0)
    return numbers * (differences.std(axis=0) / numbers.std(axis=0))


def shuffled(differences: Array, generator: np.random.Generator) -> Array:
    """Return each coordinate's differences in an order of its own."""
    return generator.permuted(differences, axis=0)


def spoiled(kind: type[Optimizer[Any]], spoil: Any) -> type[Optimizer[Any]]:
    """Return the method `kind` on spoiled differences. One rank."""

    class Spoiled(kind):  # type: ignore[valid-type, misc]
        def update(self, batch: Batch, noise: float) -> Any:
            mean = batch.rows.mean(axis=0)
            differences = spoil(batch.rows - mean, np.random.default_rng([self.seed, self.steps]))
            return super().update(replace(batch, rows=mean + differences), noise)

    return Spoiled


class Uncentred(Fisher):
    """`fisher` on the gradients themselves."""

    def start(self) -> None:
        super().start()
        exchange = self.exchange
        exchange.centred = lambda rows: (exchange.mean(rows), exchange.columns(rows))  # type: ignore[method-assign]


class DifferentBatches(Deflated):
    """`deflated` with replica i's probes on the batch of replica i + 1."""

    def evaluate(
        self, loss_and_gradient: LossAndGradient, displacements: Array | None = None, trial: bool = False
    ) -> Batch:
        def shifted(parameters: Array, replica: int) -> tuple[float, Array]:
            return loss_and_gradient(parameters, (replica + 1) % self.exchange.replicas)

        return super().evaluate(loss_and_gradient if displacements is None else shifted, displacements, trial)


if __name__ == "__main__":
    spoils = {"random": random, "shuffled": shuffled}
    kinds = {"fisher": Fisher, "kronecker": Kronecker}
    methods = {f"{name}-{how}": spoiled(kind, spoil) for name, kind in kinds.items() for how, spoil in spoils.items()}
    if "--help" in sys.argv[1:]:
        print(__doc__)
        sys.exit()
    sys.exit(run(sys.argv[1:], {**methods, "fisher-uncentred": Uncentred, "deflated-batches": DifferentBatches}))
