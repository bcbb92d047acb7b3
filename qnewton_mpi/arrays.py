"""Which array library a rank computes with: NumPy, or CuPy on the GPU of its node-local rank."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any

import numpy as np
from array_api_compat import array_namespace, device, is_cupy_array
from numpy.typing import NDArray

from qnewton_mpi.errors import MissingPackageError, UserError
from qnewton_mpi.origin import pip_install

Array = Any  # an array of any array-API library; there is no static type for it yet

# Arrays by their shapes, for the reader; `tests/mpi/test_shapes.py` holds calls and results to it.
# M replicas, R of them on this rank, N parameters, of which a rank holds `held`; any other name is of one call.
Whole = Annotated[Array, "N"]
Held = Annotated[Array, "held"]
Rows = Annotated[Array, "R N"]
Columns = Annotated[Array, "M held"]
Vectors = Annotated[Array, "p held"]
Vector = Annotated[NDArray[np.float64], "k"]  # on the host
Matrix = Annotated[NDArray[np.float64], "m n"]  # on the host


@dataclass(frozen=True)
class Device:
    """An array namespace and a name for messages.

    Attributes
    ----------
    xp : module
        `numpy` or `cupy`.
    name : str
        "cpu", or the GPU's index, name and memory.
    """

    xp: ModuleType
    name: str


def open_device(kind: str, node_rank: int) -> Device:
    """Return the device of a rank; for "cuda" make GPU (node-local rank modulo number of GPUs) current. Local.

    Raises
    ------
    UserError
        For "cuda" where CuPy is not installed or sees no GPU.
    """
    if kind == "cpu":
        return Device(np, "cpu")
    try:
        import cupy
    except ImportError as error:
        raise MissingPackageError(f"--device cuda needs CuPy: {pip_install('cuda12', 'cuda13')}") from error
    # Without a GPU `is_available` is False and does not raise; the first allocation would.
    if not cupy.is_available():
        raise UserError("--device cuda, but CuPy sees no GPU on this node: use --device cpu, or ask for a GPU node")
    index = node_rank % cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.Device(index).use()
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    memory = properties["totalGlobalMem"] / 2**30
    return Device(cupy, f"GPU {index}: {properties['name'].decode()}, {memory:.0f} GiB")


def to_host(array: Array) -> NDArray[Any]:
    """Return a contiguous NumPy array: a view where the data is in host memory, else a copy of the GPU's.

    `get` waits for the current stream, so that MPI never reads a buffer that a kernel is still writing.
    """
    if is_cupy_array(array):
        host: NDArray[Any] = array.get()
    elif isinstance(array, np.ndarray):
        host = array
    else:
        host = np.from_dlpack(array, device="cpu")
    return np.ascontiguousarray(host)


def to_device(host: NDArray[Any], like: Array) -> Array:
    """Return a NumPy array in the library, dtype and device of `like`: the argument itself where it is that already."""
    return array_namespace(like).asarray(host, dtype=like.dtype, device=device(like))
