"""Which of the parameters are a layer: a matrix, with its bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Where a layer is among all parameters: (outputs, inputs) weights, then as many biases as outputs, if any."""

    start: int
    outputs: int
    inputs: int
    bias: bool

    @property
    def stop(self) -> int:
        return self.start + self.outputs * (self.inputs + self.bias)

    @property
    def span(self) -> slice:
        return slice(self.start, self.stop)


def layer_shapes(shapes: Sequence[tuple[int, ...]]) -> list[LayerShape]:
    """Return the layers of parameters that follow each other in the given shapes. Local.

    A tensor with more than one axis is a layer, (first axis) × (all others); a vector as long as that first axis, right
    after it, is its bias. Any other vector is a layer of one column.
    """
    layers, start, k = [], 0, 0
    while k < len(shapes):
        outputs, inputs = shapes[k][0], math.prod(shapes[k][1:])
        bias = len(shapes[k]) > 1 and k + 1 < len(shapes) and shapes[k + 1] == (outputs,)
        layers.append(LayerShape(start, outputs, inputs, bias))
        start, k = layers[-1].stop, k + 1 + bias
    return layers
