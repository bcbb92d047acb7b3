"""Ĥ⁻¹z on a quadratic with a known Hessian."""

import numpy as np
import pytest
from problems import Quadratic

from qnewton_mpi.core.exchange import AllgatherExchange
from qnewton_mpi.core.inverse import InverseHessian
from qnewton_mpi.parallel.communicator import Communicator

SIZE = 20


@pytest.fixture(scope="module")
def communicator():
    return Communicator()


def columns(replicas, seed=1, rank=None):
    random = np.random.default_rng(seed)
    W = random.standard_normal((replicas, SIZE))
    if rank is not None:
        W = random.standard_normal((replicas, rank)) @ random.standard_normal((rank, SIZE))
    return W - W.mean(axis=0)


@pytest.mark.parametrize(("replicas", "rank"), [(2, None), (8, None), (8, 3), (15, None)])
def test_exact_on_the_span_and_identity_off_it(communicator, replicas, rank):
    H = Quadratic(SIZE, replicas).hessian
    W = columns(replicas, rank=rank)
    G = W @ H
    inverse = InverseHessian(AllgatherExchange(communicator, replicas, SIZE), W, G, tolerance=1e-8)
    assert inverse.rank == (rank or replicas - 1)

    random = np.random.default_rng(2)
    on = random.standard_normal((3, replicas)) @ G
    np.testing.assert_allclose(inverse.apply(on), np.linalg.solve(H, on.T).T, rtol=1e-8, atol=1e-8)
    span = np.linalg.svd(G)[2][: inverse.rank]
    off = random.standard_normal((3, SIZE))
    off -= off @ span.T @ span
    np.testing.assert_allclose(inverse.apply(off), off, atol=1e-10)


def test_equal_replicas_give_the_identity(communicator):
    zeros = np.zeros((4, SIZE))
    z = np.random.default_rng(0).standard_normal((1, SIZE))
    for W, G in ((zeros, zeros), (columns(4), zeros)):
        inverse = InverseHessian(AllgatherExchange(communicator, 4, SIZE), W, G, tolerance=1e-4)
        np.testing.assert_array_equal(inverse.apply(z), z)


def test_equal_singular_values(communicator):
    # W orthogonal and H = 2 I: G's singular values are all equal, and Ĥ⁻¹ halves the span whatever the eigenvectors.
    W = np.eye(5, SIZE) - 0.2 * (np.arange(SIZE) < 5)
    inverse = InverseHessian(AllgatherExchange(communicator, 5, SIZE), W, 2 * W, tolerance=1e-8)
    assert inverse.rank == 4
    assert inverse.condition == pytest.approx(1)
    np.testing.assert_allclose(inverse.apply(W), W / 2, atol=1e-14)
