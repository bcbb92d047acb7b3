"""Transports with a stand-in for CuPy, MPI on GPU memory and NCCL: offsets, counts, buffers. GPUs: test_gpu.py."""

import ctypes
import sys
from types import SimpleNamespace

import array_api_compat
import numpy as np
import pytest

from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel import transport as transports
from qnewton_mpi.parallel.transport import CudaTransport, NcclTransport, Transport, open_transport


class DeviceArray:
    """An array that can be had in host memory by `get` alone, and that MPI and NCCL can read."""

    def __init__(self, host):
        self.host = np.array(host)
        self.shape, self.dtype, self.size, self.itemsize = host.shape, host.dtype, host.size, host.itemsize
        self.data = SimpleNamespace(ptr=self.host.ctypes.data)

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to NumPy")

    def __dlpack__(self, **options):
        return self.host.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.host.__dlpack_device__()

    def get(self, out):
        out[...] = self.host

    def set(self, host):
        self.host[...] = host

    def __len__(self):
        return self.shape[0]

    def __setitem__(self, key, value):
        self.host[key] = value.host

    def __getitem__(self, key):
        return self.host[key]

    def __eq__(self, other):
        return self.host == other


class Nccl:
    """NCCL's calls by pointers, done by MPI at the end of their group."""

    available, NCCL_SUM, NCCL_FLOAT32, NCCL_FLOAT64 = True, 0, "f4", "f8"
    comm: object

    def __init__(self):
        self.waiting, self.grouped = [], False

    def get_unique_id(self):
        return 7

    def NcclCommunicator(self, size, identity, rank):  # noqa: N802
        assert (size, identity, rank) == (self.comm.size, 7, self.comm.rank)
        return self

    def groupStart(self):  # noqa: N802
        self.grouped = True

    def groupEnd(self):  # noqa: N802
        requests = [action() for action in self.waiting]
        for request in requests:
            if request is not None:
                request.Wait()
        self.waiting, self.grouped = [], False

    def _do(self, action):
        self.waiting.append(action)
        if not self.grouped:
            self.groupEnd()

    def view(self, pointer, count, kind):
        ctype = {"f4": ctypes.c_float, "f8": ctypes.c_double}[kind]
        return np.ctypeslib.as_array((ctype * count).from_address(pointer))

    def allReduce(self, send, receive, count, kind, op, stream):  # noqa: N802
        self._do(lambda: self.comm.Allreduce(self.view(send, count, kind), self.view(receive, count, kind)))

    def reduce(self, send, receive, count, kind, op, root, stream):
        mine = self.view(receive, count, kind) if root == self.comm.rank else None
        self._do(lambda: self.comm.Reduce(self.view(send, count, kind), mine, root=root))

    def broadcast(self, send, receive, count, kind, root, stream):
        def action():
            into = self.view(receive, count, kind)
            if root == self.comm.rank:
                into[...] = self.view(send, count, kind)
            self.comm.Bcast(into, root=root)

        self._do(action)

    def send(self, pointer, count, kind, peer, stream):
        self._do(lambda: self.comm.Isend(self.view(pointer, count, kind), dest=peer))

    def recv(self, pointer, count, kind, peer, stream):
        self._do(lambda: self.comm.Irecv(self.view(pointer, count, kind), source=peer))


@pytest.fixture
def cupy(communicator, monkeypatch):
    """Stand in for the parts of CuPy that transports use."""
    nccl = Nccl()
    nccl.comm = communicator.mpi
    stream = SimpleNamespace(synchronize=lambda: None, ptr=0)
    runtime = SimpleNamespace(getDeviceCount=lambda: communicator.size)
    cuda = SimpleNamespace(get_current_stream=lambda: stream, runtime=runtime, nccl=nccl)
    fake = SimpleNamespace(
        ndarray=DeviceArray,
        cuda=cuda,
        float32=np.float32,
        ascontiguousarray=lambda array: array,
        full=lambda *arguments: DeviceArray(np.full(*arguments)),
        zeros_like=lambda array: DeviceArray(np.zeros_like(array.host)),
    )
    for name, module in {"cupy": fake, "cupy.cuda": cuda}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace(empty_pinned=np.empty))
    monkeypatch.setattr(transports, "is_cupy_array", lambda array: isinstance(array, DeviceArray))
    assert not array_api_compat.is_numpy_array(DeviceArray(np.zeros(1)))
    return fake


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [Transport, CudaTransport, NcclTransport])
def test_collectives_are_those_of_host_memory(communicator, cupy, kind, dtype):
    if kind is Transport and communicator.size == 1:
        pytest.skip("one rank copies on the device")
    n, rank, random = communicator.size, communicator.rank, np.random.default_rng(communicator.rank)
    carrier = kind(communicator)
    counts = [3 + r for r in range(n)]  # of each rank a different number of words
    columns = 2
    for _ in range(2):  # the buffers of the first time serve again
        whole = random.integers(0, 9, sum(counts)).astype(dtype)
        rows = random.integers(0, 9, (counts[rank], columns)).astype(dtype)
        everyone = np.empty((sum(counts), columns), dtype)
        cases = {
            "allreduce": ((whole,), np.empty_like(whole)),
            "reduce_scatter": ((whole, counts), np.empty(counts[rank], dtype)),
            "allgather": ((rows, counts), everyone),
        }
        for name, ((sent, *rest), result) in cases.items():
            expected = getattr(communicator, name)(sent, *rest, result.copy())
            given = DeviceArray(np.full_like(result, -1))
            found = getattr(carrier, name)(DeviceArray(sent), *rest, given)
            assert found is given
            np.testing.assert_array_equal(found.host, expected)
        sizes = [counts[rank]] * n
        send, receive = np.concatenate([whole] * n)[: sum(counts)], np.empty(sum(sizes), dtype)
        expected = communicator.alltoall(send, counts, receive.copy(), sizes)
        found = carrier.alltoall(DeviceArray(send), counts, DeviceArray(receive), sizes)
        np.testing.assert_array_equal(found.host, expected)


def test_a_library_that_returns_something_else_is_refused(communicator, cupy, monkeypatch):
    monkeypatch.setattr(communicator, "allreduce", lambda out, into: into)
    with pytest.raises(UserError, match="use --transport host"):
        CudaTransport(communicator)


def test_nccl_where_it_cannot_be(communicator, cupy, monkeypatch):
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: communicator.size - 1)
    with pytest.raises(UserError, match="needs a GPU for each rank"):
        NcclTransport(communicator)
    monkeypatch.setattr(cupy.cuda.nccl, "available", False, raising=False)
    with pytest.raises(UserError, match="no NCCL library"):
        NcclTransport(communicator)


def test_transports_of_gpus_are_not_for_the_cpu(communicator):
    assert type(open_transport("auto", "cpu", communicator)) is Transport
    for kind in ("cuda", "nccl"):
        with pytest.raises(UserError, match="for arrays on GPUs"):
            open_transport(kind, "cpu", communicator)
