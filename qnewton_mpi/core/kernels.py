"""Linear combinations and inner products, in one pass over memory where that can be had. Local."""

from __future__ import annotations

import functools
from typing import Any

from array_api_compat import array_namespace, is_cupy_array

from qnewton_mpi.parallel.device import Array

# Numbers at a time: few enough to stay in a core's cache until they are added.
PIECE = 1 << 16


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
    """Return Σ x y over all entries, an array without axes, summed in float64."""
    if is_cupy_array(x):
        return _kernels()[1](x, y)
    xp = array_namespace(x)
    return xp.sum(x * y, dtype=xp.float64)


@functools.cache
def _kernels() -> tuple[Any, Any]:
    import cupy

    return (
        cupy.ElementwiseKernel("float64 a, T x, float64 b, T y", "T z", "z = (T)a * x + (T)b * y", "combination"),
        cupy.ReductionKernel("T x, T y", "float64 z", "(double)x * (double)y", "a + b", "z = a", "0", "inner"),
    )
