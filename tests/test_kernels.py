import array_api_strict
import numpy as np
import pytest

from qnewton_mpi.core import kernels
from qnewton_mpi.core.kernels import BLOCK, blockwise_products, combination, double_products, inner


@pytest.mark.parametrize("xp", [np, array_api_strict])
@pytest.mark.parametrize("n", [5, BLOCK, 2 * BLOCK + 5])
def test_blockwise_products_are_the_products(xp, n):
    random = np.random.default_rng(n)
    A, B = (random.standard_normal((rows, n), np.float32) for rows in (3, 4))
    exact = A.astype(np.float64) @ B.astype(np.float64).T
    lengths = np.outer(np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=1))
    a, b = xp.asarray(A), xp.asarray(B)
    np.testing.assert_allclose(np.asarray(double_products(a, b)), exact, rtol=0, atol=1e-14 * lengths.max())
    error = np.asarray(blockwise_products(a, b)) - exact
    assert np.abs(error / lengths).max() < 3e-7
    columns = xp.asarray(np.stack([A[0], A[1]], axis=1))[:, 0]  # not contiguous
    assert float(inner(columns, b[0, :])) == pytest.approx(exact[0, 0], abs=float(3e-7 * lengths[0, 0]))


@pytest.mark.parametrize("xp", [np, array_api_strict])
def test_blocks_are_added_in_double_precision(xp, monkeypatch):
    """2²⁴ + 1 is no number of single precision."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    x = xp.asarray([4096, 0, 0, 0, 1, 0, 0, 0, 1], dtype=xp.float32)
    assert float(inner(x, x)) == 2**24 + 2
    assert float(blockwise_products(x[None, :], x[None, :])[0, 0]) == 2**24 + 2
    products = blockwise_products(x[None, :], x[None, :])
    assert products.dtype == xp.float64


def test_doubles_are_converted_by_pieces(monkeypatch):
    monkeypatch.setattr(kernels, "CPU_DOUBLES", 24)
    a = np.random.default_rng(0).standard_normal((3, 50), np.float32)
    np.testing.assert_allclose(double_products(a, a), a.astype(np.float64) @ a.astype(np.float64).T, rtol=1e-14)


def test_combinations_by_pieces(monkeypatch):
    monkeypatch.setattr(kernels, "PIECE", 8)
    x, y = np.random.default_rng(0).standard_normal((2, 21))
    expected = 2 * x - 3 * y
    np.testing.assert_allclose(combination(2.0, x, -3.0, y), expected, rtol=1e-15)
    assert combination(2.0, x, -3.0, y, out=x) is x
    np.testing.assert_allclose(x, expected, rtol=1e-15)
