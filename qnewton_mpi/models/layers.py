"""Layers for R replicas at once, the samples innermost: every array is (R, features…, B).

So elementwise work runs over long rows, and a product of matrices is R products, one for each replica's samples, whose
weight gradients stay apart. Weights are (R, …), or (1, …) for all replicas.

A layer keeps the buffers of one R and B and reuses them; `forward` must precede `backward`, which leaves the gradients
of the weights in `dweight` and `dbias`. Written for NumPy and CuPy alike through one namespace `xp`, with `out=`
wherever both have it. Arrays returned are the layer's own buffers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import ClassVar

from qnewton_mpi.arrays import Array


class Activation(ABC):
    """Elementwise φ and its derivative, expressed through φ's value. One more is a subclass, and a line of ACTIVATIONS.

    Attributes
    ----------
    name : str
        In that table.
    module : str
        What it is among the modules of torch.nn.
    gain : float
        Of the variance of the weights before it, at the start of a perceptron.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    gain: ClassVar[float] = 1.0

    def __init__(self, xp: ModuleType) -> None:
        self.xp = xp

    @abstractmethod
    def apply(self, z: Array) -> None:
        """Replace z by φ(z)."""

    @abstractmethod
    def pull_back(self, a: Array, da: Array, work: Array) -> None:
        """Replace da = ∂L/∂φ by ∂L/∂z, where a = φ(z); `work` is a scratch array of a's shape."""


class Tanh(Activation):
    """φ(z) = tanh z, φ′ = 1 − φ²."""

    name, module = "tanh", "Tanh"

    def apply(self, z: Array) -> None:
        self.xp.tanh(z, out=z)

    def pull_back(self, a: Array, da: Array, work: Array) -> None:
        self.xp.multiply(a, a, out=work)
        self.xp.subtract(1, work, out=work)
        self.xp.multiply(da, work, out=da)


class Relu(Activation):
    """φ(z) = max(z, 0), φ′ = 1 where φ > 0, else 0."""

    name, module, gain = "relu", "ReLU", 2.0

    def apply(self, z: Array) -> None:
        self.xp.maximum(z, 0, out=z)

    def pull_back(self, a: Array, da: Array, work: Array) -> None:
        self.xp.multiply(da, a > 0, out=da)


ACTIVATIONS: dict[str, type[Activation]] = {kind.name: kind for kind in (Tanh, Relu)}


@dataclass(frozen=True)
class DenseShape:
    """A fully connected layer, optionally followed by the activation."""

    inputs: int
    outputs: int
    activated: bool = True

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.inputs)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.outputs,)

    @property
    def fan_in(self) -> int:
        return self.inputs


