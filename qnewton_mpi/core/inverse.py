"""The low-rank inverse of the Hessian that the replicas' differences span, as an operator."""

from __future__ import annotations

from qnewton_mpi.core import secants
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.parallel.device import Array, to_device


class InverseHessian:
    """Ĥ⁻¹z = z^⊥ + W V Σ⁻¹ Uᵀz, from columns with the secant relation G = Ĥ W, GᵀG = V Σ² Vᵀ, U = G V Σ⁻¹.

    Exact on span(G), the identity off it (Arnold and Wang 2017, arXiv 1709.05069). Evaluated as z + (W − G) a with
    a = V Σ⁻² Vᵀ Gᵀz: all that is global is one M×M matrix and one M-vector for each z. Collective, as is `apply`.

    Parameters
    ----------
    exchange : Exchange
    displacements, gradients : (M, held)
        W and G, centred over the M replicas; not copied.
    tolerance : float
        Directions with σ ≤ tolerance · σ_max are dropped, and always the structural zero of centring.
    tikhonov : float, optional
        Damping relative to σ_max².

    Attributes
    ----------
    rank : int
        Number of directions kept.
    condition : float
        σ_max/σ_min over those; NaN when none is.

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> W = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    >>> inverse = InverseHessian(AllgatherExchange(Communicator(), 2, 3), W, W * [4.0, 1.0, 1.0], 1e-6)
    >>> inverse.apply(np.array([[8.0, 5.0, 0.0]])).round(6).tolist()
    [[2.0, 5.0, 0.0]]
    """

    def __init__(
        self, exchange: Exchange, displacements: Array, gradients: Array, tolerance: float, tikhonov: float = 0.0
    ) -> None:
        self._exchange = exchange
        self._gradients = gradients
        self._difference = displacements - gradients
        self._fit = secants.multisecant(exchange.gram(gradients, gradients), tolerance, tikhonov)
        self.rank = self._fit.rank
        self.condition = self._fit.condition

    def apply(self, vectors: Array) -> Array:
        """Return Ĥ⁻¹ of each row of vectors (p, held)."""
        coefficients = self._fit.coefficients(self._exchange.gram(self._gradients, vectors))
        return vectors + to_device(coefficients.T, vectors) @ self._difference
