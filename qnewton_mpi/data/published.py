"""The published data sets: where their files are looked for, and what is downloaded."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from qnewton_mpi.data.arrays import open_hdf5, read_members
from qnewton_mpi.data.parts import Parts, with_classes
from qnewton_mpi.data.readers import check_pair, read_cifar, read_idx
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.whole import reason

SAMPLE = "fashion-mnist-sample.h5"
SYSTEM_FOLDER = Path("/usr/share/datasets")
VARIABLE = "QNEWTON_DATA_DIR"

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IDX_SIDES = (28, 28)
CIFAR_FILES = (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin")


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
        From the files' paths to the parts, their labels indices of `classes`.
    classes : tuple of str
    """

    files: tuple[str, ...]
    folder: str
    downloads: dict[str, str]
    read: Callable[[list[Path]], Parts]
    classes: tuple[str, ...]


def _read_idx_set(paths: list[Path]) -> Parts:
    train, train_labels, test, test_labels = (read_idx(p, d) for p, d in zip(paths, (3, 1, 3, 1), strict=True))
    for path, images in ((paths[0], train), (paths[2], test)):
        if images.shape[1:] != IDX_SIDES:
            sides, wanted = ("×".join(map(str, s)) for s in (images.shape[1:], IDX_SIDES))
            raise UserError(f"{printable(path)}: has images of {sides} pixels, not {wanted}: it is another data set's")
    check_pair(paths[1], train, train_labels)
    check_pair(paths[3], test, test_labels)
    return {"train": (train[:, None], train_labels), "test": (test[:, None], test_labels)}


def _read_cifar_set(paths: list[Path]) -> Parts:
    parts = [read_cifar(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        check_pair(path, *part)
    *train, test = parts
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return {"train": (images, labels), "test": test}


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


def read_published(name: str, data_dir: str | None) -> tuple[Parts, tuple[str, ...]]:
    """Return the parts and the classes of a data set, from the files that `locate` finds. Local.

    Raises
    ------
    UserError
        For files that are missing, truncated, of the wrong magic number, with labels out of range or images of another
        size.
    """
    if name == EMBEDDED:
        # Its bytes, for HDF5 would want a lock on the file.
        with open_hdf5(io.BytesIO(resources.files(__package__).joinpath(SAMPLE).read_bytes())) as members:
            return with_classes(read_members(members), EMBEDDED)[0], FASHION
    paths = locate(name, data_dir)
    if paths is None:
        raise UserError(_missing(name, data_dir))
    return SOURCES[name].read(paths), SOURCES[name].classes


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


def download(name: str, data_dir: str | None = None) -> None:
    """Fetch a data set's published files into a subfolder of `data_dir` or of the cache; check their hashes. Local.

    Raises
    ------
    UserError
        Without a network, where the files cannot be written, or when a hash does not match.
    """
    import tarfile

    import pooch

    target = Path(_named(data_dir) or _cache()) / name
    unpack = pooch.Untar(extract_dir=".") if SOURCES[name].folder else None
    for url, md5 in SOURCES[name].downloads.items():
        try:
            pooch.retrieve(url, f"md5:{md5}", Path(url).name, target, processor=unpack)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(
                f"{name}: the download to {printable(target)} failed ({reason(error)}): run `qnewton-mpi data fetch "
                f"{name}` where there is a network, with a --data-dir that all nodes see"
            ) from error


def may_download(name: str, data_dir: str | None) -> bool:
    """Tell whether a data set is to be fetched: nothing was named, and nothing was found. Local."""
    return name in SOURCES and not _named(data_dir) and locate(name, None) is None


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
        f"no {name} files ({wanted}, …; .gz or not) in {places}: name their folder with --data-dir, or fetch them "
        f"where there is a network: qnewton-mpi data fetch {name}"
    )
