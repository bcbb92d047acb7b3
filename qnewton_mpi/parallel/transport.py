"""How arrays cross the network: through host memory, from GPU to GPU by MPI, or by NCCL.

=========  ============================================================================================
transport  what the library that moves the data reads and writes
=========  ============================================================================================
`host`     host memory: NumPy's arrays themselves; those of a GPU are copied to pinned buffers and back
`cuda`     GPU memory, by an MPI library that is CUDA-aware
`nccl`     GPU memory, by NCCL through CuPy, one GPU a rank
=========  ============================================================================================
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, is_numpy_array

from qnewton_mpi.arrays import Array, to_device, to_host
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator, HostArray

TRANSPORTS = ("auto", "host", "cuda", "nccl")


class Transport:
    """Collectives on arrays of any library, by way of host memory.

    They fill, and return, an array that is given for the result, of the library, dtype and device of what is sent. All
    are collective. One rank has nothing to send: its data is copied where it is.

    Parameters
    ----------
    communicator : Communicator

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> transport = Transport(Communicator(MPI.COMM_SELF))
    >>> transport.allreduce(np.array([1.0, 2.0]), np.empty(2))
    array([1., 2.])
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self._staging: dict[tuple[str, int, str], HostArray] = {}

    def allreduce(self, array: Array, total: Array) -> Array:
        """Fill `total` with the sum of the ranks' arrays, of one shape."""
        return self._cross(self.communicator.allreduce, array, total)

    def reduce_scatter(self, array: Array, counts: Sequence[int], share: Array) -> Array:
        """Fill `share` with this rank's part, `counts` words a rank, of the sum of the ranks' arrays."""
        return self._cross(lambda out, into: self.communicator.reduce_scatter(out, counts, into), array, share)

    def allgather(self, rows: Array, counts: Sequence[int], everyone: Array) -> Array:
        """Fill `everyone` with the ranks' rows, in rank order, `counts` of each."""
        return self._cross(lambda out, into: self.communicator.allgather(out, counts, into), rows, everyone)

    def alltoall(self, send: Array, sent: Sequence[int], receive: Array, received: Sequence[int]) -> Array:
        """Send each rank its part of `send`, `sent` words a rank; fill `receive` with `received` words of each."""
        return self._cross(lambda out, into: self.communicator.alltoall(out, sent, into, received), send, receive)

    def _cross(self, collective: Callable[[Any, Any], object], array: Array, result: Array) -> Array:
        """Do a collective on what MPI may read and write for an array and its result."""
        if self.communicator.size == 1:
            result[...] = array_namespace(array).reshape(array, result.shape)
            return result
        landing = self._staged("landing", result)
        collective(self._outgoing(array), landing)
        if landing is not result:
            _set(result, landing)
        return result

    def _outgoing(self, array: Array) -> HostArray:
        if is_cupy_array(array):
            staged = self._staged("outgoing", array)
            array.get(out=staged)  # waits for the stream, so that MPI never reads what a kernel still writes
            return staged
        return to_host(array)

    def _staged(self, purpose: str, like: Array) -> HostArray:
        """Return a host buffer of an array's shape and dtype, the same at each call; of NumPy's, the array itself."""
        if is_numpy_array(like):
            return like
        dtype = np.dtype(str(like.dtype).rpartition(".")[2])
        words = int(np.prod(like.shape))
        key = purpose, words, dtype.str
        if key not in self._staging:
            self._staging[key] = _pinned(words, dtype) if is_cupy_array(like) else np.empty(words, dtype)
        return self._staging[key].reshape(like.shape)


class CudaTransport(Transport):
    """GPU memory to GPU memory, by an MPI library that is CUDA-aware. It has to be asked for, and is tried first.

    Raises
    ------
    UserError
        On every rank, where MPI returns something else than it should. (A library that is not CUDA-aware may also end
        the job with a segmentation fault.)
    """

    def __init__(self, communicator: Communicator) -> None:
        super().__init__(communicator)
        _try(self)

    def _cross(self, collective: Callable[[Any, Any], object], array: Array, result: Array) -> Array:
        import cupy

        outgoing = cupy.ascontiguousarray(array)
        cupy.cuda.get_current_stream().synchronize()  # MPI does not know of streams
        collective(outgoing, result)
        return result


