"""What a trained model says of a data set: log-probabilities, and how right they are."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.data import datasets
from qnewton_mpi.data.parts import TEST, TRAIN, VALIDATION
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.images import write_image
from qnewton_mpi.files.whole import replace_whole, writing
from qnewton_mpi.results.layout import DIGEST
from qnewton_mpi.results.plotting import pyplot, save
from qnewton_mpi.trained import Model

IN_ALL = 30  # classes, beyond which the cells of a confusion matrix have no numbers
HEADER = ("sample", "label", "predicted")  # of a table of predictions, before a column for each class


@dataclass(frozen=True)
class Predictions:
    """Of n images and K classes.

    Attributes
    ----------
    log_probabilities : (n, K) float32
    labels : (n,) integers
        Indices of `classes`.
    classes : tuple of str
    part : str
        Of the data set: "train", "test", …
    """

    log_probabilities: NDArray[np.float32]
    labels: NDArray[Any]
    classes: tuple[str, ...]
    part: str

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each image, (n,)."""
        classes: NDArray[np.int64] = np.argmax(self.log_probabilities, axis=1)
        return classes

    @property
    def nll(self) -> float:
        """The mean negative log-likelihood of the labels, nats."""
        return -float(np.mean(self.log_probabilities[np.arange(len(self.labels)), self.labels], dtype=np.float64))

    @property
    def accuracy(self) -> float:
        """The fraction of the images that are classified correctly."""
        return float(np.mean(self.predicted == self.labels))

    @property
    def confusion(self) -> NDArray[np.int64]:
        """How many images of a class (row) are taken for another (column), (K, K)."""
        counts = np.zeros((len(self.classes),) * 2, np.int64)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts


def predict(model: Model, data: str | None = None, data_dir: str | None = None, part: str | None = None) -> Predictions:
    """Return what a model says of a part of a data set. Local.

    Parameters
    ----------
    model : Model
    data : str, optional
        As for `train`, but any parts will do, and pictures are resized as the run's were. Without it the run's own,
        these very ones.
    data_dir : str, optional
        As for `train`; without it the run's, for the run's own data.
    part : str, optional
        Else the one that was held out: "test", or what else there is.

    Raises
    ------
    UserError
        For data that cannot be had or are not the run's, a part that is not there, images of another shape, classes
        that the model does not know.
    """
    what = printable(datasets.short_name(data or str(model.options["data"])))
    if data:
        size = model.options.get("image_size") if Path(data).is_dir() else None
        parts, classes = datasets.read(data, data_dir, size)
    else:
        options: dict[str, Any] = {name: model.options.get(name) for name in datasets.OPTIONS}
        dataset = datasets.load(**options | ({"data_dir": data_dir} if data_dir else {}))
        if dataset.digest != model.options.get(DIGEST):
            raise UserError(f"{what}: are not the data that the run had: if you mean these, name them with --data")
        parts, classes = {name: (split.images, split.labels) for name, split in dataset.splits.items()}, dataset.classes
    name = part or next(name for name in (TEST, VALIDATION, TRAIN) if name in parts)
    if name not in parts:
        raise UserError(f"{what}: has no {printable(name)} part: there are {', '.join(parts)}")
    if unknown := [name for name in classes if name not in model.classes]:
        raise UserError(f"{what}: has a class {printable(unknown[0])}, which {printable(model.path)} does not know")
    places = np.array([model.classes.index(name) for name in classes])
    images, labels = parts[name]
    return Predictions(model(images), places[labels], model.classes, name)


def write(predictions: Predictions, path: Path) -> None:
    """Write predictions as a table (.csv), or to an HDF5 file. Local.

    Raises
    ------
    UserError
        Where they cannot be written.
    """
    with writing(path):
        if is_table(path):
            replace_whole(path, _table(predictions).encode())
        else:
            write_image(path, "predictions", lambda file: _fill(file, predictions))


def is_table(path: Path) -> bool:
    """Tell whether predictions are written to a file as a table."""
    return path.suffix.lower() == ".csv"


def _table(predictions: Predictions) -> str:
    names, text = predictions.classes, io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*HEADER, *(f"log p({name})" for name in names)])
    values = zip(predictions.labels, predictions.predicted, predictions.log_probabilities.tolist(), strict=True)
    rows.writerows(
        [k, names[label], names[best], *(f"{p:.7g}" for p in row)] for k, (label, best, row) in enumerate(values)
    )
    return text.getvalue()


def _fill(file: h5py.File, predictions: Predictions) -> None:
    file["log_probabilities"], file["labels"] = predictions.log_probabilities, predictions.labels
    file["predicted"] = predictions.predicted
    file["classes"] = [name.encode() for name in predictions.classes]


def text(predictions: Predictions) -> str:
    """Return the figures in a line, as the terminal shows them. Local."""
    count = len(predictions.labels)
    return f"{predictions.part}: {count:,} samples, NLL {predictions.nll:.4f}, accuracy {predictions.accuracy:.2%}"


def draw(predictions: Predictions, target: Path) -> None:
    """Draw the confusion matrix, each row in shares of its class. Local.

    Raises
    ------
    UserError
        Without matplotlib, or where the picture cannot be written.
    """
    plt = pyplot("a confusion matrix")
    counts, names = predictions.confusion, predictions.classes
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = min(12.0, 3 + 0.45 * len(names))
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label", title=text(predictions))
    if len(names) <= IN_ALL:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}" if count else "", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(picture, label="share of the label's images")
    save(plt, figure, target, dpi=150)
