#!/usr/bin/env python3
"""Compare the convnet's local gradients with PyTorch's on the same network: samples/s on the CPU, one thread each.

Usage: bench_gradients.py [ROUNDS]      (extra `torch`)

The two run in turn, ROUNDS (7) times; the medians and the median of the ratios are printed.
"""

import statistics
import sys
import time
from collections.abc import Callable

from qnewton_mpi.parallel.environment import prepare

prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from qnewton_mpi.models.convnet import ACTIVATIONS, DENSE_WIDTHS, Convnet  # noqa: E402
from qnewton_mpi.models.reference import torch_convnet  # noqa: E402

SAMPLES = 1024


def seconds(action: Callable[[], object], count: int) -> float:
    """Return the mean time of an action."""
    started = time.perf_counter()
    for _ in range(count):
        action()
    return (time.perf_counter() - started) / count


def compare(shape: tuple[int, int, int], activation: str, batch: int, rounds: int) -> tuple[float, float, float]:
    """Return our samples/s, PyTorch's, and the ratio."""
    random = np.random.default_rng(0)
    images, labels = random.standard_normal((batch, *shape), np.float32), random.integers(0, 10, batch)
    network = Convnet(shape, activation)
    parameters = network.initial_parameters(seed=0)
    peer, tensors = torch_convnet(network, parameters), (torch.tensor(images), torch.tensor(labels))

    def ours() -> None:
        network.loss_and_gradient(parameters, images, labels)

    def theirs() -> None:
        peer.zero_grad()
        torch.nn.functional.cross_entropy(peer(tensors[0]), tensors[1]).backward()

    count = max(1, SAMPLES // batch)
    for action in (ours, theirs):
        seconds(action, 3)
    times = [(seconds(ours, count), seconds(theirs, count)) for _ in range(rounds)]
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    return batch / mine, batch / other, statistics.median(b / a for a, b in times)


def main() -> None:
    """Print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.set_num_threads(1)
    print(f"{'images':>8} {'activation':>10} {'batch':>5} {'samples/s':>10} {'PyTorch':>9} {'ratio':>6}")
    for shape in DENSE_WIDTHS:
        for activation in ACTIVATIONS:
            for batch in (32, 256):
                ours, theirs, ratio = compare(shape, activation, batch, rounds)
                name = "×".join(map(str, shape))
                print(f"{name:>8} {activation:>10} {batch:>5} {ours:>10,.0f} {theirs:>9,.0f} {ratio:>6.2f}")


if __name__ == "__main__":
    main()
