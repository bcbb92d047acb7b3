"""Each method against its equation, another library, or a property it must have."""

from dataclasses import replace

import numpy as np
import pytest
from problems import LIBRARIES, VARIANTS, Quadratic, make_optimizer

from qnewton_mpi.arrays import to_host
from qnewton_mpi.core.create import create
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.layers import LayerShape, layer_shapes
from qnewton_mpi.core.optimizers import OPTIMIZERS, BlockBFGS
from qnewton_mpi.core.optimizers.natural.bounds import BOUNDS, Curvature, RelativeChange
from qnewton_mpi.core.optimizers.natural.layer import Layer, Side
from qnewton_mpi.core.optimizers.natural.measurements import fixed_point
from qnewton_mpi.core.optimizers.natural.momentum import Momentum
from qnewton_mpi.core.optimizers.natural.values import NaturalStep
from qnewton_mpi.core.rate import LossTrend
from qnewton_mpi.core.settings import build
from qnewton_mpi.core.state import objects
from qnewton_mpi.errors import NonFiniteGradientError, UserError
from qnewton_mpi.parallel.communicator import Communicator

SIZE, REPLICAS = 12, 6
# Nothing bounds a step of the natural-gradient methods.
UNBOUNDED = dict.fromkeys(("curvature", "relative_change", "outlier", "gain_share"), 0)


@pytest.fixture(scope="module")
def communicator():
    return Communicator()


def step_of(number=100, reach=1.0, noise=1.0, change=0.0):
    """A step, of which only what the bounds look at is known."""
    known = {"number": number, "reach": reach, "noise": noise, "sizes": {"relative_change": change}}
    unknown = dict.fromkeys(("mean", "direction", "rate", "figures", "norms", "batch", "z", "dz"))
    return NaturalStep(**unknown, **known)


def trajectory(optimizer, problem, steps):
    points = []
    for _ in range(steps):
        optimizer.step(problem)
        points.append(to_host(optimizer.parameters).copy())
    return np.array(points)


@pytest.mark.parametrize("variant", VARIANTS)
def test_minimises_a_quadratic(communicator, variant):
    problem = Quadratic(SIZE, REPLICAS)
    if VARIANTS[variant][0] == "multisecant":
        # Different minima are noise in G, which the formula takes for curvature: it may well diverge then.
        problem._centres[:] = problem._centres[0]
    optimum = problem._centres.mean(axis=0)
    own = {} if VARIANTS[variant][0] in ("kronecker", "fisher") else {"lr": 0.05}
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS, **own)
    trajectory(optimizer, problem, 400)
    start, end = (np.linalg.norm(w - optimum) for w in (problem.start, optimizer.parameters))
    assert end < 0.5 * start


@pytest.mark.parametrize("variant", VARIANTS)
def test_figures_are_those_announced(communicator, variant):
    problem = Quadratic(SIZE, REPLICAS)
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS)
    before = np.array(optimizer.parameters)
    figures = optimizer.step(problem)
    assert set(figures) == set(optimizer.figure_names)
    step = np.array(optimizer.parameters) - before
    losses, gradients = zip(*(problem(before, i) for i in range(REPLICAS)), strict=True)
    mean = np.mean(gradients, axis=0)
    if variant in ("independent", "random"):  # the replicas are spread from the start
        return
    assert figures["loss"] == pytest.approx(np.mean(losses))
    assert figures["gradient_norm"] == pytest.approx(np.linalg.norm(mean))
    assert figures["step_norm"] == pytest.approx(np.linalg.norm(step))
    assert figures["cosine"] == pytest.approx(-step @ mean / np.linalg.norm(step) / np.linalg.norm(mean))


