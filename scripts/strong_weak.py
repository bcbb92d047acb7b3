"""Predict a step of the default on up to 1,024 ranks by the exchanges' model of their cost; check what it counts.

Usage: python scripts/strong_weak.py predict [FILE.png]     default: docs/explanation/scaling.png; the tables on stdout
       mpiexec -n RANKS python scripts/strong_weak.py check [--size N] [--latency S] [--bandwidth B/S]

`check` does steps, and compares the bytes that they count, and the seconds that they communicate, with the model's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qnewton_mpi.parallel.environment import prepare

prepare()

import numpy as np  # noqa: E402

from qnewton_mpi.arrays import Array  # noqa: E402
from qnewton_mpi.core.create import create  # noqa: E402
from qnewton_mpi.core.exchange import EXCHANGES, choose  # noqa: E402
from qnewton_mpi.core.exchange.cost import WORD, Network  # noqa: E402
from qnewton_mpi.core.optimizers.natural.kronecker import Kronecker, KroneckerSettings  # noqa: E402
from qnewton_mpi.core.optimizers.natural.method import LOSSES_EVERY  # noqa: E402
from qnewton_mpi.parallel.communicator import Communicator  # noqa: E402
from qnewton_mpi.parallel.partition import bounds_of_pieces  # noqa: E402

RANKS = [2**k for k in range(11)]
TOLD = (1, 8, 64, 1024)  # in the tables
NETWORK, FLOPS = Network(2e-6, 1e-10), 1e13  # of a rank, an accelerator: operations a second
SETTINGS = KroneckerSettings()


@dataclass(frozen=True)
class Layer:
    """A matrix of weights, bias included, and how often a sample uses it."""

    outputs: int
    inputs: int
    positions: float = 1

    @property
    def size(self) -> int:
        return self.outputs * self.inputs

    @property
    def algebra(self) -> float:
        """Operations of `kronecker` in a step: products with P⁻¹; at updates A, B, V, the mean; at some the bases."""
        a, b, leading = self.outputs, self.inputs, SETTINGS.leading
        sides = [side for side in (a, b) if 1 < side <= SETTINGS.max_side]
        if 2 * leading < min(a, b) and max(a, b) <= SETTINGS.max_side:
            turned = 2.0 * leading * (2 * a * b + b * b + (a - leading) * a)
        else:
            turned = 2.0 * self.size * sum(sides)
        update = SETTINGS.combinations * 2 * self.size * sum(sides) + (SETTINGS.combinations + 1) * turned  # the mean's
        bases = sum(20 / 3 * side**3 for side in sides)
        return 2 * turned + (update + bases / SETTINGS.basis_every) / SETTINGS.update_every


@dataclass(frozen=True)
class Workload:
    """A network, and the samples of a step: of all ranks where the batch is fixed, of a rank where that is."""

    name: str
    layers: Sequence[Layer]
    batch: int
    share: int

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)

    def gradient(self, samples: float) -> float:
        """Return the seconds of a gradient: two operations a weight and position, there and twice as many back."""
        return sum(6 * layer.size * layer.positions for layer in self.layers) * samples / FLOPS

    def sgd(self, ranks: int, samples: float) -> float:
        """Return the seconds of a step of SGD, its gradient and one Allreduce."""
        return self.gradient(samples) + (NETWORK.allreduce(ranks, WORD * self.size) if ranks > 1 else 0.0)

    def default(self, ranks: int, samples: float) -> float:
        """Return the seconds of a step of the default: a loss more every few steps, and the busiest rank's algebra."""
        replicas, traffic = max(2, ranks), Kronecker.traffic(SETTINGS)
        exchange = choose(traffic, ranks, replicas, self.size, NETWORK)
        limits = [0, self.size]
        if exchange == "sliced":
            limits = bounds_of_pieces([layer.size for layer in self.layers], ranks)
        starts = list(itertools.accumulate((layer.size for layer in self.layers), initial=0))
        busiest = max(
            sum(layer.algebra for layer, start in zip(self.layers, starts, strict=False) if first <= start < last)
            for first, last in itertools.pairwise(limits)
        )
        moved = EXCHANGES[exchange].seconds(NETWORK, traffic, ranks, replicas, self.size)
        return self.gradient(samples) * (1 + 1 / (3 * LOSSES_EVERY)) + busiest / FLOPS + moved


def block(width: int, tokens: int) -> list[Layer]:
    """Return the matrices of a block of a transformer."""
    sides = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [Layer(outputs, inputs + 1, tokens) for outputs, inputs in sides]


# A convolution and the pooling after it are one product over patches of 6 × 6, at 144 and 16 positions.
DENSER = 36 / 25
WORKLOADS = [
    Workload(
        "convnet",
        [Layer(8, 26, 144 * DENSER), Layer(16, 201, 16 * DENSER), Layer(42, 257), Layer(32, 43), Layer(10, 33)],
        batch=8192,
        share=256,
    ),
    Workload(
        "wide convnet",
        [Layer(32, 26, 144 * DENSER), Layer(64, 801, 16 * DENSER), Layer(900, 1025), Layer(80, 901), Layer(10, 81)],
        batch=8192,
        share=256,
    ),
    Workload("transformer, 14 blocks of width 768, 1,024 tokens", block(768, 1024) * 14, batch=1024, share=4),
]


