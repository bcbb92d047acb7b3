"""What a network has to have for `train`, its files, and what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array
from qnewton_mpi.core.state import Kind

if TYPE_CHECKING:
    import torch

Seeds = Sequence[int]
"""Of replicas, each from 0 to 2⁶³ − 1: what their losses draw at random, as dropout does, follows from them alone."""


class Network(Protocol):
    """A classifier of images: losses and gradients on flat parameters (N,). All of it is local.

    *Weights* are parameters and, after them, the statistics that a pass over training images changes without a
    gradient, as the running means of batch normalisation: (N + K,), K mostly 0.

    Attributes
    ----------
    xp : module
        numpy or cupy, whose arrays it takes and returns.
    dtype : numpy dtype
        Of parameters and images.
    input_shape : (C, H, W)
    classes : int
    size : int
        N.
    parameter_shapes : sequence of tuple of int
        Of the tensors that the parameters are the concatenation of, a layer's biases right after its weights.
    statistics : (K,) float64
        In host memory; where a replica's pass begins. Whoever does a step sets it to the mean of all replicas' `seen`.
    seen : (R, K) float64 or None
        The statistics after each replica's pass in the last `losses_and_gradients`.
    state : mapping
        As of `core.state`: the statistics, if there are any.
    hessian_dtype : dtype
        Of the network to be built for `hessian_times`.
    """

    xp: ModuleType
    dtype: Any
    input_shape: tuple[int, int, int]
    classes: int
    size: int
    statistics: NDArray[np.float64]

    @property
    def parameter_shapes(self) -> Sequence[tuple[int, ...]]: ...

    @property
    def seen(self) -> NDArray[np.float64] | None: ...

    @property
    def state(self) -> Mapping[str, Kind]: ...

    @property
    def hessian_dtype(self) -> Any: ...

    @property
    def description(self) -> dict[str, Any]:
        """The kind, a key of `description.NETWORKS`, and the arguments that make it, as JSON has them."""

    def initial_parameters(self, seed: int) -> Array:
        """Return (N,)."""

    def losses_and_gradients(
        self, parameters: Array, images: Array, labels: Array, seeds: Seeds = ()
    ) -> tuple[Array, Array]:
        """Return what R replicas have, each with samples of its own.

        Parameters
        ----------
        parameters : (N,), of all replicas, or (R, N)
        images : (R, B, C, H, W)
        labels : (R, B) integers 0 … classes − 1
        seeds : Seeds
            R of them.

        Returns
        -------
        losses : (R,)
            The mean negative log-likelihoods (nats), with label smoothing if the network was made so.
        gradients : (R, N)
        """

    def losses(self, parameters: Array, images: Array, labels: Array, seeds: Seeds = ()) -> Array:
        """Return those losses, to rounding, at parameters (N,), without gradients, and leave `seen` alone."""

    def log_probabilities(self, weights: Array, images: Array) -> Array:
        """Return the logarithms of the classes' probabilities (B, K), as in use: without dropout."""

    def hessian_times(self, weights: Array, direction: Array, images: Array, labels: Array) -> Array:
        """Return H q (N,), H the Hessian of the mean negative log-likelihood of some samples, at weights as in use."""

    def named(self, weights: Array) -> dict[str, Array]:
        """Return views of the weights, by name and in shape."""

    def torch_layers(self, weights: Array) -> dict[str, torch.nn.Module]:
        """Return PyTorch layers by name, in turn from normalised images to logits; MissingPackageError without it."""