@pytest.mark.parametrize(
    ("variant", "peer", "options"),
    [
        ("sgd", "SGD", {}),
        ("heavy-ball", "SGD", {"momentum": 0.9}),
        ("nesterov", "SGD", {"momentum": 0.9, "nesterov": True}),
        ("adam", "Adam", {}),
        ("nadam", "NAdam", {}),
    ],
)
def test_first_order_methods_are_pytorchs(communicator, variant, peer, options):
    torch = pytest.importorskip("torch")
    problem = Quadratic(SIZE, REPLICAS)
    ours = trajectory(make_optimizer(variant, problem, communicator, REPLICAS, lr=0.03), problem, 30)
    w = torch.tensor(problem.start, requires_grad=True)
    other = getattr(torch.optim, peer)([w], lr=0.03, **options)
    for k in range(30):
        w.grad = torch.tensor(np.mean([problem(w.detach().numpy(), i)[1] for i in range(REPLICAS)], axis=0))
        other.step()
        # PyTorch keeps NAdam's product of momenta in float32.
        np.testing.assert_allclose(ours[k], w.detach().numpy(), rtol=1e-6 if peer == "NAdam" else 1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_core_needs_no_more_than_the_array_api(communicator, variant, dtype, library):
    points = []
    for xp, device in ((np, None), LIBRARIES[library]):
        problem = Quadratic(SIZE, REPLICAS, dtype=getattr(xp, dtype), xp=xp, device=device)
        optimizer = make_optimizer(variant, problem, communicator, REPLICAS)
        assert type(optimizer.parameters) is type(problem.start)
        points.append(trajectory(optimizer, problem, 5))
        assert device in (None, optimizer.parameters.device)
        assert optimizer.parameters.dtype == problem.start.dtype
    np.testing.assert_allclose(*points, rtol=1e-12 if dtype == "float64" else 1e-4)


def test_fisher_is_its_equation(communicator):
    """Enough rank to lose nothing: the step is that of the dense matrix F, averaged as the docstring says."""
    problem = Quadratic(SIZE, REPLICAS)
    options = {"rank": SIZE, "decay": 0.7, "damping": 0.3, "momentum": 0.6, "update_every": 1, "lr": 0.2, **UNBOUNDED}
    optimizer = make_optimizer("fisher", problem, communicator, REPLICAS, **options)
    w, F, m = np.array(problem.start), np.zeros((SIZE, SIZE)), np.zeros(SIZE)
    for t in range(1, 8):
        problem.centres[:] = problem._centres[:] = np.random.default_rng(t).standard_normal((REPLICAS, SIZE))
        gradients = np.array([problem(w, i)[1] for i in range(REPLICAS)])
        G = gradients - gradients.mean(axis=0)
        gamma = (1 - 0.7) / (1 - 0.7**t)
        F = (1 - gamma) * F + gamma * 4 / (REPLICAS - 1) * G.T @ G
        m = 0.6 * m + 0.4 * gradients.mean(axis=0)
        z = (0.6 * m + 0.4 * gradients.mean(axis=0)) / (1 - 0.6 ** (t + 1))
        values, epsilon = np.linalg.eigvalsh(F), 0.3 * np.trace(F) / SIZE
        w = w - 0.2 * np.linalg.solve(F + epsilon * np.eye(SIZE), z)
        figures = optimizer.step(problem)
        np.testing.assert_allclose(optimizer.parameters, w, rtol=1e-8)
        assert figures["largest_eigenvalue"] == pytest.approx(values[-1])


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


def test_a_rate_without_a_bound_is_told(communicator):
    """Weights that start at zero have no scale: with nothing else left, there is no step to do."""
    optimizer = create("kronecker", np.zeros(3), 8, 32, curvature=0.0, gain_share=0.0, communicator=communicator)
    random = np.random.default_rng(0)
    with pytest.raises(UserError, match="no bound at this step"):
        optimizer.step(lambda w, i: (float(w.sum() + 1), np.ones(3) + random.standard_normal(3)))
    np.testing.assert_array_equal(to_host(optimizer.parameters), 0)


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


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_kronecker_is_its_equation(communicator, damping):
    """Two layers, 2 × (2 + bias) and 2 × 3; statistics in the old bases, which then take a step of iteration."""
    problem = Quadratic(SIZE, REPLICAS)
    options = {"decay": 0.7, "damping": damping, "momentum": 0.6, "lr": 0.2, "update_every": 2, "basis_every": 3}
    options |= UNBOUNDED | {"combinations": REPLICAS - 1}
    settings = build(OPTIMIZERS["kronecker"].settings_type, options)
    exchange = EXCHANGES["allgather"](communicator, REPLICAS, SIZE)
    optimizer = OPTIMIZERS["kronecker"](settings, problem.start, exchange, samples=4, shapes=[(2, 2), (2,), (2, 3)])
    # Of the parameters in order: weights, then biases as a last column.
    layers = [np.array([[0, 1, 4], [2, 3, 5]]), np.arange(6, 12).reshape(2, 3)]

    def iterated(factor, basis):
        return np.linalg.qr((factor + 1e-3 * np.trace(factor) / len(factor) * np.eye(len(factor))) @ basis)[0]

    w, m = np.array(problem.start), np.zeros(SIZE)
    optimizer.noise_share.value = noise_share = 0.9  # it would be 0.02 at the end, and nothing flattened
    V, A, B, S, N = ([0, 0] for _ in range(5))
    Q_A, Q_B = [np.eye(3)] * 2, [np.eye(2)] * 2
    shares, updates = [], 0
    for t in range(1, 28):
        problem._centres[:] = 4 * np.random.default_rng(t).standard_normal((REPLICAS, SIZE))
        gradients = np.array([problem(w, i)[1] for i in range(REPLICAS)])
        update = t <= 10 or t % 2 == 0
        updates += update
        flatness, gamma = noise_share**2, (1 - 0.7) / (1 - 0.7**updates)
        if update:
            scales = []
            for k, indices in enumerate(layers):
                X = (gradients - gradients.mean(axis=0))[:, indices] * np.sqrt(4 / (REPLICAS - 1))
                A[k] = (1 - gamma) * A[k] + gamma * np.einsum("rij,rik->jk", X, X)
                B[k] = (1 - gamma) * B[k] + gamma * np.einsum("rij,rkj->ik", X, X)
                old = Q_A[k], Q_B[k]
                V[k] = (1 - gamma) * V[k] + gamma * ((old[1].T @ X @ old[0]) ** 2).sum(axis=0)
                if updates <= 10 or updates % 3 == 0:
                    Q_A[k], Q_B[k] = iterated(A[k], old[0]), iterated(B[k], old[1])
                V[k], S[k], N[k] = (
                    ((old[1].T @ Q_B[k]) ** 2).T @ (s + np.zeros((2, 3))) @ (old[0].T @ Q_A[k]) ** 2
                    for s in (V[k], S[k], N[k])
                )
                P = V[k] + damping * 0.1**flatness * V[k].mean()
                noise = (V[k] * P ** (flatness / 4 - 1)).sum()
                signal = np.ones((2, 3))
                for depth in range(20) if t >= 20 else []:
                    group = (V[k] <= V[k].max() / 4**depth) & (V[k] > V[k].max() / 4 ** (depth + 1))
                    signal[group] = max(1 - N[k][group].sum() / S[k][group].sum(), 0.2) if group.any() else 1
                shares.extend(signal.ravel())
                scales.append((signal**noise_share * P ** (flatness / 4 - 1) * noise ** (-flatness / 4), V[k] / P))
            newton = sum(n.sum() for _, n in scales)
            flattened = sum((v * s).sum() for v, (s, _) in zip(V, scales, strict=True))
        m = 0.6 * m + 0.4 * gradients.mean(axis=0)
        z = (0.6 * m + 0.4 * gradients.mean(axis=0)) / (1 - 0.6 ** (t + 1))
        weights = [0.4 * (0.6 ** (j + 1) + (j == 0)) / (1 - 0.6 ** (t + 1)) for j in range(t)]
        d = np.zeros(SIZE)
        for k, indices in enumerate(layers):
            rotated = Q_B[k].T @ z[indices] @ Q_A[k]
            if update:
                weight = max(0.04, 1 / updates)
                S[k] = (1 - weight) * S[k] + weight * rotated**2 * 4 * REPLICAS / np.square(weights).sum()
                N[k] = (1 - weight) * N[k] + weight * V[k]
            d[indices] = Q_B[k] @ (rotated * scales[k][0] * newton / flattened) @ Q_A[k].T
        w = w - 0.2 * np.sqrt(4 * REPLICAS / 256) * d
        noise = newton / (4 * REPLICAS) * np.square(weights).sum()
        noise_share += 0.1 * (min(noise / (d @ z), (d @ z) / noise) - noise_share)
        figures = optimizer.step(problem)
        np.testing.assert_allclose(optimizer.parameters, w, rtol=1e-9)
        assert figures["noise_share"] == pytest.approx(noise_share)
    assert {0.2, 1.0} < set(shares)  # the least, the start, and others


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


def test_kronecker_bases_become_eigenvectors():
    """Orthogonal iteration on a fixed factor, in the order of the eigenvalues if that is wanted."""
    side = Side(5, np.zeros(1), max_side=9)
    spectrum = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    side.factor = spectrum @ np.diag([1.0, 2, 16, 8, 4]) @ spectrum.T
    for sort in (False, True) * 30:
        overlaps = side.renew(sort)
    np.testing.assert_allclose(np.abs(side.basis.T @ spectrum[:, [2, 3, 4, 1, 0]]), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(overlaps, np.eye(5), atol=1e-6)
    assert Side(5, np.zeros(1), max_side=4).renew(sort=False) is None


@pytest.mark.parametrize("max_side", [9, 6])
@pytest.mark.parametrize("leading", [9, 3, 2, 1])
@pytest.mark.parametrize("sides", [(5, 6, True), (7, 4, True), (2, 7, False), (5, 1, False), (1, 5, True)])
def test_kronecker_view_is_that_of_whole_bases(sides, max_side, leading):
    """Squares and products of a table that has the same entry for all directions in the corner."""
    random = np.random.default_rng(0)
    layer, whole = Layer(np.zeros(1), LayerShape(0, *sides), 0, max_side, leading), []
    for side in (layer.left, layer.right):
        whole.append(np.eye(side.length))
        if side.basis is not None:
            side.basis = whole[-1] = np.linalg.qr(random.standard_normal((side.length, side.length)))[0]
    X, (left, right) = random.standard_normal((2, layer.size)), whole
    matrices = layer.matrices(X)
    rotated = left.T @ matrices @ right
    place = np.full(rotated.shape[1:], len(layer.dimensions) - 1)  # of each direction's entry in the table
    rows, columns, first = layer.shapes[0][0], layer.shapes[1][1], layer.entries[0]
    place[:rows, :] = np.arange(first).reshape(layer.shapes[0])
    place[rows:, :columns] = first + np.arange(layer.entries[1]).reshape(layer.shapes[1])
    np.testing.assert_array_equal(np.bincount(place.ravel()), layer.dimensions)
    table, view = random.random(layer.variances.shape), layer.view(X)
    np.testing.assert_allclose(view.times(table), left @ (table[place] * rotated) @ right.T)
    squares = np.bincount(place.ravel(), (rotated**2).sum(axis=0).ravel()) / layer.dimensions
    np.testing.assert_allclose(view.squares(), squares)
    kept = [
        None if side.basis is None else np.linalg.qr(random.standard_normal((side.length, side.length)))[0] ** 2
        for side in (layer.left, layer.right)
    ]
    left, right = (np.eye(n) if overlaps is None else overlaps for n, overlaps in zip(place.shape, kept, strict=True))
    moved = left.T @ table[place] @ right
    means = np.bincount(place.ravel(), moved.ravel()) / layer.dimensions
    np.testing.assert_allclose(layer.carried(table, *kept), means)
    assert bool(layer.corner) == (2 * leading < min(place.shape) and max(place.shape) <= max_side)


def test_kronecker_combinations_have_the_covariance_of_the_replicas(communicator):
    """In the mean over the random ones; M − 1 of them are exact."""
    problem = Quadratic(SIZE, REPLICAS)
    optimizer = make_optimizer("kronecker", problem, communicator, REPLICAS, combinations=2)
    optimizer.samples = 5
    exact = 5 * (np.eye(REPLICAS) - 1 / REPLICAS) / (REPLICAS - 1)
    optimizer.steps = 1
    np.testing.assert_allclose((c := optimizer.coefficients()).T @ c, exact, atol=1e-12)
    total = np.zeros_like(exact)
    for optimizer.steps in range(100, 2100):
        c = optimizer.coefficients()
        assert c.shape == (2, REPLICAS)
        np.testing.assert_allclose(c @ c.T, 5 / 2 * np.eye(2), atol=1e-12)
        np.testing.assert_allclose(c.sum(axis=1), 0, atol=1e-12)
        np.testing.assert_allclose(c[0] ** 2, 5 / 2 / REPLICAS)  # of one size
        total += c.T @ c / 2000
    np.testing.assert_allclose(total, exact, atol=0.1)


def test_kronecker_layers_cover_the_parameters(communicator):
    shapes = [(4, 2, 3), (4,), (5, 4), (7,), (2, 5), (3,)]
    found = layer_shapes(shapes)
    assert [(layer.start, layer.stop, layer.outputs, layer.inputs, layer.bias) for layer in found] == [
        (0, 28, 4, 6, True),
        (28, 48, 5, 4, False),
        (48, 55, 7, 1, False),
        (55, 65, 2, 5, False),
        (65, 68, 3, 1, False),
    ]
    layers = [Layer(np.zeros(1), shape, 0, max_side=5, leading=9) for shape in found]
    assert layers[0].right.basis is None  # 6 + 1 is longer than a side may be
    assert layers[0].left.basis.shape == (4, 4)
    z = np.random.default_rng(0).standard_normal((1, 68))
    for layer in layers:
        twice = layer.view(z[:, layer.span]).times(2 * np.ones_like(layer.variances))
        np.testing.assert_allclose(layer.flat(twice), 2 * z[0, layer.span])


@pytest.mark.parametrize("piece", [2, 1 << 16])
def test_kronecker_shares_of_signal(monkeypatch, piece):
    """By factors of 4 of V, all below 4⁻⁷ together; a fifth where there is no signal."""
    monkeypatch.setattr("qnewton_mpi.core.optimizers.natural.layer.PIECE", piece)
    layer = Layer(np.zeros(1), LayerShape(0, 1, 7, False), 0, max_side=9, leading=9)
    layer.variances = np.array([1.0, 0.2, 0.5, 0.05, 1e-6, 1e-9, 0.0])
    layer.compared = np.array([[8.0, 4, 2, 6, 3, 0, 0], [1.0, 0.4, 1, 6, 1, 0, 0.5]])
    np.testing.assert_allclose(layer.signal_shares(0.2), [0.8, 0.9, 0.8, 0.2, 0.5, 0.5, 0.5])
    layer.variances, layer.compared = np.zeros(7), np.zeros((2, 7))
    np.testing.assert_allclose(layer.signal_shares(0.2), np.ones(7))  # neither signal nor noise


def test_fisher_with_equal_replicas_is_momentum(communicator):
    problem = Quadratic(SIZE, REPLICAS)
    problem._centres[:] = problem._centres[0]
    optimizer = make_optimizer("fisher", problem, communicator, REPLICAS, lr=0.2, momentum=0.0, **UNBOUNDED)
    plain = make_optimizer("sgd", problem, communicator, REPLICAS, lr=0.2)
    np.testing.assert_allclose(trajectory(optimizer, problem, 6), trajectory(plain, problem, 6), rtol=1e-9)


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


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("variant", ["kronecker", "fisher", "sgd-auto", "nesterov-auto", "deflated-auto"])
def test_a_schedule_scales_the_step_whatever_bounds_it(communicator, variant, share):
    problem = Quadratic(SIZE, REPLICAS)
    first, second = (make_optimizer(variant, problem, communicator, REPLICAS) for _ in range(2))
    for _ in range(5):
        first.step(problem), second.step(problem)
    before, second.rate_factor = np.array(first.parameters), share
    first.step(problem), second.step(problem)
    whole, part = (np.array(optimizer.parameters) - before for optimizer in (first, second))
    np.testing.assert_allclose(part, share * whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offset", [-1e3, 0.0])
@pytest.mark.parametrize("variant", ["sgd-auto", "nesterov-auto", "deflated-auto", "fisher-auto", "kronecker"])
def test_auto_rate_of_a_loss_that_is_negative_or_zero_is_not_negative(communicator, variant, offset):
    """A loss that climbs from below zero, or is zero all along, must not turn the steps round, nor divide by zero."""
    problem, calls = Quadratic(SIZE, REPLICAS), []
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS)

    def climbing(w, replica):
        calls.append(replica)
        return offset * (1 - 1e-6 * len(calls)), problem(w, replica)[1]

    for _ in range(5):
        figures = optimizer.step(climbing)
        assert figures["rate"] >= 0
        assert offset == 0 or figures["rate"] > 0
    assert np.isfinite(optimizer.parameters).all()


@pytest.mark.parametrize("variant", ["kronecker", "fisher"])
def test_an_outlier_among_the_gradients_is_clipped(communicator, variant):
    """A batch with a thousand times the noise that F has seen counts as one with √10 times, in the momentum too."""
    random = np.random.default_rng(0)
    problem = Quadratic(SIZE, REPLICAS)
    options = {**UNBOUNDED, "outlier": 10, "lr": 0.1}
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS, **options)
    size = [1.0]

    def noise(w, replica):
        return 1.0, size[0] * random.standard_normal(SIZE)

    before = [optimizer.step(noise) for _ in range(40)]
    assert all(figures["clip"] == 1 for figures in before[1:])
    usual = max(figures["step_norm"] for figures in before[5:])
    while optimizer.steps % 2:  # so that the next step does not update F
        optimizer.step(noise)
    trace, size[0] = optimizer.trace, 1e3
    outlier = optimizer.step(noise)
    assert trace == optimizer.trace
    assert 1e-3 < outlier["clip"] < 10e-3
    size[0] = 1.0
    after = [optimizer.step(noise) for _ in range(5)]
    assert max(figures["step_norm"] for figures in (outlier, *after)) < 5 * usual


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
    scales[-2:] = 1e-3  # the same size as the others: no outlier
    before = np.array(optimizer.parameters)
    leap = optimizer.step(bowl)
    assert leap["clip"] == 1
    assert leap["limit"] == 1
    assert leap["step_norm"] < 3 * max(lengths[-50:])
    assert np.mean([bowl(optimizer.parameters, k)[0] - bowl(before, k)[0] for k in range(REPLICAS)]) < 0


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


@pytest.mark.parametrize("variant", ["kronecker", "fisher"])
def test_auto_rate_without_noise_is_that_of_the_bound(communicator, variant):
    problem = Quadratic(SIZE, REPLICAS)
    problem._centres[:] = problem._centres[0]
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS, lr="auto")
    before = problem(problem.start, 0)[0]
    points = trajectory(optimizer, problem, 50)
    assert np.isfinite(points).all()
    assert problem(points[-1], 0)[0] < before


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_counted(communicator, variant):
    problem, calls = Quadratic(SIZE, REPLICAS), []
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS)
    trajectory(optimizer, lambda w, i: (calls.append(i), problem(w, i))[1], 5)
    probes = {"deflated": 3, "deflated-auto": 8, "nesterov-auto": 8, "sgd-auto": 6}.get(variant, 0)
    if VARIANTS[variant][0] in ("kronecker", "fisher"):
        probes = len(calls) // REPLICAS - 5
        assert 6 <= probes <= 5 + 13  # the same point again and at least one more at first, then one a step
    assert optimizer.evaluations == len(calls) == REPLICAS * (5 + probes)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_names_step_and_replica_and_changes_nothing(communicator, value, where):
    problem = Quadratic(SIZE, REPLICAS)
    optimizer = make_optimizer("fisher", problem, communicator, REPLICAS)
    optimizer.step(problem)
    before = np.array(optimizer.parameters)

    def poisoned(w, replica):
        loss, gradient = problem(w, replica)
        if replica == 4:
            if where == "loss":
                return value, gradient
            gradient[3] = value
        return loss, gradient

    with pytest.raises(NonFiniteGradientError, match="step 2: replica 4") as caught:
        optimizer.step(poisoned)
    assert (caught.value.step, caught.value.replica) == (2, 4)
    np.testing.assert_array_equal(optimizer.parameters, before)