@dataclass(frozen=True)
class ConvPoolShape:
    """A convolution without padding, 2×2 max pooling, and the activation. Odd kernels; an odd last row is unused."""

    input_shape: tuple[int, int, int]
    filters: int
    kernel: int

    def __post_init__(self) -> None:
        _, height, width = self.input_shape
        if self.kernel % 2 == 0 or min(height, width) <= self.kernel:
            raise ValueError(f"no pooled convolution of kernel {self.kernel} over {height}×{width}: odd, and smaller")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.filters, self.input_shape[0], self.kernel, self.kernel)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        _, height, width = self.input_shape
        return (self.filters, (height - self.kernel + 1) // 2, (width - self.kernel + 1) // 2)

    @property
    def fan_in(self) -> int:
        return self.input_shape[0] * self.kernel**2


class Dense:
    """a = φ(W x + b) for x (R, inputs, B)."""

    def __init__(
        self, xp: ModuleType, shape: DenseShape, activation: Activation, replicas: int, batch: int, dtype: object
    ) -> None:
        self.xp, self.shape, self.activation = xp, shape, activation
        self.a = xp.empty((replicas, shape.outputs, batch), dtype)
        self.work = xp.empty_like(self.a)
        self.dx = xp.empty((replicas, shape.inputs, batch), dtype)
        self.dweight = xp.empty((replicas, *shape.weight_shape), dtype)
        self.dbias = xp.empty((replicas, shape.outputs), dtype)

    def forward(self, x: Array, weight: Array, bias: Array) -> Array:
        self.x = x.reshape(self.dx.shape)
        self.xp.matmul(weight, self.x, out=self.a)
        self.a += bias[..., None]
        if self.shape.activated:
            self.activation.apply(self.a)
        return self.a

    def backward(self, da: Array, weight: Array, need_dx: bool) -> Array | None:
        da = da.reshape(self.a.shape)
        if self.shape.activated:
            self.activation.pull_back(self.a, da, self.work)
        self.xp.matmul(da, transposed(self.x), out=self.dweight)
        self.xp.sum(da, axis=-1, out=self.dbias)
        return self.xp.matmul(transposed(weight), da, out=self.dx) if need_dx else None


class ConvPool:
    """a = φ(maxpool₂ₓ₂(W ∗ x) + b) for x (R, C, H, W, B), as one matrix product for each replica.

    The four outputs that a pooling window compares are four filters on one (k+1)×(k+1) patch of the input, taken at
    stride 2. So the patches hold (k+1)²/4 numbers for each input position instead of k², and the matrix product has
    4 F rows instead of F: more arithmetic by ((k+1)/k)², less memory traffic, and shapes that BLAS likes. Pooling is
    then the maximum of four contiguous blocks, and comes before the activation, which is monotone.
    """

    def __init__(
        self, xp: ModuleType, shape: ConvPoolShape, activation: Activation, replicas: int, batch: int, dtype: object
    ) -> None:
        self.xp, self.shape, self.activation = xp, shape, activation
        channels, height, width = shape.input_shape
        filters, rows, columns = shape.output_shape
        side = shape.kernel + 1
        positions = rows * columns * batch
        self.windows = (replicas, channels, side, side, rows, columns, batch)
        self.patches = xp.empty(self.windows, dtype)
        self.filters = xp.zeros((replicas, 4, filters, channels, side, side), dtype)
        self.dfilters = xp.empty_like(self.filters)
        self.outputs = xp.empty((replicas, 4, filters, positions), dtype)
        self.pairs = xp.empty((replicas, 2, filters, positions), dtype)
        self.a = xp.empty((replicas, filters, rows, columns, batch), dtype)
        self.work = xp.empty((replicas, filters, positions), dtype)
        self.mask = xp.empty((replicas, filters, positions), bool)
        self.dx = xp.zeros((replicas, channels, height, width, batch), dtype)
        self.dweight = xp.empty((replicas, *shape.weight_shape), dtype)
        self.dbias = xp.empty((replicas, filters), dtype)

    def forward(self, x: Array, weight: Array, bias: Array) -> Array:
        xp = self.xp
        r, c, h, w, b = x.strides
        windows = xp.lib.stride_tricks.as_strided(x, self.windows, (r, c, h, w, 2 * h, 2 * w, b))
        self.patches[...] = windows
        for shifted, dy, dx in self._shifts(self.filters):
            shifted[..., dy : dy + self.shape.kernel, dx : dx + self.shape.kernel] = weight
        outputs, pairs, a = self.outputs, self.pairs, self.a.reshape(self.work.shape)
        xp.matmul(self._as_matrices(self.filters), self._patch_rows(), out=self._output_rows())
        xp.maximum(outputs[:, 0::2], outputs[:, 1::2], out=pairs)
        xp.maximum(pairs[:, 0], pairs[:, 1], out=a)
        a += bias[..., None]
        self.activation.apply(a)
        return self.a

    def backward(self, da: Array, weight: Array, need_dx: bool) -> Array | None:
        xp, outputs, pairs = self.xp, self.outputs, self.pairs
        da = da.reshape(self.work.shape)
        self.activation.pull_back(self.a.reshape(self.work.shape), da, self.work)
        xp.sum(da, axis=-1, out=self.dbias)
        # The gradient goes to the first of the four that attains the maximum, as in other libraries.
        xp.greater_equal(outputs[:, 0], outputs[:, 1], out=self.mask)
        first_of_top = self.mask.copy()
        xp.greater_equal(outputs[:, 2], outputs[:, 3], out=self.mask)
        first_of_bottom = self.mask.copy()
        xp.greater_equal(pairs[:, 0], pairs[:, 1], out=self.mask)
        xp.multiply(da, self.mask, out=pairs[:, 0])
        xp.subtract(da, pairs[:, 0], out=pairs[:, 1])
        for pair, first in ((0, first_of_top), (1, first_of_bottom)):
            xp.multiply(pairs[:, pair], first, out=outputs[:, 2 * pair])
            xp.subtract(pairs[:, pair], outputs[:, 2 * pair], out=outputs[:, 2 * pair + 1])
        doutputs = self._output_rows()
        xp.matmul(doutputs, transposed(self._patch_rows()), out=self._as_matrices(self.dfilters))
        self.dweight[...] = 0
        for shifted, dy, dx in self._shifts(self.dfilters):
            self.dweight += shifted[..., dy : dy + self.shape.kernel, dx : dx + self.shape.kernel]
        if not need_dx:
            return None
        # The patches are no longer needed: their buffer takes their gradient.
        xp.matmul(transposed(self._as_matrices(self.filters)), doutputs, out=self._patch_rows())
        return self._add_patches()

    def _patch_rows(self) -> Array:
        return self.patches.reshape(self.windows[0], prod(self.windows[1:4]), -1)

    def _output_rows(self) -> Array:
        return self.outputs.reshape(self.windows[0], -1, self.work.shape[2])

    def _as_matrices(self, filters: Array) -> Array:
        """Return filters as (R, 4 F, entries of a patch)."""
        return filters.reshape(self.windows[0], -1, prod(self.windows[1:4]))

    def _shifts(self, filters: Array) -> list[tuple[Array, int, int]]:
        """Return the filters of each output of a pooling window with its offset."""
        return [(filters[:, 2 * dy + dx], dy, dx) for dy in (0, 1) for dx in (0, 1)]

    def _add_patches(self) -> Array:
        """Add the patches' gradient where the patches were taken from: the adjoint of the strided copy."""
        replicas, channels, side, _, rows, columns, batch = self.windows
        half = side // 2
        self.dx[...] = 0
        # 2×2 blocks are added at a time, which takes a quarter of the calls; an odd last row or column is in no patch.
        height, width = (length // 2 for length in self.dx.shape[2:4])
        image = self.dx[:, :, : 2 * height, : 2 * width].reshape(replicas, channels, height, 2, width, 2, batch)
        patches = self.patches.reshape(replicas, channels, half, 2, half, 2, rows, columns, batch)
        for y in range(half):
            for x in range(half):
                target = image[:, :, y : y + rows, :, x : x + columns]
                target += patches[:, :, y, :, x].transpose(0, 1, 4, 2, 5, 3, 6)
        return self.dx


def transposed(matrices: Array) -> Array:
    """Return the matrices (R, m, n) transposed, (R, n, m)."""
    return matrices.swapaxes(1, 2)
