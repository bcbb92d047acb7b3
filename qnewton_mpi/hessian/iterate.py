"""Weights of a run, and what they were trained on: of what a Hessian is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.data import datasets
from qnewton_mpi.errors import UserError
from qnewton_mpi.models.choice import build
from qnewton_mpi.models.description import Description
from qnewton_mpi.models.layers import ACTIVATIONS
from qnewton_mpi.models.network import Network
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.results.layout import DIGEST
from qnewton_mpi.training.saved import read


@dataclass(frozen=True)
class Iterate:
    """Weights, and what they were trained on.

    Attributes
    ----------
    weights : (N + K,) float64
    data : str
    network : mapping
        As of a `Description`; the images' shape and classes are those of the data.
    validation : float or None
    image_size : str or None
        As of `train`: what was held out, and pictures resized to.
    digest : str or None
        Of the data; None is not compared.
    """

    weights: NDArray[np.float64]
    data: str
    network: Mapping[str, Any]
    validation: float | None = None
    image_size: str | None = None
    digest: str | None = None


def iterate_of(path: Path) -> Iterate:
    """Read the last parameters of a run's file, or those of the newest sound checkpoint of a folder. Local.

    Raises
    ------
    UserError
        For what is neither.
    """
    saved = read(path)
    options = {name: saved.options.get(name) for name in ("validation", "image_size")}
    try:
        network = Description.read(saved.network).network if saved.network else earlier(saved.options)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is of a network that this version does not know") from error
    weights = saved.flat.astype(np.float64)
    return Iterate(weights, str(saved.options.get("data")), network, **options, digest=saved.options.get(DIGEST))


def earlier(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the network of a file that does not describe it: a convnet; ValueError for an unknown activation."""
    if options.get("activation") not in ACTIVATIONS:
        raise ValueError("unknown activation")
    return {"kind": "convnet", "activation": options["activation"]}


def loaded(
    iterate: Iterate, communicator: Communicator, data_dir: str | None = None
) -> tuple[Network, datasets.Dataset]:
    """Return the network of an iterate and the data that it was trained on, in double precision. Collective.

    Parameters
    ----------
    iterate : Iterate
    communicator : Communicator
    data_dir : str, optional
        As for `train`.

    Raises
    ------
    UserError
        On all ranks, for data that cannot be had or has changed, or parameters of another network.
    """
    dataset = datasets.load_on_all(
        communicator,
        dtype=np.float64,
        data=iterate.data,
        data_dir=data_dir,
        validation=iterate.validation,
        image_size=iterate.image_size,
    )
    if iterate.digest not in (None, dataset.digest):
        raise UserError(f"{dataset.name} is not what the run was trained on: its images or labels have changed")
    network = communicator.together(lambda: network_of(iterate, dataset))
    if len(iterate.weights) != (count_here := network.size + len(network.statistics)):
        found = f"{len(iterate.weights):,} parameters"
        raise UserError(f"{found} are not those of the network for {dataset.name}, which has {count_here:,}")
    return network, dataset


def network_of(iterate: Iterate, dataset: datasets.Dataset) -> Network:
    """Return the network of an iterate, in double precision, for the images of a data set. Local.

    Raises
    ------
    UserError
        For one that this version does not know, or that cannot be made here.
    """
    about = {**iterate.network, "input_shape": dataset.input_shape, "classes": len(dataset.classes)}
    try:
        return build(about, dtype=build(about).hessian_dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("the run is of a network that this version does not know") from error