def everything(optimizer):
    """All numbers and arrays that an optimizer, its parts and its exchange have, but for those to be written to."""
    found = {}
    for k, thing in enumerate([*objects(optimizer), optimizer.exchange]):
        for name, value in vars(thing).items():
            if isinstance(value, (bool, int, float)):
                found[k, name] = value
            elif isinstance(value, np.ndarray) and name not in ("gradients", "spare"):
                found[k, name] = value.copy()
    return found


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("variant", [*VARIANTS, "block BFGS"])
def test_a_step_that_raises_changes_nothing(communicator, variant, step):
    """Whichever of its evaluations does, those of probes included; and the run goes on as if nothing had been."""

    def new():
        if variant == "block BFGS":
            return BlockBFGS(BlockBFGS.settings_type(), problem.start, exchange(communicator, REPLICAS, SIZE))
        return make_optimizer(variant, problem, communicator, REPLICAS)

    problem, exchange = Quadratic(SIZE, REPLICAS), EXCHANGES["allgather"]
    if variant == "block BFGS":
        problem._centres[:] = problem._centres[0]
    optimizer, undisturbed = new(), new()
    trajectory(optimizer, problem, step - 1)
    before, calls = everything(optimizer), []
    expected = trajectory(undisturbed, lambda w, i: (calls.append(undisturbed.steps), problem(w, i))[1], step + 3)
    for last in range(calls.count(step)):
        made = []

        def fails(w, replica, made=made, last=last):
            made.append(replica)
            if len(made) > last:
                raise KeyError(replica)
            return problem(w, replica)

        with pytest.raises(KeyError):
            optimizer.step(fails)
        after = everything(optimizer)
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=str(name))
    np.testing.assert_array_equal(trajectory(optimizer, problem, 4), expected[step - 1 :])


