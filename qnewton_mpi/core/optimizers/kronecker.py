"""The default method: the covariance of the replicas' gradients, layer by layer, in its Kronecker eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace

from qnewton_mpi.core.optimizers.base import AUTO, Figures, Optimizer
from qnewton_mpi.core.optimizers.natural_gradient import (
    BATCH,
    DIVERGENCE_HELP,
    NaturalGradient,
    NaturalGradientSettings,
)
from qnewton_mpi.core.settings import POSITIVE, setting
from qnewton_mpi.parallel.device import Array, to_device, to_host

FIRST_UPDATES = 10
LEAST_LOSS = 1e-3  # nats; nearer to zero, or below, the damping stays as if the loss were this
RIDGE = 1e-3  # ρ, relative to the mean eigenvalue


@dataclass(frozen=True)
class KroneckerSettings(NaturalGradientSettings):
    """Settings of `kronecker`."""

    lr: float | str = setting("auto", "learning rate", POSITIVE, AUTO)
    damping: float = setting(0.007, "ε of (F + ε I)⁻¹, for each nat of the loss", POSITIVE)
    basis_every: int = setting(5, "updates between steps of the eigenbases, but for the first ones", POSITIVE)
    max_divergence: float = setting(0.0003, DIVERGENCE_HELP, POSITIVE)
    max_side: int = setting(2048, "a longer side of a layer keeps the coordinates as its basis", POSITIVE)


class Kronecker(NaturalGradient[KroneckerSettings]):
    """The natural gradient with F layer by layer, each diagonal in a Kronecker eigenbasis.

    A layer's share of replica i is a matrix X_i = √(b/(M−1)) (g_i − ḡ), (outputs, inputs + 1) with the bias last, and

        A = Σ_i X_iᵀ X_i,  Q_A ← qr((A + ρ I) Q_A)     running means, and their eigenbases by
        B = Σ_i X_i X_iᵀ,  Q_B ← qr((B + ρ I) Q_B)     orthogonal iteration
        V = Σ_i (Q_Bᵀ X_i Q_A)²                        elementwise: F's diagonal in this basis
        (F + ε I)⁻¹ Z = Q_B [(Q_Bᵀ Z Q_A)/(V + ε)] Q_Aᵀ

    The columns of the replicas never cross the network: each rank keeps running sums over its own replicas, V is added
    up by an Allreduce at an update, A and B only when the bases move. The first ten steps do all of it.

    The eigenbasis is K-FAC's and Shampoo's (Martens and Grosse 2015; Gupta et al. 2018), the diagonal in it EKFAC's
    (George et al. 2018) and SOAP's (Vyas et al. 2024). What differs is the estimate, from the differences of the
    replicas: no products of activations, any layer whose parameters are a matrix, and F itself, where Shampoo and SOAP
    take a root of the second moment of the mean gradient. A numerical rate is meant for a batch of 256 and grows as
    √batch; "auto", the default, is `noise_limited_rate`.
    """

    settings_type = KroneckerSettings
    figures = (*Optimizer.figures, "damping", "shrink", "largest_eigenvalue")

    def start(self) -> None:
        super().start()
        self.layers = layers_of(self.shapes, self.parameters, self.settings.max_side)

    @property
    def damping(self) -> float:
        """ε, relative to the recent loss: F, a covariance of gradients, shrinks as the loss does."""
        return self.settings.damping * max(self.trend.level, LEAST_LOSS)

    def fixed_rate(self, rate: float) -> float:
        return rate * math.sqrt(self.batch / BATCH)

    def update_is_due(self) -> bool:
        return self.steps <= FIRST_UPDATES or self.steps % self.settings.update_every == 0

    def update(self, gradients: Array) -> Array:
        mean = self.exchange.mean(gradients)
        scaled = self.scale * (gradients - self.exchange.collect(mean))
        for layer in self.layers:
            layer.add(scaled[:, layer.span], self.weight)
        if self.updates <= FIRST_UPDATES or self.updates % self.settings.basis_every == 0:
            for layer in self.layers:
                layer.renew_bases(self.exchange.total)
        own = self.xp.concat([self.xp.reshape(layer.own_variances, (-1,)) for layer in self.layers])
        total = self.exchange.total(own)
        for layer in self.layers:
            layer.variances = self.xp.reshape(total[layer.span], layer.own_variances.shape)
        return mean

    def apply_inverse(self, z: Array) -> Array:
        whole, damping = self.exchange.collect(z), self.damping
        parts = [layer.apply_inverse(whole[layer.span], damping) for layer in self.layers]
        return self.exchange.hold(self.xp.concat(parts))

    def noise_of_step(self) -> float:
        damping, xp = self.damping, self.xp
        return sum(float(xp.sum(layer.variances / (layer.variances + damping))) for layer in self.layers)

    def spectrum(self) -> Figures:
        return {"largest_eigenvalue": max(float(self.xp.max(layer.variances)) for layer in self.layers)}


class Side:
    """One side of a layer's matrices: the running factor of this rank's replicas, the eigenbasis of all ranks' factors.

    A side that is too long keeps the coordinates as its basis, which is then None.
    """

    def __init__(self, length: int, like: Array, max_side: int) -> None:
        self.xp, self.like = array_namespace(like), like
        short = 1 < length <= max_side
        self.factor: Array | None = to_device(np.zeros((length, length)), like) if short else None
        self.basis: Array | None = to_device(np.eye(length), like) if short else None

    def add(self, rows: Array, weight: float) -> None:
        """Take rows (n, length) into the running factor: Σ rowsᵀ rows."""
        if self.factor is not None:
            self.factor += weight * (self.xp.matrix_transpose(rows) @ rows - self.factor)

    def renew(self, total: Callable[[Array], Array]) -> Array | None:
        """Move the basis towards the eigenvectors of the factor over all ranks; return the squared overlaps (old, new).

        A step of orthogonal iteration, Q ← qr((A + ρ I) Q), from the unit matrix: it converges to the eigenvectors as
        the steps add up, and unlike them depends continuously on A. Eigenvectors are arbitrary where eigenvalues are
        equal, as in the null space of the first few replicas' factor, and V would then depend on rounding.
        """
        if self.factor is None:
            return None
        factor = to_host(total(self.factor)).astype(np.float64)
        factor += RIDGE * np.trace(factor) / len(factor) * np.eye(len(factor))
        old = self.basis
        self.basis = to_device(np.linalg.qr(factor @ to_host(old).astype(np.float64))[0], self.like)
        return (self.xp.matrix_transpose(old) @ self.basis) ** 2


class Layer:
    """The running statistics of one layer, and its part of (F + ε I)⁻¹. Local.

    Parameters
    ----------
    like : array
        Of the library and dtype of the parameters.
    span : slice
        Where the layer's parameters are among all: (outputs, inputs) weights, then as many biases as outputs, if any.
    outputs, inputs : int
    bias : bool
    max_side : int

    Attributes
    ----------
    left, right : Side
        B, Q_B and A, Q_A.
    own_variances, variances : (outputs, inputs + bias)
        V over this rank's replicas, and over all.
    """

    def __init__(self, like: Array, span: slice, outputs: int, inputs: int, bias: bool, max_side: int) -> None:
        self.xp, self.span, self.outputs, self.inputs, self.bias = array_namespace(like), span, outputs, inputs, bias
        self.left, self.right = (Side(n, like, max_side) for n in (outputs, inputs + bias))
        self.variances = self.own_variances = to_device(np.zeros((outputs, inputs + bias)), like)

    def add(self, flat: Array, weight: float) -> None:
        """Take this rank's scaled gradients, (R, length of the span), into A, B and V: s ← s + weight (new − s)."""
        matrices = self.matrices(flat)
        self.right.add(self.xp.reshape(matrices, (-1, matrices.shape[2])), weight)
        by_output = self.xp.permute_dims(matrices, (0, 2, 1))
        self.left.add(self.xp.reshape(by_output, (-1, self.outputs)), weight)
        squares = self.xp.sum(self.rotate(matrices) ** 2, axis=0)
        self.own_variances = self.own_variances + weight * (squares - self.own_variances)

    def renew_bases(self, total: Callable[[Array], Array]) -> None:
        """Renew both bases; carry V over by the squared overlaps of old and new directions. Collective, as `total`."""
        left, right = self.left.renew(total), self.right.renew(total)
        if left is not None:
            self.own_variances = self.xp.matrix_transpose(left) @ self.own_variances
        if right is not None:
            self.own_variances = self.own_variances @ right

    def apply_inverse(self, flat: Array, damping: float) -> Array:
        """Return the layer's part of (F + ε I)⁻¹ z for its part of z."""
        scaled = self.rotate(self.matrices(flat[None, :])) / (self.variances + damping)
        matrix = self.rotate(scaled, back=True)[0, ...]
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


def layers_of(shapes: Sequence[tuple[int, ...]], like: Array, max_side: int) -> list[Layer]:
    """Return the layers of parameters that follow each other in the given shapes. Local.

    A tensor with more than one axis is a layer, (first axis) × (all others); a vector as long as that first axis, right
    after it, is its bias. Any other vector is a layer of one column.
    """
    layers, start, k = [], 0, 0
    while k < len(shapes):
        outputs, inputs = shapes[k][0], math.prod(shapes[k][1:])
        bias = len(shapes[k]) > 1 and k + 1 < len(shapes) and shapes[k + 1] == (outputs,)
        stop = start + outputs * (inputs + bias)
        layers.append(Layer(like, slice(start, stop), outputs, inputs, bias, max_side))
        start, k = stop, k + 1 + bias
    return layers
