"""What the algebra reaches of a GPU's bandwidth or arithmetic, and whole training steps beside PyTorch's.

Usage: python scripts/gpu_bench.py [--parameters N] [--cpu]      Markdown on standard output

--cpu runs the same on NumPy, to see that the script works; its figures mean nothing for a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from qnewton_mpi.parallel.environment import prepare

prepare()

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from qnewton_mpi.arrays import open_device  # noqa: E402
from qnewton_mpi.bench.algebra import algebra  # noqa: E402
from qnewton_mpi.bench.steps import BATCH  # noqa: E402
from qnewton_mpi.bench.tables import Table  # noqa: E402
from qnewton_mpi.core.exchange import EXCHANGES  # noqa: E402
from qnewton_mpi.core.optimizers import OPTIMIZERS  # noqa: E402
from qnewton_mpi.data import datasets  # noqa: E402
from qnewton_mpi.data.order import BatchOrder  # noqa: E402
from qnewton_mpi.models.convnet import Convnet  # noqa: E402
from qnewton_mpi.models.reference import torch_layers  # noqa: E402
from qnewton_mpi.parallel.communicator import Communicator  # noqa: E402
from qnewton_mpi.training.replicas import ReplicaLoss  # noqa: E402

REPLICAS, RANK, SIDE, PRODUCT = 8, 32, 2048, 4096
ROUNDS = 7


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=1 << 24, metavar="N")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    device = open_device("cpu" if arguments.cpu else "cuda", 0)
    print(f"{device.name}, N = {arguments.parameters:,}, M = {REPLICAS}\n")
    clock = Clock(device.xp)
    n = arguments.parameters
    print(algebra(device.xp, n, clock, REPLICAS, RANK, PRODUCT).text())
    print(steps(device.xp, n, clock).text())
    print(training(device.xp, clock).text())


class Clock:
    """Seconds of an action, by the host's clock between two synchronisations; medians of rounds."""

    def __init__(self, xp: ModuleType) -> None:
        self.wait: Callable[[], object] = (lambda: None) if xp is np else xp.cuda.Device().synchronize

    def __call__(self, action: Callable[[], object], count: int = 5) -> float:
        """Return the median over rounds of the mean of `count` actions, after one to warm up."""
        action()
        times = []
        for _ in range(ROUNDS):
            self.wait()
            started = time.perf_counter()
            for _ in range(count):
                action()
            self.wait()
            times.append((time.perf_counter() - started) / count)
        return statistics.median(times)


def steps(xp: ModuleType, size: int, clock: Clock) -> Table:
    """Time steps whose gradients cost nothing."""
    exchange = EXCHANGES["allgather"](Communicator(MPI.COMM_SELF), REPLICAS, size)
    random = np.random.default_rng(0)
    x = xp.asarray(random.standard_normal(size, np.float32))
    rows = xp.asarray(random.standard_normal((REPLICAS, size), np.float32))
    table = Table("steps, gradients for free", ("method", "ms"))
    shapes = [(SIDE, SIDE)] * (size // SIDE**2) + ([(size % SIDE**2,)] if size % SIDE**2 else [])
    for method in ("sgd", "momentum", "kronecker"):
        kind = OPTIMIZERS[method]
        optimizer: Any = kind(kind.settings_type(), x, exchange, BATCH // REPLICAS, shapes=shapes)
        for _ in range(10):  # in which `kronecker` does all its work at every step
            optimizer.step(lambda w, replica: (1.0, rows[replica]))
        seconds = clock(lambda step=optimizer.step: step(lambda w, replica: (1.0, rows[replica])), 20)
        table.rows.append((method, seconds * 1e3))
    return table


def training(xp: ModuleType, clock: Clock) -> Table:
    """Time whole steps on the convnet beside PyTorch's SGD and Adam on the same network."""
    table = Table(f"training steps of the convnet, batch {BATCH}, M = {REPLICAS}", ("what", "ms", "ms/PyTorch's Adam"))
    dataset = datasets.load(datasets.EMBEDDED, None, xp)
    network = Convnet(dataset.input_shape, "tanh", xp)
    loss = ReplicaLoss(network, dataset.train, BatchOrder(len(dataset.train), BATCH, REPLICAS, seed=0))
    actions: dict[str, Callable[[], object]] = {}
    for method in ("sgd", "fisher", "kronecker"):
        kind = OPTIMIZERS[method]
        exchange = EXCHANGES["allgather"](Communicator(MPI.COMM_SELF), REPLICAS, network.size)
        start, shapes = network.initial_parameters(0), network.parameter_shapes
        optimizer: Any = kind(kind.settings_type(), start, exchange, BATCH // REPLICAS, shapes=shapes)
        actions[method] = lambda optimizer=optimizer: optimizer.step(loss)
    actions |= torch_steps(dataset, on_gpu=xp is not np)
    for action in actions.values():
        for _ in range(16):
            action()
    seconds = {what: clock(action, 20) for what, action in actions.items()}
    for what, value in seconds.items():
        table.rows.append((what, value * 1e3, value / seconds["PyTorch's Adam"]))
    return table


def torch_steps(dataset: datasets.Dataset, on_gpu: bool) -> dict[str, Callable[[], object]]:
    """Return whole training steps by PyTorch's optimizers on the same network and the first batch."""
    import torch

    place = "cuda" if on_gpu else "cpu"
    torch.set_num_threads(1)
    host = Convnet(dataset.input_shape, "tanh")
    tensors = [torch.as_tensor(array, device=place) for array in dataset.train.batch(slice(0, BATCH))]
    steps: dict[str, Callable[[], object]] = {}
    for name in ("SGD", "Adam"):
        module = torch_layers(host, host.initial_parameters(0)).to(place)
        optimizer = getattr(torch.optim, name)(module.parameters(), lr=1e-3)

        def step(module: Any = module, optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(module(tensors[0]), tensors[1].long())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.item()

        steps[f"PyTorch's {name}"] = step
    return steps


if __name__ == "__main__":
    main()
