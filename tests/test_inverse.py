"""Ĥ⁻¹z on a quadratic with a known Hessian."""

import numpy as np
import pytest
from problems import Quadratic

from qnewton_mpi.core.exchange import AllgatherExchange
from qnewton_mpi.core.inverse import InverseHessian, RitzInverse
from qnewton_mpi.core.ritz import RitzPairs
from qnewton_mpi.errors import UserError
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
    np.testing.assert_allclose(inverse.singular_values, np.linalg.svd(G)[1][: inverse.rank], rtol=1e-8)

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


def stiff(communicator, outliers):
    """Return a Hessian with a few large eigenvalues, and its Ritz pairs after some products."""
    values = np.concatenate([outliers, np.linspace(1, 2, SIZE - len(outliers))])
    Q = np.linalg.qr(np.random.default_rng(3).standard_normal((SIZE, SIZE)))[0]
    H = (Q * values) @ Q.T
    exchange = AllgatherExchange(communicator, len(outliers), SIZE)
    ritz = RitzPairs(exchange, np.random.default_rng(4).standard_normal((len(outliers), SIZE)))
    for _ in range(12):
        ritz.update(ritz.directions @ H)
    return H, ritz


def test_ritz_inverse(communicator):
    H, ritz = stiff(communicator, np.array([1e4, -3e3, 1e3]))
    inverse = RitzInverse(ritz, bulk=1.5)
    values, vectors = np.linalg.eigh(H)
    expected = (vectors / np.where(np.abs(values) > 10, np.abs(values), 1.5)) @ vectors.T
    np.testing.assert_allclose(inverse.apply(np.eye(SIZE)), expected, atol=1e-4)
    assert RitzInverse(ritz).bulk == pytest.approx(1e3, rel=1e-6)
    for bad in ({"bulk": 0.0}, {}):
        with pytest.raises(UserError, match="give bulk"):
            RitzInverse(ritz if bad else RitzPairs(ritz.exchange, ritz.directions), **bad)


def test_solve_takes_fewer_products_with_a_better_inverse(communicator):
    H, ritz = stiff(communicator, np.array([1e5, 3e4, 1e4, 3e3]))
    z = np.random.default_rng(5).standard_normal(SIZE)
    W = columns(5, rank=4)
    exchange = AllgatherExchange(communicator, 5, SIZE)
    nothing = InverseHessian(exchange, np.zeros_like(W), np.zeros_like(W), 1e-8)
    plain = nothing.solve(lambda q: q @ H, z, 1e-8)
    aided = RitzInverse(ritz, bulk=1.5).solve(lambda q: q @ H, z, 1e-8)
    for solution in (plain, aided):
        np.testing.assert_allclose(solution.x, np.linalg.solve(H, z), rtol=1e-5, atol=1e-7)
        assert solution.residual <= 1e-8
    assert aided.products <= plain.products - 3
    # Not symmetric, and exact on its span alone.
    leading = np.linalg.eigh(H)[1][:, -4:].T
    found = InverseHessian(exchange, W, W @ H, 1e-8).solve(lambda q: q @ H, leading.sum(axis=0), 1e-8)
    np.testing.assert_allclose(found.x @ H, leading.sum(axis=0), atol=1e-7)
    assert nothing.solve(lambda q: q @ H, 0 * z).products == 0
    few = nothing.solve(lambda q: q @ H, z, 1e-8, most=3)
    assert few.products == 3
    assert few.residual == pytest.approx(np.linalg.norm(z - H @ few.x) / np.linalg.norm(z), rel=1e-6)


def test_solve_with_an_indefinite_hessian_wants_damping(communicator):
    H, ritz = stiff(communicator, np.array([50.0, -30.0, 20.0]))
    z = np.random.default_rng(5).standard_normal(SIZE)
    inverse = RitzInverse(ritz, bulk=1.5)
    with pytest.raises(UserError, match="use a larger damping"):
        inverse.solve(lambda q: q @ H, z)
    solution = inverse.solve(lambda q: q @ H, z, 1e-9, damping=31)
    np.testing.assert_allclose(solution.x, np.linalg.solve(H + 31 * np.eye(SIZE), z), rtol=1e-6, atol=1e-9)


def test_linear_operator(communicator):
    W = columns(8)
    G = W @ Quadratic(SIZE, 8).hessian
    inverse = InverseHessian(AllgatherExchange(communicator, 8, SIZE), W, G, tolerance=1e-8)
    operator = inverse.linear_operator(W)
    assert operator.shape == (SIZE, SIZE)
    z = np.random.default_rng(0).standard_normal((SIZE, 3))
    np.testing.assert_allclose(operator @ z, inverse.apply(np.ascontiguousarray(z.T)).T)
