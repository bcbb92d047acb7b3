"""Networks that are one layer after the other, in NumPy or CuPy: loss, gradient and log-probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import MissingPackageError
from qnewton_mpi.models.layers import ACTIVATIONS, ConvPool, ConvPoolShape, Dense, DenseShape
from qnewton_mpi.models.network import Seeds
from qnewton_mpi.origin import pip_install

if TYPE_CHECKING:
    import torch

# Samples computed at a time: large enough for BLAS, small enough that a layer's patches stay in cache. On a GPU the
# whole batch is one block.
BLOCK = 32
STEP = 1e-30  # h of the complex step, for a direction of length 1: its square vanishes beside anything


class Layered:
    """Layers in turn, softmax, negative log-likelihood: a `Network`. Local.

    Parameters
    ----------
    shapes : sequence of ConvPoolShape or DenseShape
    input_shape : (C, H, W)
    activation : {"tanh", "relu"}
    xp : module, optional
        numpy or cupy.
    dtype : optional
        float32; float64 (tests); complex128 for derivatives of the gradient by complex steps: everything here is
        analytic but for comparisons, which go by the real part.
    classes : int, optional
    smoothing : float, optional
        ε of label smoothing: losses are of (1 − ε) of the label and ε/K of each of the K classes.
    gain : float, optional
        Initial weights have variance gain/fan-in.

    Attributes
    ----------
    parameter_shapes : list of tuple of int
        Of the weights and biases that the flat parameters are made of, in their order.
    """

    state: ClassVar[Mapping[str, Kind]] = {}
    seen = None
    hessian_dtype = np.complex128

    def __init__(
        self,
        shapes: Sequence[ConvPoolShape | DenseShape],
        input_shape: tuple[int, int, int],
        activation: str,
        xp: ModuleType,
        dtype: Any,
        classes: int,
        smoothing: float,
        gain: float = 1.0,
    ) -> None:
        self.shapes, self.input_shape, self.xp, self.dtype, self.classes = shapes, input_shape, xp, dtype, classes
        self.activation, self._smoothing, self._gain = ACTIVATIONS[activation](xp), smoothing, gain
        self.parameter_shapes = [shape for s in self.shapes for shape in (s.weight_shape, s.output_shape[:1])]
        self.bounds = list(itertools.accumulate((prod(shape) for shape in self.parameter_shapes), initial=0))
        self.size = self.bounds[-1]
        self.statistics: NDArray[np.float64] = np.zeros(0)
        self._layers: dict[tuple[int, int], list[ConvPool | Dense]] = {}

    @property
    def layer_names(self) -> list[str]:
        """The layers' names: "conv1", "conv2", "dense1", "dense2", "dense3"."""
        kinds = ["conv" if isinstance(shape, ConvPoolShape) else "dense" for shape in self.shapes]
        return [f"{kind}{kinds[:k].count(kind) + 1}" for k, kind in enumerate(kinds)]

    @property
    def parameter_names(self) -> list[str]:
        """Names of what `parameter_shapes` are the shapes of: "conv1.weight", "conv1.bias", …, "dense3.bias"."""
        return [f"{layer}.{part}" for layer in self.layer_names for part in ("weight", "bias")]

    def named(self, parameters: Array) -> dict[str, Array]:
        """Return views of the flat parameters (N,), by name and in shape."""
        parts = self.xp.split(parameters, self.bounds[1:-1])
        shaped = [part.reshape(shape) for part, shape in zip(parts, self.parameter_shapes, strict=True)]
        return dict(zip(self.parameter_names, shaped, strict=True))

    def initial_parameters(self, seed: int) -> Array:
        """Return (N,): weights normal, biases zero."""
        random = np.random.default_rng([seed, 0])
        pieces = []
        for shape in self.shapes:
            pieces.append(random.standard_normal(prod(shape.weight_shape)) * (self._gain / shape.fan_in) ** 0.5)
            pieces.append(np.zeros(shape.output_shape[0]))
        return self.xp.asarray(np.concatenate(pieces), dtype=self.dtype)

    def loss_and_gradient(self, parameters: Array, images: Array, labels: Array) -> tuple[float, Array]:
        """Return the mean negative log-likelihood (nats) and its gradient.

        Parameters
        ----------
        parameters : (N,)
        images : (B, C, H, W), the network's dtype
        labels : (B,) integers 0 … classes − 1

        Returns
        -------
        loss : float
        gradient : (N,)
        """
        losses, gradients = self.losses_and_gradients(parameters, images[None], labels[None])
        return float(losses[0]), gradients[0]

    def losses_and_gradients(
        self, parameters: Array, images: Array, labels: Array, seeds: Seeds = ()
    ) -> tuple[Array, Array]:
        """Return the same for R replicas, each with samples of its own: on a GPU in the calls that one would take.

        Parameters
        ----------
        parameters : (N,), of all replicas, or (R, N)
        images : (R, B, C, H, W), the network's dtype
        labels : (R, B) integers 0 … classes − 1
        seeds : Seeds
            Nothing is drawn at random here.

        Returns
        -------
        losses : (R,) float64
        gradients : (R, N)
        """
        xp, (replicas, count) = self.xp, labels.shape
        losses, gradients = xp.zeros(replicas), xp.zeros((replicas, self.size), self.dtype)
        every = parameters.reshape(-1, self.size)
        # As many replicas at a time as their samples make a block.
        for some in self._blocks(replicas, count):
            weights = self._unflatten(every[some] if len(every) > 1 else every)
            for block in self._blocks(count):
                layers, logits = self._forward(weights, images[some, block])
                nll, probabilities, aims = self._softmax(logits, labels[some, block])
                losses[some] += xp.sum(nll, axis=1).real
                d = (probabilities - aims) / count
                for k in reversed(range(len(layers))):
                    d = layers[k].backward(d, weights[k][0], need_dx=k > 0)
                parts = [part for layer in layers for part in (layer.dweight, layer.dbias)]
                for part, (start, stop) in zip(parts, itertools.pairwise(self.bounds), strict=True):
                    gradients[some, start:stop] += part.reshape(len(part), -1)
        return losses / count, gradients

    def losses(self, parameters: Array, images: Array, labels: Array, seeds: Seeds = ()) -> Array:
        """Return the losses (R,) of `losses_and_gradients`, to rounding, without the gradients: a third of the work."""
        replicas, count = labels.shape
        losses, weights = self.xp.zeros(replicas), self._unflatten(parameters[None])
        for some in self._blocks(replicas, count):
            for block in self._blocks(count):
                _, logits = self._forward(weights, images[some, block])
                losses[some] += self.xp.sum(self._softmax(logits, labels[some, block])[0], axis=1).real
        return losses / count

    def log_probabilities(self, parameters: Array, images: Array) -> Array:
        """Return the logarithms of the classes' probabilities (B, K), of parameters (N,) and images (B, C, H, W)."""
        xp, weights = self.xp, self._unflatten(parameters[None])
        found = xp.empty((len(images), self.classes), self.dtype)
        for block in self._blocks(len(images)):
            _, logits = self._forward(weights, images[None, block])
            shifted = logits[0] - xp.max(logits[0], axis=0)
            found[block] = (shifted - xp.log(xp.sum(xp.exp(shifted), axis=0))).T
        return found

    def hessian_times(self, weights: Array, direction: Array, images: Array, labels: Array) -> Array:
        """Return H q by a complex step of the gradient, of a network of complex128: H q = Im ∇f(w + i h q)/h.

        Exact to rounding, without the cancellation of a difference (Squire and Trapp 1998, SIAM Review 40, 110), and
        without its trouble with max pooling and ReLU: a difference steps over their kinks, where the gradient jumps.
        """
        return self.loss_and_gradient(weights + 1j * STEP * direction, images, labels)[1].imag / STEP

    def torch_layers(self, weights: Array) -> dict[str, torch.nn.Module]:
        """Return the same layers in PyTorch, by name."""
        try:
            from qnewton_mpi.models.reference import torch_layers
        except ModuleNotFoundError as error:
            raise MissingPackageError(f"a model as a module needs PyTorch: {pip_install('torch')}") from error
        return dict(torch_layers(self, weights).named_children())

    def _blocks(self, count: int, each: int = 1) -> list[slice]:
        """Return the parts of a range in which `each` samples apiece are a block, or of one."""
        block = max(1, BLOCK // each) if self.xp is np else count
        return [slice(start, min(start + block, count)) for start in range(0, count, block)]

    def _forward(self, weights: list[tuple[Array, Array]], images: Array) -> tuple[list[ConvPool | Dense], Array]:
        layers = self._layers_for(*images.shape[:2])
        # Samples innermost, as the layers want it.
        x = self.xp.ascontiguousarray(images.transpose(0, 2, 3, 4, 1))
        for layer, (weight, bias) in zip(layers, weights, strict=True):
            x = layer.forward(x, weight, bias)
        return layers, x

    def _softmax(self, logits: Array, labels: Array) -> tuple[Array, Array, Array]:
        """Return the losses (R, B), the probabilities, and what these are aimed at: the labels, smoothed; (R, K, B)."""
        xp = self.xp
        shifted = logits - xp.max(logits, axis=1, keepdims=True)
        exponentials = xp.exp(shifted)
        norms = xp.sum(exponentials, axis=1)
        aims = xp.arange(self.classes)[:, None] == labels[:, None, :]
        if self._smoothing:
            aims = ((1 - self._smoothing) * aims + self._smoothing / self.classes).astype(self.dtype)
        return xp.log(norms) - xp.sum(shifted * aims, axis=1), exponentials / norms[:, None, :], aims

    def _layers_for(self, replicas: int, batch: int) -> list[ConvPool | Dense]:
        """Return the layers, with their buffers, of a number of replicas and samples; made once for each."""
        sizes = replicas, batch
        if sizes not in self._layers:
            self._layers[sizes] = [
                (ConvPool if isinstance(s, ConvPoolShape) else Dense)(self.xp, s, self.activation, *sizes, self.dtype)  # type: ignore[arg-type]
                for s in self.shapes
            ]
        return self._layers[sizes]

    def _unflatten(self, flat: Array) -> list[tuple[Array, Array]]:
        """Return each layer's weight and bias, (R, …), of flat vectors (R, N)."""
        parts = [
            flat[:, start:stop].reshape(-1, *shape)
            for shape, (start, stop) in zip(self.parameter_shapes, itertools.pairwise(self.bounds), strict=True)
        ]
        return list(itertools.pairwise(parts))[::2]
