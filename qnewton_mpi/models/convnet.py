"""The five-layer convolutional network of about 16,000 parameters."""

from __future__ import annotations

import itertools
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from qnewton_mpi.errors import UserError
from qnewton_mpi.models.layered import Layered
from qnewton_mpi.models.layers import ConvPoolShape, DenseShape

KERNEL = 5
FILTERS = (8, 16)
CLASSES = 10
# Widths of the two hidden dense layers, for the poster's images chosen for about 16,000 parameters: 15,924 and 16,154.
DENSE_WIDTHS = {(1, 28, 28): (42, 32), (3, 32, 32): (28, 28)}
OTHER_WIDTHS = (32, 32)
LEAST_SIDE = 16  # what the two pooled convolutions leave a pixel of


class Convnet(Layered):
    """Two pooled 5×5 convolutions (8 and 16 filters) and three dense layers, softmax, negative log-likelihood. Local.

    Initial weights have variance 1/fan-in, for ReLU too: the maximum of four already raises the second moment that it
    halves.

    Parameters
    ----------
    input_shape : (C, H, W)
        H and W 16 at least.
    activation : {"tanh", "relu"}
    xp, dtype, smoothing : optional
        As of `Layered`.
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
        smoothing: float = 0.0,
    ) -> None:
        if min(input_shape[1:]) < LEAST_SIDE:
            raise UserError(
                f"images of {input_shape[1]}×{input_shape[2]} pixels are too small for the network: it takes "
                f"{LEAST_SIDE}×{LEAST_SIDE} at least"
            )
        first = ConvPoolShape(input_shape, filters[0], KERNEL)
        second = ConvPoolShape(first.output_shape, filters[1], KERNEL)
        self._widths = dense or DENSE_WIDTHS.get(input_shape, OTHER_WIDTHS)
        hidden = [prod(second.output_shape), *self._widths]
        full = [DenseShape(m, n) for m, n in itertools.pairwise(hidden)]
        last = DenseShape(hidden[-1], classes, activated=False)
        super().__init__([first, second, *full, last], input_shape, activation, xp, dtype, classes, smoothing)

    @property
    def description(self) -> dict[str, Any]:
        return {
            "kind": "convnet",
            "input_shape": self.input_shape,
            "activation": self.activation.name,
            "filters": tuple(shape.filters for shape in self.shapes if isinstance(shape, ConvPoolShape)),
            "dense": self._widths,
            "classes": self.classes,
        }
