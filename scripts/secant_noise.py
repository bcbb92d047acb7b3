#!/usr/bin/env python3
"""How much curvature is in the replicas' differences: cos(G, H W) with different batches, and on the same batch.

Usage: secant_noise.py      (embedded images, tanh, 8 replicas of 32 samples, after 100 steps of SGD at rate 0.1)

H W is the difference of the gradients over all training images at w̄ + W and at w̄, W one local step of rate η.
"""

from qnewton_mpi.parallel.environment import prepare

prepare()

import argparse  # noqa: E402

import numpy as np  # noqa: E402

from qnewton_mpi.data import datasets  # noqa: E402
from qnewton_mpi.data.order import BatchOrder  # noqa: E402
from qnewton_mpi.models.convnet import Convnet  # noqa: E402
from qnewton_mpi.training.replicas import ReplicaLoss  # noqa: E402

REPLICAS, BATCH, STEPS = 8, 256, 100


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two matrices as vectors."""
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    dataset = datasets.load(datasets.EMBEDDED, None)
    network = Convnet(dataset.input_shape, "tanh")
    loss = ReplicaLoss(network, dataset.train, BatchOrder(len(dataset.train), BATCH, REPLICAS, seed=0))
    whole = dataset.train.batch(slice(None))
    w = network.initial_parameters(0)

    def gradients(points: np.ndarray) -> np.ndarray:
        return np.array([loss(point, i)[1] for i, point in enumerate(points)], dtype="f8")

    def centre(rows: np.ndarray) -> np.ndarray:
        return rows - rows.mean(axis=0)

    for step in range(STEPS):
        loss.step = step
        w -= 0.1 * gradients([w] * REPLICAS).mean(axis=0).astype("f4")
    noise = centre(gradients([w] * REPLICAS))
    base = network.loss_and_gradient(w, *whole)[1]
    loss.step = STEPS
    print(f"{'η':>5} {'different batches':>18} {'same batch':>11}")
    for eta in (0.01, 0.1):
        W = (-eta * noise).astype("f4")
        HW = centre(np.array([network.loss_and_gradient(w + d, *whole)[1] - base for d in W], dtype="f8"))
        displaced = gradients(w + W)
        same = displaced - gradients([w] * REPLICAS)
        print(f"{eta:>5} {cosine(centre(displaced), HW):>18.2f} {cosine(centre(same), HW):>11.2f}")


if __name__ == "__main__":
    main()
