"""The spectrum of the Hessian of the mean training NLL at a run's parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qnewton_mpi.arrays import Matrix
from qnewton_mpi.core.layers import layer_shapes
from qnewton_mpi.core.spectrum import BLOCKS, Density, Eigenpairs, density, leading
from qnewton_mpi.hessian.iterate import Iterate, loaded
from qnewton_mpi.hessian.product import HessianProduct, of_loss
from qnewton_mpi.models.network import Network
from qnewton_mpi.parallel.communicator import Communicator

PROBES, LANCZOS_STEPS = 8, 60  # of the density


@dataclass(frozen=True)
class Spectrum:
    """What `spectrum_of` returns.

    Attributes
    ----------
    pairs : Eigenpairs
        Of the Hessian.
    layers : dict of Eigenpairs
        By the name of a layer: of its diagonal block of the Hessian.
    density : Density or None
    """

    pairs: Eigenpairs
    layers: dict[str, Eigenpairs]
    density: Density | None


def spectrum_of(
    iterate: Iterate,
    communicator: Communicator,
    count: int = 8,
    samples: int | None = None,
    by_layer: bool = False,
    with_density: bool = False,
    data_dir: str | None = None,
    tell: Callable[[int], object] = lambda most: None,
) -> Spectrum:
    """Return the leading eigenpairs of the Hessian of the mean training NLL at some parameters. Collective.

    Parameters
    ----------
    iterate : Iterate
    communicator : Communicator
    count : int
        How many pairs, of the largest |λ|.
    samples : int, optional
        The first so many training samples instead of all.
    by_layer : bool
        The leading pairs of each layer's diagonal block too, `count` of each.
    with_density : bool
        The spectral density too.
    data_dir : str, optional
        As for `train`.
    tell : callable, optional
        Called after each product with a direction with how many there are at most: the leading pairs may be found
        sooner.

    Raises
    ------
    UserError
        On all ranks, for data that cannot be had, or parameters of another network.

    Examples
    --------
    >>> from qnewton_mpi.data.datasets import EMBEDDED
    >>> from qnewton_mpi.models.convnet import Convnet
    >>> network = Convnet((1, 28, 28), "tanh")
    >>> start = Iterate(network.initial_parameters(seed=0).astype(float), EMBEDDED, network.description)
    >>> spectrum = spectrum_of(start, Communicator(), count=2, samples=8)
    >>> spectrum.pairs.vectors.shape
    (2, 15924)
    """
    network, dataset = loaded(iterate, communicator, data_dir)
    times = of_loss(network, iterate.weights, dataset, samples, communicator)
    spans = layer_spans(network) if by_layer else {}
    most = count * BLOCKS * (1 + len(spans)) + PROBES * LANCZOS_STEPS * with_density
    product = HessianProduct(times, network.size, communicator, lambda: tell(most))
    random = np.random.default_rng(0)

    def pairs_of(part: Callable[[Matrix], Matrix], size: int) -> Eigenpairs:
        block = min(count, size)
        return leading(part, random.standard_normal((block, size)), block)

    pairs = leading(product, random.standard_normal((count, network.size)), count)
    layers = {name: pairs_of(product.block(span), span.stop - span.start) for name, span in spans.items()}
    points = density(product, random.standard_normal((PROBES, network.size)), LANCZOS_STEPS) if with_density else None
    return Spectrum(pairs, layers, points)


def layer_spans(network: Network) -> dict[str, slice]:
    """Return where the layers, weights and biases, are among the parameters, by name. Local."""
    shapes, spans = iter(network.parameter_shapes), {}
    for k, layer in enumerate(layer_shapes(network.parameter_shapes), 1):
        spans[f"layer {k}, {'×'.join(map(str, next(shapes)))}"] = layer.span
        if layer.bias:
            next(shapes)
    return spans