def test_what_the_noise_may_change(communicator):
    """α √ν r ≤ η max(1, 5/√t) over what was not zero at the start; no bound where nothing has a scale, or is noise."""
    start = np.array([3.0, 4.0, 0.0, 0.0, 2.0, 0.0])
    exchange, spans = EXCHANGES["allgather"](communicator, REPLICAS, 6), [slice(0, 3), slice(3, 4), slice(4, 6)]
    change = RelativeChange(0.02, spans, start)

    def squared(change, d, w):
        return change.size(*exchange.dots_of_parts(*change.products(d, w)))

    def limit(squared, noise, step):
        return change.limit(step_of(number=step, noise=noise, change=squared))

    w, d = np.array([3.0, 4.0, 7.0, 7.0, 2.0, 7.0]), np.array([0.6, 0.8, 100.0, 100.0, 4.0, 100.0])
    assert squared(change, d, w) == pytest.approx((0.2**2 + 2**2) / 2)
    assert squared(change, d, w / 10) == pytest.approx((0.2**2 + 2**2) / 2)  # smaller than at the start
    assert squared(change, d, 10 * w) == pytest.approx((0.2**2 + 2**2) / 200)
    assert limit(0.04, 1.0, 100) == limit(0.04, 1.0, 25) == pytest.approx(0.1)
    assert [limit(0.04, 1.0, step) for step in (1, 4)] == pytest.approx([0.5, 0.25])
    assert limit(0.04, 0.25, 100) == pytest.approx(0.2)
    assert limit(0.04, 0.0, 1) == limit(0.0, 1.0, 1) == np.inf
    assert squared(RelativeChange(0.02, spans, 0 * start), d, w) == 0


