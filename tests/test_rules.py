"""The rules of the natural-gradient methods, by what they are for."""

from dataclasses import dataclass

import numpy as np
import pytest
from problems import REPLICAS, SIZE, UNBOUNDED, Quadratic, make_optimizer, trajectory

from qnewton_mpi.arrays import to_host
from qnewton_mpi.core.create import create
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.layers import layer_shapes
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.optimizers.natural.bounds import BOUNDS, Bound, Curvature, RelativeChange
from qnewton_mpi.core.optimizers.natural.kronecker import Kronecker, KroneckerSettings
from qnewton_mpi.core.optimizers.natural.measurements import fixed_point
from qnewton_mpi.core.optimizers.natural.momentum import Momentum
from qnewton_mpi.core.optimizers.natural.values import NaturalStep
from qnewton_mpi.errors import UserError


def step_of(number=100, reach=1.0, noise=1.0, measurable=True):
    """A step, of which only what the bounds look at is known."""
    unknown = dict.fromkeys(("mean", "direction", "rate", "figures", "norms", "batch", "z", "dz", "sizes"))
    return NaturalStep(**unknown, number=number, reach=reach, noise=noise, measurable=measurable)


@pytest.mark.parametrize("variant", ["kronecker", "fisher"])
def test_rate_along_the_step_is_of_its_curvature(communicator, variant):
    """On a quadratic α = (1 + ν) dᵀz/dᵀHd, ς = 1; at 1/λ of that direction, as P has it, the loss is least along d."""
    problem = Quadratic(SIZE, REPLICAS)
    options = {"lr": 1e9, "momentum": 0, "relative_change": 0}
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS, **options)
    figures = optimizer.step(problem)
    step = np.array(optimizer.parameters) - problem.start
    mean = np.mean([problem(problem.start, i)[1] for i in range(REPLICAS)], axis=0)
    noise = optimizer.noise_share.unbiased
    assert -mean @ step * (1 + noise) == pytest.approx(step @ problem.hessian @ step, rel=1e-6)
    assert (figures["limit"], figures["rate"]) == (1, pytest.approx((1 + noise) / figures["curvature"], rel=1e-6))


