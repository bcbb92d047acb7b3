"""The default method: the covariance of the replicas' gradients, layer by layer, in its Kronecker eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from qnewton_mpi.core.exchange.cost import Traffic
from qnewton_mpi.core.kernels import PIECE
from qnewton_mpi.core.layers import LayerShape, layer_shapes
from qnewton_mpi.core.optimizers.base import Batch, Figures
from qnewton_mpi.core.optimizers.natural_gradient import BATCH, NaturalGradient, NaturalGradientSettings
from qnewton_mpi.core.settings import NOT_NEGATIVE, POSITIVE, setting
from qnewton_mpi.core.state import Kind
from qnewton_mpi.parallel.device import Array, to_device, to_host

FIRST_UPDATES, FIRST_COMBINATIONS = 10, 8
FLAT_SHARE = 0.1  # of that where a step is all noise: flattened, V needs less damping
FIRST_SHARES = 20  # steps, before which the shares of signal are not known well enough
SHARE_WEIGHT = 0.04  # of an update in the means that they are known from
GROUPS = 8  # of a layer's directions, by factors of 4 from its largest V on down
RIDGE = 1e-3  # ρ, relative to the mean eigenvalue
COMBINATIONS = 5  # in the seed of their random numbers: no others have it


@dataclass(frozen=True)
class KroneckerSettings(NaturalGradientSettings):
    """Settings of `kronecker`."""

    damping: float = setting(0.3, "ε, of a layer's mean V, where a step is signal; a tenth where it is noise", POSITIVE)
    flattening: float = setting(0.25, "of V's exponent, where a step is noise; 0 is off", NOT_NEGATIVE)
    least_share: float = setting(0.2, "of signal that a group of directions is taken to have; 1 is off", POSITIVE)
    basis_every: int = setting(5, "updates between steps of the eigenbases, but for the first ones", POSITIVE)
    max_side: int = setting(2048, "a longer side of a layer keeps the coordinates as its basis", POSITIVE)
    leading: int = setting(64, "directions of a long side that are taken with all of the other side's", POSITIVE)
    combinations: int = setting(3, "of the replicas' differences in an update, but for the first ones", POSITIVE)


class Kronecker(NaturalGradient[KroneckerSettings]):
    """The natural gradient with F layer by layer, each diagonal in a Kronecker eigenbasis.

    A layer's share of a combination of the replicas' gradients is a matrix X_k = √(b/K) Σ_i c_ki g_i, (outputs,
    inputs + 1) with the bias last, c_k random, orthonormal, and Σ_i c_ki = 0. M − 1 of them are all their differences;
    there are 8 at most in the first ten updates, then 3, and the squares have the same mean.

        A = Σ_k X_kᵀ X_k,  U_A ← qr((A + ρ I) U_A)     running means, and their eigenvectors by
        B = Σ_k X_k X_kᵀ,  U_B ← qr((B + ρ I) U_B)     orthogonal iteration
        V = Σ_k (U_Bᵀ X_k U_A)²                        elementwise: F's diagonal in this basis
        P⁻¹ Z = U_B [(U_Bᵀ Z U_A)/(V + 0.3 mean V)] U_Aᵀ

    Where both sides are longer than 128, the 64 leading directions of each are taken with all of the other side's, and
    the others' V with each other is one number, its mean. A side longer than 2,048 keeps the coordinates as its basis.

    That is for steps of signal alone. With ν the share of noise in a step's dᵀz and φ = ν², the last line is

        P⁻¹ Z = c U_B [s^ν (U_Bᵀ Z U_A) n^(−φ/4) (V + ε)^(φ/4 − 1)] U_Aᵀ,    ε = 0.3 · 10^(−φ) mean V

    where n = Σ V (V + ε)^(φ/4 − 1) is the layer's noise, and c leaves the noise of all layers, tr(P⁻¹F), as it is with
    1/(V + ε). Newton's step divides noise too by the curvature, and is then longest where there is nothing to gain; of
    full whitening, the other extreme, the exponent would be −½. From the 20th step on s, 1 before, is the share of
    signal of a group of directions, those of a layer with V within the same factor of 4:

        s = max(1 − Σ N/Σ S, 0.2),    S = ⟨b z̃²/Σ_k a_k²⟩,  N = ⟨V⟩,    z̃ = U_Bᵀ Z U_A,  z = Σ_k a_k ḡ_{t−k}

    with running means ⟨ ⟩ over about 25 updates and b the samples of a step, so that S is V where all is noise.

    What crosses the network at an update is the mean and the combinations, added up, or all replicas' columns where
    those are fewer (`Exchange.combined`).

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
    state: ClassVar = {**NaturalGradient.state, "largest": Kind.SHARED, "rounded": Kind.SHARED}
    figures = (*NaturalGradient.figures, "largest_eigenvalue")

    @classmethod
    def traffic(cls, settings: KroneckerSettings) -> Traffic:
        updates = 1 / settings.update_every
        return Traffic(columns=updates, means=1 - updates, combinations=settings.combinations)

    def pieces(self) -> list[int]:
        return [layer.stop - layer.start for layer in layer_shapes(self.shapes)]

    def start(self) -> None:
        super().start()
        held = self.exchange.held
        inside = [shape for shape in layer_shapes(self.shapes) if held.start <= shape.start and shape.stop <= held.stop]
        sizes = self.settings.max_side, self.settings.leading
        self.layers = [Layer(self.held, shape, held.start, *sizes) for shape in inside]
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
        mean, combined = self.exchange.combined(batch.rows, self.coefficients())
        seen = []
        for layer in self.layers:
            seen.append(layer.add(combined[:, layer.span], mean[layer.span], self.weight))
            if self.updates <= FIRST_UPDATES or self.updates % self.settings.basis_every == 0:
                layer.renew_bases()
        self.rounded += self.weight * (self.rounding(batch) / self.exchange.size - self.rounded)
        least = max(self.rounded, self.tiny)
        both = [self.scales(layer, least) for layer in self.layers]
        figures = [self.held[:0]]
        for layer, (newton, flattened), before in zip(self.layers, both, seen, strict=True):
            V = layer.variances
            sums = [layer.sum(table) for table in (V, V * newton, V * flattened)]
            figures.append(self.xp.stack([*sums, *before, self.xp.max(V)]))
        own = to_host(self.xp.concat(figures)).astype(np.float64).reshape(-1, 6)
        everyone = self.exchange.gathered(np.concatenate([own[:, :5].sum(axis=0), own[:, 5].max(initial=0.0)[None]]))
        self.trace, self.known, noise, *before = everyone[:, :5].sum(axis=0).tolist()
        self.largest = float(everyone[:, 5].max())
        if self.updates > 1:
            self.compare_noise(*before)
        for layer, (newton, flattened) in zip(self.layers, both, strict=True):
            layer.scales = flattened * (self.known / noise) if noise > 0 else newton
        return mean

    def coefficients(self) -> NDArray[np.float64]:
        """Return the rows √(b/K) c_k, (K, M), c_k random, orthonormal, and orthogonal to the ones. Local.

        So Σ_k x_k x_kᵀ of the combinations x_k has the expectation b/(M−1) G Gᵀ, and for K = M − 1 is it. The first has
        entries of one size, as many of either sign: then it is exact too where one replica alone differs.
        """
        replicas = self.exchange.replicas
        wanted = FIRST_COMBINATIONS if self.steps <= FIRST_UPDATES else self.settings.combinations
        number = min(wanted, replicas - 1)
        random = np.random.default_rng([self.seed, COMBINATIONS, self.steps])
        columns = random.standard_normal((replicas, number))
        columns[:, 0] = random.permutation(np.resize([1, -1], replicas) * (np.arange(replicas) < replicas // 2 * 2))
        rows = np.linalg.qr(columns - columns.mean(axis=0))[0].T
        return math.sqrt(self.samples / number) * rows

    def scales(self, layer: Layer, least: float) -> tuple[Array, Array]:
        """Return of a layer 1/(V + ε), ε a share of the mean V and at least what V has of rounding, and that flattened.

        s^ν n^(−φ/4) (V + ε)^(φ/4 − 1), n = Σ V (V + ε)^(φ/4 − 1) its noise. Local.
        """
        share = self.settings.damping * FLAT_SHARE**self.flatness
        damped = layer.variances + self.xp.clip(share * layer.sum(layer.variances) / layer.size, least, None)
        exponent = self.settings.flattening * self.flatness
        scales = damped ** (exponent - 1)
        scales = scales * self.xp.clip(layer.sum(layer.variances * scales), self.tiny, None) ** -exponent
        if self.steps >= FIRST_SHARES:
            scales = scales * layer.signal_shares(self.settings.least_share) ** self.noise_share.value
        return 1 / damped, scales

    @property
    def flatness(self) -> float:
        """φ = ν², ν the share of noise in the recent steps."""
        return self.noise_share.value**2

    def apply_inverse(self, z: Array) -> Array:
        """Return P⁻¹ z; at an update, take z̃² and V into the means from which the next one has its shares of signal."""
        noise = self.momentum.noise(self.steps) / self.batch
        parts = [z[:0]]
        for layer in self.layers:
            view = layer.view(z[None, layer.span])
            if self.update_is_due():
                layer.compare(view.squares() / noise, max(SHARE_WEIGHT, 1 / self.updates))
            parts.append(layer.flat(view.times(layer.scales)))
        return self.xp.concat(parts)

    def spectrum(self) -> Figures:
        return {"largest_eigenvalue": self.largest}


class Side:
    """One side of a layer's matrices: its running factor, and the eigenbasis of that.

    A side that is too long keeps the coordinates as its basis; both are then None.

    Attributes
    ----------
    factor : (length, length), optional
        A.
    basis : (length, length), optional
        U.
    """

    state: ClassVar = {"factor": Kind.OWNED, "basis": Kind.OWNED}

    def __init__(self, length: int, like: Array, max_side: int) -> None:
        self.xp, self.length = array_namespace(like), length
        short = 1 < length <= max_side
        self.factor: Array = to_device(np.zeros((length, length)), like) if short else None
        self.basis: Array = to_device(np.eye(length), like) if short else None

    def add(self, rows: Array, weight: float) -> None:
        """Take rows (n, length) into the running factor: Σ rowsᵀ rows."""
        if self.factor is not None:
            self.factor = self.factor + weight * (self.xp.matrix_transpose(rows) @ rows - self.factor)

    def renew(self, sort: bool) -> Array | None:
        """Move the basis towards the eigenvectors of the factor; return the squared overlaps (old, new).

        A step of orthogonal iteration, U ← qr((A + ρ I) U), from the unit matrix: it converges to the eigenvectors as
        the steps add up, and unlike them depends continuously on A. Eigenvectors are arbitrary where eigenvalues are
        equal, as in the null space of the first few replicas' factor, and V would then depend on rounding.

        Parameters
        ----------
        sort : bool
            Whether the directions u are put in the order of uᵀ A u first, so that the leading ones are.
        """
        if self.factor is None:
            return None
        xp, old = self.xp, self.basis
        image = self.factor @ old
        sizes = xp.sum(old * image, axis=0)
        image = image + RIDGE * xp.sum(sizes) / self.length * old
        if sort:
            image = xp.take(image, xp.argsort(sizes, descending=True), axis=1)
        self.basis = xp.linalg.qr(image)[0]
        return (xp.matrix_transpose(old) @ self.basis) ** 2


class View:
    """Matrices X (n, outputs, inputs + bias) in the directions of a layer's sides.

    The leading directions of each side are taken with all of the other, L of U_B and R of U_A:

        T = Lᵀ X U_A,    S = Ūᵀ X R,  Ū the others of U_B

    and the corner, what is in the leading ones of neither side, as a whole. Where there is no corner, L is U_B.
    """

    def __init__(self, matrices: Array, layer: Layer) -> None:
        self.layer, self.whole = layer, matrices
        xp, left, right = layer.xp, layer.left.basis, layer.right.basis
        if layer.corner:
            self.leading, self.others, self.columns = left[:, : layer.leading], left[:, layer.leading :], layer.leading
            self.s = xp.matrix_transpose(self.others) @ (matrices @ right[:, : self.columns])
        else:
            self.leading = left
        rows = matrices if self.leading is None else xp.matrix_transpose(self.leading) @ matrices
        self.t = rows if right is None else rows @ right

    def squares(self) -> Array:
        """Return the mean squares of the directions, summed over the matrices: a table."""
        xp, layer = self.layer.xp, self.layer
        top = xp.reshape(xp.sum(self.t**2, axis=0), (-1,))
        if not layer.corner:
            return top
        below = xp.reshape(xp.sum(self.s**2, axis=0), (-1,))
        return layer.with_corner(xp.concat([top, below]), xp.sum(self.whole**2))

    def times(self, table: Array) -> Array:
        """Return the matrices, each direction's part times its entry K of a table, (n, outputs, inputs + bias).

        κ X + L ((K − κ) T) U_Aᵀ + Ū ((K − κ) S) Rᵀ,    κ the corner's entry, 0 where there is none
        """
        xp, right = self.layer.xp, self.layer.right.basis
        top, below, corner = self.layer.parts_of(table)
        product = (top - corner) * self.t
        if right is not None:
            product = product @ xp.matrix_transpose(right)
        if self.leading is not None:
            product = self.leading @ product
        if self.layer.corner:
            other = (self.others @ ((below - corner) * self.s)) @ xp.matrix_transpose(right[:, : self.columns])
            product += other
            product += corner * self.whole
        return product


class Layer:
    """The running statistics of one layer, and its bases. Local.

    A table is a vector of an entry for each pair of a leading direction of the left side and any of the right one, then
    for each of another direction of the left side and a leading one of the right, then for the corner, which is what is
    in the leading directions of neither. Where there is no corner, all directions of the left side are leading.

    Parameters
    ----------
    like : array
        Of the library and dtype of the parameters.
    shape : LayerShape
    origin : int
        Index of the first coordinate that this rank holds.
    max_side : int
    leading : int
        Directions of a side that are taken with all of the other's, where both are more than twice as long, so that it
        takes fewer operations.

    Attributes
    ----------
    start : int
        Index of the layer's first coordinate.
    span : slice
        Where the layer is among the coordinates held.
    size : int
        Its parameters.
    left, right : Side
        B, U_B and A, U_A.
    corner : int
        The dimensions that are in no leading direction.
    dimensions : table
        How many dimensions an entry is the mean of.
    variances : table
        V.
    compared : (2, *table)
        S and N: running means, over the same updates, of z̃² in units of its noise, and of V, which S is without signal.
    scales : table
        P⁻¹ as of the last update.
    """

    state: ClassVar = {"variances": Kind.OWNED, "compared": Kind.OWNED, "scales": Kind.OWNED}

    def __init__(self, like: Array, shape: LayerShape, origin: int, max_side: int, leading: int) -> None:
        self.xp, self.outputs, self.inputs, self.bias = array_namespace(like), shape.outputs, shape.inputs, shape.bias
        self.start, self.size = shape.start, shape.stop - shape.start
        self.span = slice(shape.start - origin, shape.stop - origin)
        self.left, self.right = (Side(n, like, max_side) for n in (self.outputs, self.inputs + self.bias))
        rows, columns = self.left.length, self.right.length
        self.leading, self.corner = leading, 0
        if 2 * leading < min(rows, columns) and max(rows, columns) <= max_side:
            self.corner = (rows - leading) * (columns - leading)
            self.shapes = (leading, columns), (rows - leading, leading)
        else:
            self.shapes = (rows, columns), (0, 0)
        self.entries = [math.prod(shape) for shape in self.shapes]
        ones = np.ones(sum(self.entries))
        self.dimensions = to_device(np.append(ones, self.corner) if self.corner else ones, like)
        self.variances = self.xp.zeros_like(self.dimensions)
        self.compared = self.xp.stack([self.variances, self.variances])
        self.scales = self.variances

    def parts(self) -> Mapping[str, Side]:
        """Return both sides."""
        return {"left": self.left, "right": self.right}

    def view(self, flat: Array) -> View:
        """Return vectors, (n, length of the span), in the layer's directions."""
        return View(self.matrices(flat), self)

    def add(self, flat: Array, mean: Array, weight: float) -> tuple[Array, Array]:
        """Take scaled gradients, (k, length of the span), into A, B and V: s ← s + weight (new − s).

        Return Σ_k x_kᵀ P⁻¹ x_k of them, and ḡᵀ P⁻¹ ḡ of the mean gradient, (length of the span,), with P as it was.
        """
        view = self.view(flat)
        squares = view.squares()
        seen = self.sum(self.scales * squares), self.sum(self.scales * self.view(mean[None, :]).squares())
        self.variances = self.variances + weight * (squares - self.variances)
        self.right.add(self.xp.reshape(view.whole, (-1, self.right.length)), weight)
        by_output = self.xp.permute_dims(view.whole, (0, 2, 1))
        self.left.add(self.xp.reshape(by_output, (-1, self.left.length)), weight)
        return seen

    def renew_bases(self) -> None:
        """Renew both bases, and carry V, S and N over."""
        left, right = (side.renew(sort=self.corner > 0) for side in (self.left, self.right))
        tables = self.variances, self.compared[0, :], self.compared[1, :]
        self.variances, *compared = (self.carried(table, left, right) for table in tables)
        self.compared = self.xp.stack(compared)

    def carried(self, table: Array, left: Array, right: Array) -> Array:
        """Return a table of means in the new directions, given both sides' squared overlaps (old, new), if they moved.

        What is equal in all directions stays, so the corner's entry is taken off first, and only the others move.
        """
        xp = self.xp
        top, below, corner = self.parts_of(table)
        if not self.corner:
            top = top if left is None else xp.matrix_transpose(left) @ top
            return xp.reshape(top if right is None else top @ right, (-1,))
        old = slice(self.leading), slice(self.leading, None)
        top, below = (top - corner) @ right, (below - corner) @ right[: self.leading, :]
        parts = []
        for new, columns in zip(old, (slice(None), slice(self.leading)), strict=True):
            turned = [xp.matrix_transpose(left[place, new]) for place in old]
            moved = turned[0] @ top[:, columns] + turned[1] @ below[:, columns] + corner
            parts.append(xp.reshape(moved, (-1,)))
        return self.with_corner(xp.concat(parts), self.sum(table))

    def parts_of(self, table: Array) -> tuple[Array, Array, Array | float]:
        """Return the entries of the leading rows, of the other rows, and of the corner, 0 where there is none."""
        first, second = self.entries
        top = self.xp.reshape(table[:first], self.shapes[0])
        below = self.xp.reshape(table[first : first + second], self.shapes[1])
        return top, below, table[-1] if self.corner else 0.0

    def with_corner(self, entries: Array, total: Array) -> Array:
        """Return a table of the entries and that of the corner, with which all directions' sum is the total."""
        known = self.xp.sum(self.dimensions[:-1] * entries)
        return self.xp.concat([entries, self.xp.clip(total - known, 0, None)[None] / self.corner])

    def sum(self, table: Array) -> Array:
        """Return the sum over all directions of what a table has the means of."""
        return self.xp.sum(self.dimensions * table)

    def compare(self, squares: Array, weight: float) -> None:
        """Take z̃² of a step, in units of its noise, and V into S and N."""
        self.compared = self.compared + weight * (self.xp.stack([squares, self.variances]) - self.compared)

    def signal_shares(self, least: float) -> Array:
        """Return s = 1 − Σ N/Σ S, at least `least`, of each direction, the sums over those of about as large a V."""
        xp, V = self.xp, self.variances
        tiny = float(xp.finfo(V.dtype).smallest_normal)
        logarithms = xp.log2(xp.clip(V, tiny, None))
        groups = xp.clip(xp.floor((xp.max(logarithms) - logarithms) / 2), 0, GROUPS - 1)
        numbers = xp.arange(GROUPS, dtype=groups.dtype, device=device(groups))[:, None]
        compared = self.dimensions * self.compared
        pieces = [slice(start, min(start + PIECE, V.shape[0])) for start in range(0, V.shape[0], PIECE)]

        def members(piece: slice) -> Array:  # (groups, length of the piece), as numbers: sums are products of matrices
            return xp.astype(groups[None, piece] == numbers, groups.dtype)

        sums = sum(compared[:, piece] @ xp.matrix_transpose(members(piece)) for piece in pieces)
        shares = xp.clip(1 - sums[1, :] / xp.clip(sums[0, :], tiny, None), least, None)
        return xp.concat([shares @ members(piece) for piece in pieces])

    def flat(self, matrices: Array) -> Array:
        """Return the one of matrices (1, outputs, inputs + bias) as parameters, (length of the span,)."""
        weights = self.xp.reshape(matrices[0, :, : self.inputs], (-1,))
        return self.xp.concat([weights, matrices[0, :, self.inputs]]) if self.bias else weights

    def matrices(self, flat: Array) -> Array:
        """Return flat parameters (n, length of the span) as matrices (n, outputs, inputs + bias)."""
        weights = self.outputs * self.inputs
        matrices = self.xp.reshape(flat[:, :weights], (flat.shape[0], self.outputs, self.inputs))
        return self.xp.concat([matrices, flat[:, weights:, None]], axis=2) if self.bias else matrices
