"""What a network is made of and what it was trained on: all that its parameters need to be of use again."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np

from qnewton_mpi.data.datasets import Dataset
from qnewton_mpi.models.choice import build
from qnewton_mpi.models.network import Network

# How far what describes a constant may be off, relatively and absolutely: another processor rounds otherwise.
SAME, SMALL = 1e-3, 1e-6


def changed(said: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return the first tensor of which two descriptions of a module say something else; empty where there is none.

    The shapes of what steps change are to be the same, in the same order; the constants are numbers. What one of them
    does not say is not compared.

    Examples
    --------
    >>> changed({"shapes": {"a": [2], "b": [2]}}, {"shapes": {"b": [2], "a": [2]}})
    'a'
    """
    if "shapes" in said and "shapes" in found:
        theirs, ours = (list(about["shapes"].items()) for about in (said, found))
        for was, is_now in itertools.zip_longest(theirs, ours):
            if was != is_now:
                return str((was or is_now)[0])
    if "constants" in said and "constants" in found:
        before, now = said["constants"], found["constants"]
        for name in {**before, **now}:
            if not math.isclose(before.get(name, math.inf), now.get(name, math.inf), rel_tol=SAME, abs_tol=SMALL):
                return str(name)
    return ""


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
