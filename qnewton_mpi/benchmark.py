"""What a step costs beside the gradients: methods and exchanges against one Allreduce, timed in turn in one run."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array
from qnewton_mpi.core.create import create
from qnewton_mpi.core.exchange import EXCHANGES, AllgatherExchange
from qnewton_mpi.core.kernels import combination, inner
from qnewton_mpi.core.layers import LayerShape
from qnewton_mpi.core.optimizers.natural.kronecker import KroneckerSettings
from qnewton_mpi.core.optimizers.natural.layer import Layer
from qnewton_mpi.core.secants import multisecant
from qnewton_mpi.data import datasets
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.files.images import write_image
from qnewton_mpi.files.whole import writing
from qnewton_mpi.models.convnet import DENSE_WIDTHS, Convnet
from qnewton_mpi.models.layers import ACTIVATIONS
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.training.replicas import ReplicaLoss

METHODS = ("sgd", "multisecant", "fisher", "kronecker")
# Sizes beyond which `fisher`, which keeps 64 vectors, is left out.
LARGEST = {"fisher": 1 << 21}
SIDE = 128  # of the square layers that the N parameters are taken for
WARM_UP = 16  # steps: `kronecker` does all its work in the first ten
RANK = 64  # of `fisher`, which updates at every step until it is reached
BATCH = 256
IMAGES = (1, 28, 28)
SIDES = (128, 1024)  # of the layers whose products are timed

LossAndGradient = Callable[[Array, int], tuple[float, Array]]
Clock = Callable[[Callable[[], object]], float]  # seconds of an action


@dataclass
class Table:
    """A section of the benchmark: a title, and rows of numbers and words under a header."""

    title: str
    header: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)

    def text(self) -> str:
        """Return it in Markdown."""
        cells = [[f"{x:.3g}" if isinstance(x, float) else f"{x}" for x in row] for row in self.rows]
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, ["---"] * len(self.header), *cells)]
        return f"### {self.title}\n\n" + "\n".join(lines) + "\n"

    def write(self, file: h5py.File) -> None:
        """Write a group with a data set for each column."""
        group = file.create_group(self.title)
        for name, column in zip(self.header, zip(*self.rows, strict=True), strict=True):
            group[name.replace("/", " over ")] = list(column)


@dataclass
class Case:
    """An action to be timed, in turn with others. `action(k)` does it k times. Collective."""

    action: Callable[[int], None]
    times: list[float] = field(default_factory=list)


def bench(
    sizes: Sequence[int], replicas: int | None, rounds: int, communicator: Communicator, seconds: float = 0.5
) -> list[Table]:
    """Return the tables of all sections. Collective.

    Parameters
    ----------
    sizes : sequence of int
        The numbers N of parameters.
    replicas : int or None
        M; None: one a rank, but two on one rank.
    rounds : int
        How often each case is timed; medians are reported.
    communicator : Communicator
    seconds : float
        Of a case and round, about.
    """
    m = replicas or max(2, communicator.size)
    tables = [steps(sizes, m, rounds, communicator, seconds)]
    tables.append(training(Convnet(IMAGES, "tanh"), METHODS[1:], max(8, m), rounds, communicator, seconds))
    wide = Convnet(IMAGES, "tanh", filters=(32, 64), dense=(900, 80))
    if max(sizes) >= wide.size:
        tables.append(training(wide, METHODS[-1:], max(8, m), rounds, communicator, seconds))
    if communicator.rank == 0:

        def clock(action: Callable[[], object]) -> float:
            return statistics.median(_seconds(action, 1, rounds))

        # No larger than `fisher` is timed at: its rows are these.
        tables.append(algebra(np, min(max(sizes), LARGEST["fisher"]), clock))
        tables += [solves(rounds), *gradients(rounds), *adapter(rounds)]
    return tables


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
    """`loss, gradient = f(w, replica)` with random gradients that cost nothing, another one at each call. Local."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.calls = size, 0
        self.numbers = np.random.default_rng(seed).standard_normal(size + 4096, np.float32)

    def __call__(self, w: Array, replica: int) -> tuple[float, Array]:
        self.calls += 1
        first = 1021 * self.calls % 4096
        return 1.0, self.numbers[first : first + self.size]


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


