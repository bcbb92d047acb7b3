"""The poster's method: what its formula is on the span of the replicas, and off it."""

import numpy as np
import pytest
from problems import REPLICAS, SIZE, Quadratic, make_optimizer, trajectory


@pytest.mark.parametrize("spread", ["local-step", "independent", "random"])
def test_multisecant_with_equal_gradients_is_sgd(communicator, spread):
    """A linear loss: G = 0 whatever the spread."""
    problem = Quadratic(SIZE, REPLICAS)
    slope = np.arange(1.0, SIZE + 1)
    optimizer = make_optimizer("multisecant", problem, communicator, REPLICAS, spread=spread, lr=0.1)
    points = trajectory(optimizer, lambda w, i: (float(slope @ w), slope), 4)
    np.testing.assert_allclose(points, problem.start - 0.1 * np.outer(np.arange(1, 5), slope), rtol=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_independent_replicas_collapse_whatever_the_curvature(communicator, rate):
    """W ← (1 − α) W: the reason why there are spread policies."""
    problem = Quadratic(SIZE, REPLICAS)
    problem._centres[:] = problem._centres[0]  # the same batch everywhere, so that G = H W
    optimizer = make_optimizer("independent", problem, communicator, REPLICAS, lr=rate, tolerance=1e-8)
    for _ in range(5):
        before = np.array(optimizer.displacements)
        optimizer.step(problem)
        np.testing.assert_allclose(optimizer.displacements, (1 - rate) * before, rtol=1e-6)


def test_multisecant_is_newtons_method_on_its_span(communicator):
    """Same batch, M − 1 = N directions: one step at rate 1 solves the quadratic."""
    problem = Quadratic(5, 6)
    problem._centres[:] = problem._centres[0]
    optimizer = make_optimizer("random", problem, communicator, 6, lr=1.0, tolerance=1e-10)
    optimizer.step(problem)
    np.testing.assert_allclose(optimizer.parameters, problem._centres[0], rtol=1e-8)
