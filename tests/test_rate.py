"""The rate "auto" of the methods that probe the Hessian, and the trend of the loss that it goes by."""

import numpy as np
import pytest
from problems import REPLICAS, SIZE, Quadratic, make_optimizer, trajectory

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.rate import LossTrend


@pytest.mark.parametrize("variant", ["sgd", "nesterov", "deflated"])
def test_auto_rate_is_bounded_by_the_curvature(communicator, variant):
    """All replicas alike: no noise, and the rate is of 1/λ_max; for `deflated` the smallest of the tracked λ."""
    problem = Quadratic(SIZE, REPLICAS)
    problem._centres[:] = problem._centres[0]
    options = {"probe_every": 1, "smoothing": 0.0, "lr": "auto"}
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS, **options)
    trajectory(optimizer, problem, 60)
    values = np.linalg.eigvalsh(problem.hessian)
    curvature = values[-REPLICAS] if variant == "deflated" else values[-1]
    bound = 1.8 if variant == "sgd" else 1.0
    assert optimizer.step(problem)["rate"] == pytest.approx(bound / curvature, rel=1e-3)


def test_auto_rate_follows_the_noise(communicator):
    """4 κ · 2.59 σ/tr C in the first step, C the covariance of the mean gradient, σ² the variance of the mean loss."""
    problem = Quadratic(SIZE, REPLICAS)
    losses, gradients = map(np.array, zip(*(problem(problem.start, i) for i in range(REPLICAS)), strict=True))
    noise, error = np.trace(np.cov(gradients.T)) / REPLICAS, losses.std(ddof=1) / np.sqrt(REPLICAS)
    for factor in (1.0, 0.25):
        optimizer = make_optimizer("sgd", problem, communicator, REPLICAS, lr="auto", probe_scale=1e-6)
        optimizer.rate_factor = factor
        figures = optimizer.step(lambda w, i: (1e-6 * losses[i], problem(w, i)[1]))
        assert figures["rate"] == pytest.approx(factor * 4 * 0.2 * 1e-6 * 4 * np.sqrt(44 / 105) * error / noise)


@pytest.mark.parametrize("method", ["sgd", "momentum", "deflated"])
def test_auto_rate_knows_the_largest_curvature_from_the_first_step_on(communicator, method):
    """One large eigenvalue among 500: of it random directions alone see a small part, and the first steps diverge."""
    curvatures = np.ones(500)
    curvatures[17] = 300.0
    exchange = EXCHANGES["allgather"](communicator, 4, 500)
    kind = OPTIMIZERS[method]
    optimizer = kind(kind.settings_type(lr="auto"), np.ones(500), exchange)

    def loss_and_gradient(w, replica):
        return float(w @ (curvatures * w)) / 2, curvatures * w

    figures = optimizer.step(loss_and_gradient)
    assert optimizer.curvature(np.max) == pytest.approx(300, rel=0.05)
    assert max(optimizer.step(loss_and_gradient)["loss"] for _ in range(10)) < figures["loss"]


@pytest.mark.parametrize("floor", [1e-5, -3.0])
def test_the_trend_starts_anew_after_a_rise(floor):
    random, scale = np.random.default_rng(0), abs(floor)
    trend = LossTrend()
    for _ in range(4000):
        trend.add(floor + 0.3 * scale * random.standard_normal(8))
    trend.add(floor + 100 * scale * random.standard_normal(8))
    for _ in range(5):
        trend.add(floor + 0.3 * scale * random.standard_normal(8))
    assert trend.count == 4006  # a single batch is no rise
    for t in range(200):
        trend.add(floor + scale * (5 * (1 + t) ** -0.25 + 0.3 * random.standard_normal(8)))
    assert trend.count < 200
    assert trend.slope > 0
