"""How good weights are on each part of a data set."""

from __future__ import annotations

import numpy as np

from qnewton_mpi.arrays import Array
from qnewton_mpi.data.datasets import Dataset
from qnewton_mpi.models.network import Network
from qnewton_mpi.parallel import partition
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.results.layout import QUALITIES

EVALUATION_BATCH = 1024


def evaluate(network: Network, weights: Array, dataset: Dataset, communicator: Communicator) -> dict[str, float]:
    """Return the mean negative log-likelihood (nats) and the accuracy of each part, by QUALITIES' names. Collective.

    The samples are shared by the ranks. The figures are the same on all of them, bit for bit.
    """
    splits = dataset.splits
    sums = np.zeros((len(splits), 2))
    for total, split in zip(sums, splits.values(), strict=True):
        mine = partition.share(len(split), communicator.size, communicator.rank)
        for start in range(mine.start, mine.stop, EVALUATION_BATCH):
            total += judged(network, weights, *split.batch(slice(start, min(start + EVALUATION_BATCH, mine.stop))))
    means = communicator.allreduce(sums) / [[len(split)] for split in splits.values()]
    communicator.broadcast(means)  # an Allreduce need not round alike everywhere, and what is decided by these must be
    found = {
        f"{name}_{what}": float(value)
        for name, values in zip(splits, means, strict=True)
        for what, value in zip(("nll", "accuracy"), values, strict=True)
    }
    return {name: value for name, value in found.items() if name in QUALITIES}


def judged(network: Network, weights: Array, images: Array, labels: Array) -> tuple[float, int]:
    """Return the summed negative log-likelihood (nats) and the number of samples classified correctly. Local."""
    xp, logs = network.xp, network.log_probabilities(weights, images)
    nll = -xp.sum(logs[xp.arange(len(labels)), labels.astype(np.intp)], dtype=np.float64)
    return float(nll), int(xp.sum(xp.argmax(logs, axis=1) == labels))
