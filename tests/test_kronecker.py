"""The natural gradient layer by layer, in Kronecker eigenbases."""

import numpy as np
import pytest
from problems import REPLICAS, SIZE, UNBOUNDED, Quadratic, make_optimizer

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.layers import LayerShape, layer_shapes
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.optimizers.natural.layer import Layer, Side
from qnewton_mpi.core.settings import build


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_kronecker_is_its_equation(communicator, damping):
    """Two layers, 2 × (2 + bias) and 2 × 3; statistics in the old bases, which then take a step of iteration."""
    problem = Quadratic(SIZE, REPLICAS)
    options = {"memory": 0.25, "damping": damping, "momentum": 0.6, "lr": 0.2, "update_every": 2, "basis_every": 3}
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
        flatness, gamma = noise_share**2, 4 / (updates + 3)
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
                P = V[k] + damping * V[k].mean()
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
    place = np.full(rotated.shape[1:], len(layer.variances) - 1)  # of each direction's entry in the table
    rows, columns, first = layer.shapes[0][0], layer.shapes[1][1], layer.entries[0]
    place[:rows, :] = np.arange(first).reshape(layer.shapes[0])
    place[rows:, :columns] = first + np.arange(layer.entries[1]).reshape(layer.shapes[1])
    dimensions = np.bincount(place.ravel())
    np.testing.assert_array_equal(dimensions[:-1], 1)
    assert dimensions[-1] == (layer.corner or 1)
    table, view = random.random(layer.variances.shape), layer.view(X)
    np.testing.assert_allclose(layer.sum(table), (dimensions * table).sum())
    np.testing.assert_allclose(view.times(table), left @ (table[place] * rotated) @ right.T)
    squares = np.bincount(place.ravel(), (rotated**2).sum(axis=0).ravel()) / dimensions
    np.testing.assert_allclose(view.squares(), squares)
    kept = [
        None if side.basis is None else np.linalg.qr(random.standard_normal((side.length, side.length)))[0] ** 2
        for side in (layer.left, layer.right)
    ]
    left, right = (np.eye(n) if overlaps is None else overlaps for n, overlaps in zip(place.shape, kept, strict=True))
    moved = left.T @ table[place] @ right
    means = np.bincount(place.ravel(), moved.ravel()) / dimensions
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
