"""Fit the α-β model of `qnewton_mpi.core.exchange.cost` to measured collectives, check it, and predict large machines.

Usage: mpiexec -n RANKS python scripts/scaling.py measure FILE.json     the collectives on these ranks
       python scripts/scaling.py fit FILE.json … [--check FILE.json …]  α and β; their error on files not in the fit
       python scripts/scaling.py predict [--latency 2e-6] [--bandwidth 1e10]

Ranks that share the cores of one machine also share its memory: there, β of the model is multiplied by
max(1, ranks/cores), and so is α.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qnewton_mpi.parallel.environment import prepare

prepare()

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from qnewton_mpi.core.exchange import EXCHANGES  # noqa: E402
from qnewton_mpi.core.exchange.cost import Network  # noqa: E402
from qnewton_mpi.core.optimizers import OPTIMIZERS  # noqa: E402
from qnewton_mpi.parallel.partition import bounds  # noqa: E402

SIZES = [4 * 2**k for k in range(8, 23, 2)]  # bytes: 1 KiB to 16 MiB
COLLECTIVES = ("allreduce", "reduce_scatter", "allgather", "alltoall")
ROUNDS = 15


@dataclass(frozen=True)
class Measurement:
    """Median seconds of a collective of some bytes a rank, the slowest rank's."""

    collective: str
    ranks: int
    cores: int
    size: int
    seconds: float

    def predicted(self, latency: float, seconds_per_byte: float) -> float:
        """Return what the model says."""
        crowd = max(1.0, self.ranks / self.cores)
        network = Network(crowd * latency, crowd * seconds_per_byte)
        collective: Callable[[int, float], float] = getattr(network, self.collective)
        return collective(self.ranks, self.size)