def test_what_curvature_allows():
    """ς/χ for signal, 2/χ for noise; χ a running mean of its logarithm, to which a zero counts as a hundredth."""
    curvature = Curvature(1.0, [], None)
    curvature.add(np.log(4), 1, 1.0, 1.5, 9.0)
    assert curvature.newest == pytest.approx(1.5 / 4)
    assert curvature.limit(step_of(reach=1.0)) == pytest.approx(0.25)
    assert curvature.limit(step_of(reach=2.0)) == pytest.approx(0.5)
    assert curvature.limit(step_of(reach=0.0)) == 0
    curvature.add(np.log(1), 2, 1.0, 1.0, 0.1)
    assert curvature.chi == pytest.approx(2)
    assert curvature.newest == 0.1
    curvature.add(np.log(1e-15), 640, 1.0, 1.0, 9.0)
    assert curvature.chi == pytest.approx(2 * 100**-0.3)
    assert curvature.due(641, 10, 2.1)
    assert not curvature.due(641, 10, 1.9)
    assert curvature.due(650, 10, 0.1)
    assert all(curvature.due(step, 10, 0.1) for step in range(1, 11))


def test_a_bound_that_shortens_nearly_all_steps_is_told_once(communicator):
    problem = Quadratic(SIZE, REPLICAS)
    problem._centres += 1e3
    optimizer = make_optimizer("kronecker", problem, communicator, REPLICAS, relative_change=1e-6)
    with pytest.warns(UserWarning, match="relative_change=2e-06") as told:
        trajectory(optimizer, problem, 200)
    assert len(told) == 1


