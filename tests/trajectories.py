"""Run under mpiexec: a few steps of every method and exchange on the real convnet and images, written by rank 0.

Usage: trajectories.py OUTPUT.npz      M = 8 replicas, float64
"""

import sys

import numpy as np
from problems import VARIANTS

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.optimizers.natural import kronecker
from qnewton_mpi.core.settings import build
from qnewton_mpi.data import datasets
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.parallel.communicator import Communicator, abort_on_exception
from qnewton_mpi.training.replicas import ReplicaLoss

REPLICAS, BATCH, STEPS = 8, 32, 4


def main(output):
    kronecker.FIRST_SHARES = 2  # so that its shares of signal are in these few steps
    communicator = Communicator()
    abort_on_exception(communicator)
    dataset = datasets.load(datasets.EMBEDDED, None, dtype=np.float64)
    network = Convnet(dataset.input_shape, "tanh", dtype=np.float64)
    loss = ReplicaLoss(network, dataset.train, BatchOrder(len(dataset.train), BATCH, REPLICAS, seed=0))
    results = {}
    for exchange in EXCHANGES:
        for variant, (method, options) in VARIANTS.items():
            kind = OPTIMIZERS[method]
            optimizer = kind(
                build(kind.settings_type, options),
                network.initial_parameters(0),
                EXCHANGES[exchange](communicator, REPLICAS, network.size),
                BATCH // REPLICAS,
                shapes=network.parameter_shapes,
            )
            for step in range(STEPS):
                loss.step = step
                figures = optimizer.step(loss)
            results[f"{exchange}/{variant}"] = np.append(optimizer.parameters, figures["loss"])
            results[f"{exchange}/{variant}/noise"] = list(optimizer.noise_scales.values())
    if communicator.rank == 0:
        np.savez(output, **results)


if __name__ == "__main__":
    main(sys.argv[1])
