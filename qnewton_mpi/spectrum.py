"""The spectrum of the Hessian of a run's loss: `qnewton-mpi spectrum`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.arrays import Matrix
from qnewton_mpi.core.layers import layer_shapes
from qnewton_mpi.core.spectrum import BLOCKS, Density, Eigenpairs, density, leading
from qnewton_mpi.data import datasets
from qnewton_mpi.errors import UserError
from qnewton_mpi.files.images import write_image
from qnewton_mpi.files.whole import writing
from qnewton_mpi.models.choice import build
from qnewton_mpi.models.description import Description
from qnewton_mpi.models.layers import ACTIVATIONS
from qnewton_mpi.models.network import Network
from qnewton_mpi.parallel import partition
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.results.plotting import pyplot, save
from qnewton_mpi.training.saved import read
from qnewton_mpi.training.whose import DIGEST

CHUNK = 1024  # samples of a gradient: a chunk in double precision stays small beside the data set
PROBES, LANCZOS_STEPS = 8, 60  # of the density

Vector = NDArray[np.float64]


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

    weights: Matrix
    data: str
    network: Mapping[str, Any]
    validation: float | None = None
    image_size: str | None = None
    digest: str | None = None


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


class HessianProduct:
    """H Q, H the Hessian of the loss of all samples: the ranks share them, and an Allreduce adds up. Collective.

    Parameters
    ----------
    times : callable
        This rank's part of H q (N,), for q (N,): the parts of all ranks add up to it. Local.
    size : int
        N.
    communicator : Communicator
    tell : callable, optional
        Called after each direction, as for a progress bar.

    Examples
    --------
    >>> import numpy as np
    >>> product = HessianProduct(lambda q: np.array([3.0, 12.0]) * q, 2, Communicator())
    >>> product(np.array([[1.0, 1.0]])).tolist()
    [[3.0, 12.0]]
    """

    def __init__(
        self,
        times: Callable[[Vector], Vector],
        size: int,
        communicator: Communicator,
        tell: Callable[[], object] = lambda: None,
    ) -> None:
        self.times, self.size, self.communicator, self.tell = times, size, communicator, tell

    def __call__(self, directions: Matrix) -> Matrix:
        """Return H Q for the rows of Q (k, N), the same on all ranks bit for bit."""
        part = np.empty_like(directions)
        for k, q in enumerate(directions):
            part[k] = self.communicator.together(lambda q=q: self.times(q))  # type: ignore[misc]
            self.tell()
        total = self.communicator.allreduce(part)
        self.communicator.broadcast(total)  # an Allreduce need not round alike everywhere
        return total

    def block(self, span: slice) -> Callable[[Matrix], Matrix]:
        """Return the product with the diagonal block of some coordinates, (k, length of the span)."""

        def product(directions: Matrix) -> Matrix:
            whole = np.zeros((len(directions), self.size))
            whole[:, span] = directions
            return self(whole)[:, span]

        return product


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
    total = min(samples or len(dataset.train), len(dataset.train))
    mine = partition.share(total, communicator.size, communicator.rank)

    def times(direction: Vector) -> Vector:
        found = np.zeros(network.size)
        for start in range(mine.start, mine.stop, CHUNK):
            chunk = slice(start, min(start + CHUNK, mine.stop))
            part = network.hessian_times(iterate.weights, direction, *dataset.train.batch(chunk))
            found += (chunk.stop - chunk.start) / total * part
        return found

    spans = layer_spans(network) if by_layer else {}
    most = count * BLOCKS * (1 + len(spans)) + PROBES * LANCZOS_STEPS * with_density
    product = HessianProduct(times, network.size, communicator, lambda: tell(most))
    random = np.random.default_rng(0)
    pairs = leading(product, random.standard_normal((count, network.size)), count)
    layers = {}
    for name, span in spans.items():
        size = span.stop - span.start
        block = min(count, size)
        layers[name] = leading(product.block(span), random.standard_normal((block, size)), block)
    points = density(product, random.standard_normal((PROBES, network.size)), LANCZOS_STEPS) if with_density else None
    return Spectrum(pairs, layers, points)


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


def layer_spans(network: Network) -> dict[str, slice]:
    """Return where the layers, weights and biases, are among the parameters, by name. Local."""
    shapes, spans = iter(network.parameter_shapes), {}
    for k, layer in enumerate(layer_shapes(network.parameter_shapes), 1):
        spans[f"layer {k}, {'×'.join(map(str, next(shapes)))}"] = slice(layer.start, layer.stop)
        if layer.bias:
            next(shapes)
    return spans


def write(spectrum: Spectrum, path: Path) -> None:
    """Write eigenvalues, residuals and vectors, those of the layers, and the density to an HDF5 file. Local.

    Raises
    ------
    UserError
        Where it cannot be written.
    """

    def fill(file: h5py.File) -> None:
        for name, pairs in {"hessian": spectrum.pairs, **spectrum.layers}.items():
            group = file.create_group(name)
            group["eigenvalues"], group["eigenvectors"] = pairs.values, pairs.vectors
            group["residuals"] = pairs.residuals
        if spectrum.density is not None:
            file["density/nodes"], file["density/weights"] = spectrum.density.nodes, spectrum.density.weights

    with writing(path):
        write_image(path, "spectrum", fill)


def text(spectrum: Spectrum) -> str:
    """Return the tables, as the terminal shows them. Local."""
    lines = []
    for name, pairs in {"Hessian": spectrum.pairs, **spectrum.layers}.items():
        lines += ["", f"{name}: {pairs.products} products", "  eigenvalue    residual"]
        lines += [f"{v:12.5g}{r:12.2g}" for v, r in zip(pairs.values, pairs.residuals, strict=True)]
    return "\n".join(lines[1:])


def draw(spectrum: Spectrum, target: Path) -> None:
    """Draw the density, and the leading eigenvalues as ticks. Local.

    Raises
    ------
    UserError
        Without matplotlib, or where the picture cannot be written.
    """
    plt = pyplot("--density")
    points = spectrum.density
    assert points is not None
    low, high = points.nodes.min(), points.nodes.max()
    width = (high - low) / 200
    at = np.linspace(low - 4 * width, high + 4 * width, 1000)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.semilogy(at, np.maximum(points.smoothed(at, width), 1e-12))
    axes.plot(spectrum.pairs.values, np.full(len(spectrum.pairs.values), 1e-6), "k|", label="leading eigenvalues")
    axes.set(xlabel="eigenvalue λ", ylabel="density", ylim=(1e-7, None))
    axes.legend()
    axes.grid(True, alpha=0.3)
    save(plt, figure, target, dpi=150)
