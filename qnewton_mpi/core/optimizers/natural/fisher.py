"""The differences of the replicas' gradients as a running low-rank Fisher matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qnewton_mpi.arrays import Held, Matrix, Vector, to_device
from qnewton_mpi.core.exchange.cost import Traffic
from qnewton_mpi.core.optimizers.natural.method import NaturalGradient
from qnewton_mpi.core.optimizers.natural.settings import NaturalGradientSettings
from qnewton_mpi.core.optimizers.natural.values import Update
from qnewton_mpi.core.optimizers.values import Batch, Figures
from qnewton_mpi.core.secants import leading_eigenpairs
from qnewton_mpi.core.settings import POSITIVE, setting
from qnewton_mpi.core.state import Kind


@dataclass(frozen=True)
class FisherSettings(NaturalGradientSettings):
    """Settings of `fisher`."""

    damping: float = setting(0.3, "ε, of F's mean eigenvalue; at least the smallest that the rank keeps", POSITIVE)
    rank: int = setting(64, "directions of the Fisher matrix that are kept", POSITIVE)


class Fisher(NaturalGradient[FisherSettings]):
    """The natural gradient with F ≈ Lᵀ L of low rank, from the poster's Gram matrix and eigenproblem.

        F ← (1 − γ) F + γ b/(M−1) G Gᵀ         G = [g_i − ḡ], b samples a replica
        F ≈ Σ_k λ_k u_k u_kᵀ                   the leading eigenpairs, from the Gram matrix of L's rows and G
        (F + ε I)⁻¹ z = (z − Σ_k λ_k/(λ_k + ε) u_k u_kᵀ z)/ε

    L (rank × held) has the rows √λ_k u_k. ε is a share of the mean eigenvalue of F, and at least the smallest one that
    the rank keeps; the bulk, outside the span, moves at the rate α/ε. Where the replicas' gradients are all equal,
    F = 0 and the step is that of gradient descent. F is updated at every step until its rank is reached. Kin are TONGA
    (Le Roux et al. 2007) and GGT (Agarwal et al. 2019); see docs/explanation/method.md.

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> x = np.random.default_rng(0).standard_normal((8, 32, 3)) * [1.0, 3.0, 10.0]
    >>> def loss_and_gradient(w, replica):  # targets 1, of unit noise
    ...     errors = x[replica] @ w - 1
    ...     return float(errors @ errors) / 64, errors @ x[replica] / 32
    >>> exchange = AllgatherExchange(Communicator(), replicas=8, size=3)
    >>> optimizer = Fisher(Fisher.settings_type(rank=2), np.zeros(3), exchange, samples=32)
    >>> figures = [optimizer.step(loss_and_gradient) for _ in range(20)]
    >>> figures[-1]["kept_rank"], figures[-1]["loss"] < figures[0]["loss"]
    (2, True)
    """

    settings_type = FisherSettings
    state: ClassVar = {
        **NaturalGradient.state,
        "factor": Kind.HELD,
        "eigenvalues": Kind.SHARED,
        "damping": Kind.SHARED,
    }
    lengths: ClassVar = {"factor": "rank", "eigenvalues": "rank"}
    figure_names = (*NaturalGradient.figure_names, "kept_rank", "captured", "largest_eigenvalue", "smallest_eigenvalue")

    @classmethod
    def traffic(cls, settings: FisherSettings) -> Traffic:
        return Traffic(columns=1 / settings.update_every, means=1 - 1 / settings.update_every)

    def start(self) -> None:
        super().start()
        self.factor = self.held[None, :][:0, :]
        self.eigenvalues = np.zeros(0)  # λ, on the host, descending
        self.damping = 1.0  # ε

    def damping_of(self, eigenvalues: Vector, trace: float) -> float:
        """Return ε, given λ and tr F; 1 where F is zero, whatever that is worth. Local."""
        cut = len(eigenvalues) == self.settings.rank < self.exchange.size
        least = float(eigenvalues[-1]) if cut else 0.0
        mean = trace / self.exchange.size if len(eigenvalues) else 0.0
        return max(least, self.settings.damping * mean) or 1.0

    def update_is_due(self) -> bool:
        full = len(self.eigenvalues) == self.settings.rank
        return not full or self.steps % self.settings.update_every == 0

    def update(self, batch: Batch, noise: float) -> Update:
        mean, G = self.exchange.centred(batch.rows)
        weight = self.weight
        G = math.sqrt(weight) * self.scale * G
        columns = self.xp.concat([self.factor, G, mean[None, :]])
        kept, n = len(self.eigenvalues), columns.shape[0] - 1
        # Their precision will do: what is below n ε λ_max is dropped.
        products = self.exchange.gram(columns[kept:, :], columns, precise=False)
        seen = None
        if kept:
            squares = self.preconditioned_squares(np.diag(products[:, kept:]), products[:, :kept])
            seen = float(squares[:-1].sum()) / weight, float(squares[-1])
        S, left = np.zeros((n, n)), np.append(np.full(kept, math.sqrt(1 - weight)), np.ones(n - kept))
        # The kept rows are eigenvectors, orthogonal to rounding: their block of the Gram matrix is known.
        S[:kept, :kept] = np.diag((1 - weight) * self.eigenvalues)
        S[kept:] = left * products[:-1, :n]
        S[:kept, kept:] = S[kept:, :kept].T
        trace = (1 - weight) * self.trace + float(np.trace(S[kept:, kept:]))
        values, vectors = leading_eigenpairs(S, self.settings.rank)
        rounding = max(float(self.xp.finfo(G.dtype).eps) * values[0], self.rounding(batch))
        values = values[values > n * rounding]
        self.eigenvalues, self.damping = values, self.damping_of(values, trace)
        self.factor = to_device(vectors[:, : len(values)].T * left, G) @ columns[:n, :]
        rest = max(0.0, trace - float(values.sum()))  # what the rank cuts off, in the bulk
        known = float((values / (values + self.damping)).sum()) + rest / self.damping
        return Update(mean, trace, known, seen)

    def apply_inverse(self, z: Held, noise: float | None = None) -> Held:
        damping = self.damping
        projections = self.exchange.gram(self.factor, z[None, :], precise=False)[:, 0]
        coefficients = to_device(projections / (self.eigenvalues + damping), z)
        return (z - coefficients @ self.factor) / damping

    def preconditioned_squares(self, squares: Vector, projections: Matrix) -> Vector:
        """Return xᵀ (F + ε I)⁻¹ x of vectors, from ‖x‖², (n,), and their products with L's rows, (n, rank). Local."""
        along = projections**2 @ (1 / (self.eigenvalues + self.damping))
        return (squares - along) / self.damping

    def fisher_figures(self) -> Figures:
        values = self.eigenvalues
        largest, smallest = (float(values[0]), float(values[-1])) if len(values) else (math.nan, math.nan)
        captured = float(values.sum()) / self.trace if self.trace > 0 else math.nan
        return {
            "kept_rank": len(values),
            "captured": captured,
            "largest_eigenvalue": largest,
            "smallest_eigenvalue": smallest,
        }
