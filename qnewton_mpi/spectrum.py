"""The spectrum of the Hessian of a run's loss: `qnewton-mpi spectrum`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.core.spectrum import Density, Eigenpairs, Matrix, density, leading
from qnewton_mpi.data import datasets
from qnewton_mpi.errors import UserError
from qnewton_mpi.files.images import write_image
from qnewton_mpi.files.whole import writing
from qnewton_mpi.models.convnet import ACTIVATIONS, Convnet
from qnewton_mpi.parallel import partition
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.plotting import pyplot, save
from qnewton_mpi.training.saved import read
from qnewton_mpi.training.whose import DIGEST

CHUNK = 1024  # samples of a gradient: a chunk in double precision stays small beside the data set
STEP = 1e-30  # h of the complex step, for a direction of length 1: its square vanishes beside anything
PROBES, LANCZOS_STEPS = 8, 60  # of the density

Gradient = Callable[[NDArray[np.complex128]], NDArray[np.complex128]]


@dataclass(frozen=True)
class Iterate:
    """Parameters, and what they were trained on.

    Attributes
    ----------
    parameters : (N,) float64
    data, activation : str
    validation : float or None
    image_size : str or None
        As of `train`: what was held out, and pictures resized to.
    digest : str or None
        Of the data; None is not compared.
    """

    parameters: Matrix
    data: str
    activation: str
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
    """H Q by complex steps of the gradient: H q = Im ∇f(w + i h q)/h, f the loss of all samples.

    Exact to rounding, without the cancellation of a difference (Squire and Trapp 1998, SIAM Review 40, 110), and
    without its trouble with max pooling and ReLU: a difference steps over their kinks, where the gradient jumps. The
    ranks share the samples; each adds up its own, and an Allreduce the ranks'. Collective.

    Parameters
    ----------
    gradient : callable
        This rank's part of ∇f at complex parameters (N,), analytic: the parts of all ranks add up to it. Local.
    parameters : (N,) float64
    communicator : Communicator
    tell : callable, optional
        Called after each direction, as for a progress bar.

    Examples
    --------
    Of ¼ Σ w⁴, H = diag(3 w²):

    >>> import numpy as np
    >>> product = HessianProduct(lambda w: w**3, np.array([1.0, 2.0]), Communicator())
    >>> product(np.array([[1.0, 1.0]])).tolist()
    [[3.0, 12.0]]
    """

    def __init__(
        self,
        gradient: Gradient,
        parameters: Matrix,
        communicator: Communicator,
        tell: Callable[[], object] = lambda: None,
    ) -> None:
        self.gradient, self.parameters, self.communicator, self.tell = gradient, parameters, communicator, tell

    def __call__(self, directions: Matrix) -> Matrix:
        """Return H Q for the rows of Q (k, N), the same on all ranks bit for bit."""
        part = np.empty_like(directions)
        for k, q in enumerate(directions):
            part[k] = self.gradient(self.parameters + 1j * STEP * q).imag / STEP
            self.tell()
        total = self.communicator.allreduce(part)
        with self.communicator.waiting():
            self.communicator.mpi.Bcast(total)  # an Allreduce need not round alike everywhere
        return total

    def block(self, span: slice) -> Callable[[Matrix], Matrix]:
        """Return the product with the diagonal block of some coordinates, (k, length of the span)."""

        def product(directions: Matrix) -> Matrix:
            whole = np.zeros((len(directions), len(self.parameters)))
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
    data, activation = (str(saved.options.get(name)) for name in ("data", "activation"))
    iterate = Iterate(saved.flat.astype(np.float64), data, activation, **options, digest=saved.options.get(DIGEST))
    if iterate.activation not in ACTIVATIONS:
        raise UserError(f"{path}: is of an activation that this version does not know")
    return iterate


def spectrum_of(
    iterate: Iterate,
    communicator: Communicator,
    count: int = 8,
    samples: int | None = None,
    by_layer: bool = False,
    with_density: bool = False,
    data_dir: str | None = None,
    tell: Callable[[], object] = lambda: None,
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
        Called after each product with a direction.

    Raises
    ------
    UserError
        On all ranks, for data that cannot be had, or parameters of another network.

    Examples
    --------
    >>> from qnewton_mpi.data.datasets import EMBEDDED
    >>> start = Convnet((1, 28, 28), "tanh").initial_parameters(seed=0).astype(float)
    >>> spectrum = spectrum_of(Iterate(start, EMBEDDED, "tanh"), Communicator(), count=2, samples=8)
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
    classes = len(dataset.classes)
    network = Convnet(dataset.input_shape, iterate.activation, dtype=np.complex128, classes=classes)
    if len(iterate.parameters) != network.size:
        found = f"{len(iterate.parameters):,} parameters"
        raise UserError(f"{found} are not those of the network for {dataset.name}, which has {network.size:,}")
    total = min(samples or len(dataset.train), len(dataset.train))
    mine = partition.share(total, communicator.size, communicator.rank)

    def gradient(parameters: NDArray[np.complex128]) -> NDArray[np.complex128]:
        found = np.zeros(network.size, np.complex128)
        for start in range(mine.start, mine.stop, CHUNK):
            chunk = slice(start, min(start + CHUNK, mine.stop))
            _, part = network.loss_and_gradient(parameters, *dataset.train.batch(chunk))
            found += (chunk.stop - chunk.start) / total * part
        return found

    product = HessianProduct(gradient, iterate.parameters, communicator, tell)
    random = np.random.default_rng(0)
    pairs = leading(product, random.standard_normal((count, network.size)), count)
    layers = {}
    if by_layer:
        for name, span in layer_spans(network).items():
            size = span.stop - span.start
            block = min(count, size)
            layers[name] = leading(product.block(span), random.standard_normal((block, size)), block)
    points = density(product, random.standard_normal((PROBES, network.size)), LANCZOS_STEPS) if with_density else None
    return Spectrum(pairs, layers, points)


def layer_spans(network: Convnet) -> dict[str, slice]:
    """Return where the layers, weights and biases, are among the parameters, by name. Local."""
    sizes = [int(np.prod(shape)) for shape in network.parameter_shapes]
    spans, start = {}, 0
    for k in range(0, len(sizes), 2):
        stop = start + sizes[k] + sizes[k + 1]
        spans[f"layer {k // 2 + 1}, {'×'.join(map(str, network.parameter_shapes[k]))}"] = slice(start, stop)
        start = stop
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
