"""A spectrum as tables on the terminal, as an HDF5 file, as a picture. Local."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from qnewton_mpi.files.images import write_image
from qnewton_mpi.files.whole import writing
from qnewton_mpi.hessian.spectrum import Spectrum
from qnewton_mpi.results.plotting import pyplot, save


def text(spectrum: Spectrum) -> str:
    """Return the tables, as the terminal shows them. Local."""
    lines = []
    for name, pairs in {"Hessian": spectrum.pairs, **spectrum.layers}.items():
        lines += ["", f"{name}: {pairs.products} products", "  eigenvalue    residual"]
        lines += [f"{v:12.5g}{r:12.2g}" for v, r in zip(pairs.values, pairs.residuals, strict=True)]
    return "\n".join(lines[1:])


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
