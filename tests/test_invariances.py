"""What does not change a run: a constant added to the loss, its unit, the order of layers."""

import numpy as np
import pytest

from qnewton_mpi.core.create import create
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import build
from qnewton_mpi.parallel.communicator import Communicator

REPLICAS, SAMPLES, STEPS = 4, 16, 30
SHAPES = [(5, 3), (5,), (3, 5), (3,)]
METHODS = {
    "kronecker": {},
    "fisher": {"rank": 8},
    "deflated": {"lr": "auto"},
    "sgd": {"lr": "auto"},
    "momentum": {"lr": "auto"},
}


class Network:
    """Three classes of noisy points, by a network with five hidden units; new points at each step."""

    def __init__(self, factor=1.0, constant=0.0, order=(0, 1, 2, 3)):
        self.factor, self.constant, self.order, self.step = factor, constant, order, 0
        random = np.random.default_rng(0)
        parts = [random.standard_normal(shape) / 2 * (len(shape) > 1) for shape in SHAPES]
        self.start = self.flat(parts)
        self.shapes = [SHAPES[k] for k in order]

    def flat(self, parts):
        return np.concatenate([parts[k].ravel() for k in self.order])

    def parts(self, w):
        """Return the parameters in the order of SHAPES."""
        ends = np.cumsum([np.prod(shape) for shape in self.shapes])
        split = np.split(w, ends[:-1])
        return [split[self.order.index(k)].reshape(shape) for k, shape in enumerate(SHAPES)]

    def __call__(self, w, replica):
        random = np.random.default_rng([self.step, replica])
        labels = random.integers(0, 3, SAMPLES)
        x = random.standard_normal((SAMPLES, 3)) + 2 * np.eye(3)[labels]
        W, a, V, b = self.parts(w)
        hidden = np.tanh(x @ W.T + a)
        logits = hidden @ V.T + b
        logits -= logits.max(axis=1, keepdims=True)
        norms = np.log(np.exp(logits).sum(axis=1, keepdims=True))
        errors = (np.exp(logits - norms) - np.eye(3)[labels]) / SAMPLES
        back = (errors @ V) * (1 - hidden**2)
        gradient = self.flat([back.T @ x, back.sum(axis=0), errors.T @ hidden, errors.sum(axis=0)])
        loss = float((norms[:, 0] - logits[np.arange(SAMPLES), labels]).mean())
        return self.factor * loss + self.constant, self.factor * gradient


def run(network, method, steps=STEPS, **options):
    exchange = EXCHANGES["allgather"](Communicator(), REPLICAS, len(network.start))
    kind = OPTIMIZERS[method]
    settings = build(kind.settings_type, {**METHODS[method], **options})
    optimizer = kind(settings, network.start, exchange, SAMPLES, shapes=network.shapes)
    for network.step in range(steps):
        figures = optimizer.step(network)
    return network.parts(np.array(optimizer.parameters)), figures


@pytest.fixture(scope="module", params=METHODS)
def plain(request):
    parts, figures = run(Network(), request.param)
    assert 0 < figures["loss"] < 0.9  # from 1.2
    return request.param, parts


@pytest.mark.parametrize("constant", [10.0, -5.0, 1e3])
def test_a_constant_added_to_the_loss(plain, constant):
    """Rounding is that of the constant."""
    method, expected = plain
    for ours, theirs in zip(run(Network(constant=constant), method)[0], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize("factor", [1e3, 1e-3, 7.0])
def test_the_unit_of_the_loss(plain, factor):
    method, expected = plain
    for ours, theirs in zip(run(Network(factor=factor), method)[0], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize("change", [{"factor": 1e3}, {"constant": 10.0}])
@pytest.mark.parametrize("method", METHODS)
def test_the_noise_scale(method, change):
    scales = []
    for network in (Network(), Network(**change)):
        figures = run(network, method, steps=12)[1]
        scales.append([value for name, value in figures.items() if name.startswith("noise_scale")])
    assert np.isfinite(scales).all()
    np.testing.assert_allclose(*scales, rtol=1e-5)


def test_the_order_of_layers():
    expected, _ = run(Network(), "kronecker")
    found, _ = run(Network(order=(2, 3, 0, 1)), "kronecker")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_starts_below_zero(method):
    """It falls on, and no step is turned round."""
    network = Network(constant=-3.0)
    before = np.mean([network(network.start, replica)[0] for replica in range(REPLICAS)])
    assert run(network, method)[1]["loss"] < before - 0.1


def test_create_takes_the_unit_too():
    """As a user would: the defaults, nothing named."""
    points = []
    for factor in (1.0, 1e3):
        network = Network(factor=factor)
        optimizer = create("kronecker", network.start, REPLICAS, SAMPLES, shapes=network.shapes)
        for network.step in range(10):
            optimizer.step(network)
        points.append(np.array(optimizer.parameters))
    np.testing.assert_allclose(*points, atol=1e-8)