def measure(path: Path) -> None:
    """Time the collectives on all ranks and write them from rank 0. Collective."""
    world = MPI.COMM_WORLD
    found = []
    for size in SIZES:
        words = size // 4
        counts = np.diff(bounds(words, world.size)).tolist()
        mine, all_of_it, other = np.ones(counts[world.rank], "f4"), np.ones(words, "f4"), np.empty(words, "f4")
        share = np.empty(counts[world.rank], "f4")
        whole_shares, received = (a[: words // world.size * world.size] for a in (all_of_it, other))
        actions: dict[str, Callable[[], None]] = {
            "allreduce": lambda: world.Allreduce(all_of_it, other),  # noqa: B023
            "reduce_scatter": lambda: world.Reduce_scatter(all_of_it, share, counts),  # noqa: B023
            "allgather": lambda: world.Allgatherv(mine, [other, counts]),  # noqa: B023
            "alltoall": lambda: world.Alltoall(whole_shares, received),  # noqa: B023
        }
        repeat = max(1, min(200, int(2e7 / size / world.size)))
        for name, action in actions.items():
            times = []
            for _ in range(ROUNDS):
                world.Barrier()
                started = time.perf_counter()
                for _ in range(repeat):
                    action()
                times.append(world.allreduce((time.perf_counter() - started) / repeat, MPI.MAX))
            cores = len(os.sched_getaffinity(0))
            found.append(Measurement(name, world.size, cores, size, statistics.median(times)))
    if world.rank == 0:
        path.write_text("\n".join(json.dumps(vars(m)) for m in found) + "\n")


def read(paths: Sequence[str]) -> list[Measurement]:
    """Return the measurements of files."""
    return [Measurement(**json.loads(line)) for path in paths for line in Path(path).read_text().splitlines()]


def fit(measurements: Sequence[Measurement]) -> tuple[float, float]:
    """Return α and β of the least squared logarithms of predicted over measured seconds, by a grid made ever finer."""
    alpha, beta, width = 1e-5, 1e-9, 4.0

    def error(latency: float, per_byte: float) -> float:
        return sum(np.log(m.predicted(latency, per_byte) / m.seconds) ** 2 for m in measurements)

    for _ in range(12):
        grid = np.geomspace(1 / 10**width, 10**width, 17) if width > 0.01 else np.ones(1)
        alpha, beta = min(((alpha * a, beta * b) for a in grid for b in grid), key=lambda pair: error(*pair))
        width /= 2
    return float(alpha), float(beta)


def show_fit(fitted: Sequence[Measurement], checked: Sequence[Measurement]) -> None:
    """Print α, β, and predicted over measured seconds of each rank count."""
    alpha, beta = fit(fitted)
    print(f"α = {alpha * 1e6:.2f} μs, 1/β = {1e-9 / beta:.2f} GB/s")
    print("\n| ranks | in the fit | collective | " + " | ".join(f"{size / 1024:.0f} KiB" for size in SIZES) + " |")
    print("|---" * (3 + len(SIZES)) + "|")
    for ranks in sorted({m.ranks for m in (*fitted, *checked)}):
        for name in COLLECTIVES:
            row = [m for m in (*fitted, *checked) if (m.ranks, m.collective) == (ranks, name)]
            inside = "yes" if row[0] in fitted else "no"
            ratios = " | ".join(f"{m.predicted(alpha, beta) / m.seconds:.2f}" for m in row)
            print(f"| {ranks} | {inside} | {name} | {ratios} |")
    for what, some in (("in the fit", fitted), ("not in the fit", checked)):
        if some:
            errors = [abs(np.log(m.predicted(alpha, beta) / m.seconds)) for m in some]
            print(f"\n{what}: predicted/measured off by a factor of {np.exp(statistics.median(errors)):.2f} (median)")


def predict(network: Network) -> None:
    """Print the seconds of communication in a step with one replica a rank, and where `sliced` overtakes."""
    print(f"α = {network.latency * 1e6:g} μs, 1/β = {1e-9 / network.seconds_per_byte:g} GB/s; M = ranks\n")
    print("| method | N | ranks | Allreduce, ms | allgather, ms | sliced, ms |\n|---|---|---|---|---|---|")
    for method in ("sgd", "multisecant", "fisher", "kronecker"):
        kind = OPTIMIZERS[method]
        traffic = kind.traffic(kind.settings_type())
        for size in (10**4, 10**6, 10**9):
            for ranks in (8, 64, 1024):
                times = (
                    EXCHANGES[name].seconds(network, traffic, ranks, ranks, size) for name in ("allgather", "sliced")
                )
                cells = " | ".join(f"{1e3 * t:.4g}" for t in (network.allreduce(ranks, 4 * size), *times))
                print(f"| {method} | {size:.0e} | {ranks} | {cells} |")
    print("\n| method | ranks | sliced is faster from N = |\n|---|---|---|")
    for method in ("sgd", "multisecant", "fisher", "kronecker"):
        kind = OPTIMIZERS[method]
        traffic = kind.traffic(kind.settings_type())
        for ranks in (2, 8, 64, 1024):
            sizes = (round(10 ** (k / 10)) for k in range(10, 91))
            faster = (
                s
                for s in sizes
                if EXCHANGES["sliced"].seconds(network, traffic, ranks, ranks, s)
                < EXCHANGES["allgather"].seconds(network, traffic, ranks, ranks, s) * (1 - 1e-9)
            )
            first = next(faster, None)
            print(f"| {method} | {ranks} | {f'{first:.1e}' if first else 'never'} |")


def main() -> int:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("measure").add_argument("file", type=Path)
    fitting = commands.add_parser("fit")
    fitting.add_argument("files", nargs="+")
    fitting.add_argument("--check", nargs="*", default=[])
    predicting = commands.add_parser("predict")
    predicting.add_argument("--latency", type=float, default=2e-6)
    predicting.add_argument("--bandwidth", type=float, default=1e10)
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.file)
    elif arguments.command == "fit":
        show_fit(read(arguments.files), read(arguments.check))
    else:
        predict(Network(arguments.latency, 1 / arguments.bandwidth))
    return 0


if __name__ == "__main__":
    sys.exit(main())
