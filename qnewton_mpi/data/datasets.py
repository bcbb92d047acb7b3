"""The data sets by name: where their files are looked for, what is downloaded, and the arrays they become."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qnewton_mpi.data.readers import Bytes, check_pair, read_cifar, read_idx
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.whole import reason
from qnewton_mpi.parallel.device import Array

SAMPLE = "fashion-mnist-sample.h5"
SYSTEM_FOLDER = Path("/usr/share/datasets")
VARIABLE = "QNEWTON_DATA_DIR"

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IDX_SIDES = (28, 28)
CIFAR_FILES = (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin")
OPTIONS = ("data", "data_dir")  # of `train`, that say what `load` returns


@dataclass(frozen=True)
class Split:
    """Images and labels of one purpose, in host or GPU memory.

    Attributes
    ----------
    images : (n, C, H, W) uint8
    labels : (n,) uint8
    scale, shift : (C, 1, 1) float
        A pixel p enters the network as p · scale + shift: zero mean and unit variance over the training images.
    """

    images: Array
    labels: Array
    scale: Array
    shift: Array

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Any) -> tuple[Array, Array]:
        """Return normalised images (b, C, H, W) and labels (b,) of an index array or a slice."""
        return self.images[indices] * self.scale + self.shift, self.labels[indices]


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of one data set.

    Attributes
    ----------
    classes : tuple of str
        Names, in the order of the labels.
    digest : str
        Of all images and labels: data sets with the same are the same.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    digest: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def splits(self) -> dict[str, Split]:
        """The parts that there are, by their names."""
        return {"train": self.train, "test": self.test}


@dataclass(frozen=True)
class Source:
    """A published data set: how its files are called and read, and where they come from.

    Attributes
    ----------
    files : tuple of str
        Names without ".gz"; either is accepted.
    folder : str
        The subfolder that the published archive unpacks to, if any.
    downloads : dict
        URL to MD5, as published with the files.
    read : callable
        From the files' paths to (train images, train labels, test images, test labels).
    classes : tuple of str
    """

    files: tuple[str, ...]
    folder: str
    downloads: dict[str, str]
    read: Callable[[list[Path]], tuple[Bytes, Bytes, Bytes, Bytes]]
    classes: tuple[str, ...]


def _read_idx_set(paths: list[Path]) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    train, train_labels, test, test_labels = (read_idx(p, d) for p, d in zip(paths, (3, 1, 3, 1), strict=True))
    for path, images in ((paths[0], train), (paths[2], test)):
        if images.shape[1:] != IDX_SIDES:
            sides, wanted = ("×".join(map(str, s)) for s in (images.shape[1:], IDX_SIDES))
            raise UserError(f"{printable(path)}: has images of {sides} pixels, and the network takes {wanted}")
    check_pair(paths[1], train, train_labels)
    check_pair(paths[3], test, test_labels)
    return train[:, None], train_labels, test[:, None], test_labels


def _read_cifar_set(paths: list[Path]) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    parts = [read_cifar(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        check_pair(path, *part)
    *train, test = parts
    return np.concatenate([p[0] for p in train]), np.concatenate([p[1] for p in train]), *test


DIGITS = tuple("0123456789")
FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SOURCES = {
    "mnist": Source(
        IDX_FILES,
        "",
        {
            f"{MNIST_URL}{IDX_FILES[0]}.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            f"{MNIST_URL}{IDX_FILES[1]}.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            f"{MNIST_URL}{IDX_FILES[2]}.gz": "9fb629c4189551a2d022fa330f9573f3",
            f"{MNIST_URL}{IDX_FILES[3]}.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        _read_idx_set,
        DIGITS,
    ),
    "fashion-mnist": Source(
        IDX_FILES,
        "",
        {
            f"{FASHION_URL}{IDX_FILES[0]}.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            f"{FASHION_URL}{IDX_FILES[1]}.gz": "25c81989df183df01b3e8a0aad5dffbe",
            f"{FASHION_URL}{IDX_FILES[2]}.gz": "bef4ecab320f06d8554ea6380940ec79",
            f"{FASHION_URL}{IDX_FILES[3]}.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        _read_idx_set,
        FASHION,
    ),
    "cifar10": Source(
        CIFAR_FILES,
        "cifar-10-batches-bin",
        {f"{CIFAR_URL}cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        _read_cifar_set,
        CIFAR,
    ),
}

EMBEDDED = "fashion-mnist-sample"
NAMES = (EMBEDDED, *SOURCES)


def load(data: str, data_dir: str | None = None, xp: ModuleType = np, dtype: Any = np.float32) -> Dataset:
    """Return a data set from the files that `locate` finds. Local: every rank reads its node's files.

    Raises
    ------
    UserError
        For files that are missing, truncated, of the wrong magic number, with labels out of range, with images that
        are of another size or all of one grey.
    """
    classes: tuple[str, ...]
    if data == EMBEDDED:
        arrays, classes = _read_sample(), FASHION
    else:
        paths = locate(data, data_dir)
        if paths is None:
            raise UserError(_missing(data, data_dir))
        arrays, classes = SOURCES[data].read(paths), SOURCES[data].classes
    train, train_labels, test, test_labels = arrays
    mean = train.mean(axis=(0, 2, 3))
    # Var = E[p²] − E[p]², from the histogram of the 256 pixel values: no float copy of the images.
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in train.swapaxes(0, 1)])
    if (constant := np.count_nonzero(counts, axis=1) == 1).any():
        raise UserError(
            f"{data}: all pixels of channel {int(constant.argmax())} of the training images are equal: nothing to learn"
        )
    second = counts @ np.arange(256.0) ** 2 / counts.sum(axis=1)
    scale = 1 / np.sqrt(second - mean**2)
    constants = [xp.asarray(c[:, None, None], dtype=dtype) for c in (scale, -mean * scale)]
    training, testing = (
        Split(xp.asarray(i), xp.asarray(la), *constants) for i, la in ((train, train_labels), (test, test_labels))
    )
    return Dataset(data, training, testing, classes, _digest(arrays))


def _digest(arrays: tuple[Bytes, ...]) -> str:
    """Return a digest of arrays of bytes and of their shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def locate(name: str, data_dir: str | None) -> list[Path] | None:
    """Return the paths of a data set's files, in the order of `Source.files`, or None where a file is missing. Local.

    A folder named by `data_dir`, or else by $QNEWTON_DATA_DIR, is the only one looked at; otherwise the system's
    (/usr/share/datasets) and the download cache. In each, a subfolder with the data set's name comes first.
    """
    source = SOURCES[name]
    for base in _folders(data_dir):
        for folder in (base / name / source.folder, base / source.folder, base / name, base):
            paths = [next((p for p in (folder / f, folder / f"{f}.gz") if _is_file(p)), None) for f in source.files]
            found = [p for p in paths if p is not None]
            if len(found) == len(paths):
                return found
    return None


