"""The default method: the covariance of the replicas' gradients, layer by layer, in its Kronecker eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace, device

from qnewton_mpi.core.kernels import PIECE
from qnewton_mpi.core.layers import LayerShape, layer_shapes
from qnewton_mpi.core.optimizers.base import Batch, Figures
from qnewton_mpi.core.optimizers.natural_gradient import BATCH, NaturalGradient, NaturalGradientSettings
from qnewton_mpi.core.settings import NOT_NEGATIVE, POSITIVE, setting
from qnewton_mpi.core.state import Kind
from qnewton_mpi.parallel.cost import Traffic
from qnewton_mpi.parallel.device import Array, to_device

FIRST_UPDATES = 10
FLAT_SHARE = 0.1  # of that where a step is all noise: flattened, V needs less damping
FIRST_SHARES = 20  # steps, before which the shares of signal are not known well enough
SHARE_WEIGHT = 0.04  # of an update in the means that they are known from
GROUPS = 8  # of a layer's directions, by factors of 4 from its largest V on down
RIDGE = 1e-3  # ρ, relative to the mean eigenvalue


@dataclass(frozen=True)
class KroneckerSettings(NaturalGradientSettings):
    """Settings of `kronecker`."""

    damping: float = setting(0.3, "ε, of a layer's mean V, where a step is signal; a tenth where it is noise", POSITIVE)
    flattening: float = setting(0.25, "of V's exponent, where a step is noise; 0 is off", NOT_NEGATIVE)
    least_share: float = setting(0.2, "of signal that a group of directions is taken to have; 1 is off", POSITIVE)
    basis_every: int = setting(5, "updates between steps of the eigenbases, but for the first ones", POSITIVE)
    max_side: int = setting(2048, "a longer side of a layer keeps the coordinates as its basis", POSITIVE)


class Kronecker(NaturalGradient[KroneckerSettings]):
    """The natural gradient with F layer by layer, each diagonal in a Kronecker eigenbasis.

    A layer's share of replica i is a matrix X_i = √(b/(M−1)) (g_i − ḡ), (outputs, inputs + 1) with the bias last, and

        A = Σ_i X_iᵀ X_i,  Q_A ← qr((A + ρ I) Q_A)     running means, and their eigenbases by
        B = Σ_i X_i X_iᵀ,  Q_B ← qr((B + ρ I) Q_B)     orthogonal iteration
        V = Σ_i (Q_Bᵀ X_i Q_A)²                        elementwise: F's diagonal in this basis
        P⁻¹ Z = Q_B [(Q_Bᵀ Z Q_A)/(V + 0.3 mean V)] Q_Aᵀ

    That is for steps of signal alone. With ν the share of noise in a step's dᵀz and φ = ν², the last line is

        P⁻¹ Z = c Q_B [s^ν (Q_Bᵀ Z Q_A) n^(−φ/4) (V + ε)^(φ/4 − 1)] Q_Aᵀ,    ε = 0.3 · 10^(−φ) mean V

    where n = Σ V (V + ε)^(φ/4 − 1) is the layer's noise, and c leaves the noise of all layers, tr(P⁻¹F), as it is with
    1/(V + ε). Newton's step divides noise too by the curvature, and is then longest where there is nothing to gain; of
    full whitening, the other extreme, the exponent would be −½. From the 20th step on s, 1 before, is the share of
    signal of a group of directions, those of a layer with V within the same factor of 4:

        s = max(1 − Σ N/Σ S, 0.2),    S = ⟨b z̃²/Σ_k a_k²⟩,  N = ⟨V⟩,    z̃ = Q_Bᵀ Z Q_A,  z = Σ_k a_k ḡ_{t−k}

    with running means ⟨ ⟩ over about 25 updates and b the samples of a step, so that S is V where all is noise.

    Where all ranks hold everything, no columns cross the network: each rank keeps running sums over its own replicas, V
    is added up by an Allreduce at an update, A and B only when the bases move. Where each rank holds some of the
    layers, it keeps the sums over all replicas for those, from columns that come by Alltoall at an update, and nothing
    else is added up. The first ten steps do all of it.

    The eigenbasis is K-FAC's and Shampoo's (Martens and Grosse 2015; Gupta et al. 2018), the diagonal in it EKFAC's
    (George et al. 2018) and SOAP's (Vyas et al. 2024). What differs is the estimate, from the differences of the
    replicas: no products of activations, any layer whose parameters are a matrix, and F itself, where Shampoo and SOAP
    take a root of the second moment of the mean gradient. A numerical rate is meant for a batch of 256 and grows as
    √batch; "auto", the default, is `noise_limited_rate`.

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> random = np.random.default_rng(0)
    >>> x, truth = random.standard_normal((8, 32, 3)), np.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]])
    >>> y = x @ truth.T + random.standard_normal((8, 32, 2))
    >>> def loss_and_gradient(w, replica):  # a layer of 3 inputs and 2 outputs, targets of unit noise
    ...     errors = x[replica] @ w.reshape(2, 3).T - y[replica]
    ...     return float((errors**2).sum()) / 64, (errors.T @ x[replica] / 32).reshape(-1)
    >>> exchange = AllgatherExchange(Communicator(), replicas=8, size=6)
    >>> optimizer = Kronecker(Kronecker.settings_type(), np.zeros(6), exchange, samples=32, shapes=[(2, 3)])
    >>> losses = [optimizer.step(loss_and_gradient)["loss"] for _ in range(50)]
    >>> losses[0] > 9, losses[-1] < 1
    (True, True)
    """

    settings_type = KroneckerSettings
    state: ClassVar = {**NaturalGradient.state, "inverse": Kind.HELD, "largest": Kind.SHARED, "rounded": Kind.SHARED}
    figures = (*NaturalGradient.figures, "largest_eigenvalue")

    @classmethod
    def traffic(cls, settings: KroneckerSettings) -> Traffic:
        updates = 1 / settings.update_every
        return Traffic(columns=updates, means=1 - updates, sums=updates)

    def pieces(self) -> list[int]:
        return [layer.stop - layer.start for layer in layer_shapes(self.shapes)]

    def start(self) -> None:
        super().start()
        held = self.exchange.held
        inside = [shape for shape in layer_shapes(self.shapes) if held.start <= shape.start and shape.stop <= held.stop]
        self.layers = [Layer(self.held, shape, held.start, self.settings.max_side) for shape in inside]
        self.inverse = self.xp.zeros_like(self.held)  # P⁻¹ as of the last update
        self.largest = 0.0  # of V
        self.rounded = 0.0  # what V has of rounding
        self.tiny = float(self.xp.finfo(self.held.dtype).smallest_normal) ** 0.5  # where there is no gradient

    def parts(self) -> Mapping[str, Any]:
        return {**super().parts(), **{f"layer-{layer.start}": layer for layer in self.layers}}

    def fixed_rate(self, rate: float) -> float:
        return rate * math.sqrt(self.batch / BATCH)

    def update_is_due(self) -> bool:
        return self.steps <= FIRST_UPDATES or self.steps % self.settings.update_every == 0

    def update(self, batch: Batch) -> Array:
        mean, differences = self.exchange.samples(batch.rows)
        differences *= self.scale
        for layer in self.layers:
            layer.add(differences[:, layer.span], self.weight)
        if self.updates <= FIRST_UPDATES or self.updates % self.settings.basis_every == 0:
            for layer in self.layers:
                layer.renew_bases(self.exchange.total)
        own = [self.xp.reshape(layer.variances, (-1,)) for layer in self.layers]
        variances = self.exchange.total(self.xp.concat([self.held[:0], *own]))
        for layer in self.layers:
            layer.total = variances[layer.span]
        self.rounded += self.weight * (self.rounding(batch) / self.exchange.size - self.rounded)
        least = max(self.rounded, self.tiny)
        damped = [self.damped(layer.total, least) for layer in self.layers]
        newton = 1 / self.xp.concat([self.held[:0], *damped])
        flattened = self.xp.concat([self.held[:0], *map(self.flattened, self.layers, damped)])
        pairs = [(variances, other) for other in (self.xp.ones_like(variances), newton, flattened)]
        self.trace, self.known, noise = self.exchange.dots(*pairs)
        self.inverse = flattened * (self.known / noise) if noise > 0 else newton
        self.largest = self.exchange.largest(float(self.xp.max(variances)) if own else 0.0)
        return mean

    def damped(self, variances: Array, least: float) -> Array:
        """Return V + ε of a layer, ε a share of the mean of V, at least what V has of rounding. Local."""
        share = self.settings.damping * FLAT_SHARE**self.flatness
        return variances + self.xp.clip(share * self.xp.mean(variances), least, None)

    def flattened(self, layer: Layer, damped: Array) -> Array:
        """Return s^ν n^(−φ/4) (V + ε)^(φ/4 − 1) of a layer, n = Σ V (V + ε)^(φ/4 − 1) its noise. Local."""
        exponent = self.settings.flattening * self.flatness
        scales = damped ** (exponent - 1)
        noise = self.xp.clip(self.xp.sum(layer.total * scales), self.tiny, None)
        scales = scales * noise**-exponent
        known = self.steps >= FIRST_SHARES
        return scales * layer.signal_shares(self.settings.least_share) ** self.noise_share.value if known else scales

    @property
    def flatness(self) -> float:
        """φ = ν², ν the share of noise in the recent steps."""
        return self.noise_share.value**2

    def apply_inverse(self, z: Array) -> Array:
        """Return P⁻¹ z; at an update, take z̃² and V into the means from which the next one has its shares of signal."""
        noise = self.momentum.noise(self.steps) / self.batch
        parts = [z[:0]]
        for layer in self.layers:
            rotated = layer.rotated(z[layer.span])
            if self.update_is_due():
                layer.compare(rotated**2 / noise, max(SHARE_WEIGHT, 1 / self.updates))
            parts.append(layer.flat(rotated * self.inverse[layer.span]))
        return self.xp.concat(parts)

    def spectrum(self) -> Figures:
        return {"largest_eigenvalue": self.largest}


class Side:
    """One side of a layer's matrices: the running factor of this rank's replicas, the eigenbasis of all ranks' factors.

    A side that is too long keeps the coordinates as its basis, which is then None.
    """

    state: ClassVar = {"factor": Kind.PARTIAL, "basis": Kind.OWNED}

    def __init__(self, length: int, like: Array, max_side: int) -> None:
        self.xp, self.like = array_namespace(like), like
        short = 1 < length <= max_side
        self.factor: Array | None = to_device(np.zeros((length, length)), like) if short else None
        self.basis: Array | None = to_device(np.eye(length), like) if short else None

    def add(self, rows: Array, weight: float) -> None:
        """Take rows (n, length) into the running factor: Σ rowsᵀ rows."""
        if self.factor is not None:
            self.factor = self.factor + weight * (self.xp.matrix_transpose(rows) @ rows - self.factor)

    def renew(self, total: Callable[[Array], Array]) -> Array | None:
        """Move the basis towards the eigenvectors of the factor over all ranks; return the squared overlaps (old, new).

        A step of orthogonal iteration, Q ← qr((A + ρ I) Q), from the unit matrix: it converges to the eigenvectors as
        the steps add up, and unlike them depends continuously on A. Eigenvectors are arbitrary where eigenvalues are
        equal, as in the null space of the first few replicas' factor, and V would then depend on rounding.
        """
        if self.factor is None:
            return None
        factor, old = total(self.factor), self.basis
        ridge = RIDGE * float(self.xp.sum(self.xp.linalg.diagonal(factor))) / factor.shape[0]
        self.basis = self.xp.linalg.qr(factor @ old + ridge * old)[0]
        return (self.xp.matrix_transpose(old) @ self.basis) ** 2


class Layer:
    """The running statistics of one layer, and its bases. Local.

    Parameters
    ----------
    like : array
        Of the library and dtype of the parameters.
    shape : LayerShape
    origin : int
        Index of the first coordinate that this rank holds.
    max_side : int

    Attributes
    ----------
    start : int
        Index of the layer's first coordinate.
    span : slice
        Where the layer is among the coordinates held.
    left, right : Side
        B, Q_B and A, Q_A.
    variances : (outputs, inputs + bias)
        V over the columns that this rank takes into its sums.
    total : (outputs · (inputs + bias),)
        V over all columns, as of this step's update.
    compared : (2, outputs, inputs + bias)
        S and N: running means, over the same updates, of z̃² in units of its noise, and of V, which S is without signal.
    """

    state: ClassVar = {"variances": Kind.PARTIAL, "compared": Kind.OWNED}

    def __init__(self, like: Array, shape: LayerShape, origin: int, max_side: int) -> None:
        self.xp, self.outputs, self.inputs, self.bias = array_namespace(like), shape.outputs, shape.inputs, shape.bias
        self.start = shape.start
        self.span = slice(shape.start - origin, shape.stop - origin)
        sides = self.outputs, self.inputs + self.bias
        self.left, self.right = (Side(n, like, max_side) for n in sides)
        self.variances = to_device(np.zeros(sides), like)
        self.total = self.xp.reshape(self.variances, (-1,))
        self.compared = to_device(np.zeros((2, *sides)), like)

    def parts(self) -> Mapping[str, Side]:
        """Return both sides."""
        return {"left": self.left, "right": self.right}

    def add(self, flat: Array, weight: float) -> None:
        """Take scaled gradients, (k, length of the span), into A, B and V: s ← s + weight (new − s)."""
        matrices = self.matrices(flat)
        self.right.add(self.xp.reshape(matrices, (-1, matrices.shape[2])), weight)
        by_output = self.xp.permute_dims(matrices, (0, 2, 1))
        self.left.add(self.xp.reshape(by_output, (-1, self.outputs)), weight)
        squares = self.xp.sum(self.rotate(matrices) ** 2, axis=0)
        self.variances = self.variances + weight * (squares - self.variances)

    def renew_bases(self, total: Callable[[Array], Array]) -> None:
        """Renew both bases; carry V, S and N over by the squared overlaps (old, new). Collective, as `total`."""
        left, right = self.left.renew(total), self.right.renew(total)
        if left is not None:
            left = self.xp.matrix_transpose(left)
            self.variances, self.compared = left @ self.variances, left @ self.compared
        if right is not None:
            self.variances, self.compared = self.variances @ right, self.compared @ right

    def compare(self, squares: Array, weight: float) -> None:
        """Take z̃² of a step, in units of its noise, and V into S and N."""
        new = self.xp.reshape(self.xp.stack([squares, self.total]), self.compared.shape)
        self.compared = self.compared + weight * (new - self.compared)

    def signal_shares(self, least: float) -> Array:
        """Return s = 1 − Σ N/Σ S, at least `least`, of each direction, the sums over those of about as large a V."""
        xp, size = self.xp, self.total.shape[0]
        tiny = float(xp.finfo(self.total.dtype).smallest_normal)
        logarithms = xp.log2(xp.clip(self.total, tiny, None))
        groups = xp.clip(xp.floor((xp.max(logarithms) - logarithms) / 2), 0, GROUPS - 1)
        numbers = xp.arange(GROUPS, dtype=groups.dtype, device=device(groups))[:, None]
        compared = xp.reshape(self.compared, (2, -1))
        pieces = [slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]

        def members(piece: slice) -> Array:  # (groups, length of the piece), as numbers: sums are products of matrices
            return xp.astype(groups[None, piece] == numbers, groups.dtype)

        sums = sum(compared[:, piece] @ xp.matrix_transpose(members(piece)) for piece in pieces)
        shares = xp.clip(1 - sums[1, :] / xp.clip(sums[0, :], tiny, None), least, None)
        return xp.concat([shares @ members(piece) for piece in pieces])

    def rotated(self, flat: Array) -> Array:
        """Return Z̃ = Q_Bᵀ Z Q_A, (span,), for the layer's part Z of a vector."""
        return self.xp.reshape(self.rotate(self.matrices(flat[None, :])), (-1,))

    def flat(self, rotated: Array) -> Array:
        """Return the parameters Q_B Z̃ Q_Aᵀ, (span,)."""
        matrix = self.rotate(self.xp.reshape(rotated, (1, *self.variances.shape)), back=True)[0, ...]
        weights = self.xp.reshape(matrix[:, : self.inputs], (-1,))
        return self.xp.concat([weights, matrix[:, self.inputs]]) if self.bias else weights

    def rotate(self, matrices: Array, back: bool = False) -> Array:
        """Return Q_Bᵀ X Q_A of each matrix X, (n, outputs, inputs + bias); Q_B X Q_Aᵀ for `back`."""
        transpose = self.xp.matrix_transpose
        if self.left.basis is not None:
            matrices = (self.left.basis if back else transpose(self.left.basis)) @ matrices
        if self.right.basis is not None:
            matrices = matrices @ (transpose(self.right.basis) if back else self.right.basis)
        return matrices

    def matrices(self, flat: Array) -> Array:
        """Return flat parameters (n, length of the span) as matrices (n, outputs, inputs + bias)."""
        weights = self.outputs * self.inputs
        matrices = self.xp.reshape(flat[:, :weights], (flat.shape[0], self.outputs, self.inputs))
        return self.xp.concat([matrices, flat[:, weights:, None]], axis=2) if self.bias else matrices
