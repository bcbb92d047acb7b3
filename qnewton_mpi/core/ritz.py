"""The leading eigenpairs of the Hessian, tracked by the replicas: a distributed block power iteration."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from qnewton_mpi.arrays import Columns, Held, Vector, Vectors, to_device
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.core.state import Kind

# Power iteration with H + δ‖H‖ I: directions in the null space of H stay directions.
SHIFT = 1e-3


class RitzPairs:
    """Approximate eigenpairs (λ_k, r_k) of a Hessian H that is known by products with M directions at a time.

    The directions are the rows of Q (M × held), orthonormal, one for each replica; from Y = Q H, the products,

        T' = (1 − γ) T + γ sym(Q Yᵀ)           Rayleigh quotient, a running mean
        T' = V Λ Vᵀ,  R = Vᵀ Q                 Ritz values Λ and vectors R (rows)
        Q' = orth((1 − γ) T Q + γ Y + δ‖T‖ Q)  the next directions: a power iteration with the running mean
        T ← (Q' Qᵀ) T' (Q Q'ᵀ)                 carried to them

    Rayleigh-Ritz as in Parlett, The Symmetric Eigenvalue Problem, chapter 11. The Ritz vectors of equal Ritz values are
    arbitrary; only R f(Λ) Rᵀ is the same for every rank's library, and only that is to be used. Collective.

    Parameters
    ----------
    exchange : Exchange
    directions : (M, held)
        The first ones; linearly independent, not necessarily orthonormal.
    smoothing : float
        1 − γ, 0 for a Hessian that does not change from update to update.

    Attributes
    ----------
    directions : (M, held)
        Q, of the next products.
    values : (M,) float64
        Λ, ascending; none before the first update.
    vectors : (M, held)
        R, in the order of the values.
    residuals : (M,) float64
        ‖H r_k − λ_k r_k‖ of the last products.

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> curvatures = np.array([10.0, -5.0, 1.0, 0.5])
    >>> exchange = AllgatherExchange(Communicator(), replicas=2, size=4)
    >>> pairs = RitzPairs(exchange, np.random.default_rng(0).standard_normal((2, 4)))
    >>> for _ in range(30):
    ...     pairs.update(pairs.directions * curvatures)
    >>> pairs.values.round(6).tolist()
    [-5.0, 10.0]
    >>> pairs.apply(1 / pairs.values, np.ones(4)).round(6).tolist()  # H⁻¹ on their span, the identity off it
    [0.1, -0.2, 1.0, 1.0]
    """

    state: ClassVar = {
        "directions": Kind.HELD,
        "vectors": Kind.HELD,
        "values": Kind.SHARED,
        "residuals": Kind.SHARED,
        "_rayleigh": Kind.SHARED,
    }
    lengths: ClassVar = {"vectors": "pairs", "values": "pairs", "residuals": "pairs"}

    def __init__(self, exchange: Exchange, directions: Columns, smoothing: float = 0.0) -> None:
        self.exchange, self.smoothing = exchange, smoothing
        self.directions = orthonormal(exchange, directions)
        self.values = self.residuals = np.zeros(0)
        self.vectors = directions[:0, :]
        self._rayleigh = np.zeros(2 * directions.shape[:1])

    def update(self, products: Columns, first: bool = False) -> None:
        """Take the products H q_k, (M, held), of the current directions; for `first` as if there were none before."""
        Q, Y = self.directions, products
        fresh = self.exchange.gram(Q, Y)
        fresh = (fresh + fresh.T) / 2
        kept, before = (0.0, fresh) if first or not len(self.values) else (self.smoothing, self._rayleigh)
        T = kept * before + (1 - kept) * fresh
        self.values, V = np.linalg.eigh(T)
        self.vectors = to_device(V.T, Q) @ Q
        errors = to_device(V.T, Q) @ Y - to_device(self.values[:, None], Q) * self.vectors
        self.residuals = np.sqrt(np.diag(self.exchange.gram(errors, errors)))

        shift = SHIFT * float(np.abs(self.values).max())
        mixed = (1 - kept) * Y + to_device(kept * before + shift * np.eye(len(T)), Q) @ Q
        if shift > 0:  # otherwise there is no curvature to follow
            self.directions = orthonormal(self.exchange, mixed)
        overlap = self.exchange.gram(self.directions, Q)
        self._rayleigh = overlap @ T @ overlap.T

    def apply(self, function_of_values: Vector, z: Held) -> Held:
        """Return z^⊥ + Σ_k f(λ_k) r_k r_kᵀ z, (held,), given f(λ_k)."""
        if not len(self.values):
            return z
        projections = self.exchange.gram(self.vectors, z[None, :])[:, 0]
        return z + to_device((function_of_values - 1) * projections, z) @ self.vectors


def orthonormal(exchange: Exchange, rows: Vectors) -> Vectors:
    """Return S^(−1/2) rows, S their Gram matrix, twice: orthonormal rows of the same span. Collective.

    Parameters
    ----------
    exchange : Exchange
    rows : (k, held)
        Linearly independent, to rounding. The result has no free signs, unlike that of an eigensolver.

    Returns
    -------
    (k, held)

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> rows = orthonormal(AllgatherExchange(Communicator(), 2, 3), np.array([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    >>> rows.round(6).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    for _ in range(2):
        squares, vectors = np.linalg.eigh(exchange.gram(rows, rows))
        floor = len(squares) * np.finfo(np.float64).eps * squares[-1]
        root = (vectors / np.sqrt(np.maximum(squares, floor))) @ vectors.T
        rows = to_device(root, rows) @ rows
    return rows
