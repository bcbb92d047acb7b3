"""The small matrices: from a Gram matrix to the coefficients that combine columns.

Everything here is host-side float64, needs no MPI and takes at most a few hundred rows; it is run redundantly, on
bitwise equal input, by every rank. Eigenvectors have free signs and, at equal eigenvalues, free rotations:
`multisecant` returns only functions f(S) = V f(Λ) Vᵀ, which do not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qnewton_mpi.arrays import Matrix, Vector


@dataclass(frozen=True)
class Secants:
    """A (pseudo-)inverted Gram matrix of secants.

    Attributes
    ----------
    inverse : (M, M) float64
        V Σ⁻² Vᵀ over the kept directions; V (Σ² + μ)⁻¹ Vᵀ with damping μ.
    singular_values : (rank,) float64
        σ of the kept directions, descending.
    """

    inverse: Matrix
    singular_values: Vector

    @property
    def rank(self) -> int:
        """Number of kept directions, at most M − 1."""
        return len(self.singular_values)

    @property
    def condition(self) -> float:
        """σ_max/σ_min over the kept directions; NaN when none is kept."""
        return float(self.singular_values[0] / self.singular_values[-1]) if self.rank else float("nan")

    def coefficients(self, projections: Vector | Matrix) -> Vector | Matrix:
        """Return a = V Σ⁻² Vᵀ (Gᵀz), with which Ĥ⁻¹z = z + (W − G) a.

        Parameters
        ----------
        projections : (M,) or (M, p) float64
            Gᵀz, one column for each vector z.

        Returns
        -------
        (M,) or (M, p) float64
        """
        return self.inverse @ projections


def multisecant(gram: Matrix, tolerance: float, damping: float = 0.0) -> Secants:
    """Invert the Gram matrix S = GᵀG = V Σ² Vᵀ of centred gradients on its numerical range.

    Centring makes one singular value exactly zero, so at most M − 1 directions are kept whatever the tolerance. A zero
    matrix (all replicas equal) keeps none: the coefficients vanish and the step is the plain gradient's.

    Parameters
    ----------
    gram : (M, M) float64
        S, finite; only its symmetric part is used.
    tolerance : float
        Directions with σ ≤ tolerance · σ_max are dropped. S squares the singular values and is known to rounding only:
        what does not reach σ² = 4 M ε σ_max², ε = 2.2e-16, is dropped whatever the tolerance.
    damping : float, optional
        Tikhonov damping relative to σ_max²: μ = damping · σ_max².

    Returns
    -------
    Secants

    Notes
    -----
    Arnold and Wang (2017), arXiv 1709.05069: U = G V Σ⁻¹, Ĥ⁻¹U = W V Σ⁻¹, hence
    Ĥ⁻¹z = z − U Uᵀz + W V Σ⁻¹ Uᵀz = z + (W − G) V Σ⁻² Vᵀ Gᵀz.

    Examples
    --------
    >>> import numpy as np
    >>> fit = multisecant(np.array([[1.0, -1.0], [-1.0, 1.0]]), tolerance=1e-6)
    >>> fit.rank, fit.inverse.round(6).tolist()
    (1, [[0.25, -0.25], [-0.25, 0.25]])
    """
    replicas = len(gram)
    squared, vectors = np.linalg.eigh((gram + gram.T) / 2)
    least = max(tolerance**2, 4 * replicas * np.finfo(np.float64).eps)
    # The smallest of the M eigenvalues is the structural zero; what is left of a zero matrix is not positive.
    kept = (np.arange(replicas) > 0) & (squared > least * squared[-1]) & (squared > 0)
    squared, vectors = squared[kept], vectors[:, kept]
    if not len(squared):
        return Secants(np.zeros((replicas, replicas)), squared)
    inverse = (vectors / (squared + damping * squared[-1])) @ vectors.T
    return Secants(inverse, np.sqrt(squared[::-1]))


def leading_eigenpairs(gram: Matrix, count: int) -> tuple[Vector, Matrix]:
    """Return the `count` largest eigenvalues of a Gram matrix, descending, and their eigenvectors.

    Parameters
    ----------
    gram : (n, n) float64
    count : int
        At most this many pairs; n < count gives n.

    Returns
    -------
    eigenvalues : (k,) float64
        Clipped at zero: a Gram matrix has no negative ones but for rounding.
    eigenvectors : (n, k) float64
        Orthonormal columns. Signs are fixed by making the entry of largest magnitude positive.

    Examples
    --------
    >>> import numpy as np
    >>> values, vectors = leading_eigenpairs(np.diag([1.0, 9.0, 4.0]), 2)
    >>> values.tolist(), vectors.T.tolist()
    ([9.0, 4.0], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    """
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    largest = np.argmax(np.abs(vectors), axis=0)
    signs = np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    return np.maximum(values, 0.0), vectors * signs
