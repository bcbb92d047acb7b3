"""What a network is made of and what it was trained on: all that its parameters need to be of use again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np

from qnewton_mpi.data.datasets import Dataset
from qnewton_mpi.models.choice import build
from qnewton_mpi.models.network import Network


@dataclass(frozen=True)
class Description:
    """A network, the normalisation of its inputs, and the names of its classes.

    Attributes
    ----------
    network : dict
        Its `kind`, of `choice.NETWORKS`, and the arguments that make it.
    mean, deviation : tuple of float
        Of the training images' pixels, for each channel: a pixel p enters the network as (p − mean)/deviation.
    pixels : str
        The type of the training images: of "uint8" they are 0 … 255.
    classes : tuple of str
        In the order of the outputs.
    """

    network: dict[str, Any]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    pixels: str
    classes: tuple[str, ...]

    @classmethod
    def of(cls, network: Network, dataset: Dataset) -> Description:
        """Describe a network that is trained on a data set. Local."""
        scale, shift = (
            np.asarray(constant.tolist(), float).ravel() for constant in (dataset.train.scale, dataset.train.shift)
        )
        mean, deviation = tuple((-shift / scale).tolist()), tuple((1 / scale).tolist())
        return cls(network.description, mean, deviation, str(dataset.train.images.dtype), dataset.classes)

    @classmethod
    def read(cls, text: str) -> Description:
        """Return what `text` wrote; ValueError, TypeError or KeyError for anything else. Local."""
        found = json.loads(text)
        constants = {name: tuple(map(float, found[name])) for name in ("mean", "deviation")}
        classes = tuple(map(str, found["classes"]))
        return cls(dict(found["network"]), **constants, pixels=str(found["pixels"]), classes=classes)

    def text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    def build(self, xp: ModuleType = np, dtype: Any = np.float32) -> Network:
        """Return the network, as `choice.build` does. Local."""
        return build(self.network, xp, dtype)
