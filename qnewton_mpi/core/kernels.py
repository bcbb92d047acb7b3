"""Linear combinations and inner products of long vectors, in one pass over memory where that can be had. Local."""

from __future__ import annotations

import functools
from typing import Any

from array_api_compat import array_namespace, device, is_cupy_array, is_numpy_array

from qnewton_mpi.arrays import Array, to_host

# Numbers at a time: few enough to stay in a core's cache until they are added.
PIECE = 1 << 16
# Numbers that are converted to float64 at a time: on a CPU few enough to stay in cache, in rows long enough for a fast
# product; elsewhere few enough to leave room in memory.
CPU_DOUBLES, DOUBLES = 1 << 18, 1 << 26
# Coordinates whose products are added in the arrays' own precision, where that is precise enough.
BLOCK = 1 << 14


def combination(a: float, x: Array, b: float, y: Array, out: Array | None = None) -> Array:
    """Return a x + b y, of the arrays' dtype; in `out`, which may be x or y, if given.

    Parameters
    ----------
    a, b : float
    x, y : array
        Of one shape, dtype and library.
    out : array, optional

    Examples
    --------
    >>> import numpy as np
    >>> combination(2.0, np.array([1.0, 2.0]), -1.0, np.array([0.5, 0.0]))
    array([1.5, 4. ])
    """
    if is_cupy_array(x):
        return _kernels()[0](a, x, b, y) if out is None else _kernels()[0](a, x, b, y, out)
    out = array_namespace(x).empty_like(x) if out is None else out
    for start in range(0, x.shape[0], PIECE):
        piece = slice(start, min(start + PIECE, x.shape[0]))
        scaled = b * y[piece, ...]
        if out is not x or a != 1:
            out[piece, ...] = a * x[piece, ...]
        out[piece, ...] += scaled
    return out


def inner(x: Array, y: Array) -> Array:
    """Return Σ x y over all entries, an array without axes: float64, on a CPU the sum of `blockwise_products`."""
    if is_cupy_array(x):
        return _inner_on_gpu(x.reshape(-1), y.reshape(-1))
    xp = array_namespace(x)
    x, y = xp.reshape(x, (1, -1)), xp.reshape(y, (1, -1))
    if x.shape[1] <= BLOCK:  # the same by fewer calls: of a network's layers most are short
        return xp.astype(xp.vecdot(x, y)[0], xp.float64)
    return blockwise_products(x, y)[0, 0]


def square_norms(rows: Array) -> Array:
    """Return Σ x² of each row of an array (n, N), (n,)."""
    xp = array_namespace(rows)
    return xp.stack([inner(row, row) for row in rows]) if is_cupy_array(rows) else xp.vecdot(rows, rows)


def checksum(vector: Array) -> int:
    """Return the sum of a vector's words of 64 bits, modulo 2⁶⁴, as a signed number: the same where all bits are."""
    if not (is_numpy_array(vector) or is_cupy_array(vector)):
        vector = to_host(vector)
    even = vector.shape[0] - vector.shape[0] % 2
    words, rest = vector[:even].view("int64"), vector[even:].view("int32").astype("int64")
    return int(words.sum() + rest.sum())


def double_products(a: Array, b: Array) -> Array:
    """Return A Bᵀ of arrays (p, n) and (q, n), multiplied and added in float64."""
    xp = array_namespace(a)
    piece = max(1, (CPU_DOUBLES if is_numpy_array(a) else DOUBLES) // (a.shape[0] + b.shape[0]))
    total = xp.zeros((a.shape[0], b.shape[0]), dtype=xp.float64, device=device(a))
    for start in range(0, a.shape[1], piece):
        block = slice(start, min(start + piece, a.shape[1]))
        left = xp.astype(a[:, block], xp.float64)
        right = left if a is b else xp.astype(b[:, block], xp.float64)
        total += left @ right.T
    return total


def blockwise_products(a: Array, b: Array) -> Array:
    """Return A Bᵀ of arrays (p, n) and (q, n), in float64 over blocks multiplied in the arrays' precision.

    One product of stacks of matrices: a GPU is asked once, not once a block.
    """
    xp = array_namespace(a)
    blocks = a.shape[1] // BLOCK
    whole = blocks * BLOCK

    def stack(rows: Array) -> Array:
        return xp.permute_dims(xp.reshape(rows[:, :whole], (rows.shape[0], blocks, BLOCK)), (1, 0, 2))

    products = stack(a) @ xp.matrix_transpose(stack(b))
    return xp.sum(products, axis=0, dtype=xp.float64) + a[:, whole:] @ xp.matrix_transpose(b[:, whole:])


def _inner_on_gpu(x: Array, y: Array) -> Array:
    """Return Σ x y of CuPy's vectors, in two levels: a reduction has a thread block for each number that comes out."""
    kernel, whole = _kernels()[1], x.shape[0] - x.shape[0] % BLOCK
    blocks = kernel(x[:whole].reshape(-1, BLOCK), y[:whole].reshape(-1, BLOCK), axis=1)
    return blocks.sum() + kernel(x[whole:], y[whole:])


@functools.cache
def _kernels() -> tuple[Any, Any]:
    import cupy

    return (
        cupy.ElementwiseKernel("float64 a, T x, float64 b, T y", "T z", "z = (T)a * x + (T)b * y", "combination"),
        cupy.ReductionKernel("T x, T y", "float64 z", "(double)x * (double)y", "a + b", "z = a", "0", "inner"),
    )
