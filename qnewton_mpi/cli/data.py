"""`qnewton-mpi data`: fetch a published data set, or say what is in one, one's own too."""

from __future__ import annotations

import argparse
import shlex

from qnewton_mpi.cli.arguments import Commands, add_command
from qnewton_mpi.errors import UserError, printable

MOST_CLASSES = 20  # that are named

EXAMPLES = (
    "qnewton-mpi data fetch cifar10",
    "qnewton-mpi data fetch mnist --data-dir /scratch/data",
    "qnewton-mpi data info photos --image-size 32x32",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands, "data", "fetch a published data set, or tell what is in one, also in your own", EXAMPLES
    )
    parser.add_argument(
        "action", choices=("fetch", "info"), help="fetch: download it, as on a login node; info: sizes, classes, digest"
    )
    parser.add_argument("data", metavar="NAME|PATH", help="as --data of train; to fetch, the name of a published one")
    parser.add_argument("--data-dir", metavar="FOLDER", help="as for train; files are fetched to a folder in it")
    parser.add_argument("--image-size", metavar="HEIGHTxWIDTH", help="as for train, of info")
    parser.set_defaults(process=process, alone=True)


def process(command: argparse.Namespace) -> None:
    """Fetch, or tell."""
    if command.action == "fetch":
        print(fetch(command.data, command.data_dir), flush=True)
    else:
        print(info(command.data, command.data_dir, command.image_size), flush=True)


def fetch(name: str, data_dir: str | None) -> str:
    """Have a published data set's files, and return where they are and how to use them."""
    from qnewton_mpi.data.published import EMBEDDED, SOURCES, download, locate

    if name == EMBEDDED:
        return f"{name} comes with the package\nuse it: {usage(name, data_dir)}"
    if name not in SOURCES:
        raise UserError(f"{printable(name)}: is no published data set: these are {', '.join(SOURCES)}")
    if locate(name, data_dir) is None:
        download(name, data_dir)
    paths = locate(name, data_dir)
    assert paths is not None
    return f"{name}: {len(paths)} files in {printable(paths[0].parent)}\nuse it: {usage(name, data_dir)}"


def info(data: str, data_dir: str | None, image_size: str | None) -> str:
    """Return what is in a data set, as a terminal shows it."""
    import numpy as np

    from qnewton_mpi.core.settings import build
    from qnewton_mpi.data import datasets
    from qnewton_mpi.options import TrainSettings

    options = {"data": data, "data_dir": data_dir, "image_size": image_size}
    build(TrainSettings, {name: value for name, value in options.items() if value is not None})
    parts, classes = datasets.read(data, data_dir, image_size)
    lines = [printable(datasets.short_name(data))]
    for name, (images, _) in parts.items():
        channels, height, width = images.shape[1:]
        values = f"{images.min():g} … {images.max():g}"
        lines.append(f"{name:<12}{len(images):,} images of {height}×{width} pixels, {channels} channel(s), {values}")
    name, (_, labels) = next(iter(parts.items()))
    counts = np.bincount(labels, minlength=len(classes))
    told = ", ".join(f"{label} {count:,}" for label, count in zip(classes[:MOST_CLASSES], counts, strict=False))
    more = ", …" if len(classes) > MOST_CLASSES else ""
    lines.append(f"{'classes':<12}{len(classes)}, of the {name} images: {told}{more}")
    lines += [f"{'digest':<12}{datasets.digest_of(parts)}", f"{'use it':<12}{usage(data, data_dir, image_size)}"]
    return "\n".join(lines)


def usage(data: str, data_dir: str | None, image_size: str | None = None) -> str:
    """Return the command that trains on a data set."""
    words = ["qnewton-mpi", "train", "--data", data]
    words += ["--data-dir", data_dir] if data_dir else []
    words += ["--image-size", image_size] if image_size else []
    return printable(shlex.join(words))
