"""The natural gradient with a Fisher matrix of low rank."""

import numpy as np
import pytest
from problems import REPLICAS, SIZE, UNBOUNDED, Quadratic, make_optimizer, trajectory


def test_fisher_is_its_equation(communicator):
    """Enough rank to lose nothing: the step is that of the dense matrix F, averaged as the docstring says."""
    problem = Quadratic(SIZE, REPLICAS)
    options = {"rank": SIZE, "memory": 0.25, "damping": 0.3, "momentum": 0.6, "update_every": 1, "lr": 0.2, **UNBOUNDED}
    optimizer = make_optimizer("fisher", problem, communicator, REPLICAS, **options)
    w, F, m = np.array(problem.start), np.zeros((SIZE, SIZE)), np.zeros(SIZE)
    for t in range(1, 8):
        problem.centres[:] = problem._centres[:] = np.random.default_rng(t).standard_normal((REPLICAS, SIZE))
        gradients = np.array([problem(w, i)[1] for i in range(REPLICAS)])
        G = gradients - gradients.mean(axis=0)
        gamma = 4 / (t + 3)
        F = (1 - gamma) * F + gamma * 4 / (REPLICAS - 1) * G.T @ G
        m = 0.6 * m + 0.4 * gradients.mean(axis=0)
        z = (0.6 * m + 0.4 * gradients.mean(axis=0)) / (1 - 0.6 ** (t + 1))
        values, epsilon = np.linalg.eigvalsh(F), 0.3 * np.trace(F) / SIZE
        w = w - 0.2 * np.linalg.solve(F + epsilon * np.eye(SIZE), z)
        figures = optimizer.step(problem)
        np.testing.assert_allclose(optimizer.parameters, w, rtol=1e-8)
        assert figures["largest_eigenvalue"] == pytest.approx(values[-1])


def test_fisher_with_equal_replicas_is_momentum(communicator):
    problem = Quadratic(SIZE, REPLICAS)
    problem._centres[:] = problem._centres[0]
    optimizer = make_optimizer("fisher", problem, communicator, REPLICAS, lr=0.2, momentum=0.0, **UNBOUNDED)
    plain = make_optimizer("sgd", problem, communicator, REPLICAS, lr=0.2)
    np.testing.assert_allclose(trajectory(optimizer, problem, 6), trajectory(plain, problem, 6), rtol=1e-9)
