"""Eigenvalues of a Hessian from its products with vectors: the leading pairs, and the density of all. No MPI.

Everything here is local, and the same on all ranks where the products are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qnewton_mpi.arrays import Matrix, Vector

BLOCKS = 40  # of a Krylov space, at most
Product = Callable[[Matrix], Matrix]
"""H Q of directions, the rows of Q (k, N): (k, N)."""


@dataclass(frozen=True)
class Eigenpairs:
    """The eigenpairs of largest |λ|, those first.

    Attributes
    ----------
    values : (k,)
    vectors : (k, N), orthonormal rows
    residuals : (k,)
        ‖H r − λ r‖: some eigenvalue of H is within it of λ (Parlett, The Symmetric Eigenvalue Problem, 4.5).
    products : int
        With single vectors, that it took.
    """

    values: Vector
    vectors: Matrix
    residuals: Vector
    products: int


def leading(
    product: Product, directions: Matrix, count: int, tolerance: float = 1e-4, blocks: int = BLOCKS
) -> Eigenpairs:
    """Return the eigenpairs of largest |λ| by Rayleigh-Ritz in a block Krylov space, span(Q, H Q, H² Q, …).

        Q_{j+1} R = H Q_j − Σ_{i ≤ j} Q_i (Q_iᵀ H Q_j)       block Lanczos, each block orthogonal to all before
        T = Qᵀ H Q = V Λ Vᵀ,  r_k = Q v_k                    Parlett, chapters 11 and 13

    Parameters
    ----------
    product : callable
    directions : (m, N)
        The first block, linearly independent; m products a block.
    count : int
        k, at most N.
    tolerance : float
        Of the residuals, relative to the largest |λ|.
    blocks : int
        At most; the residuals then tell how far it got.

    Examples
    --------
    >>> import numpy as np
    >>> H = np.diag([5.0, -4.0, 3.0, 1.0, 0.5, 0.1])
    >>> pairs = leading(lambda Q: Q @ H, np.random.default_rng(0).standard_normal((2, 6)), 2)
    >>> pairs.values.round(6).tolist()
    [5.0, -4.0]
    """
    size = directions.shape[1]
    basis, images = np.empty((0, size)), np.empty((0, size))
    block, products = np.linalg.qr(directions.T)[0].T, 0
    for _ in range(blocks):
        image = product(block)
        products += len(block)
        basis, images = np.concatenate([basis, block]), np.concatenate([images, image])
        T = basis @ images.T
        values, vectors = np.linalg.eigh((T + T.T) / 2)
        kept = np.argsort(-np.abs(values), kind="stable")[:count]
        values, vectors = values[kept], vectors[:, kept].T
        found = vectors @ basis
        residuals = np.linalg.norm(vectors @ images - values[:, None] * found, axis=1)
        done = len(values) == count and residuals.max() <= tolerance * np.abs(values).max()
        block = _orthogonal(image, basis)
        if done or not len(block):
            break
    return Eigenpairs(values, found, residuals, products)


def _orthogonal(rows: Matrix, basis: Matrix) -> Matrix:
    """Return orthonormal rows for what of some rows is outside the span of a basis; fewer where that is nothing."""
    scale = np.linalg.norm(rows, axis=1).max()
    for _ in range(2):  # twice is enough (Kahan, in Parlett 6.9)
        rows = rows - (rows @ basis.T) @ basis
    room = basis.shape[1] - len(basis)
    _, sizes, directions = np.linalg.svd(rows, full_matrices=False)
    fresh = directions[(sizes > 1e-12 * scale)][:room]
    fresh = fresh - (fresh @ basis.T) @ basis
    return np.asarray(np.linalg.qr(fresh.T)[0].T)


@dataclass(frozen=True)
class Density:
    """The distribution of all eigenvalues, as weighted points: the weights add up to 1.

    Attributes
    ----------
    nodes, weights : (probes · steps,)
    """

    nodes: Vector
    weights: Vector

    def smoothed(self, at: Vector, width: float) -> Vector:
        """Return the density at some values, the points smeared to normal distributions of a standard deviation."""
        offsets = (at[:, None] - self.nodes) / width
        return np.asarray(np.exp(-(offsets**2) / 2) @ self.weights / (width * np.sqrt(2 * np.pi)))


def density(product: Product, directions: Matrix, steps: int) -> Density:
    """Return the spectral density by stochastic Lanczos quadrature.

    Of each random direction q, Lanczos' tridiagonal matrix T = V Θ Vᵀ gives the nodes θ_k with the weights v_{1k}²,
    exact for polynomials of degree 2 · steps − 1 in qᵀ f(H) q; their mean over q estimates tr f(H)/N (Golub and
    Meurant, Matrices, Moments and Quadrature; Lin, Saad and Yang 2016, SIAM Review 58, 34).

    Parameters
    ----------
    product : callable
    directions : (probes, N)
        Of a distribution that is the same in all directions.
    steps : int
        Products with each.

    Examples
    --------
    >>> import numpy as np
    >>> H = np.diag(np.repeat([0.0, 1.0, 5.0], [80, 15, 5]))
    >>> found = density(lambda Q: Q @ H, np.random.default_rng(0).standard_normal((20, 100)), 3)
    >>> [round(float(found.weights[np.abs(found.nodes - value) < 0.1].sum()), 2) for value in (0, 1, 5)]
    [0.8, 0.15, 0.05]
    """
    probes, size = directions.shape
    steps = min(steps, size)
    now = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    basis = np.empty((probes, 0, size))
    T = np.zeros((probes, steps, steps))
    for j in range(steps):
        basis = np.concatenate([basis, now[:, None, :]], axis=1)
        image = product(now)
        T[:, j, j] = np.einsum("pn,pn->p", now, image)
        for _ in range(2):  # orthogonal to all before, not to the last two alone: rounding brings copies otherwise
            image = image - np.einsum("pjn,pj->pn", basis, np.einsum("pjn,pn->pj", basis, image))
        lengths = np.linalg.norm(image, axis=1)
        if j + 1 < steps:
            T[:, j, j + 1] = T[:, j + 1, j] = lengths
            now = image / np.maximum(lengths, np.finfo(np.float64).tiny)[:, None]
    nodes, vectors = np.linalg.eigh(T)
    return Density(nodes.reshape(-1), (vectors[:, 0, :] ** 2 / probes).reshape(-1))