def test_the_first_rate_allows_itself_whatever_the_unit():
    for unit in (1e-6, 1.0, 1e6):
        rate = fixed_point(lambda rate, unit=unit: 1 / (unit * (3 + np.tanh(unit * rate))), 1e-12)
        assert unit * rate == pytest.approx(0.30353234, rel=1e-6)
    assert fixed_point(lambda rate: 0.0 if rate > 1e-5 else 1e-6, 1e-9) == pytest.approx(1e-6)  # not finite at first


def test_rules_that_are_off_change_nothing(communicator):
    random = np.random.default_rng(0)
    g, w = random.standard_normal((2, SIZE))
    momentum = Momentum(0.0, w)
    for step in (1, 2, 3):
        np.testing.assert_array_equal(momentum.add(step * g, step), step * g)
    for bound in BOUNDS.values():
        assert bound(0.0, [slice(0, SIZE)], w).limit(step_of(change=1.0)) == np.inf
    problem = Quadratic(SIZE, REPLICAS)
    options = {"flattening": 0, "least_share": 1, "damping": 1e-3, **UNBOUNDED, "lr": 1e-3}
    optimizer = make_optimizer("kronecker", problem, communicator, REPLICAS, **options)
    optimizer.noise_share.value = 0.9
    figures = optimizer.step(problem)
    epsilon = 1e-3 * 0.1 ** (0.9**2) * optimizer.trace / SIZE
    np.testing.assert_allclose(optimizer.layers[0].scales, 1 / (optimizer.layers[0].variances + epsilon))
    assert (figures["clip"], figures["shrink"]) == (1, 1)


def test_every_method_is_covered():
    assert {method for method, _ in VARIANTS.values()} == set(OPTIMIZERS)


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


def test_a_trial_that_raises_an_error_of_arithmetic_is_no_loss(communicator):
    problem = Quadratic(SIZE, REPLICAS)
    optimizer = make_optimizer("kronecker", problem, communicator, REPLICAS)

    def narrow(w, replica):
        if np.linalg.norm(w - problem.start) > 0.1:
            raise OverflowError("math range error")
        return problem(w, replica)

    assert 0 < optimizer.step(narrow)["step_norm"] <= 0.1


def test_a_rate_without_a_bound_is_refused(communicator):
    problem = Quadratic(SIZE, REPLICAS)
    with pytest.raises(UserError, match="has no bound"):
        make_optimizer("kronecker", problem, communicator, REPLICAS, **UNBOUNDED)
