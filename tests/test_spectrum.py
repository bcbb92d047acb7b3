"""Eigenvalues of Hessians: of matrices, of the convnet against PyTorch's Hessian and SciPy, and the command."""

import h5py
import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from qnewton_mpi.cli.spectrum import Products
from qnewton_mpi.core.spectrum import density, leading
from qnewton_mpi.data import datasets
from qnewton_mpi.hessian.spectrum import layer_spans
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.models.layers import ACTIVATIONS
from qnewton_mpi.models.reference import torch_layers
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.spectrum import Iterate, spectrum_of

pytestmark = pytest.mark.slow

SAMPLES = 100


def symmetric(values, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return (Q * values) @ Q.T


def test_leading_pairs_of_either_sign():
    values = np.concatenate([[9, -8, 7.99, 3], np.linspace(-1, 1, 96)])
    H = symmetric(values)
    pairs = leading(lambda Q: Q @ H, np.random.default_rng(1).standard_normal((3, 100)), 4, tolerance=1e-8)
    np.testing.assert_allclose(pairs.values, [9, -8, 7.99, 3], rtol=1e-10)
    np.testing.assert_allclose(pairs.vectors @ pairs.vectors.T, np.eye(4), atol=1e-10)
    np.testing.assert_allclose(pairs.vectors @ H, pairs.values[:, None] * pairs.vectors, atol=1e-6)
    assert (pairs.residuals < 1e-7).all()


def test_multiple_eigenvalues_and_low_rank():
    """A Krylov space that ends: three equal eigenvalues, and nothing besides."""
    H = symmetric(np.array([2.0, 2, 2] + [0] * 7))
    pairs = leading(lambda Q: Q @ H, np.random.default_rng(1).standard_normal((4, 10)), 4)
    np.testing.assert_allclose(pairs.values, [2, 2, 2, 0], atol=1e-12)


def test_residuals_tell_how_far_it_got():
    H = symmetric(np.linspace(1, 2, 200))
    pairs = leading(lambda Q: Q @ H, np.random.default_rng(1).standard_normal((2, 200)), 2, tolerance=1e-12, blocks=5)
    assert pairs.products == 10
    assert (np.abs(pairs.values - [2, 2 - 1 / 199]) > 1e-6).all()
    assert (pairs.residuals > 1e-4).all()


def test_density_has_the_moments_of_the_spectrum():
    values = np.concatenate([np.linspace(0, 1, 150), [5.0] * 10, np.linspace(-2, -1, 40)])
    H = symmetric(values)
    directions = np.random.default_rng(0).standard_normal((200, 200))
    points = density(lambda Q: Q @ H, directions, 12)
    assert points.weights.sum() == pytest.approx(1)
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    power = units
    for degree in range(1, 8):  # exact for each direction, so for their mean
        power = power @ H
        expected = (units * power).sum(axis=1).mean()
        assert points.weights @ points.nodes**degree == pytest.approx(expected, rel=1e-9)
        assert expected == pytest.approx((values**degree).mean(), rel=0.2)
    at = np.linspace(-4, 8, 4000)
    smoothed = points.smoothed(at, 0.1)
    assert np.trapezoid(smoothed, at) == pytest.approx(1, abs=1e-3)
    assert np.trapezoid(smoothed[at > 4], at[at > 4]) == pytest.approx(10 / 200, rel=0.3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convnets_pairs_are_those_of_pytorchs_hessian(activation):
    network = Convnet((1, 28, 28), activation, dtype=np.float64)
    w = network.initial_parameters(0)
    found = spectrum_of(Iterate(w, datasets.EMBEDDED, network.description), Communicator(), 3, SAMPLES, by_layer=True)
    model = torch_layers(network, w)
    images, labels = datasets.load(datasets.EMBEDDED, None, dtype=np.float64).train.batch(slice(0, SAMPLES))
    data = torch.tensor(images), torch.tensor(labels).long()
    parameters = list(model.parameters())

    def eigenvalues(parts):
        loss = torch.nn.functional.cross_entropy(model(data[0]), data[1])
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parts, create_graph=True)])

        def product(v):
            both = torch.autograd.grad(gradient @ torch.tensor(v.reshape(-1)), parts, retain_graph=True)
            return torch.cat([g.reshape(-1) for g in both]).numpy()

        size = gradient.numel()
        values = eigsh(LinearOperator((size, size), product, dtype=np.float64), 3, return_eigenvectors=False)
        return values[np.argsort(-np.abs(values))]

    np.testing.assert_allclose(found.pairs.values, eigenvalues(parameters), rtol=1e-6)
    for k, pairs in enumerate(found.layers.values()):
        np.testing.assert_allclose(pairs.values, eigenvalues(parameters[2 * k : 2 * k + 2]), rtol=1e-6)
    assert [span.stop for span in layer_spans(network).values()][-1] == network.size


