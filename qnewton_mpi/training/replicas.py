"""The loss of a replica: the network on its share of the batch of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qnewton_mpi.arrays import Array
from qnewton_mpi.data.augmentation import Augmentation
from qnewton_mpi.data.datasets import Split
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.models.network import Network


@dataclass
class ReplicaLoss:
    """`loss, gradient = f(w, replica)` on the replica's share of the batch of the current step. Local.

    Within a step it may be called again, at other parameters, and sees the same samples and the same random numbers.
    """

    network: Network
    split: Split
    order: BatchOrder
    augmentation: Augmentation | None = None
    step: int = 0

    def __call__(self, parameters: Array, replica: int) -> tuple[float, Array]:
        losses, gradients = self.at_once(parameters, [replica])
        return float(losses[0]), gradients[0]

    def at_once(self, parameters: Array, replicas: Sequence[int]) -> tuple[Array, Array]:
        """Return the losses (R,) and gradients (R, N) of several replicas, at parameters (N,) or (R, N)."""
        return self.network.losses_and_gradients(parameters, *self._batches(replicas), self._seeds(replicas))

    def losses(self, parameters: Array, replicas: Sequence[int]) -> Array:
        """Return the losses (R,) alone, at parameters (N,)."""
        return self.network.losses(parameters, *self._batches(replicas), self._seeds(replicas))

    def _batches(self, replicas: Sequence[int]) -> tuple[Array, Array]:
        asarray, pixels = self.network.xp.asarray, None
        indices = np.stack([self.order.indices(self.step, replica) for replica in replicas])
        if self.augmentation is not None:
            rows, columns = self.augmentation.pixels(self.step, replicas)
            pixels = asarray(rows), asarray(columns)
        return self.split.batch(asarray(indices), pixels)

    def _seeds(self, replicas: Sequence[int]) -> list[int]:
        return [self.order.drawn(self.step, replica) for replica in replicas]
