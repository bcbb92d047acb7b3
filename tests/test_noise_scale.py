"""How many samples a batch is worth: against gradients whose covariance is known, and where there is no telling."""

import math

import numpy as np
import pytest
from problems import VARIANTS, Quadratic, make_optimizer

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.noise_scale import NoiseScale
from qnewton_mpi.core.optimizers import OPTIMIZERS, BlockBFGS
from qnewton_mpi.core.settings import build
from qnewton_mpi.parallel.communicator import Communicator

SIZE, REPLICAS, SAMPLES, STEPS = 12, 4, 8, 300
AT_ONE_POINT = [variant for variant, (method, _) in VARIANTS.items() if method != "multisecant"]
DEVIATIONS = np.geomspace(0.2, 2, SIZE)  # of one sample's gradient
SIGNAL = 0.1 * np.random.default_rng(0).standard_normal(SIZE)


class Slope:
    """A loss that is linear in w, by the mean of 8 samples' slopes; new samples at each step."""

    step = 0

    def __call__(self, w, replica):
        random = np.random.default_rng([1, self.step, replica])
        gradient = SIGNAL + DEVIATIONS * random.standard_normal((SAMPLES, SIZE)).mean(axis=0)
        return float(gradient @ w), gradient


def optimizer_of(method, replicas=REPLICAS, **options):
    kind = OPTIMIZERS[method]
    exchange = EXCHANGES["allgather"](Communicator(), replicas, SIZE)
    settings = build(kind.settings_type, {"lr": 1e-3, **options})
    return kind(settings, np.ones(SIZE), exchange, SAMPLES, shapes=[(3, 3), (3,)])


def standard_errors(metric, count):
    """Return those of the means of so many estimates of noise and signal, for normal gradients, P⁻¹ a matrix.

    Weights that grow as t³ have the sum t⁴/4, and their squares t⁷/7.
    """
    noise = metric @ np.diag(DEVIATIONS**2)
    of_noise = 2 * np.trace(noise @ noise) / (REPLICAS - 1)
    mean = noise / (SAMPLES * REPLICAS)
    of_signal = 4 * SIGNAL @ mean @ metric @ SIGNAL + 2 * np.trace(mean @ mean) * REPLICAS / (REPLICAS - 1)
    return np.sqrt(16 / 7 / count * np.array([of_noise, of_signal]))


def test_plain_is_that_of_the_samples():
    problem, optimizer = Slope(), optimizer_of("sgd")
    for problem.step in range(STEPS):
        figures = optimizer.step(problem)
    scale = optimizer.noise_scale
    assert figures["noise_scale"] == scale.noise / scale.signal
    noise, signal = standard_errors(np.eye(SIZE), STEPS)
    assert scale.noise == pytest.approx((DEVIATIONS**2).sum(), abs=3 * noise)
    assert scale.signal == pytest.approx(SIGNAL @ SIGNAL, abs=3 * signal)
    assert signal < (DEVIATIONS**2).sum() / optimizer.batch / 10  # of which the signal is told apart


@pytest.mark.parametrize("variant", AT_ONE_POINT)
def test_plain_is_its_equation(variant):
    problem = Quadratic(SIZE, REPLICAS)
    optimizer, expected = make_optimizer(variant, problem, Communicator(), REPLICAS), [0.0, 0.0]
    for t in range(1, 4):
        gradients = np.array([problem(np.array(optimizer.parameters), k)[1] for k in range(REPLICAS)])
        mean = gradients.mean(axis=0)
        noise = 4 / (REPLICAS - 1) * ((gradients - mean) ** 2).sum()
        for k, new in enumerate((noise, mean @ mean - noise / (4 * REPLICAS))):
            expected[k] += 4 / (t + 3) * (new - expected[k])
        figures = optimizer.step(problem)
        assert figures["noise_scale"] == pytest.approx(expected[0] / expected[1] if expected[1] > 0 else math.inf)


def inverse_of(optimizer):
    """Return P⁻¹ as a matrix."""
    if not hasattr(optimizer, "layers"):
        return np.array([optimizer.apply_inverse(e) for e in np.eye(SIZE)])
    rows = [
        [layer.flat(layer.view(e[None, layer.span]).times(layer.scales)) for layer in optimizer.layers]
        for e in np.eye(SIZE)
    ]
    return np.array([np.concatenate(row) for row in rows])


@pytest.mark.parametrize(("method", "options"), [("kronecker", {}), ("fisher", {"rank": 4})])
@pytest.mark.parametrize("update_every", [1, 2])
def test_preconditioned_is_of_batches_that_the_inverse_has_not_seen(method, options, update_every):
    """F is a mean over few updates. So P⁻¹ is small along their noise, and would be along its own batch's."""
    options = {"memory": 0.2, "curvature": 0, "relative_change": 0, "update_every": update_every, **options}
    problem, optimizer = Slope(), optimizer_of(method, **options)
    found, exact, metrics = optimizer.noise_scale_preconditioned, NoiseScale(), []
    for problem.step in range(STEPS):
        metric = inverse_of(optimizer)
        optimizer.step(problem)
        if found.count > exact.count:
            exact.add(np.trace(metric @ np.diag(DEVIATIONS**2)), SIGNAL @ metric @ SIGNAL)
            metrics.append(metric)
    assert found.count == exact.count >= STEPS / update_every - 1
    noise, signal = np.median([standard_errors(metric, exact.count) for metric in metrics], axis=0)
    assert found.noise == pytest.approx(exact.noise, abs=3 * noise)
    assert found.signal == pytest.approx(exact.signal, abs=3 * signal)


def test_no_signal_is_seen_where_there_is_none(monkeypatch):
    monkeypatch.setitem(globals(), "SIGNAL", np.zeros(SIZE))
    problem, optimizer = Slope(), optimizer_of("sgd")
    values = []
    for problem.step in range(STEPS):
        values.append(optimizer.step(problem)["noise_scale"])
    assert np.isinf(values).any()
    assert min(values[100:]) > 3 * SAMPLES * REPLICAS


@pytest.mark.parametrize("method", ["sgd", "momentum", "adam", "deflated"])
def test_one_replica_cannot_tell(method):
    problem, optimizer = Slope(), optimizer_of(method, replicas=1)
    assert math.isnan(optimizer.step(problem)["noise_scale"])


@pytest.mark.parametrize("spread", ["local-step", "independent", "random"])
def test_nor_can_replicas_that_stand_apart(spread):
    problem, optimizer = Slope(), optimizer_of("multisecant", spread=spread)
    for problem.step in range(3):
        assert math.isnan(optimizer.step(problem)["noise_scale"])


def test_nor_can_probes():
    problem = Quadratic(SIZE, REPLICAS)
    problem._centres[:] = problem._centres[0]
    exchange = EXCHANGES["allgather"](Communicator(), REPLICAS, SIZE)
    assert math.isnan(BlockBFGS(BlockBFGS.settings_type(), problem.start, exchange).step(problem)["noise_scale"])


@pytest.mark.parametrize("method", ["kronecker", "fisher"])
def test_equal_gradients_have_no_noise(method):
    optimizer = optimizer_of(method, curvature=0, relative_change=0)
    for _ in range(3):
        figures = optimizer.step(lambda w, replica: (float(SIGNAL @ w), SIGNAL.copy()))
    assert figures["noise_scale"] < 1e-6
    assert not figures["noise_scale_preconditioned"] > 1e-6
