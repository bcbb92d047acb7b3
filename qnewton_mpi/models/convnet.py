"""The five-layer convolutional network of about 16,000 parameters: loss, gradient and evaluation on flat parameters."""

from __future__ import annotations

import itertools
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from qnewton_mpi.errors import UserError
from qnewton_mpi.models.layers import Activation, ConvPool, ConvPoolShape, Dense, DenseShape
from qnewton_mpi.parallel.device import Array

KERNEL = 5
FILTERS = (8, 16)
CLASSES = 10
# Widths of the two hidden dense layers, for the poster's images chosen for about 16,000 parameters: 15,924 and 16,154.
DENSE_WIDTHS = {(1, 28, 28): (42, 32), (3, 32, 32): (28, 28)}
OTHER_WIDTHS = (32, 32)
LEAST_SIDE = 16  # what the two pooled convolutions leave a pixel of
# Samples computed at a time: large enough for BLAS, small enough that a layer's patches stay in cache. On a GPU the
# whole batch is one block.
BLOCK = 32

ACTIVATIONS = ("tanh", "relu")


class Convnet:
    """Two pooled 5×5 convolutions (8 and 16 filters) and three dense layers, softmax, negative log-likelihood. Local.

    Parameters
    ----------
    input_shape : (C, H, W)
        H and W 16 at least.
    activation : {"tanh", "relu"}
    xp : module, optional
        numpy or cupy.
    dtype : optional
        float32; float64 (tests); complex128 for derivatives of the gradient by complex steps: everything here is
        analytic but for comparisons, which go by the real part.
    filters : (int, int), optional
    dense : (int, int), optional
        Widths of the two hidden dense layers.
    classes : int, optional

    Raises
    ------
    UserError
        For smaller images.

    Attributes
    ----------
    size : int
        N, the number of parameters: of 10 classes 15,924 for (1, 28, 28), 16,154 for (3, 32, 32).
    parameter_shapes : list of tuple of int
        Of the weights and biases that the flat parameters are made of, in their order.

    Examples
    --------
    >>> import numpy as np
    >>> net = Convnet((1, 28, 28), "tanh")
    >>> w = net.initial_parameters(seed=0)
    >>> images, labels = np.zeros((2, 1, 28, 28), "f4"), np.array([3, 7])
    >>> loss, gradient = net.loss_and_gradient(w, images, labels)
    >>> net.size, gradient.shape, round(loss, 4)
    (15924, (15924,), 2.3026)
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        activation: str,
        xp: ModuleType = np,
        dtype: Any = np.float32,
        filters: tuple[int, int] = FILTERS,
        dense: tuple[int, int] | None = None,
        classes: int = CLASSES,
    ) -> None:
        if min(input_shape[1:]) < LEAST_SIDE:
            raise UserError(
                f"images of {input_shape[1]}×{input_shape[2]} pixels are too small for the network: it takes "
                f"{LEAST_SIDE}×{LEAST_SIDE} at least"
            )
        self.xp, self.dtype, self.input_shape, self.classes = xp, dtype, input_shape, classes
        self.activation = Activation(xp, activation)
        first = ConvPoolShape(input_shape, filters[0], KERNEL)
        second = ConvPoolShape(first.output_shape, filters[1], KERNEL)
        self._widths = dense or DENSE_WIDTHS.get(input_shape, OTHER_WIDTHS)
        hidden = [prod(second.output_shape), *self._widths]
        full = [DenseShape(m, n) for m, n in itertools.pairwise(hidden)]
        last = DenseShape(hidden[-1], classes, activated=False)
        self.shapes: list[ConvPoolShape | DenseShape] = [first, second, *full, last]
        self.parameter_shapes = [shape for s in self.shapes for shape in (s.weight_shape, s.output_shape[:1])]
        self.bounds = list(itertools.accumulate((prod(shape) for shape in self.parameter_shapes), initial=0))
        self.size = self.bounds[-1]
        self._layers: dict[tuple[int, int], list[ConvPool | Dense]] = {}

    @property
    def description(self) -> dict[str, Any]:
        """The kind of network, and the arguments that make it."""
        return {
            "kind": "convnet",
            "input_shape": self.input_shape,
            "activation": "tanh" if self.activation.tanh else "relu",
            "filters": tuple(shape.filters for shape in self.shapes if isinstance(shape, ConvPoolShape)),
            "dense": self._widths,
            "classes": self.classes,
        }

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
        """Return (N,): weights normal with variance 1/fan-in, biases zero.

        Not 2/fan-in for ReLU: the maximum of four already raises the second moment that ReLU halves.
        """
        random = np.random.default_rng([seed, 0])
        pieces = []
        for shape in self.shapes:
            pieces.append(random.standard_normal(prod(shape.weight_shape)) * shape.fan_in**-0.5)
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

    def losses_and_gradients(self, parameters: Array, images: Array, labels: Array) -> tuple[Array, Array]:
        """Return the same for R replicas, each with samples of its own: on a GPU in the calls that one would take.

        Parameters
        ----------
        parameters : (N,), of all replicas, or (R, N)
        images : (R, B, C, H, W), the network's dtype
        labels : (R, B) integers 0 … classes − 1

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
                nll, probabilities, hot = self._softmax(logits, labels[some, block])
                losses[some] += xp.sum(nll, axis=1).real
                d = (probabilities - hot) / count
                for k in reversed(range(len(layers))):
                    d = layers[k].backward(d, weights[k][0], need_dx=k > 0)
                parts = [part for layer in layers for part in (layer.dweight, layer.dbias)]
                for part, (start, stop) in zip(parts, itertools.pairwise(self.bounds), strict=True):
                    gradients[some, start:stop] += part.reshape(len(part), -1)
        return losses / count, gradients

    def losses(self, parameters: Array, images: Array, labels: Array) -> Array:
        """Return the losses (R,) of `losses_and_gradients`, to rounding, without the gradients: a third of the work."""
        replicas, count = labels.shape
        losses, weights = self.xp.zeros(replicas), self._unflatten(parameters[None])
        for some in self._blocks(replicas, count):
            for block in self._blocks(count):
                _, logits = self._forward(weights, images[some, block])
                losses[some] += self.xp.sum(self._softmax(logits, labels[some, block])[0], axis=1).real
        return losses / count

    def evaluate(self, parameters: Array, images: Array, labels: Array) -> tuple[float, int]:
        """Return the summed negative log-likelihood (nats) and the number of samples classified correctly."""
        total, correct = 0.0, 0
        weights = self._unflatten(parameters[None])
        for block in self._blocks(len(labels)):
            _, logits = self._forward(weights, images[None, block])
            nll, _, _ = self._softmax(logits, labels[None, block])
            total += float(self.xp.sum(nll, dtype=np.float64))
            correct += int(self.xp.sum(self.xp.argmax(logits, axis=1) == labels[None, block]))
        return total, correct

    def log_probabilities(self, parameters: Array, images: Array) -> Array:
        """Return the logarithms of the classes' probabilities (B, K), of parameters (N,) and images (B, C, H, W)."""
        xp, weights = self.xp, self._unflatten(parameters[None])
        found = xp.empty((len(images), self.classes), self.dtype)
        for block in self._blocks(len(images)):
            _, logits = self._forward(weights, images[None, block])
            shifted = logits[0] - xp.max(logits[0], axis=0)
            found[block] = (shifted - xp.log(xp.sum(xp.exp(shifted), axis=0))).T
        return found

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
        """Return the negative log-likelihoods (R, B), the probabilities (R, K, B), the one-hot labels (R, K, B)."""
        xp = self.xp
        shifted = logits - xp.max(logits, axis=1, keepdims=True)
        exponentials = xp.exp(shifted)
        norms = xp.sum(exponentials, axis=1)
        hot = xp.arange(self.classes)[:, None] == labels[:, None, :]
        return xp.log(norms) - xp.sum(shifted * hot, axis=1), exponentials / norms[:, None, :], hot

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
