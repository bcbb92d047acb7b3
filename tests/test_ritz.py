"""Tracked Ritz pairs against dense eigenpairs and against Lanczos."""

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, eigsh

from qnewton_mpi.core.exchange import AllgatherExchange
from qnewton_mpi.core.ritz import RitzPairs
from qnewton_mpi.data import datasets
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.parallel.communicator import Communicator


def symmetric(values, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return basis @ np.diag(values) @ basis.T, basis


def tracked(matrix, count, updates, smoothing=0.0, noise=0.0):
    random = np.random.default_rng(1)
    first = random.standard_normal((count, len(matrix)))
    ritz = RitzPairs(AllgatherExchange(Communicator(), count, len(matrix)), first, smoothing)
    for _ in range(updates):
        ritz.update(ritz.directions @ matrix + noise * random.standard_normal(first.shape))
    return ritz


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_converges_to_the_eigenpairs_of_largest_magnitude(smoothing):
    values = np.array([-8, 10, 5, 3, *np.linspace(-1, 1, 30)])
    matrix, basis = symmetric(values)
    ritz = tracked(matrix, 4, 60, smoothing)
    np.testing.assert_allclose(ritz.values, [-8, 3, 5, 10], rtol=1e-6)
    np.testing.assert_allclose(ritz.residuals, 0, atol=1e-6)
    np.testing.assert_allclose(np.abs(ritz.vectors @ basis[:, [0, 3, 2, 1]]), np.eye(4), atol=1e-6)


def test_residuals_bound_the_errors_of_the_values():
    values = np.geomspace(1e-3, 10, 40)
    ritz = tracked(symmetric(values)[0], 6, 3)
    errors = np.abs(ritz.values[:, None] - values).min(axis=1)
    assert (errors <= ritz.residuals).all()
    assert ritz.residuals.max() > 1e-3


def test_running_mean_averages_noise():
    values = np.array([10, 8, 6, *np.linspace(0, 1, 30)])
    matrix = symmetric(values)[0]
    errors = [
        np.abs(tracked(matrix, 3, 80, smoothing, noise=1.0).values - [6, 8, 10]).max() for smoothing in (0.0, 0.95)
    ]
    assert errors[1] < errors[0] / 2


def test_a_flat_loss_has_no_curvature_and_keeps_its_directions():
    ritz = tracked(np.zeros((7, 7)), 3, 4)
    np.testing.assert_array_equal(ritz.values, 0)
    np.testing.assert_allclose(ritz.directions @ ritz.directions.T, np.eye(3), atol=1e-12)


def test_directions_stay_orthonormal_where_the_hessian_is_singular():
    ritz = tracked(symmetric([5.0, 2.0, *np.zeros(18)])[0], 6, 30)
    np.testing.assert_allclose(ritz.directions @ ritz.directions.T, np.eye(6), atol=1e-10)
    np.testing.assert_allclose(ritz.values[-2:], [2, 5], rtol=1e-6)


def test_values_of_the_convnet_are_those_of_its_exact_hessian():
    """Gradient differences against Lanczos on PyTorch's second derivatives.

    The maximum of a pool makes the gradient jump where another pixel takes over, so the probes must be short.
    """
    torch = pytest.importorskip("torch")
    from qnewton_mpi.models.reference import torch_layers

    data = datasets.load(datasets.EMBEDDED, None, dtype=np.float64)
    network = Convnet(data.input_shape, "tanh", dtype=np.float64)
    w, (images, labels) = network.initial_parameters(0), data.train.batch(slice(0, 64))
    peer = torch_layers(network, w)
    loss = torch.nn.functional.cross_entropy(peer(torch.tensor(images)), torch.tensor(labels).long())
    gradients = torch.autograd.grad(loss, list(peer.parameters()), create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])

    def product(v):
        parts = torch.autograd.grad(flat @ torch.tensor(v), list(peer.parameters()), retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts]).numpy()

    operator = LinearOperator((network.size, network.size), matvec=product, dtype=float)
    expected = np.sort(eigsh(operator, 2, which="LA", tol=1e-3, v0=np.ones(network.size))[0])
    base = network.loss_and_gradient(w, images, labels)[1]
    first = np.random.default_rng(0).standard_normal((8, network.size))
    ritz = RitzPairs(AllgatherExchange(Communicator(), 8, network.size), first)
    for _ in range(12):
        displaced = [network.loss_and_gradient(w + 1e-7 * q, images, labels)[1] for q in ritz.directions]
        ritz.update((np.array(displaced) - base) / 1e-7)
    np.testing.assert_allclose(ritz.values[-2:], expected, rtol=0.01)
