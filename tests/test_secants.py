"""The M×M mathematics."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnewton_mpi.core.secants import leading_eigenpairs, multisecant


def centred(random, replicas, size):
    columns = random.standard_normal((replicas, size))
    return columns - columns.mean(axis=0)


@given(replicas=st.integers(2, 12), size=st.integers(1, 30), seed=st.integers(0, 99))
def test_inverse_is_the_pseudo_inverse(replicas, size, seed):
    G = centred(np.random.default_rng(seed), replicas, size)
    fit = multisecant(G @ G.T, tolerance=1e-6)
    assert fit.rank == min(replicas - 1, size)
    np.testing.assert_allclose(fit.inverse, np.linalg.pinv(G @ G.T, rcond=1e-11, hermitian=True), rtol=1e-5, atol=1e-8)
    singular = np.linalg.svd(G, compute_uv=False)[: fit.rank]
    assert fit.condition == pytest.approx(singular[0] / singular[-1], rel=1e-6)


def test_never_keeps_all_directions():
    # Rounding may leave the structural zero of centring large: it goes all the same.
    assert multisecant(np.eye(4), tolerance=0.0).rank == 3


@given(replicas=st.integers(3, 12), rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_rounding_is_no_direction(replicas, rank, seed):
    """Dependent columns: what rounding leaves of the zero eigenvalues is dropped even at tolerance 0."""
    rank = min(rank, replicas - 2)
    random = np.random.default_rng(seed)
    G = random.standard_normal((replicas, rank)) @ random.standard_normal((rank, 40))
    G -= G.mean(axis=0)
    singular = np.linalg.svd(G, compute_uv=False)
    fit = multisecant(G @ G.T, tolerance=0.0)
    assert fit.rank == np.count_nonzero(singular > 1e-6 * singular[0])


def test_repeated_eigenvalues_give_one_matrix():
    # I − 11ᵀ/M has the eigenvalue 1 three times: any rotation of the eigenvectors must give the same inverse.
    gram = np.eye(4) - 0.25
    fit = multisecant(gram, tolerance=1e-8)
    assert fit.rank == 3
    np.testing.assert_allclose(fit.inverse, gram, atol=1e-14)


@pytest.mark.parametrize("replicas", [1, 2, 8])
def test_equal_replicas_span_nothing(replicas):
    fit = multisecant(np.zeros((replicas, replicas)), tolerance=1e-4)
    assert fit.rank == 0
    assert np.isnan(fit.condition)
    assert not fit.inverse.any()


def test_tolerance_drops_and_damping_shrinks():
    G = np.zeros((4, 5))
    G[0, 0], G[1, 0] = 1, -1  # σ = √2
    G[2, 1], G[3, 1] = 1e-3, -1e-3  # σ = √2 · 10⁻³
    gram = G @ G.T
    assert multisecant(gram, tolerance=1e-4).rank == 2
    assert multisecant(gram, tolerance=1e-2).rank == 1
    damped = multisecant(gram, tolerance=1e-2, damping=0.5).inverse
    np.testing.assert_allclose(damped[:2, :2], multisecant(gram, 1e-2).inverse[:2, :2] / 1.5)


@given(n=st.integers(1, 10), count=st.integers(1, 12), seed=st.integers(0, 99))
def test_leading_eigenpairs(n, count, seed):
    A = np.random.default_rng(seed).standard_normal((n, n))
    values, vectors = leading_eigenpairs(A @ A.T, count)
    kept = min(n, count)
    assert values.shape == (kept,)
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(kept), atol=1e-12)
    np.testing.assert_allclose(A @ A.T @ vectors, vectors * values, atol=1e-9)
    # The sign is a rule, not LAPACK's choice.
    assert (vectors[np.abs(vectors).argmax(axis=0), np.arange(kept)] > 0).all()
