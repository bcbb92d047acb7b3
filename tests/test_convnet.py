"""The built-in network's loss and gradient against PyTorch and finite differences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnewton_mpi.models.convnet import DENSE_WIDTHS, Convnet
from qnewton_mpi.models.layered import BLOCK
from qnewton_mpi.models.layers import ACTIVATIONS, ConvPool, ConvPoolShape
from qnewton_mpi.training.evaluation import judged

SHAPES = [*DENSE_WIDTHS, (2, 19, 24)]


def batch(shape, count, dtype=np.float64, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((count, *shape)).astype(dtype), random.integers(0, 10, count)


def parameters(network):
    w = network.initial_parameters(seed=1)
    return w + 0.05 * np.random.default_rng(2).standard_normal(w.shape).astype(w.dtype)  # biases are not zero


@pytest.mark.parametrize("count", [1, 7, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_pytorchs(shape, activation, count):
    torch = pytest.importorskip("torch")
    from qnewton_mpi.models.reference import torch_layers

    network = Convnet(shape, activation, dtype=np.float64)
    w, (images, labels) = parameters(network), batch(shape, count)
    loss, gradient = network.loss_and_gradient(w, images, labels)
    peer = torch_layers(network, w)
    expected = torch.nn.functional.cross_entropy(peer(torch.tensor(images)), torch.tensor(labels))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    other = torch.cat([p.grad.reshape(-1) for p in peer.parameters()]).numpy()
    np.testing.assert_allclose(gradient, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("widths", [{}, {"filters": (3, 5), "dense": (7, 4)}])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_finite_difference(shape, widths):
    network = Convnet(shape, "tanh", dtype=np.float64, **widths)
    if widths:
        assert network.parameter_shapes[::2][1:] == [(5, 3, 5, 5), (7, network.shapes[2].inputs), (4, 7), (10, 4)]
    w, data = parameters(network), batch(shape, 5)
    gradient = network.loss_and_gradient(w, *data)[1]
    random = np.random.default_rng(3)
    for _ in range(5):
        v = random.standard_normal(network.size)
        h = 1e-6
        ahead, behind = (network.loss_and_gradient(w + s * h * v, *data)[0] for s in (1, -1))
        assert (ahead - behind) / (2 * h) == pytest.approx(gradient @ v, rel=1e-6)


@pytest.mark.parametrize("count", [3, 8, BLOCK + 1])
@pytest.mark.parametrize("own_parameters", [False, True])
def test_replicas_at_once_are_replicas_one_by_one(own_parameters, count):
    replicas = 5
    network = Convnet((1, 28, 28), "tanh", dtype=np.float64)
    w, (images, labels) = parameters(network), batch((1, 28, 28), replicas * count)
    w = w + 0.01 * np.random.default_rng(4).standard_normal((replicas, network.size)) if own_parameters else w
    images, labels = images.reshape(replicas, count, *images.shape[1:]), labels.reshape(replicas, count)
    losses, gradients = network.losses_and_gradients(w, images, labels)
    for r in range(replicas):
        loss, gradient = network.loss_and_gradient(w[r] if own_parameters else w, images[r], labels[r])
        assert losses[r] == pytest.approx(loss, rel=1e-12)
        np.testing.assert_allclose(gradients[r], gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_float64_rounded(shape):
    single, double = (Convnet(shape, "tanh", dtype=d) for d in (np.float32, np.float64))
    w, (images, labels) = parameters(single), batch(shape, 40, np.float32)
    loss, gradient = single.loss_and_gradient(w, images, labels)
    assert gradient.dtype == np.float32
    expected_loss, expected = double.loss_and_gradient(w.astype("f8"), images.astype("f8"), labels)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert np.abs(gradient - expected).max() < 1e-5 * np.abs(expected).max()


def test_about_16000_parameters():
    assert [Convnet(shape, "relu").size for shape in DENSE_WIDTHS] == [15924, 16154]


def test_evaluate_agrees_with_the_loss():
    network = Convnet((1, 28, 28), "relu")
    w, (images, labels) = parameters(network), batch((1, 28, 28), 2 * BLOCK + 3, np.float32)
    total, correct = judged(network, w, images, labels)
    assert total / len(labels) == pytest.approx(network.loss_and_gradient(w, images, labels)[0], rel=1e-5)
    single = [judged(network, w, images[i : i + 1], labels[i : i + 1])[1] for i in range(len(labels))]
    assert correct == sum(single)


def test_large_logits_stay_finite():
    network = Convnet((1, 28, 28), "relu")
    loss, gradient = network.loss_and_gradient(30 * parameters(network), *batch((1, 28, 28), 8, np.float32))
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


@given(
    channels=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    filters=st.integers(1, 3),
    kernel=st.sampled_from([1, 3, 5]),
    count=st.integers(1, 4),
    odd=st.sampled_from([(0, 0), (1, 0), (0, 1), (1, 1)]),
)
def test_pooled_convolution_is_its_definition(channels, rows, columns, filters, kernel, count, odd):
    height, width = 2 * rows + kernel - 1 + odd[0], 2 * columns + kernel - 1 + odd[1]
    shape = ConvPoolShape((channels, height, width), filters, kernel)
    layer = ConvPool(np, shape, ACTIVATIONS["relu"](np), 1, count, np.float64)
    random = np.random.default_rng(0)
    x = random.standard_normal((channels, height, width, count))
    weight, bias = random.standard_normal(shape.weight_shape), random.standard_normal(filters)
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))
    z = np.einsum("cyxbij,fcij->fyxb", windows, weight) + bias[:, None, None, None]
    z = z[:, : 2 * rows, : 2 * columns]
    pooled = z.reshape(filters, rows, 2, columns, 2, count).max(axis=(2, 4))
    out = layer.forward(x[None], weight[None], bias[None])[0].copy()
    np.testing.assert_allclose(out, np.maximum(pooled, 0), atol=1e-12)

    # The adjoint: ⟨upstream, φ'(z) dz⟩ along a direction of x is ⟨dx, direction⟩ (the maps are piecewise linear).
    upstream, direction = random.standard_normal(out.shape), random.standard_normal(x.shape)
    dx = layer.backward(upstream[None].copy(), weight[None], need_dx=True)[0].copy()
    h = 1e-7
    ahead = layer.forward((x + h * direction)[None], weight[None], bias[None])[0]
    assert (upstream * (ahead - out)).sum() / h == pytest.approx((dx * direction).sum(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("height", "width", "kernel"), [(28, 28, 4), (5, 6, 5)])
def test_shapes_that_cannot_be_pooled_are_refused(height, width, kernel):
    with pytest.raises(ValueError, match="odd, and smaller"):
        ConvPoolShape((1, height, width), 2, kernel)
