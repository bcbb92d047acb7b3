"""Arrays on GPUs over several ranks: every transport that there is. Skipped without a GPU.

A CUDA-aware MPI library has to be named, by QNEWTON_TEST_CUDA_MPI=1: another one ends the job.
"""

import os

import numpy as np
import pytest
from problems import CUPY, VARIANTS, Quadratic, make_optimizer

from qnewton_mpi.arrays import open_device, to_host
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.parallel.transport import open_transport

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CUPY is None, reason="no GPU, or no CuPy")]


@pytest.fixture(params=["host", "cuda", "nccl"])
def transport(request, communicator):
    open_device("cuda", communicator.node_rank)
    if request.param == "cuda" and not os.environ.get("QNEWTON_TEST_CUDA_MPI"):
        pytest.skip("QNEWTON_TEST_CUDA_MPI is not set")
    if request.param == "nccl":
        from cupy.cuda import nccl

        if not nccl.available or CUPY.cuda.runtime.getDeviceCount() < communicator.size:
            pytest.skip("no NCCL, or fewer GPUs than ranks")
    return open_transport(request.param, "cuda", communicator)


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_of_the_cpu(communicator, transport, variant, name):
    points, replicas = [], communicator.size + 1
    for xp in (np, CUPY):
        problem = Quadratic(23, replicas, xp=xp)
        optimizer = make_optimizer(variant, problem, communicator, replicas, exchange=name)
        if xp is CUPY:
            optimizer.exchange.transport = transport
        for _ in range(4):
            optimizer.step(problem)
        points.append(to_host(optimizer.parameters))
    np.testing.assert_allclose(*points, rtol=1e-9)
