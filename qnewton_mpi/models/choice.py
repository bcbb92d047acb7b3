"""Which network a run has: the options that say so, by its kind, and the network that they make."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from qnewton_mpi.errors import MissingPackageError, UserError
from qnewton_mpi.models.network import Network
from qnewton_mpi.origin import pip_install

OWN = "own"
# Where the networks of a kind are made: loaded when one is, as some need PyTorch.
NETWORKS = {
    "convnet": "qnewton_mpi.models.convnet:Convnet",
    "mlp": "qnewton_mpi.models.mlp:Mlp",
    "resnet": "qnewton_mpi.models.resnet:resnet",
    OWN: "qnewton_mpi.models.own:own",
}
# The options of `train` that a kind has, and their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "convnet": {"activation": "tanh"},
    "mlp": {"activation": "tanh", "hidden": "512,512"},
    "resnet": {"activation": "relu", "blocks": "2,2,2", "width": 16},
    OWN: {},
}
WITH_TORCH = ("resnet", OWN)
ALL = tuple(dict.fromkeys(name for options in OPTIONS.values() for name in options))
FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
SIZES = re.compile(r"\s*[1-9]\d{0,5}\s*(,\s*[1-9]\d{0,5}\s*)*")


def is_model(text: str) -> bool:
    """Tell whether a text names a network: a kind of ours, or MODULE:FACTORY."""
    return text in OPTIONS.keys() - {OWN} or FACTORY.fullmatch(text) is not None


def are_sizes(text: str) -> bool:
    """Tell whether a text is of whole numbers with commas between them."""
    return SIZES.fullmatch(text) is not None


def kind_of(model: str) -> str:
    """Return the kind of network that the option `--model` names."""
    return model if model in OPTIONS else OWN


def settled(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options `ALL` of a model: what is given, else the kind's defaults, None of those that it has not.

    Raises
    ------
    UserError
        Where one is given that the kind has not.
    """
    own = OPTIONS[kind_of(model)]
    for name in ALL:
        if given[name] is not None and name not in own:
            owners = ", ".join(kind for kind, options in OPTIONS.items() if name in options)
            raise UserError(f"--{name} is an option of --model {owners}, not of {model}")
    return {name: own.get(name) if given[name] is None else given[name] for name in ALL}


def described(options: Mapping[str, Any], input_shape: tuple[int, int, int], classes: int, seed: int) -> dict[str, Any]:
    """Return what `build` makes a network of.

    Parameters
    ----------
    options : mapping
        `model`, and those of `settled`.
    input_shape : (C, H, W)
    classes, seed : int
    """
    kind = kind_of(options["model"])
    sizes = {name: options[name] for name in OPTIONS[kind]}
    sizes |= {name: tuple(map(int, sizes[name].split(","))) for name in ("hidden", "blocks") if name in sizes}
    about = {"kind": kind, "input_shape": input_shape, "classes": classes, **sizes}
    if kind == OWN:
        about["factory"] = options["model"]
    return about | ({"seed": seed} if kind in WITH_TORCH else {})


def build(about: Mapping[str, Any], xp: ModuleType = np, dtype: Any = np.float32, smoothing: float = 0.0) -> Network:
    """Return the network of a description. Local.

    Parameters
    ----------
    about : mapping
        Its `kind`, of `NETWORKS`, and the arguments that make it.
    xp : module
        numpy or cupy.
    dtype : dtype
    smoothing : float
        ε of label smoothing.

    Raises
    ------
    UserError
        Where it needs PyTorch, which is not installed; of a network of one's own, where there is no such.
    KeyError, TypeError, ValueError
        For a kind or arguments that this version does not know.
    """
    arguments: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in about.items()
    }
    kind = arguments.pop("kind")
    module, _, name = NETWORKS[kind].partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        which = f"--model {kind}" if kind != OWN else f"--model {about['factory']}"
        raise MissingPackageError(f"{which} needs PyTorch: {pip_install('torch')}") from error
    network: Network = make(**arguments, xp=xp, dtype=dtype, smoothing=smoothing)
    return network


def title(attributes: Mapping[str, Any]) -> str:
    """Return what a picture calls the network of a run, from the run's options.

    Examples
    --------
    >>> title({"activation": "tanh"}), title({"model": "mlp", "hidden": "64", "activation": "relu"})
    ('convnet (tanh)', 'mlp 64 (relu)')
    """
    model = str(attributes.get("model", "convnet"))
    sizes = {name: attributes[name] for name in OPTIONS[kind_of(model)] if name != "activation" and name in attributes}
    words = [f"width {size}" if name == "width" else str(size) for name, size in sizes.items()]
    activation = attributes.get("activation")
    return " ".join([model, *words, *([f"({activation})"] if activation else [])])