class NcclTransport(Transport):
    """GPU memory to GPU memory by NCCL, on CuPy's current stream; MPI only tells the ranks of each other.

    What has no collective of its own there, because the ranks' parts differ in length, is a group of simpler ones.

    Raises
    ------
    UserError
        On every rank, where CuPy has no NCCL, ranks share a GPU, or NCCL returns something else than it should.
    """

    def __init__(self, communicator: Communicator) -> None:
        super().__init__(communicator)
        self.nccl = communicator.together(self._library)
        identity = communicator.from_root(self.nccl.get_unique_id)
        self.ranks = self.nccl.NcclCommunicator(communicator.size, identity, communicator.rank)
        _try(self)

    def _library(self) -> Any:
        import cupy
        from cupy.cuda import nccl

        if not nccl.available:
            raise UserError("--transport nccl: CuPy finds no NCCL library: install it (nvidia-nccl-cu12), or take host")
        gpus = cupy.cuda.runtime.getDeviceCount()
        if self.communicator.node_rank >= gpus:
            raise UserError(f"--transport nccl needs a GPU for each rank, this node has {gpus}: fewer ranks, or host")
        return nccl

    def allreduce(self, array: Array, total: Array) -> Array:
        send, stream = self._ready(array)
        with self._timed("Allreduce", stream):
            pointers = send.data.ptr, total.data.ptr
            self.ranks.allReduce(*pointers, total.size, self._type(total), self.nccl.NCCL_SUM, stream.ptr)
        return total

    def reduce_scatter(self, array: Array, counts: Sequence[int], share: Array) -> Array:
        send, stream = self._ready(array)
        with self._timed("Reduce_scatter", stream), self._group():
            for rank, (first, count) in enumerate(_parts(counts)):
                pointers = send.data.ptr + first * send.itemsize, share.data.ptr
                self.ranks.reduce(*pointers, count, self._type(send), self.nccl.NCCL_SUM, rank, stream.ptr)
        return share

    def allgather(self, rows: Array, counts: Sequence[int], everyone: Array) -> Array:
        send, stream = self._ready(rows)
        words = int(np.prod(everyone.shape[1:]))
        with self._timed("Allgatherv", stream), self._group():
            for rank, (first, count) in enumerate(_parts([count * words for count in counts])):
                pointers = send.data.ptr, everyone.data.ptr + first * everyone.itemsize
                self.ranks.broadcast(*pointers, count, self._type(everyone), rank, stream.ptr)
        return everyone

    def alltoall(self, send: Array, sent: Sequence[int], receive: Array, received: Sequence[int]) -> Array:
        outgoing, stream = self._ready(send)
        kind, size = self._type(receive), receive.itemsize
        with self._timed("Alltoallv", stream), self._group():
            for peer, (out, into) in enumerate(zip(_parts(sent), _parts(received), strict=True)):
                self.ranks.send(outgoing.data.ptr + out[0] * size, out[1], kind, peer, stream.ptr)
                self.ranks.recv(receive.data.ptr + into[0] * size, into[1], kind, peer, stream.ptr)
        return receive

    def _ready(self, array: Array) -> tuple[Array, Any]:
        import cupy

        return cupy.ascontiguousarray(array), cupy.cuda.get_current_stream()

    def _type(self, array: Array) -> Any:
        return self.nccl.NCCL_FLOAT32 if array.itemsize == 4 else self.nccl.NCCL_FLOAT64

    @contextlib.contextmanager
    def _group(self) -> Iterator[None]:
        self.nccl.groupStart()
        yield
        self.nccl.groupEnd()

    @contextlib.contextmanager
    def _timed(self, kind: str, stream: Any) -> Iterator[None]:
        """Count the collective, and the time until the data is there, and tell the watchdog."""
        with self.communicator.timed(kind):
            yield
            stream.synchronize()


def open_transport(kind: str, device: str, communicator: Communicator) -> Transport:
    """Return a transport by its name for "cpu" or "cuda"; "auto" is `host`. Collective.

    Raises
    ------
    UserError
        On every rank, for a transport that the device does not have or that does not work here.
    """
    if kind in ("auto", "host"):
        return Transport(communicator)
    if device == "cpu":
        raise UserError(f"--transport {kind} is for arrays on GPUs: use --device cuda, or --transport host")
    return {"cuda": CudaTransport, "nccl": NcclTransport}[kind](communicator)


def _try(transport: Transport) -> None:
    """Send a small array round and compare. Collective."""
    import cupy

    communicator = transport.communicator

    def compare() -> None:
        mine = cupy.full(1 << 12, communicator.rank + 1, cupy.float32)
        total = transport.allreduce(mine, cupy.zeros_like(mine))
        expected = communicator.size * (communicator.size + 1) / 2
        if not bool((total == expected).all()):
            raise UserError(
                f"{type(transport).__name__}: a sum over the ranks came back as {float(total[0]):g} instead of "
                f"{expected:g}: this MPI library or NCCL cannot be used from GPU memory here; use --transport host"
            )

    communicator.together(compare)


def _parts(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return where each part of so many words begins, and its words."""
    return zip(itertools.accumulate(counts, initial=0), counts, strict=False)


def _set(result: Array, host: HostArray) -> None:
    """Copy a host buffer into an array of the same shape, and wait until it may be used again."""
    if is_cupy_array(result):
        import cupy

        result.set(host)
        cupy.cuda.get_current_stream().synchronize()
    else:
        result[...] = to_device(host, result)


def _pinned(words: int, dtype: np.dtype[Any]) -> HostArray:
    """Return page-locked memory, which a GPU copies from and to without a detour."""
    import cupyx

    return cupyx.empty_pinned(words, dtype)  # type: ignore[no-any-return]