def _is_file(path: Path) -> bool:
    """Tell whether there is a file; not where the path is none, as of too many characters."""
    try:
        return path.is_file()
    except OSError:
        return False


def download(name: str) -> None:
    """Fetch a data set's published files into the cache and check their hashes. Local: call on one rank of a node.

    Raises
    ------
    UserError
        Without a network, or when a hash does not match.
    """
    import tarfile

    import pooch

    unpack = pooch.Untar(extract_dir=".") if SOURCES[name].folder else None
    for url, md5 in SOURCES[name].downloads.items():
        try:
            pooch.retrieve(url, f"md5:{md5}", Path(url).name, _cache() / name, processor=unpack)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"{_missing(name, None)}; the download failed: {reason(error)}") from error


def may_download(name: str, data_dir: str | None) -> bool:
    """Tell whether a data set is to be fetched: nothing was named, and nothing was found. Local."""
    return name != EMBEDDED and not _named(data_dir) and locate(name, None) is None


def _named(data_dir: str | None) -> str | None:
    return data_dir or os.environ.get(VARIABLE)


def _cache() -> Path:
    import pooch

    return Path(pooch.os_cache("qnewton_mpi"))


def _folders(data_dir: str | None) -> list[Path]:
    named = _named(data_dir)
    return [Path(named)] if named else [SYSTEM_FOLDER, _cache()]


def _missing(name: str, data_dir: str | None) -> str:
    places = " or ".join(printable(folder) for folder in _folders(data_dir))
    wanted = ", ".join(SOURCES[name].files[:2])
    return (
        f"no {name} files ({wanted}, …; .gz or not) in {places}: put them there, or name their folder with --data-dir"
    )


def _read_sample() -> tuple[Bytes, Bytes, Bytes, Bytes]:
    import h5py

    raw = resources.files(__package__).joinpath(SAMPLE).read_bytes()  # HDF5 would want a lock on the file
    with h5py.File(io.BytesIO(raw)) as file:
        train, train_labels, test, test_labels = (
            file[key][()] for key in ("train/images", "train/labels", "test/images", "test/labels")
        )
        return train, train_labels, test, test_labels
