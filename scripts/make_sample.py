#!/usr/bin/env python3
"""Make the sample that the package embeds: the first 10,000 training and 2,000 test images of Fashion-MNIST.

Usage: make_sample.py FOLDER      (the four published IDX files, plain or gzip)

Writes qnewton_mpi/data/fashion-mnist-sample.h5. Fashion-MNIST is under the MIT licence; its notice travels in the file
and in qnewton_mpi/data/LICENSE.fashion-mnist.
"""

import argparse
import sys
from pathlib import Path

import h5py

from qnewton_mpi.data import published

TRAIN, TEST = 10_000, 2_000


def main(folder: str) -> None:
    """Write the sample from the full files under a folder."""
    paths = published.locate("fashion-mnist", folder)
    if paths is None:
        sys.exit(f"no Fashion-MNIST files in {folder}")
    parts = published.SOURCES["fashion-mnist"].read(paths)
    home = Path(published.__file__).parent
    with h5py.File(home / published.SAMPLE, "w") as file:
        file.attrs["source"] = (
            "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747), first images of each split"
        )
        file.attrs["license"] = (home / "LICENSE.fashion-mnist").read_text()
        for split, count in (("train", TRAIN), ("test", TEST)):
            images, labels = parts[split]
            options = {"compression": "gzip", "compression_opts": 9, "track_times": False}
            file.create_dataset(f"{split}/images", data=images[:count], chunks=(500, 1, 28, 28), **options)
            file.create_dataset(f"{split}/labels", data=labels[:count], **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    main(parser.parse_args().folder)