def test_command(qnewton, tmp_path):
    arguments = ("--steps", "3", "--output", "run.h5", "--checkpoint", "saved")
    assert qnewton(2, "train", *arguments, cwd=tmp_path).returncode == 0
    options = ("--samples", "32", "--top", "2")
    finished = qnewton(2, "spectrum", "run.h5", *options, "--layers", "--density", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "layer 5, 10×32" in finished.stdout
    assert (tmp_path / "run.spectrum.png").stat().st_size > 1000
    assert qnewton(3, "spectrum", "saved", *options, cwd=tmp_path).returncode == 0
    with h5py.File(tmp_path / "run.spectrum.h5") as one, h5py.File(tmp_path / "saved.spectrum.h5") as other:
        np.testing.assert_allclose(one["hessian/eigenvalues"], other["hessian/eigenvalues"], rtol=1e-6)
        assert one["density/weights"][()].sum() == pytest.approx(1)
    for words, match in (
        (("run.h5",), "run.spectrum.h5 exists"),
        (("nothing.h5",), "nothing.h5: no such file"),
        (("run.h5", "--output", "run.h5", "--overwrite"), "run.h5: is not a spectrum"),
        (("run.h5", "--output", "new.png", "--density"), "new.png: is the picture's name"),
        ((".",), "has no checkpoint"),
        (("run.h5", "--top", "0"), "--top 0: a whole number from 1"),
    ):
        failed = qnewton(2, "spectrum", *words, cwd=tmp_path)
        assert failed.returncode == 2
        assert failed.stderr.count("\n") == 1
        assert match in failed.stderr


def test_only_sound_checkpoints_count(qnewton, tmp_path):
    """As with --resume: what is damaged is passed over with a word, and parameters that are not there are no zeros."""
    arguments = ("--steps", "2", "--checkpoint-every", "1", "--output", "run.h5", "--checkpoint", "saved")
    assert qnewton(2, "train", *arguments, cwd=tmp_path).returncode == 0
    options = ("--samples", "8", "--top", "1", "--overwrite")
    found = []
    for step in (2, 1):
        finished = qnewton(2, "spectrum", "saved", *options, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr.count("passed over") == 2 - step
        found.append(finished.stdout)
        max((tmp_path / "saved" / f"step-{step:010d}").glob("rank-*.h5")).unlink()
    assert found[0] != found[1]
    finished = qnewton(2, "spectrum", "saved", *options, cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "no sound checkpoint in saved" in finished.stderr


def test_products_are_counted_and_the_time_left_told(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("qnewton_mpi.cli.spectrum.time.monotonic", lambda: now[0])
    with Products(shown=True) as products, Products(shown=False) as silent:
        for _ in range(10):
            now[0] += 10.0
            products.count(40)
            silent.count(40)
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "8 of 40 products at most, 5 min left at most"
    assert len(told) == 2  # after 40 and 80 seconds


def test_no_more_products_than_were_told():
    counted = []
    network = Convnet((1, 28, 28), "tanh")
    iterate = Iterate(np.zeros(network.size), datasets.EMBEDDED, network.description)
    found = spectrum_of(iterate, Communicator(), 1, 2, by_layer=True, tell=counted.append)
    assert len(set(counted)) == 1
    assert found.pairs.products + sum(pairs.products for pairs in found.layers.values()) == len(counted) <= counted[0]
