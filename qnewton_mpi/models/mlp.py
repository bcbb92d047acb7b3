"""The multilayer perceptron: dense layers alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from qnewton_mpi.models.layered import Layered
from qnewton_mpi.models.layers import ACTIVATIONS, DenseShape


class Mlp(Layered):
    """Dense layers over all pixels, softmax, negative log-likelihood. Local.

    Initial weights have variance 1/fan-in, with ReLU, which halves the second moment, 2/fan-in.

    Parameters
    ----------
    input_shape : (C, H, W)
    hidden : sequence of int
        Widths of the hidden layers.
    activation : {"tanh", "relu"}
    classes : int
    xp, dtype, smoothing : optional
        As of `Layered`.

    Examples
    --------
    >>> Mlp((1, 28, 28), (512, 512), "relu", classes=10).size
    669706
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        hidden: Sequence[int],
        activation: str,
        classes: int,
        xp: ModuleType = np,
        dtype: Any = np.float32,
        smoothing: float = 0.0,
    ) -> None:
        self._hidden = tuple(hidden)
        widths = [prod(input_shape), *hidden]
        full = [DenseShape(m, n) for m, n in itertools.pairwise(widths)]
        last = DenseShape(widths[-1], classes, activated=False)
        gain = ACTIVATIONS[activation].gain
        super().__init__([*full, last], input_shape, activation, xp, dtype, classes, smoothing, gain)

    @property
    def description(self) -> dict[str, Any]:
        return {
            "kind": "mlp",
            "input_shape": self.input_shape,
            "hidden": self._hidden,
            "activation": self.activation.name,
            "classes": self.classes,
        }
