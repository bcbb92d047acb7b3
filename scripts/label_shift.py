#!/usr/bin/env python3
"""How fast a run recovers when its data change: class k becomes k + 3, with the trend of the loss begun anew and not.

Usage: label_shift.py [DATA]      (by default fashion-mnist; tanh, batch 256, 8 replicas, 1600 steps and 400 more)
"""

from qnewton_mpi.parallel.environment import prepare

prepare()

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import math  # noqa: E402

import numpy as np  # noqa: E402

from qnewton_mpi.core import rate  # noqa: E402
from qnewton_mpi.core.create import create  # noqa: E402
from qnewton_mpi.data import datasets  # noqa: E402
from qnewton_mpi.data.order import BatchOrder  # noqa: E402
from qnewton_mpi.models.convnet import Convnet  # noqa: E402
from qnewton_mpi.training.replicas import ReplicaLoss  # noqa: E402

REPLICAS, BATCH, BEFORE, AFTER, BLOCK = 8, 256, 1600, 400, 50


def losses(dataset: datasets.Dataset) -> list[float]:
    """Return the mean training loss of the last 50 steps before the change, and of each 50 after it."""
    network = Convnet(dataset.input_shape, "tanh")
    order = BatchOrder(len(dataset.train), BATCH, REPLICAS, seed=0)
    shifted = dataclasses.replace(dataset.train, labels=(dataset.train.labels + 3) % 10)
    loss = ReplicaLoss(network, dataset.train, order)
    w, shapes = network.initial_parameters(0), network.parameter_shapes
    optimizer = create("kronecker", w, REPLICAS, BATCH // REPLICAS, shapes=shapes)
    values = []
    for loss.step in range(BEFORE + AFTER):
        if loss.step == BEFORE:
            loss.split = shifted
        values.append(optimizer.step(loss)["loss"])
    return list(np.mean(np.reshape(values[BEFORE - BLOCK :], (-1, BLOCK)), axis=1))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="fashion-mnist")
    dataset = datasets.load(parser.parse_args().data, None)
    print(f"{'steps after the change':<24}", *(f"{block * BLOCK:>6}" for block in range(AFTER // BLOCK + 1)))
    print(f"{'begun anew':<24}", *(f"{value:6.3f}" for value in losses(dataset)), flush=True)
    rate.RISEN = math.inf
    print(f"{'not':<24}", *(f"{value:6.3f}" for value in losses(dataset)))


if __name__ == "__main__":
    main()
