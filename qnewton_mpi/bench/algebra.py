"""What steps are made of, against what bounds it in the same run: a copy, and a product of matrices."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from mpi4py import MPI

from qnewton_mpi.arrays import Array
from qnewton_mpi.bench.steps import RANK
from qnewton_mpi.bench.tables import Table
from qnewton_mpi.bench.timing import Clock, seconds_of
from qnewton_mpi.core.exchange import AllgatherExchange
from qnewton_mpi.core.kernels import combination, inner
from qnewton_mpi.core.layers import LayerShape
from qnewton_mpi.core.optimizers.natural.kronecker import KroneckerSettings
from qnewton_mpi.core.optimizers.natural.layer import Layer
from qnewton_mpi.core.secants import multisecant
from qnewton_mpi.parallel.communicator import Communicator

SIDES = (128, 1024)  # of the layers whose products are timed


@dataclass(frozen=True)
class Work:
    """Something that steps are made of: an action, the bytes that it has to move at least, and its operations."""

    action: Callable[[], object]
    moved: float
    operations: float = 0.0  # multiplications and additions of products


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
    random = np.random.default_rng(0)

    def numbers(*shape: int) -> Array:
        return xp.asarray(random.standard_normal(shape, np.float32))

    x, y, rows = numbers(size), numbers(size), numbers(replicas + rank, size)
    square, out = numbers(side, side), xp.empty_like(rows)

    def copy() -> None:
        out[...] = rows

    works = {
        "copy": Work(copy, 8 * (replicas + rank) * size),
        "sgemm": Work(lambda: square @ square, 0, 2 * side**3),
        "a x + b y": Work(lambda: combination(0.5, x, 0.5, y, out=out[0, :]), 12 * size),
        "Σ x y": Work(lambda: inner(x, y), 8 * size),
        **_of_rows(x, rows, replicas, numbers(rank, replicas + rank), numbers(rank)),
    }
    for s in SIDES:
        if s * s <= size:
            works |= _of_a_layer(x, s, numbers(2, s * s))
    seconds = {what: clock(work.action) for what, work in works.items()}
    bandwidth, arithmetic = works["copy"].moved / seconds["copy"], works["sgemm"].operations / seconds["sgemm"]
    table = Table(f"algebra, N = {size}", ("what", "ms", "GB/s", "Gflop/s", "of copy's rate", "of sgemm's rate"))
    for what, work in works.items():
        rates = work.moved / seconds[what], work.operations / seconds[what]
        shares = rates[0] / bandwidth, rates[1] / arithmetic
        table.rows.append((what, seconds[what] * 1e3, rates[0] / 1e9, rates[1] / 1e9, *shares))
    return table


def _of_rows(x: Array, rows: Array, replicas: int, coefficients: Array, weights: Array) -> dict[str, Work]:
    """Return what is done with the columns of the replicas and `fisher`'s kept vectors.

    Parameters
    ----------
    x : (N,)
    rows : (M + rank, N)
        The M new ones first.
    replicas : int
        M.
    coefficients : (rank, M + rank)
    weights : (rank,)
    """
    m, r, size = replicas, len(weights), len(x)
    exchange = AllgatherExchange(Communicator(MPI.COMM_SELF), m, size)
    new, kept = rows[:m, :], rows[:r, :]
    return {
        f"Gram matrix, {m} rows": Work(lambda: exchange.gram(new, new), 4 * m * size, 2 * m * m * size),
        f"Gram matrix, {m} rows with {m + r}": Work(
            lambda: exchange.gram(new, rows, precise=False), 4 * (m + r) * size, 2 * m * (m + r) * size
        ),
        f"{r} combinations of {m + r} rows": Work(
            lambda: coefficients @ rows, 4 * (m + 2 * r) * size, 2 * r * (m + r) * size
        ),
        f"products of {r} rows with one": Work(
            lambda: exchange.gram(kept, x[None, :], precise=False), 4 * (r + 1) * size, 2 * r * size
        ),
        f"a combination of {r} rows": Work(lambda: weights @ kept, 4 * (r + 1) * size, 2 * r * size),
    }


def _of_a_layer(x: Array, side: int, gradients: Array) -> dict[str, Work]:
    """Return what `kronecker` does with a square layer of a side; gradients (2, side²)."""
    usual = KroneckerSettings()
    layer = Layer(x, LayerShape(0, side, side, False), 0, usual.max_side, usual.leading)
    turned = 4 * side**2 * (2 * layer.leading if layer.corner else side)  # flops into the bases, and as many back
    words = 2 * side**2 + 2 * side**2  # of X, read and written, and of the bases
    return {
        f"A, B and V of a layer {side}×{side}, a combination and the mean": Work(
            lambda: layer.add(gradients[:1, :], gradients[0, :], 0.1),
            4 * (words + 4 * side**2),
            2 * turned + 4 * side**3,
        ),
        f"P⁻¹ of a layer {side}×{side} times a vector": Work(
            lambda: layer.flat(layer.view(gradients[1:, :]).times(layer.scales)), 4 * words, 2 * turned
        ),
    }


def solves(rounds: int) -> Table:
    """Time the eigenproblem of an M×M Gram matrix. Local."""
    table = Table("M×M solve, float64", ("M", "ms"))
    for m in (8, 32, 64, 128, 256, 512):
        columns = np.random.default_rng(0).standard_normal((m, 2 * m))
        gram = columns @ columns.T
        table.rows.append((m, statistics.median(seconds_of(lambda: multisecant(gram, 1e-6), 1, rounds)) * 1e3))  # noqa: B023
    return table
