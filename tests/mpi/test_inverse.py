"""Ĥ⁻¹ and linear systems with it, on vectors that the ranks share."""

import numpy as np
import pytest

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.inverse import InverseHessian, RitzInverse
from qnewton_mpi.core.ritz import RitzPairs

SIZE, REPLICAS = 23, 5


@pytest.mark.parametrize("name", EXCHANGES)
def test_solve_and_linear_operator(communicator, name):
    random = np.random.default_rng(0)
    Q = np.linalg.qr(random.standard_normal((SIZE, SIZE)))[0]
    H = (Q * np.concatenate([[1e3, 500, 200], np.linspace(1, 2, SIZE - 3)])) @ Q.T
    exchange = EXCHANGES[name](communicator, REPLICAS, SIZE)

    def held(rows):
        return np.stack([exchange.hold(row) for row in rows])

    def product(q):
        return exchange.hold(exchange.collect(q) @ H)

    W = random.standard_normal((REPLICAS, SIZE))
    W -= W.mean(axis=0)
    ritz = RitzPairs(exchange, held(random.standard_normal((3, SIZE))))
    for _ in range(8):
        ritz.update(np.stack([product(q) for q in ritz.directions]))
    z = random.standard_normal(SIZE)
    for inverse in (InverseHessian(exchange, held(W), held(W @ H), 1e-8), RitzInverse(ritz, bulk=1.5)):
        solution = inverse.solve(product, exchange.hold(z), 1e-10)
        np.testing.assert_allclose(exchange.collect(solution.x), np.linalg.solve(H, z), rtol=1e-6, atol=1e-9)
        applied = inverse.linear_operator(held(z[None])) @ z
        np.testing.assert_allclose(applied, exchange.collect(inverse.apply(held(z[None]))[0]))
        assert len(set(communicator.mpi.allgather(applied.tobytes()))) == 1
