"""A trained model, as `load` returns it: from images as files have them to classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.models.description import Description
from qnewton_mpi.results.layout import Parameters
from qnewton_mpi.training.saved import Saved, read, weights_for

if TYPE_CHECKING:
    import torch

AT_A_TIME = 1024  # images: what they take normalised stays small beside them


class Model:
    """A trained network with its normalisation inside. Local.

    log p = model(images), class = model.predict(images)

    Images are uint8 or float, (n, C, H, W), (n, H, W, C) or, of one channel, (n, H, W), with pixels in the unit of the
    training images: 0 … 255 of bytes. They are normalised here.

    Parameters
    ----------
    saved : Saved
        As `load` reads it.

    Attributes
    ----------
    description : Description
        The network, mean and deviation of the pixels, and `classes`, their names.
    parameters : dict of arrays
        By name and in shape: "conv1.weight", "conv1.bias", …; of a network of one's own its running statistics, too.
    options : mapping
        The options of the run.
    history : dict of (rows,) float64
        The run's evaluations by figure, as "test_nll"; empty for a checkpoint.
    path : Path

    Raises
    ------
    UserError
        For parameters without a network that this version can make.
    """

    def __init__(self, saved: Saved) -> None:
        self._saved, self.path, self.options, self.history = saved, saved.path, saved.options, saved.history
        where = printable(saved.path)
        if not saved.network:
            raise UserError(f"{where}: is of an earlier version, and says nothing of the normalisation: train again")
        try:
            self.description = Description.read(saved.network)
            self._network = self.description.build()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: is of a network that this version does not know") from error
        self._flat = weights_for(self._network, saved)
        self.parameters: Parameters = self._network.named(self._flat)

    def __reduce__(self) -> tuple[type[Model], tuple[Saved]]:
        return type(self), (self._saved,)

    def __repr__(self) -> str:
        channels, height, width = self._network.input_shape
        kind = self.description.network.get("factory", self.description.network["kind"])
        return f"<{kind} of {channels}×{height}×{width} images, {len(self.classes)} classes, from {self.path}>"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the outputs."""
        return self.description.classes

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return the log-probabilities of the classes, (n, K) float32: a row's exponentials add up to 1.

        Raises
        ------
        UserError
            For images of another shape, or pixels that are not in the unit of the training images.
        """
        pixels = self._as_trained(np.asarray(images))
        found = np.empty((len(pixels), len(self.classes)), np.float32)
        for start in range(0, len(pixels), AT_A_TIME):
            piece = slice(start, start + AT_A_TIME)
            found[piece] = self._network.log_probabilities(self._flat, self._normalised(pixels[piece]))
        return found

    def predict(self, images: NDArray[Any]) -> NDArray[np.int64]:
        """Return the most probable class of each image, (n,) indices of `classes`; for errors see a call."""
        classes: NDArray[np.int64] = np.argmax(self(images), axis=1)
        return classes

    def torch(self) -> torch.nn.Sequential:
        """Return a PyTorch module of the same, from images (n, C, H, W) to log-probabilities, to be trained further.

        Its first layer normalises; mean and deviation are buffers. Parameters have their names, in float32; those of a
        network of one's own with "network." before them, which is in the mode of evaluation.

        Raises
        ------
        MissingPackageError
            Without PyTorch.
        """
        layers = self._network.torch_layers(self._flat)
        from qnewton_mpi.models.reference import with_ends

        return with_ends(layers, *self._constants())

    def _constants(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return mean and deviation, (C, 1, 1)."""
        about, dtype = self.description, self._network.dtype
        return np.array(about.mean, dtype)[:, None, None], np.array(about.deviation, dtype)[:, None, None]

    def _normalised(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return some images as the network takes them; `UserError` for another unit."""
        if self.description.pixels == "uint8" and pixels.dtype.kind == "f":
            low, high = float(pixels.min()), float(pixels.max())
            if not (low >= 0 and (high == 0 or 1 < high <= 255)):
                raise UserError(
                    f"pixels of {low:.3g} … {high:.3g}, and the network was trained on 0 … 255: give them as their "
                    "files have them: they are normalised here"
                )
        mean, deviation = self._constants()
        normalised: NDArray[Any] = (pixels - mean) / deviation
        return normalised

    def _as_trained(self, images: NDArray[Any]) -> NDArray[Any]:
        """Return images as (n, C, H, W), views where they can be; `UserError` where they are of another shape."""
        channels, height, width = shape = self._network.input_shape
        if images.dtype.kind in "uif":
            if images.shape[1:] == shape:
                return images
            if images.shape[1:] == (height, width, channels):
                return images.transpose(0, 3, 1, 2)
            if channels == 1 and images.shape[1:] == (height, width):
                return images[:, None]
        wanted = [f"(n, {channels}, {height}, {width})", f"(n, {height}, {width}, {channels})"]
        wanted += [f"(n, {height}, {width})"] if channels == 1 else []
        raise UserError(
            f"images of shape {images.shape} and type {images.dtype}: must be numbers, {' or '.join(wanted)}"
        )


def load(path: str | os.PathLike[str], which: str = "last") -> Model:
    """Return the model that a run trained. Local, without MPI.

    Parameters
    ----------
    path : str or path
        The run's file, or its folder of checkpoints, of which the newest sound one counts.
    which : {"last", "ema", "tail", "best"}
        The last parameters; their exponential mean (`--ema`); the mean over the last quarter of the run; those with the
        lowest validation NLL, where there is a validation part. A run's file has the means once it is finished, a
        checkpoint the exponential one.

    Raises
    ------
    UserError
        For what is neither, does not have these parameters, or is of an earlier version and lacks the normalisation.
    """
    return Model(read(Path(path), which))
