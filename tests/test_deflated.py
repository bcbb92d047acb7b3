"""Momentum with the leading eigenpairs deflated."""

from dataclasses import replace

import numpy as np
import pytest
from problems import REPLICAS, SIZE, Quadratic, make_optimizer, trajectory

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import build


def test_deflated_is_newtons_method_on_tracked_directions(communicator):
    """Momentum 0, α_N = 1: once the Ritz pairs have converged, a step ends at the minimum along their vectors."""
    problem = Quadratic(SIZE, REPLICAS)
    options = {"momentum": 0.0, "newton_rate": 1.0, "probe_every": 1, "smoothing": 0.0, "lr": 1e-6}
    optimizer = make_optimizer("deflated", problem, communicator, REPLICAS, **options)
    trajectory(optimizer, problem, 60)
    values, vectors = np.linalg.eigh(problem.hessian)
    leading = values > np.sort(values)[-REPLICAS - 1] * 1.01
    rate = 1.1 / values[leading].min()  # min(1, …) cuts none of them
    optimizer.settings = replace(optimizer.settings, lr=rate)
    before = vectors.T @ (optimizer.parameters - problem.centres.mean(axis=0))
    optimizer.step(problem)
    after = vectors.T @ (optimizer.parameters - problem.centres.mean(axis=0))
    np.testing.assert_allclose(after, np.where(leading, 0, 1 - rate * values) * before, atol=1e-6)
    assert np.abs(before[leading]).max() > 0.1


def test_deflated_leaves_a_saddle(communicator):
    """½ (x² + 2 y² − 0.01 z²) next to the ridge: along z a step grows the distance by α_N, whatever the small |λ|."""
    hessian = np.diag([1.0, 2.0, -0.01])

    def saddle(w, replica):
        return float(w @ hessian @ w) / 2, hessian @ w

    distances = {}
    start = np.array([1.0, 1.0, 1e-6])
    for method, options in (("deflated", {"newton_rate": 0.5, "momentum": 0.0, "probe_every": 1}), ("sgd", {})):
        kind = OPTIMIZERS[method]
        settings = build(kind.settings_type, {"lr": 50.0 if method == "deflated" else 0.5, **options})
        optimizer = kind(settings, start, EXCHANGES["allgather"](communicator, 3, 3))
        points = trajectory(optimizer, saddle, 20)
        distances[method] = abs(points[-1, 2]) / start[2]
        assert np.abs(points[-1, :2]).max() < 1e-3
    assert distances["deflated"] == pytest.approx(1.5**20, rel=1e-3)
    assert distances["sgd"] < 1.2
