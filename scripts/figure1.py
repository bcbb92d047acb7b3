"""Draw how SGD, `multisecant` and `deflated` cross a saddle and a plateau in two dimensions.

Usage: python scripts/figure1.py [FILE.png]      default: docs/explanation/figure1.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.core.exchange import AllgatherExchange
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import build
from qnewton_mpi.parallel.communicator import Communicator

Vector = NDArray[np.float64]
STEPS = 100
METHODS = {
    "sgd": {"lr": 0.3},
    "multisecant": {"lr": 0.3, "spread": "random"},
    # The rate is for what is not deflated; here both directions are, and move by 0.3/|λ|.
    "deflated": {"lr": 30.0, "newton_rate": 0.3, "momentum": 0.0, "probe_every": 1},
}


def saddle(w: Vector) -> tuple[float, Vector]:
    """Return ½ x² − 0.01 y² + 0.0025 y⁴, whose minima are at y = ±√2, and its gradient."""
    x, y = w
    return 0.5 * x**2 - 0.01 * y**2 + 0.0025 * y**4, np.array([x, -0.02 * y + 0.01 * y**3])


def plateau(w: Vector) -> tuple[float, Vector]:
    """Return ½ x² + 0.05 tanh²(y/2), flat far from its minimum, and its gradient."""
    x, y = w
    t = np.tanh(y / 2)
    return 0.5 * x**2 + 0.05 * t**2, np.array([x, 0.05 * t * (1 - t**2)])


SURFACES: dict[str, tuple[Callable[[Vector], tuple[float, Vector]], Vector]] = {
    "saddle at the origin": (saddle, np.array([1.0, 0.02])),
    "plateau": (plateau, np.array([1.0, 4.0])),
}


def trajectory(method: str, surface: Callable[[Vector], tuple[float, Vector]], start: Vector) -> Vector:
    """Return the points, (STEPS + 1, 2), of three replicas that all see the same loss."""
    kind = OPTIMIZERS[method]
    replicas = 2 if method == "deflated" else 3  # as many directions as there are; secants have one less than replicas
    exchange = AllgatherExchange(Communicator(), replicas, 2)
    optimizer = kind(build(kind.settings_type, METHODS[method]), start, exchange)
    points = [start]
    for _ in range(STEPS):
        optimizer.step(lambda w, replica: surface(w))
        points.append(np.array(optimizer.parameters))
    return np.array(points)


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="docs/explanation/figure1.png", metavar="FILE.png")
    target = parser.parse_args().target
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for (above, below), (title, (surface, start)) in zip(panels.T, SURFACES.items(), strict=True):
        x, y = np.meshgrid(np.linspace(-1.1, 1.1, 121), np.linspace(-2, 2 if surface is saddle else 9.5, 121))
        heights = np.array(
            [[surface(np.array(w))[0] for w in zip(*row, strict=True)] for row in zip(x, y, strict=True)]
        )
        above.contour(y, x, heights, 25, cmap="Greys", linewidths=0.6)
        for method in METHODS:
            points = trajectory(method, surface, start)
            above.plot(points[:, 1], points[:, 0], ".-", markersize=3, linewidth=1, label=method)
            below.plot([surface(w)[0] for w in points], label=method)
            print(f"{title}, {method}: {surface(points[-1])[0]:+.5f} after {STEPS} steps")
        above.set(title=title, xlabel="y", ylabel="x")
        below.set(xlabel="steps", ylabel="loss")
        below.set_yscale("symlog", linthresh=0.01)
        below.grid(True, alpha=0.3)
        below.legend()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
