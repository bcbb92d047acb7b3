"""The default method: the covariance of the replicas' gradients, layer by layer, in its Kronecker eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace

from qnewton_mpi.core.optimizers.base import Figures, LossAndGradient, Optimizer, Settings
from qnewton_mpi.core.settings import FRACTION, POSITIVE, setting
from qnewton_mpi.parallel.device import Array, to_device, to_host

RATE_BATCH = 256
FIRST_UPDATES = 10
RIDGE = 1e-3  # ρ, relative to the mean eigenvalue


@dataclass(frozen=True)
class KroneckerSettings(Settings):
    """Settings of `kronecker`."""

    lr: float = setting(0.02, f"learning rate at a batch of {RATE_BATCH}; it grows as √batch", POSITIVE)
    damping: float = setting(0.003, "ε of (F + ε I)⁻¹", POSITIVE)
    momentum: float = setting(0.9, "momentum β", FRACTION)
    decay: float = setting(0.98, "of the running Fisher matrix, per update", FRACTION)
    max_divergence: float = setting(0.01, "bound of a step's predicted KL divergence (nats)", POSITIVE)
    update_every: int = setting(4, f"steps between updates of F, after the first {FIRST_UPDATES}", POSITIVE)
    basis_every: int = setting(5, f"updates between steps of the eigenbases, after the first {FIRST_UPDATES}", POSITIVE)
    max_side: int = setting(2048, "a longer side of a layer keeps the coordinates as its basis", POSITIVE)


class Kronecker(Optimizer[KroneckerSettings]):
    """w ← w − α (F + ε I)⁻¹ z, F the Fisher matrix of each layer, diagonal in a Kronecker eigenbasis.

    As in `Fisher`, the centred gradients of the replicas are sampling noise whose covariance is the Fisher matrix. Here
    a layer's share of replica i is a matrix X_i = √(b/(M−1)) (g_i − ḡ), (outputs, inputs + 1) with the bias last, and

        A = Σ_i X_iᵀ X_i = Q_A Λ_A Q_Aᵀ,    B = Σ_i X_i X_iᵀ = Q_B Λ_B Q_Bᵀ       running means
        V = Σ_i (Q_Bᵀ X_i Q_A)²                                                elementwise: F's diagonal in this basis
        (F + ε I)⁻¹ Z = Q_B [(Q_Bᵀ Z Q_A)/(V + ε)] Q_Aᵀ

    z is Nesterov's momentum, and a step is shrunk to a bound on its KL divergence, both as in `Fisher`. The columns of
    the replicas never cross the network: each rank keeps running sums over its own replicas, V is added up by an
    Allreduce at an update, A and B only when the bases are renewed.

    The eigenbasis is K-FAC's and Shampoo's (Martens and Grosse 2015; Gupta et al. 2018), the diagonal in it EKFAC's
    (George et al. 2018) and SOAP's (Vyas et al. 2024). What differs is the estimate, from the differences of the
    replicas: no products of activations, any layer whose parameters are a matrix, and F itself, where Shampoo and SOAP
    take a root of the second moment of the mean gradient.
    """

    settings_type = KroneckerSettings
    minimum_replicas = 2
    figures = (*Optimizer.figures, "shrink", "largest_eigenvalue")

    def default_rate(self) -> float:
        return self.settings.lr * math.sqrt(self.samples * self.exchange.replicas / RATE_BATCH)

    def start(self) -> None:
        self.moment = self.xp.zeros_like(self.parameters)
        self.layers = layers_of(self.shapes, self.parameters, self.settings.max_side)
        self.updates = 0

    def direction(self, loss_and_gradient: LossAndGradient) -> tuple[Array, Array, Figures]:
        settings, t = self.settings, self.steps
        gradients, loss = self.evaluate(loss_and_gradient)
        held = self.exchange.mean(gradients)
        mean = self.exchange.collect(held)
        if t <= FIRST_UPDATES or t % settings.update_every == 0:
            self.update(gradients - mean)

        beta = settings.momentum
        self.moment = beta * self.moment + (1 - beta) * mean
        z = (beta * self.moment + (1 - beta) * mean) / (1 - beta ** (t + 1))
        d = self.xp.concat([layer.apply_inverse(z[layer.span], settings.damping) for layer in self.layers])
        divergence = self.rate**2 / 2 * float(d @ z)
        shrink = min(1.0, math.sqrt(settings.max_divergence / divergence)) if divergence > 0 else 1.0
        largest = max(float(self.xp.max(layer.variances)) for layer in self.layers)
        return held, self.exchange.hold(shrink * d), {"loss": loss, "shrink": shrink, "largest_eigenvalue": largest}

    def update(self, centred: Array) -> None:
        """Take this rank's centred gradients, (R, N), into F. Collective."""
        self.updates += 1
        weight = (1 - self.settings.decay) / (1 - self.settings.decay**self.updates)
        scaled = math.sqrt(self.samples / (self.exchange.replicas - 1)) * centred
        for layer in self.layers:
            layer.add(scaled[:, layer.span], weight)
        if self.updates <= FIRST_UPDATES or self.updates % self.settings.basis_every == 0:
            for layer in self.layers:
                layer.renew_bases(self.exchange.total)
        for layer in self.layers:
            layer.variances = self.exchange.total(layer.own_variances)


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
