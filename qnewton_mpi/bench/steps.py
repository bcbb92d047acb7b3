"""Steps of methods and exchanges, against one Allreduce and against SGD, timed in turn in one run."""

from __future__ import annotations

import statistics
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array
from qnewton_mpi.bench.tables import Table
from qnewton_mpi.bench.timing import Case, time_in_turn
from qnewton_mpi.core.create import create
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers.values import LossAndGradient
from qnewton_mpi.data import datasets
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.training.replicas import ReplicaLoss

METHODS = ("sgd", "multisecant", "fisher", "kronecker")
# Sizes beyond which `fisher`, which keeps 64 vectors, is left out.
LARGEST = {"fisher": 1 << 21}
SIDE = 128  # of the square layers that the N parameters are taken for
WARM_UP = 16  # steps: `kronecker` does all its work in the first ten
RANK = 64  # of `fisher`, which updates at every step until it is reached
BATCH = 256


def steps(sizes: Sequence[int], replicas: int, rounds: int, communicator: Communicator, seconds: float) -> Table:
    """Time steps whose gradients cost nothing against an Allreduce of the mean gradient and w ← w − α ḡ."""
    n = communicator.size
    table = Table(
        f"steps without gradients, {n} ranks, M = {replicas}",
        (
            "N",
            "method",
            "exchange",
            "ms",
            "ms/(Allreduce + update)",
            "communication/Allreduce",
            "received/Allreduce",
            "received MB",
            "collectives",
            "peak MB",
        ),
    )
    for size in sizes:
        shapes = [(SIDE, SIDE)] * (size // SIDE**2) + ([(size % SIDE**2,)] if size % SIDE**2 else [])
        loss_and_gradient = FreeGradients(size, communicator.rank)
        reduced, updated = allreduce(loss_and_gradient.numbers[:size], communicator)
        baseline = [Case(reduced), Case(updated)]
        cases = {}
        for method in METHODS:
            for name in EXCHANGES:
                if size <= LARGEST.get(method, size) and not (name == "server" and method != "sgd"):
                    cases[method, name] = StepCase(
                        method, name, size, shapes, replicas, loss_and_gradient, communicator
                    )
        time_in_turn([*baseline, *cases.values()], rounds, communicator, seconds)
        plain, updating = (statistics.median(case.times) for case in baseline)
        vector = 2 * (n - 1) / n * 4 * size
        for (method, name), case in cases.items():
            took = statistics.median(case.times) - case.gradient_seconds
            received = case.bytes_per_step / n
            table.rows.append(
                (
                    size,
                    method,
                    name,
                    took * 1e3,
                    took / updating,
                    case.communication_seconds / plain if n > 1 else 0.0,
                    received / vector if n > 1 else 0.0,
                    received / 1e6,
                    case.collectives_per_step,
                    case.peak_bytes / 1e6,
                )
            )
    return table


class FreeGradients:
    """`loss, gradient = f(w, replica)`, random both, that cost nothing, others at each call. Local.

    Of losses that are all the same no rate could be told, and steps would grow until they overflow.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.calls = size, 0
        self.numbers = np.random.default_rng(seed).standard_normal(size + 4096, np.float32)

    def __call__(self, w: Array, replica: int) -> tuple[float, Array]:
        self.calls += 1
        first = 1021 * self.calls % 4096
        return 1.0 + float(self.numbers[first]), self.numbers[first : first + self.size]


def allreduce(gradient: NDArray[np.float32], communicator: Communicator) -> tuple[Callable[[int], None], ...]:
    """Return MPI_Allreduce of a vector of this size, and the same with the update of plain SGD, as actions."""
    mean, parameters = np.empty_like(gradient), np.zeros_like(gradient)

    def reduce(count: int) -> None:
        for _ in range(count):
            communicator.allreduce(gradient, mean)

    def update(count: int) -> None:
        for _ in range(count):
            communicator.allreduce(gradient, mean)
            np.multiply(mean, 1e-9 / communicator.size, out=mean)
            np.subtract(parameters, mean, out=parameters)

    return reduce, update


class StepCase(Case):
    """Steps of a method by an exchange, on gradients that another function gives."""

    def __init__(
        self,
        method: str,
        exchange: str,
        size: int,
        shapes: Sequence[tuple[int, ...]],
        replicas: int,
        loss_and_gradient: LossAndGradient,
        communicator: Communicator,
        start: Array | None = None,
    ) -> None:
        super().__init__(self.steps)
        self.loss_and_gradient, self.communicator = loss_and_gradient, communicator
        tracemalloc.start()  # NumPy tells it of its arrays
        parameters = np.zeros(size, np.float32) if start is None else start
        samples = max(1, BATCH // replicas)
        self.optimizer = create(
            method, parameters, replicas, samples, shapes=shapes, exchange=exchange, communicator=communicator
        )
        for _ in range(WARM_UP + (RANK // (replicas - 1) if method == "fisher" else 0)):
            self.optimizer.step(loss_and_gradient)
        self.peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.count = self.collectives = self.communicated = self.computed = 0.0
        self.bytes_before = self.optimizer.exchange.bytes_sent

    def steps(self, count: int) -> None:
        """Do steps, in multiples of the 20 after which `kronecker` has done each kind of work as often as it does."""
        collectives = self.communicator.collectives.total()
        communicated, computed = self.communicator.seconds, self.optimizer.gradient_seconds
        for _ in range(count):
            self.optimizer.step(self.loss_and_gradient)
        self.count += count
        self.collectives += self.communicator.collectives.total() - collectives
        self.communicated += self.communicator.seconds - communicated
        self.computed += self.optimizer.gradient_seconds - computed

    @property
    def bytes_per_step(self) -> float:
        """By all ranks together."""
        return (self.optimizer.exchange.bytes_sent - self.bytes_before) / self.count

    @property
    def collectives_per_step(self) -> float:
        return self.collectives / self.count

    @property
    def communication_seconds(self) -> float:
        """Of a step, waiting for other ranks included."""
        return self.communicated / self.count

    @property
    def gradient_seconds(self) -> float:
        """Of a step."""
        return self.computed / self.count


def training(
    network: Convnet,
    methods: Sequence[str],
    replicas: int,
    rounds: int,
    communicator: Communicator,
    seconds: float,
) -> Table:
    """Time whole training steps, gradients included, against those of SGD."""
    table = Table(
        f"training steps of the convnet, N = {network.size}, {communicator.size} ranks, M = {replicas}, batch {BATCH}",
        ("method", "exchange", "ms", "ms/SGD"),
    )
    dataset = datasets.load(datasets.EMBEDDED, None)
    order = BatchOrder(len(dataset.train), BATCH, replicas, seed=0)
    loss = ReplicaLoss(network, dataset.train, order)
    names = [("sgd", "allgather"), *((m, e) for m in methods for e in ("allgather", "sliced"))]
    start, shapes = network.initial_parameters(0), network.parameter_shapes
    cases = [StepCase(m, e, network.size, shapes, replicas, loss, communicator, start) for m, e in names]
    time_in_turn(cases, rounds, communicator, seconds)
    for (method, name), case in zip(names, cases, strict=True):
        ratio = statistics.median(a / b for a, b in zip(case.times, cases[0].times, strict=True))
        table.rows.append((method, name, statistics.median(case.times) * 1e3, ratio))
    return table
