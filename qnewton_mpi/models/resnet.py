"""A residual network (extra `torch`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from math import gcd
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qnewton_mpi.models.layers import ACTIVATIONS
from qnewton_mpi.models.module import ModuleNetwork

GROUPS = 8  # of channels, each normalised for itself


class Block(torch.nn.Module):
    """φ(x′ + N(conv(φ(N(conv(x)))))), 3×3 both; x′ is x, or a 1×1 convolution of it where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: type[torch.nn.Module]) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.norm1 = torch.nn.GroupNorm(gcd(GROUPS, outputs), outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm2 = torch.nn.GroupNorm(gcd(GROUPS, outputs), outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = torch.nn.Identity() if same else torch.nn.Conv2d(inputs, outputs, 1, stride)
        self.activation = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.activation(self.norm1(self.conv1(x)))
        return self.activation(self.shortcut(x) + self.norm2(self.conv2(y)))  # type: ignore[no-any-return]


class ResNet(torch.nn.Sequential):
    """A 3×3 convolution, stages of blocks, the mean over the pixels, a dense layer (He et al. 2015, arXiv 1512.03385).

    Each stage after the first halves the image and doubles the channels. Group normalisation (Wu and He 2018, arXiv
    1803.08494) in place of a batch's: a sample's loss depends on no other, and so the run not on how replicas share a
    batch. Convolutions keep their biases, which make layers of them.

    Parameters
    ----------
    input_shape : (C, H, W)
    classes : int
    blocks : sequence of int
        In each stage.
    width : int
        Channels of the first stage.
    activation : {"relu", "tanh"}

    Examples
    --------
    >>> sum(p.numel() for p in ResNet((3, 32, 32), 10, (3, 3, 3), 16, "relu").parameters())
    273066
    """

    def __init__(
        self, input_shape: tuple[int, int, int], classes: int, blocks: Sequence[int], width: int, activation: str
    ) -> None:
        kind = getattr(torch.nn, ACTIVATIONS[activation].module)
        layers: OrderedDict[str, torch.nn.Module] = OrderedDict()
        layers["conv"] = torch.nn.Conv2d(input_shape[0], width, 3, padding=1)
        layers["norm"], layers["activation"] = torch.nn.GroupNorm(gcd(GROUPS, width), width), kind()
        channels = width
        for stage, count in enumerate(blocks):
            for k in range(count):
                outputs, stride = width << stage, 2 if stage and not k else 1
                layers[f"stage{stage + 1}_block{k + 1}"] = Block(channels, outputs, stride, kind)
                channels = outputs
        layers["pool"], layers["flatten"] = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        layers["dense"] = torch.nn.Linear(channels, classes)
        super().__init__(layers)


def resnet(
    input_shape: tuple[int, int, int],
    blocks: Sequence[int],
    width: int,
    activation: str,
    classes: int,
    seed: int,
    shapes: Mapping[str, Sequence[int]] | None = None,
    constants: Mapping[str, float] | None = None,
    xp: ModuleType = np,
    dtype: Any = np.float32,
    smoothing: float = 0.0,
) -> ModuleNetwork:
    """Return the network. Local.

    Parameters
    ----------
    input_shape, blocks, width, activation, classes
        As of `ResNet`.
    seed : int
        Of the initial parameters.
    shapes, constants : mapping, optional
        Those that follow from the sizes; of constants there are none.
    xp, dtype, smoothing : optional
        As of `ModuleNetwork`.
    """
    sizes = {"input_shape": tuple(input_shape), "blocks": tuple(blocks), "width": width}
    arguments: dict[str, Any] = {**sizes, "activation": activation, "classes": classes}
    return ModuleNetwork(
        partial(ResNet, **arguments), {"kind": "resnet", **arguments, "seed": seed}, xp, dtype, smoothing
    )