def predict(path: Path) -> None:
    """Draw the seconds of a step against ranks, and print them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(WORKLOADS), figsize=(12, 7), layout="constrained", sharex=True)
    for column, workload in zip(panels.T, WORKLOADS, strict=True):
        for panel, strong in zip(column, (True, False), strict=True):
            samples = [workload.batch / ranks if strong else workload.share for ranks in RANKS]
            for method in ("sgd", "default"):
                took = [1e3 * getattr(workload, method)(*case) for case in zip(RANKS, samples, strict=True)]
                panel.plot(RANKS, took, "o-", markersize=3, label={"sgd": "SGD, one Allreduce"}.get(method, method))
            ideal = [1e3 * workload.gradient(each) for each in samples]
            panel.plot(RANKS, ideal, "k:", linewidth=1, label="gradients alone")
            fixed = f"batch {workload.batch:,}" if strong else f"{workload.share} samples a rank"
            panel.set(xscale="log", title=f"{workload.size:,} parameters, {fixed}", ylabel="ms a step")
            panel.set(yscale="log") if strong else panel.set_ylim(0)
            panel.title.set_size(10)
            panel.grid(True, alpha=0.3)
        column[-1].set(xlabel="ranks")
    panels[0, 0].legend()
    figure.savefig(path, dpi=110)
    for title, strong in (("fixed batch", True), ("fixed samples a rank", False)):
        heads = " | ".join(f"{ranks:,} rank{'s' if ranks > 1 else ''}" for ranks in TOLD)
        print(f"\n| network, {title} | N | samples | " + heads + " |\n|" + "---|" * (3 + len(TOLD)))
        for workload in WORKLOADS:
            cells = []
            for ranks in TOLD:
                samples = workload.batch / ranks if strong else workload.share
                sgd, default = (1e3 * f(ranks, samples) for f in (workload.sgd, workload.default))
                cells.append(f"{default:.3g} / {sgd:.3g} = {default / sgd:.2f}")
            number = workload.batch if strong else workload.share
            print(f"| {workload.name} | {workload.size:,} | {number:,} | " + " | ".join(cells) + " |")


class Noisy:
    """½ |w|² + c·w, c of the step and the replica, whose losses can be had alone."""

    def __init__(self, size: int) -> None:
        self.numbers, self.size, self.step = np.random.default_rng(0).standard_normal(size + 4096, "f4"), size, 0

    def __call__(self, w: Array, replica: int) -> tuple[float, Array]:
        first = (1021 * self.step + 101 * replica) % 4096
        noise = self.numbers[first : first + self.size]
        return float(w @ w) / 2 + float(noise @ w), w + noise

    def losses(self, w: Array, replicas: Sequence[int]) -> Array:
        return np.array([self(w, replica)[0] for replica in replicas])


def check(size: int, network: Network, steps: int = 100, warm_up: int = 20) -> None:
    """Do steps of the default on these ranks, and print what is counted and measured over what is predicted."""
    communicator, side = Communicator(), 128
    n, count = communicator.size, max(1, size // side**2)
    size, replicas = count * side**2, max(2, communicator.size)
    traffic = Kronecker.traffic(SETTINGS)
    for name in EXCHANGES:
        problem = Noisy(size)
        optimizer = create(
            "kronecker", np.ones(size, "f4"), replicas, shapes=[(side, side)] * count, exchange=name,
            communicator=communicator,
        )  # fmt: skip
        took, exchange = [], optimizer.exchange
        for problem.step in range(warm_up + steps):
            if problem.step == warm_up:
                sent, made = exchange.bytes_sent, communicator.collectives.total()
            before = communicator.seconds
            optimizer.step(problem)
            took.append(communicator.seconds - before)
        received = (exchange.bytes_sent - sent) / steps / n
        bytes_, time = (EXCHANGES[name].seconds(w, traffic, n, replicas, size) for w in (Network(0.0, 1.0), network))
        collectives = (communicator.collectives.total() - made) / steps
        if communicator.rank == 0 and n > 1:
            told = f"{statistics.mean(took[warm_up:]) / time:.2f}" if name != "server" else ""
            print(f"| {n} | {size:,} | {name} | {received / bytes_:.3f} | {collectives:.2f} | {told} |", flush=True)


def main() -> int:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    picture = Path("docs/explanation/scaling.png")
    commands.add_parser("predict").add_argument("file", type=Path, nargs="?", default=picture)
    checking = commands.add_parser("check")
    checking.add_argument("--size", type=int, default=1 << 20)
    checking.add_argument("--latency", type=float, default=NETWORK.latency)
    checking.add_argument("--bandwidth", type=float, default=1 / NETWORK.seconds_per_byte)
    arguments = parser.parse_args()
    if arguments.command == "predict":
        predict(arguments.file)
    else:
        check(arguments.size, Network(arguments.latency, 1 / arguments.bandwidth))
    return 0


if __name__ == "__main__":
    sys.exit(main())
