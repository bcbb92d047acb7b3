"""A layer's part of F: running factors of its sides, their eigenbases, and the diagonal of F in these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace, device

from qnewton_mpi.arrays import Array, to_device
from qnewton_mpi.core.kernels import PIECE
from qnewton_mpi.core.layers import LayerShape
from qnewton_mpi.core.state import Kind

GROUPS = 8  # of a layer's directions, by factors of 4 from its largest V on down
RIDGE = 1e-3  # ρ, relative to the mean eigenvalue


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

    def add(self, vectors: Array, weight: float) -> None:
        """Take vectors x (n, length) into the running factor: Σ x xᵀ."""
        if self.factor is not None:
            self.factor = self.factor + weight * (self.xp.matrix_transpose(vectors) @ vectors - self.factor)

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
        # Row by row, as a checkpoint has it and CuPy's does not: products of matrices round by how they lie in memory.
        self.basis = xp.reshape(xp.reshape(xp.linalg.qr(image)[0], (-1,)), image.shape)
        return (xp.matrix_transpose(old) @ self.basis) ** 2


class View:
    """Matrices X (n, outputs, inputs + bias) in the directions of a layer's sides.

    The leading directions of each side are taken with all of the other, L of U_B and R of U_A:

        top = Lᵀ X U_A,    below = Ūᵀ X R,  Ū the others of U_B

    and the corner, what is in the leading ones of neither side, as a whole. Where there is no corner, L is U_B.
    """

    def __init__(self, matrices: Array, layer: Layer) -> None:
        self.layer, self.whole = layer, matrices
        xp, left, right = layer.xp, layer.left.basis, layer.right.basis
        if layer.corner:
            self.leading, self.others, self.columns = left[:, : layer.leading], left[:, layer.leading :], layer.leading
            self.below = xp.matrix_transpose(self.others) @ (matrices @ right[:, : self.columns])
        else:
            self.leading = left
        turned = matrices if self.leading is None else xp.matrix_transpose(self.leading) @ matrices
        self.top = turned if right is None else turned @ right

    def squares(self) -> Array:
        """Return the mean squares of the directions, summed over the matrices: a table."""
        xp, layer = self.layer.xp, self.layer
        top = xp.reshape(xp.sum(self.top**2, axis=0), (-1,))
        if not layer.corner:
            return top
        below = xp.reshape(xp.sum(self.below**2, axis=0), (-1,))
        return layer.with_corner(xp.concat([top, below]), xp.sum(self.whole**2))

    def times(self, table: Array) -> Array:
        """Return the matrices, each direction's part times its entry E of a table, (n, outputs, inputs + bias).

        e X + L ((E − e) top) U_Aᵀ + Ū ((E − e) below) Rᵀ,    e the corner's entry, 0 where there is none
        """
        xp, right = self.layer.xp, self.layer.right.basis
        top, below, corner = self.layer.parts_of(table)
        product = (top - corner) * self.top
        if right is not None:
            product = product @ xp.matrix_transpose(right)
        if self.leading is not None:
            product = self.leading @ product
        if self.layer.corner:
            other = (self.others @ ((below - corner) * self.below)) @ xp.matrix_transpose(right[:, : self.columns])
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
        takes fewer operations, and neither is longer than `max_side`: of coordinates none lead.

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
        The dimensions that are in no leading direction, of which a table has the mean as its last entry.
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
        height, width = self.left.length, self.right.length
        self.leading, self.corner = leading, 0
        if 2 * leading < min(height, width) and max(height, width) <= max_side:
            self.corner = (height - leading) * (width - leading)
            self.shapes = (leading, width), (height - leading, leading)
        else:
            self.shapes = (height, width), (0, 0)
        self.entries = [math.prod(shape) for shape in self.shapes]
        self.variances = to_device(np.zeros(sum(self.entries) + (self.corner > 0)), like)
        self.compared = self.xp.stack([self.variances, self.variances])
        self.scales = self.variances

    def parts(self) -> Mapping[str, Side]:
        """Return both sides."""
        return {"left": self.left, "right": self.right}

    def view(self, flat: Array) -> View:
        """Return vectors, (n, length of the span), in the layer's directions."""
        return View(self.matrices(flat), self)

    def add(self, flat: Array, mean: Array, weight: float) -> tuple[Array, Array]:
        """Take scaled gradients, (k, length of the span), into A, B and V, running means of a weight.

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
        known = self.xp.sum(entries)
        return self.xp.concat([entries, self.xp.maximum(total - known, 0.0)[None] / self.corner])

    def sum(self, table: Array) -> Array:
        """Return the sum over all directions of what a table has the means of."""
        return self.xp.sum(table) + max(self.corner - 1, 0) * table[-1]

    def compare(self, squares: Array, weight: float) -> None:
        """Take z̃² of a step, in units of its noise, and V into S and N."""
        self.compared = self.compared + weight * (self.xp.stack([squares, self.variances]) - self.compared)

    def signal_shares(self, least: float) -> Array:
        """Return s = 1 − Σ N/Σ S, at least `least`, of each direction, the sums over those of about as large a V."""
        xp, V = self.xp, self.variances
        tiny = float(xp.finfo(V.dtype).smallest_normal)
        logarithms = xp.log2(xp.maximum(V, tiny))
        groups = xp.minimum(xp.floor((xp.max(logarithms) - logarithms) / 2), GROUPS - 1.0)
        numbers = xp.arange(GROUPS, dtype=groups.dtype, device=device(groups))[:, None]
        compared = self.compared
        if self.corner:
            compared = xp.concat([compared[:, :-1], self.corner * compared[:, -1:]], axis=1)
        pieces = [slice(start, min(start + PIECE, V.shape[0])) for start in range(0, V.shape[0], PIECE)]

        def members(piece: slice) -> Array:  # (groups, length of the piece), as numbers: sums are products of matrices
            return xp.astype(groups[None, piece] == numbers, groups.dtype)

        sums = sum(compared[:, piece] @ xp.matrix_transpose(members(piece)) for piece in pieces)
        shares = xp.maximum(1 - sums[1, :] / xp.maximum(sums[0, :], tiny), least)
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
