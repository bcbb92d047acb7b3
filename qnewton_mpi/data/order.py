"""Which samples and random numbers each replica sees at each step: a function of the seed and the step alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class BatchOrder:
    """A new permutation of the training samples each epoch, cut into batches. Local.

    What is left over sits the epoch out. Replica i takes share i of the batch of every step, so the batches do not
    depend on the number of replicas or ranks.

    Parameters
    ----------
    samples : int
        Number of training samples, at least `batch`.
    batch : int
        Global batch, over all replicas.
    replicas : int
        M, a divisor of `batch`.
    seed : int
    """

    def __init__(self, samples: int, batch: int, replicas: int, seed: int) -> None:
        self.samples, self.batch, self.seed = samples, batch, seed
        self.share = batch // replicas
        self.steps_per_epoch = samples // batch
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, np.int64)

    def indices(self, step: int, replica: int) -> NDArray[np.int64]:
        """Return the sample indices, (batch/M,), of a replica at a step (from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, 1, epoch]).permutation(self.samples)
            self._epoch = epoch
        start = position * self.batch + replica * self.share
        return self._permutation[start : start + self.share]

    def drawn(self, step: int, replica: int) -> int:
        """Return a seed, from 0 to 2⁶³ − 1, of what a replica's loss draws at random at a step (from 0)."""
        return int(np.random.SeedSequence([self.seed, 2, step, replica]).generate_state(1, np.uint64)[0] >> 1)