def time_in_turn(cases: Sequence[Case], rounds: int, communicator: Communicator, seconds: float) -> None:
    """Give each case `rounds` times: seconds of one repetition, of the slowest rank. Collective."""
    counts = []
    for case in cases:
        started = time.perf_counter()
        case.action(1)
        guess = communicator.allgather(np.array([time.perf_counter() - started]), [1] * communicator.size).max()
        count = max(1, min(200, round(seconds / guess)))
        counts.append(count if type(case) is Case else max(20, count // 20 * 20))
    for _ in range(rounds):
        for case, count in zip(cases, counts, strict=True):
            communicator.mpi.Barrier()
            started = time.perf_counter()
            case.action(count)
            mine = np.array([time.perf_counter() - started]) / count
            case.times.append(float(communicator.allgather(mine, [1] * communicator.size).max()))


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


def algebra(xp: ModuleType, size: int, clock: Clock, replicas: int = 8, rank: int = RANK, side: int = 1024) -> Table:
    """Time what steps are made of against a copy and sgemm of the same run, one of which bounds it. Local.

    Parameters
    ----------
    xp : module
        NumPy or CuPy.
    size : int
        N; two arrays of (M + rank) N numbers are needed.
    clock : callable
        Seconds of an action.
    replicas, rank : int
    side : int
        Of the square matrices whose product sgemm's rate is that of.

    Returns
    -------
    Table
        Bytes are those that have to move at least, operations the multiplications and additions of products.
    """
    exchange = AllgatherExchange(Communicator(MPI.COMM_SELF), replicas, size)
    random = np.random.default_rng(0)

    def numbers(*shape: int) -> Array:
        return xp.asarray(random.standard_normal(shape, np.float32))

    x, y, rows = numbers(size), numbers(size), numbers(replicas + rank, size)
    new, kept, out, square = rows[:replicas, :], rows[:rank, :], xp.empty_like(rows), numbers(side, side)
    coefficients, weights = numbers(rank, replicas + rank), numbers(rank)

    def copy() -> None:
        out[...] = rows

    m, r = replicas, rank
    cases: dict[str, tuple[Callable[[], object], float, float]] = {
        "copy": (copy, 8 * (m + r) * size, 0),
        "sgemm": (lambda: square @ square, 0, 2 * side**3),
        "a x + b y": (lambda: combination(0.5, x, 0.5, y, out=out[0, :]), 12 * size, 0),
        "Σ x y": (lambda: inner(x, y), 8 * size, 0),
        f"Gram matrix, {m} rows": (lambda: exchange.gram(new, new), 4 * m * size, 2 * m * m * size),
        f"Gram matrix, {m} rows with {m + r}": (
            lambda: exchange.gram(new, rows, precise=False),
            4 * (m + r) * size,
            2 * m * (m + r) * size,
        ),
        f"{r} combinations of {m + r} rows": (
            lambda: coefficients @ rows,
            4 * (m + 2 * r) * size,
            2 * r * (m + r) * size,
        ),
        f"products of {r} rows with one": (
            lambda: exchange.gram(kept, x[None, :], precise=False),
            4 * (r + 1) * size,
            2 * r * size,
        ),
        f"a combination of {r} rows": (lambda: weights @ kept, 4 * (r + 1) * size, 2 * r * size),
    }
    for s in SIDES:
        if s * s > size:
            continue
        usual = KroneckerSettings()
        layer, gradients = Layer(x, LayerShape(0, s, s, False), 0, usual.max_side, usual.leading), numbers(2, s * s)
        turned = 4 * s * s * (2 * layer.leading if layer.corner else s)  # flops into the bases, and as many back
        words = 2 * s * s + 2 * s * s  # of X, read and written, and of the bases
        cases[f"A, B and V of a layer {s}×{s}, a combination"] = (
            lambda layer=layer, gradients=gradients: layer.add(gradients[:1, :], gradients[0, :], 0.1),  # type: ignore[misc]
            4 * (words + 4 * s * s),
            turned + 4 * s**3,
        )
        cases[f"P⁻¹ of a layer {s}×{s} times a vector"] = (
            lambda layer=layer, z=gradients[1:, :]: layer.flat(layer.view(z).times(layer.scales)),  # type: ignore[misc]
            4 * words,
            2 * turned,
        )
    seconds = {what: clock(action) for what, (action, _, _) in cases.items()}
    bandwidth, arithmetic = 8 * (m + r) * size / seconds["copy"], 2 * side**3 / seconds["sgemm"]
    table = Table(f"algebra, N = {size}", ("what", "ms", "GB/s", "Gflop/s", "of copy's rate", "of sgemm's rate"))
    for what, (_, moved, operations) in cases.items():
        rates = moved / seconds[what], operations / seconds[what]
        shares = rates[0] / bandwidth, rates[1] / arithmetic
        table.rows.append((what, seconds[what] * 1e3, rates[0] / 1e9, rates[1] / 1e9, *shares))
    return table


def solves(rounds: int) -> Table:
    """Time the eigenproblem of an M×M Gram matrix. Local."""
    table = Table("M×M solve, float64", ("M", "ms"))
    for m in (8, 32, 64, 128, 256, 512):
        columns = np.random.default_rng(0).standard_normal((m, 2 * m))
        gram = columns @ columns.T
        table.rows.append((m, statistics.median(_seconds(lambda: multisecant(gram, 1e-6), 1, rounds)) * 1e3))  # noqa: B023
    return table


def gradients(rounds: int) -> Iterator[Table]:
    """Time the convnet's gradients beside PyTorch's on the same network, one thread each; nothing without it. Local."""
    try:
        import torch
    except ImportError:
        return
    from qnewton_mpi.models.reference import torch_layers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = Table(
        f"samples/s of the local gradients, PyTorch {torch.__version__}",
        ("images", "activation", "batch", "samples/s", "PyTorch", "ratio"),
    )
    for shape in DENSE_WIDTHS:
        for activation in ACTIVATIONS:
            for batch in (32, 256):
                random = np.random.default_rng(0)
                images, labels = random.standard_normal((batch, *shape), np.float32), random.integers(0, 10, batch)
                network = Convnet(shape, activation)
                parameters = network.initial_parameters(seed=0)
                peer, tensors = torch_layers(network, parameters), (torch.tensor(images), torch.tensor(labels))

                def theirs(peer: Any = peer, tensors: Any = tensors) -> None:
                    peer.zero_grad()
                    torch.nn.functional.cross_entropy(peer(tensors[0]), tensors[1]).backward()  # type: ignore[no-untyped-call]

                def ours(network: Convnet = network, arguments: Any = (parameters, images, labels)) -> None:
                    network.loss_and_gradient(*arguments)

                both = [
                    (_seconds(ours, 1024 // batch, 1)[0], _seconds(theirs, 1024 // batch, 1)[0]) for _ in range(rounds)
                ]
                mine, other = (batch / statistics.median(times) for times in zip(*both, strict=True))
                ratio = statistics.median(b / a for a, b in both)
                table.rows.append(("×".join(map(str, shape)), activation, batch, round(mine), round(other), ratio))
    torch.set_num_threads(threads)
    yield table


def adapter(rounds: int) -> Iterator[Table]:
    """Time `qnewton_mpi.torch` on two replicas against what it calls; nothing without PyTorch. Local."""
    try:
        import torch

        from qnewton_mpi.torch import QuasiNewton
    except ImportError:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = Table(
        "steps of sgd through the PyTorch adapter, M = 2",
        ("N", "ms", "gradients, ms", "algebra, ms", "ms/(gradients + algebra)"),
    )
    inputs = torch.randn(BATCH, 512)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))
    alone = Communicator(MPI.COMM_SELF)
    optimizer = QuasiNewton(
        model.parameters(), samples=BATCH // 2, replicas_per_rank=2, method="sgd", communicator=alone
    )

    def closure() -> float:
        mine = optimizer.share(inputs)
        loss = torch.nn.functional.mse_loss(model(mine), mine)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def both() -> None:
        for _ in range(2):
            model.zero_grad()
            closure()

    core, zero = optimizer.core, np.zeros(optimizer.core.exchange.size, np.float32)
    actions = (lambda: optimizer.step(closure), both, lambda: core.step(lambda w, replica: (1.0, zero)))
    times = [[_seconds(action, 4, 1)[0] for action in actions] for _ in range(rounds)]
    medians = [statistics.median(column) * 1e3 for column in zip(*times, strict=True)]
    ratio = statistics.median(whole / (gradient + algebra) for whole, gradient, algebra in times)
    table.rows.append((core.exchange.size, *medians, ratio))
    torch.set_num_threads(threads)
    yield table


def _seconds(action: Callable[[], object], count: int, rounds: int) -> list[float]:
    """Return the mean times of `count` actions, `rounds` of them, after one to warm up."""
    action()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(count):
            action()
        times.append((time.perf_counter() - started) / count)
    return times


def write(tables: Sequence[Table], path: Path) -> None:
    """Write the tables to an HDF5 file; `UserError` where it cannot be written."""

    def fill(file: h5py.File) -> None:
        for table in tables:
            table.write(file)

    with writing(path):
        write_image(path, "benchmark", fill)
