"""Count the sequential gradient rounds of `BlockBFGS` and of SciPy's L-BFGS on a smooth ill-conditioned problem.

Usage: python scripts/full_batch.py [--images 5000] [--regularisation 1e-4] [--replicas 4 8 16] [--rounds 120]

Softmax regression with L2 regularisation on the embedded images, float64, all images in every gradient. A round is
what happens at one time: one gradient on every replica, each of all images. The gap is the loss above its minimum,
relative to that at the start; the minimum is where L-BFGS ends after 1,000 gradients.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from qnewton_mpi.core.exchange import AllgatherExchange
from qnewton_mpi.core.optimizers import BlockBFGS
from qnewton_mpi.core.optimizers.block_bfgs import BlockBFGSSettings
from qnewton_mpi.data import datasets
from qnewton_mpi.parallel.communicator import Communicator

GAPS = (0.1, 0.01, 0.001)
CLASSES = 10


class SoftmaxRegression:
    """Mean negative log-likelihood + r/2 ‖w‖², w of (pixels + 1) × 10 entries."""

    def __init__(self, images: int, regularisation: float) -> None:
        data = datasets.load(datasets.EMBEDDED, None, dtype=np.float64)
        pixels, self.labels = data.train.batch(slice(0, images))
        self.inputs = np.column_stack([pixels.reshape(len(pixels), -1), np.ones(len(pixels))])
        self.hot = np.eye(CLASSES)[self.labels]
        self.regularisation = regularisation
        self.size = self.inputs.shape[1] * CLASSES

    def __call__(self, w: NDArray[np.float64], replica: int = 0) -> tuple[float, NDArray[np.float64]]:
        logits = self.inputs @ w.reshape(-1, CLASSES)
        logits -= logits.max(axis=1, keepdims=True)
        norms = np.log(np.exp(logits).sum(axis=1))
        nll = np.mean(norms - logits[np.arange(len(logits)), self.labels])
        residuals = np.exp(logits - norms[:, None]) - self.hot
        gradient = (self.inputs.T @ residuals / len(logits)).ravel() + self.regularisation * w
        return float(nll + self.regularisation / 2 * (w @ w)), gradient


def rounds_to(losses: list[float], least: float) -> list[str]:
    """Return after how many rounds each gap is reached."""
    gaps = (np.minimum.accumulate(losses) - least) / (losses[0] - least)
    return [str(int(np.argmax(gaps <= gap)) + 1) if (gaps <= gap).any() else f"> {len(losses)}" for gap in GAPS]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--regularisation", type=float, default=1e-4)
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=120)
    options = parser.parse_args()
    problem = SoftmaxRegression(options.images, options.regularisation)
    start = np.zeros(problem.size)

    print(f"| method | {' | '.join(f'rounds to a gap of {gap:g}' for gap in GAPS)} |\n|{'---|' * (len(GAPS) + 1)}")
    least = np.inf
    for memory in (10, 50, 300):
        losses: list[float] = []

        def watched(w: NDArray[np.float64], losses: list[float] = losses) -> tuple[float, NDArray[np.float64]]:
            loss, gradient = problem(w)
            losses.append(loss)
            return loss, gradient

        limits = {"maxcor": memory, "maxfun": 1000, "maxiter": 1000, "ftol": 0, "gtol": 0}
        least = min(least, minimize(watched, start, jac=True, method="L-BFGS-B", options=limits).fun)
        print(f"| L-BFGS (SciPy), memory {memory} | {' | '.join(rounds_to(losses, least))} |", flush=True)
    for replicas in options.replicas:
        optimizer = BlockBFGS(BlockBFGSSettings(), start, AllgatherExchange(Communicator(), replicas, problem.size))
        losses = []
        while optimizer.evaluations < options.rounds * replicas:
            loss = optimizer.step(problem)["loss"]
            losses += [losses[-1] if losses else loss] * (optimizer.evaluations // replicas - len(losses) - 1) + [loss]
        print(f"| BlockBFGS, M = {replicas} | {' | '.join(rounds_to(losses, least))} |", flush=True)


if __name__ == "__main__":
    main()
