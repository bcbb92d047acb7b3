"""Approximate inverses of the Hessian, as operators: from the replicas' differences, and from tracked eigenpairs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array, Columns, Held, Vectors, to_device, to_host
from qnewton_mpi.core import secants
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.core.ritz import RitzPairs
from qnewton_mpi.errors import UserError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True)
class Solution:
    """Of (H + μ I) x = z.

    Attributes
    ----------
    x : (held,)
    residual : float
        ‖z − (H + μ I) x‖/‖z‖.
    products : int
        With H, that it took.
    """

    x: Held
    residual: float
    products: int


class Inverse(ABC):
    """An operator like H⁻¹. All methods are collective."""

    exchange: Exchange

    @abstractmethod
    def apply(self, vectors: Vectors) -> Vectors:
        """Return Ĥ⁻¹ of each row of vectors (p, held)."""

    def solve(
        self,
        product: Callable[[Held], Held],
        z: Held,
        tolerance: float = 1e-6,
        most: int = 100,
        damping: float = 0.0,
    ) -> Solution:
        """Solve (H + μ I) x = z by conjugate gradients preconditioned with this operator.

        Flexible: each direction Ĥ⁻¹r is made conjugate to all before, and so need not come from a symmetric operator,
        as that of the columns is not (Notay 2000, SIAM J. Sci. Comput. 22, 1444).

        Parameters
        ----------
        product : callable
            H q (held,) of a held vector; H symmetric.
        z : (held,)
        tolerance : float
            Of ‖z − (H + μ I) x‖, relative to ‖z‖.
        most : int
            Products, at most; the directions of all are kept.
        damping : float
            μ.

        Raises
        ------
        UserError
            On all ranks, where a direction of no positive curvature is met.

        Examples
        --------
        >>> import numpy as np
        >>> from qnewton_mpi.core.exchange import AllgatherExchange
        >>> from qnewton_mpi.parallel.communicator import Communicator
        >>> curvatures = np.array([100.0, 2.0, 1.0])
        >>> W = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
        >>> inverse = InverseHessian(AllgatherExchange(Communicator(), 2, 3), W, W * curvatures, 1e-6)
        >>> solution = inverse.solve(lambda q: curvatures * q, np.ones(3))
        >>> solution.x.round(6).tolist(), solution.products  # the first is deflated: two eigenvalues are left
        ([0.01, 0.5, 1.0], 2)
        """
        xp, dots = array_namespace(z), self.exchange.dots
        x, r = xp.zeros_like(z), z
        directions = images = z[None, :][:0, :]
        curvatures = np.zeros(0)
        size = now = math.sqrt(dots((z, z))[0])
        while now > tolerance * size and len(curvatures) < most:
            p = self._conjugate(self.apply(r[None, :])[0, :], directions, images, curvatures)
            image = product(p) + damping * p
            curvature, along = dots((p, image), (p, r))
            if not curvature > 0:
                raise UserError(f"H + {damping:g} I has a direction of curvature {curvature:g}: use a larger damping")
            x, r = x + along / curvature * p, r - along / curvature * image
            directions, images = (xp.concat([old, new[None, :]]) for old, new in ((directions, p), (images, image)))
            curvatures = np.append(curvatures, curvature)
            now = math.sqrt(dots((r, r))[0])
        return Solution(x, now / size if size else 0.0, len(curvatures))

    def _conjugate(self, p: Array, directions: Array, images: Array, curvatures: NDArray[np.float64]) -> Array:
        """Return p − Σ_k (p_kᵀA p/p_kᵀA p_k) p_k, of directions p_k (k, held) and their images A p_k."""
        if not len(curvatures):
            return p
        overlaps = self.exchange.gram(images, p[None, :])[:, 0] / curvatures
        return p - to_device(overlaps, p) @ directions

    def linear_operator(self, like: Array) -> LinearOperator:
        """Return a SciPy operator (N, N) on whole vectors; its products are collective.

        Parameters
        ----------
        like : array
            Of the library and dtype of the held vectors.
        """
        from scipy.sparse.linalg import LinearOperator

        exchange = self.exchange

        def matvec(vector: Any) -> Any:
            held = exchange.hold(to_device(np.ascontiguousarray(vector).reshape(-1), like))
            return np.array(to_host(exchange.collect(self.apply(held[None, :])[0, :])))

        return LinearOperator((exchange.size, exchange.size), matvec, dtype=np.asarray(to_host(like)).dtype)


class RitzInverse(Inverse):
    """Ĥ⁻¹z = z^⊥/ν + Σ_k r_k r_kᵀz/max(|λ_k|, ν) from tracked Ritz pairs: |H|⁻¹ on their span, 1/ν off it. Symmetric.

    Parameters
    ----------
    ritz : RitzPairs
    bulk : float, optional
        ν > 0, what curvature is taken for off the span; the smallest |λ_k| by default.

    Raises
    ------
    UserError
        On all ranks, where neither `bulk` nor the values give a ν > 0.

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> curvatures = np.array([10.0, -5.0, 2.0, 2.0])
    >>> exchange = AllgatherExchange(Communicator(), replicas=2, size=4)
    >>> pairs = RitzPairs(exchange, np.random.default_rng(0).standard_normal((2, 4)))
    >>> for _ in range(30):
    ...     pairs.update(pairs.directions * curvatures)
    >>> RitzInverse(pairs, bulk=2.0).apply(np.ones((1, 4))).round(6).tolist()
    [[0.1, 0.2, 0.5, 0.5]]
    """

    def __init__(self, ritz: RitzPairs, bulk: float | None = None) -> None:
        self.exchange, self._ritz = ritz.exchange, ritz
        sizes = np.abs(ritz.values)
        self.bulk = float(sizes.min(initial=np.inf)) if bulk is None else bulk
        if not 0 < self.bulk < np.inf:
            raise UserError("the Ritz values do not say what curvature there is elsewhere: give bulk, greater than 0")
        self._factors = self.bulk / np.maximum(sizes, self.bulk)

    def apply(self, vectors: Vectors) -> Vectors:
        xp = array_namespace(vectors)
        rows = [self._ritz.apply(self._factors, vectors[k, :]) for k in range(vectors.shape[0])]
        return xp.stack(rows) / self.bulk


class InverseHessian(Inverse):
    """Ĥ⁻¹z = z^⊥ + W V Σ⁻¹ Uᵀz, from columns with the secant relation G = Ĥ W, GᵀG = V Σ² Vᵀ, U = G V Σ⁻¹.

    Exact on span(G), the identity off it (Arnold and Wang 2017, arXiv 1709.05069). Evaluated as z + (W − G) a with
    a = V Σ⁻² Vᵀ Gᵀz: all that is global is one M×M matrix and one M-vector for each z. Collective, as is `apply`.

    Parameters
    ----------
    exchange : Exchange
    displacements, gradients : (M, held)
        W and G, centred over the M replicas; not copied.
    tolerance : float
        Directions with σ ≤ tolerance · σ_max are dropped, and always the structural zero of centring and what is
        rounding of the Gram matrix, σ ≤ √(4 M ε) σ_max (8e-8 σ_max for M = 8).
    tikhonov : float, optional
        Damping relative to σ_max².

    Attributes
    ----------
    rank : int
        Number of directions kept.
    singular_values : (rank,) float64
        σ of G over those, descending.
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
        self, exchange: Exchange, displacements: Columns, gradients: Columns, tolerance: float, tikhonov: float = 0.0
    ) -> None:
        self.exchange = exchange
        self._gradients = gradients
        self._difference = displacements - gradients
        self._fit = secants.multisecant(exchange.gram(gradients, gradients), tolerance, tikhonov)
        self.rank = self._fit.rank
        self.singular_values = self._fit.singular_values
        self.condition = self._fit.condition

    def apply(self, vectors: Vectors) -> Vectors:
        coefficients = self._fit.coefficients(self.exchange.gram(self._gradients, vectors))
        return vectors + to_device(coefficients.T, vectors) @ self._difference