def test_curvature_is_that_of_the_dense_hessian(communicator):
    """χ = ΔwᵀHΔw/ΔwᵀPΔw for a small step of a small network, H of the batch by automatic differentiation twice."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(REPLICAS, 8, 3, generator=generator).double(), torch.arange(8) % 3
    start = torch.randn(27, generator=generator).double() / 2

    def loss(w, k):
        hidden = torch.tanh(x[k] @ w[:12].reshape(4, 3).T)
        return torch.nn.functional.cross_entropy(hidden @ w[12:24].reshape(3, 4).T + w[24:], labels)

    def loss_and_gradient(w, k):
        w = torch.tensor(np.array(w), requires_grad=True)
        value = loss(w, k)
        return value.item(), torch.autograd.grad(value, w)[0].numpy()

    settings = OPTIMIZERS["kronecker"].settings_type(momentum=0, relative_change=1e-5)  # a short step
    exchange = EXCHANGES["allgather"](communicator, REPLICAS, 27)
    optimizer = OPTIMIZERS["kronecker"](settings, start.numpy(), exchange, 8, shapes=[(4, 3), (3, 4), (3,)])
    figures = optimizer.step(loss_and_gradient)
    step = np.array(optimizer.parameters) - start.numpy()
    H = torch.autograd.functional.hessian(lambda w: sum(loss(w, k) for k in range(REPLICAS)) / REPLICAS, start).numpy()
    d = -step / figures["rate"]  # of each layer as shortened: P is diagonal in the layers' bases
    predicted = 0.0
    for layer in optimizer.layers:
        predicted += (layer.view(d[None, layer.span]).squares() / layer.scales).sum()
    assert figures["curvature"] == pytest.approx(abs(d @ H @ d) / predicted, rel=1e-3)


def test_what_curvature_allows():
    """ς/χ for signal, 2/χ for noise; χ a running mean of its logarithm, to which a zero counts as a hundredth."""
    curvature = Curvature(1.0, [], None)
    curvature.add(np.log(4), 1, 1.0, 1.5, 9.0)
    assert curvature.newest == pytest.approx(1.5 / 4)
    assert curvature.limit(step_of(reach=1.0), 0.0) == pytest.approx(0.25)
    assert curvature.limit(step_of(reach=2.0), 0.0) == pytest.approx(0.5)
    assert curvature.limit(step_of(reach=0.0), 0.0) == 0
    curvature.add(np.log(1), 2, 1.0, 1.0, 0.1)
    assert curvature.chi == pytest.approx(2)
    assert curvature.newest == 0.1
    curvature.add(np.log(1e-15), 640, 1.0, 1.0, 9.0)
    assert curvature.chi == pytest.approx(2 * 100**-0.3)
    assert curvature.due(641, 10, 2.1)
    assert not curvature.due(641, 10, 1.9)
    assert curvature.due(650, 10, 0.1)
    assert all(curvature.due(step, 10, 0.1) for step in range(1, 11))


def test_the_first_rate_allows_itself_whatever_the_unit():
    for unit in (1e-6, 1.0, 1e6):
        rate = fixed_point(lambda rate, unit=unit: 1 / (unit * (3 + np.tanh(unit * rate))), 1e-12)
        assert unit * rate == pytest.approx(0.30353234, rel=1e-6)
    assert fixed_point(lambda rate: 0.0 if rate > 1e-5 else 1e-6, 1e-9) == pytest.approx(1e-6)  # not finite at first


@pytest.mark.parametrize("seed", range(3))
def test_momentum_does_not_carry_a_step_uphill(communicator, seed):
    """Classes that can be separated, all samples at each step: far out the loss is linear, and allows any length."""
    random = np.random.default_rng(seed)
    centres, labels = random.standard_normal((3, 5)), random.integers(0, 3, (4, 64))
    x, y = 2 * centres[labels] + random.standard_normal((4, 64, 5)), np.eye(3)[labels]

    def loss_and_gradient(w, replica):
        logits = x[replica] @ w[:15].reshape(3, 5).T + w[15:]
        shifted = logits - logits.max(axis=1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        d = (np.exp(logs) - y[replica]) / 64
        return -float((y[replica] * logs).sum()) / 64, np.concatenate([(d.T @ x[replica]).reshape(-1), d.sum(axis=0)])

    optimizer = create("kronecker", np.zeros(18), 4, 64, shapes=[(3, 5), (3,)], communicator=communicator)
    losses = [optimizer.step(loss_and_gradient)["loss"] for _ in range(200)]
    assert max(losses) == losses[0]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(("variant", "options"), [("kronecker", {}), ("fisher", {"rank": SIZE - 2})])
def test_a_step_off_the_span_is_no_leap(communicator, variant, options):
    """Nearly all is learnt, but what a batch then brings is not, in directions where F and ε are as good as nothing."""
    problem = Quadratic(SIZE, REPLICAS)
    options = {**UNBOUNDED, "curvature": 1, "lr": 0.1, "damping": 1e-9, "momentum": 0, **options}
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS, **options)
    scales = np.where(np.arange(SIZE) < SIZE - 2, 1e-3, 1e-7)

    def bowl(w, replica):
        pull = w - scales * np.random.default_rng([optimizer.steps, replica]).standard_normal(SIZE)
        return float(pull @ pull) / 2, pull

    lengths = [optimizer.step(bowl)["step_norm"] for _ in range(1000)]
    while optimizer.steps % 4 != 1:  # F is not updated by the next step, nor is χ measured because it is its turn
        optimizer.step(bowl)
    scales[-2:] = 1e-3  # as large as the others
    before = np.array(optimizer.parameters)
    leap = optimizer.step(bowl)
    assert leap["limit"] == 1
    assert leap["step_norm"] < 3 * max(lengths[-50:])
    assert np.mean([bowl(optimizer.parameters, k)[0] - bowl(before, k)[0] for k in range(REPLICAS)]) < 0


@pytest.mark.parametrize("error", [ValueError, ArithmeticError, np.linalg.LinAlgError])
def test_a_trial_may_fail(communicator, error):
    """Where a loss cannot be computed the step does not go."""

    def loss_and_gradient(w, replica):
        if abs(w[0]) > 0.05:
            raise error
        return float((w[0] - 0.04) ** 2), np.array([2 * (w[0] - 0.04)]) + 1e-3 * (replica - 0.5)

    optimizer = create("kronecker", np.zeros(1), 2, 32, communicator=communicator)
    for _ in range(5):
        optimizer.step(loss_and_gradient)
    assert 0 < optimizer.parameters[0] <= 0.05


@pytest.mark.parametrize("variant", ["kronecker", "fisher"])
def test_a_loss_that_can_no_longer_be_had(communicator, variant):
    """After ten steps it is nowhere finite but where its gradient is taken: steps go on by successive gradients."""
    problem = Quadratic(SIZE, REPLICAS)
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS)

    def loss_and_gradient(w, replica):
        loss, gradient = problem(w, replica)
        there = optimizer.steps <= 10 or np.array_equal(w, optimizer.parameters)
        return (loss if there else np.nan), gradient

    with pytest.warns(UserWarning, match="successive gradients") as told:
        trajectory(optimizer, loss_and_gradient, 60)
    assert len(told) == 1
    assert not optimizer.repeats
    assert optimizer.steps == 60


@pytest.mark.parametrize("variant", ["kronecker", "fisher"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5])
def test_a_loss_that_is_not_the_gradients(communicator, variant, part):
    """Gradients that were clipped or scaled: the curvature of their steps is not measured by the loss."""
    problem = Quadratic(SIZE, REPLICAS)
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS)
    before = np.mean([problem(problem.start, k)[0] for k in range(REPLICAS)])

    def scaled(w, replica):
        loss, gradient = problem(w, replica)
        return loss, (part or 1 / np.linalg.norm(gradient)) * gradient

    with pytest.warns(UserWarning, match="successive gradients"):
        trajectory(optimizer, scaled, 150)
    assert np.mean([problem(optimizer.parameters, k)[0] for k in range(REPLICAS)]) < 0.7 * before


@pytest.mark.parametrize("damping", [1e-2, 1.0])
@pytest.mark.parametrize("variant", ["kronecker", "fisher"])
def test_noise_of_a_step_is_the_trace_of_the_equation(communicator, variant, damping):
    """tr((F + ε I)⁻¹F), by applying the inverse to every unit vector; for `fisher` what its rank cuts off is bulk."""
    problem = Quadratic(SIZE, REPLICAS)
    options = {"rank": 3} if variant == "fisher" else {}
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS, damping=damping, **options)
    optimizer.step(problem)
    inverse = np.array([optimizer.apply_inverse(e) for e in np.eye(SIZE)])
    # `kronecker` has one layer here.
    epsilon = damping * optimizer.trace / SIZE if variant == "kronecker" else optimizer.damping
    expected = SIZE - epsilon * np.trace(inverse)  # nothing is flattened in the first step
    if variant == "fisher":
        gradients = np.array([problem(problem.start, i)[1] for i in range(REPLICAS)])
        whole = 4 / (REPLICAS - 1) * ((gradients - gradients.mean(axis=0)) ** 2).sum()
        assert epsilon == pytest.approx(max(optimizer.eigenvalues[-1], damping * whole / SIZE))
        expected += (whole - optimizer.eigenvalues.sum()) / epsilon
    assert optimizer.known == pytest.approx(expected)


@pytest.mark.parametrize("variant", ["kronecker", "fisher"])
@pytest.mark.parametrize("gradients", ["noise", "noise and a large mean", "differences that add up to nothing"])
def test_share_of_noise(communicator, variant, gradients):
    """Near 1 where the gradients are noise; near 0 where they are not, or where the mean gradient has none of it."""
    exchange = EXCHANGES["allgather"](communicator, REPLICAS, SIZE)
    optimizer = OPTIMIZERS[variant](OPTIMIZERS[variant].settings_type(), np.zeros(SIZE), exchange, samples=4)
    random = np.random.default_rng(0)
    for _ in range(300):
        draws = random.standard_normal((REPLICAS, SIZE))
        if gradients == "noise and a large mean":
            draws += 5
        elif gradients == "differences that add up to nothing":
            draws += 0.01 - draws.mean(axis=0)
        figures = optimizer.step(lambda w, i, draws=draws: (1.0, draws[i]))
    low, high = (0.6, 1.0) if gradients == "noise" else (0.0, 0.05)
    assert low < figures["noise_share"] < high


@pytest.mark.parametrize("variant", ["kronecker", "fisher"])
def test_auto_rate_without_noise_is_that_of_the_bound(communicator, variant):
    problem = Quadratic(SIZE, REPLICAS)
    problem._centres[:] = problem._centres[0]
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS, lr="auto")
    before = problem(problem.start, 0)[0]
    points = trajectory(optimizer, problem, 50)
    assert np.isfinite(points).all()
    assert problem(points[-1], 0)[0] < before


def test_what_the_noise_may_change(communicator):
    """α √ν r ≤ η max(1, 5/√t) over what was not zero at the start; no bound where nothing has a scale, or is noise."""
    start = np.array([3.0, 4.0, 0.0, 0.0, 2.0, 0.0])
    exchange, layers = EXCHANGES["allgather"](communicator, REPLICAS, 6), layer_shapes([(3,), (1,), (2,)])
    change = RelativeChange(0.02, layers, start)

    def squared(change, d, w):
        return change.size(*exchange.dots_of_parts(*change.products(d, w)))

    def limit(squared, noise, step):
        return change.limit(step_of(number=step, noise=noise), squared)

    w, d = np.array([3.0, 4.0, 7.0, 7.0, 2.0, 7.0]), np.array([0.6, 0.8, 100.0, 100.0, 4.0, 100.0])
    assert squared(change, d, w) == pytest.approx((0.2**2 + 2**2) / 2)
    assert squared(change, d, w / 10) == pytest.approx((0.2**2 + 2**2) / 2)  # smaller than at the start
    assert squared(change, d, 10 * w) == pytest.approx((0.2**2 + 2**2) / 200)
    assert limit(0.04, 1.0, 100) == limit(0.04, 1.0, 25) == pytest.approx(0.1)
    assert [limit(0.04, 1.0, step) for step in (1, 4)] == pytest.approx([0.5, 0.25])
    assert limit(0.04, 0.25, 100) == pytest.approx(0.2)
    assert limit(0.04, 0.0, 1) == limit(0.0, 1.0, 1) == np.inf
    assert squared(RelativeChange(0.02, layers, 0 * start), d, w) == 0


@pytest.mark.parametrize(
    ("shapes", "bounded"),
    [
        ([(1, 5), (1,)], False),
        ([(2, 3)], False),
        ([(6,)], True),
        ([(1, 4), (1, 2)], True),
        ([(1, 4), (1,), (1,)], True),
    ],
)
def test_the_change_of_a_linear_model_is_bounded_where_no_curvature_is_measured(shapes, bounded):
    """Of one matrix and its bias; not of a vector, which may be anything."""
    change = RelativeChange(0.02, layer_shapes(shapes), np.ones(6))
    limits = [change.limit(step_of(number=100, noise=1.0, measurable=known), 0.04) for known in (True, False)]
    assert limits == pytest.approx([0.1 if bounded else np.inf, 0.1])


def test_a_bound_that_shortens_nearly_all_steps_is_told_once(communicator):
    problem = Quadratic(SIZE, REPLICAS)
    problem._centres += 1e3
    optimizer = make_optimizer("kronecker", problem, communicator, REPLICAS, relative_change=1e-6)
    with pytest.warns(UserWarning, match="relative_change=2e-06") as told:
        trajectory(optimizer, problem, 200)
    assert len(told) == 1


@pytest.mark.parametrize("variant", ["kronecker", "fisher"])
def test_an_outlier_that_the_fisher_matrix_does_not_see_leads_no_steps(communicator, variant):
    """A batch with a thousand times the noise of the others counts as one with ten times, in the momentum too."""
    random = np.random.default_rng(0)
    problem = Quadratic(SIZE, REPLICAS)
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS, **UNBOUNDED, lr=0.1)
    size = [1.0]

    def noise(w, replica):
        return 1.0, size[0] * random.standard_normal(SIZE)

    usual = max(optimizer.step(noise)["step_norm"] for _ in range(40))
    while optimizer.steps % 2:  # so that the next step does not update F
        optimizer.step(noise)
    trace, size[0] = optimizer.trace, 1e3
    outlier = optimizer.step(noise)
    assert trace == optimizer.trace
    size[0] = 1.0
    after = [optimizer.step(noise) for _ in range(5)]
    assert max(figures["step_norm"] for figures in (outlier, *after)) < 15 * usual


def test_rules_that_are_off_change_nothing(communicator):
    random = np.random.default_rng(0)
    g, w = random.standard_normal((2, SIZE))
    momentum = Momentum(0.0, w)
    for step in (1, 2, 3):
        np.testing.assert_array_equal(momentum.add(step * g, step), step * g)
    for bound in BOUNDS.values():
        assert bound(0.0, layer_shapes([(SIZE,)]), w).limit(step_of(), 1.0) == np.inf
    problem = Quadratic(SIZE, REPLICAS)
    options = {"flattening": 0, "least_share": 1, "damping": 1e-3, **UNBOUNDED, "lr": 1e-3}
    optimizer = make_optimizer("kronecker", problem, communicator, REPLICAS, **options)
    optimizer.noise_share.value = 0.9
    figures = optimizer.step(problem)
    epsilon = 1e-3 * optimizer.trace / SIZE
    np.testing.assert_allclose(optimizer.layers[0].scales, 1 / (optimizer.layers[0].variances + epsilon))
    assert figures["shrink"] == 1


def test_a_rate_without_a_bound_is_refused(communicator):
    problem = Quadratic(SIZE, REPLICAS)
    with pytest.raises(UserError, match="has no bound"):
        make_optimizer("kronecker", problem, communicator, REPLICAS, **UNBOUNDED)


def test_a_rate_without_a_bound_is_told(communicator):
    """Weights that start at zero have no scale: with nothing else left, there is no step to do."""
    optimizer = create("kronecker", np.zeros(3), 8, 32, curvature=0.0, gain_share=0.0, communicator=communicator)
    random = np.random.default_rng(0)
    with pytest.raises(UserError, match="no bound at this step"):
        optimizer.step(lambda w, i: (float(w.sum() + 1), np.ones(3) + random.standard_normal(3)))
    np.testing.assert_array_equal(to_host(optimizer.parameters), 0)


def test_a_bound_more_is_a_class_its_setting_and_a_line(communicator, monkeypatch):
    class Cap(Bound):
        def limit(self, step, size):
            return self.value

    @dataclass(frozen=True)
    class CappedSettings(KroneckerSettings):
        cap: float = 0.0

    class Capped(Kronecker):
        settings_type = CappedSettings

    monkeypatch.setitem(BOUNDS, "cap", Cap)
    problem, exchange = Quadratic(SIZE, REPLICAS), EXCHANGES["allgather"](communicator, REPLICAS, SIZE)
    figures = [Capped(CappedSettings(cap=cap), problem.start, exchange).step(problem) for cap in (1e-9, 0.0)]
    assert (figures[0]["rate"], figures[0]["limit"]) == (1e-9, len(BOUNDS))
    assert figures[1]["limit"] < len(BOUNDS)
