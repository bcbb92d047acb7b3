"""The tables of the benchmark: in Markdown, and in an HDF5 file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from qnewton_mpi.files.images import write_image
from qnewton_mpi.files.whole import writing


@dataclass
class Table:
    """A section of the benchmark: a title, and rows of numbers and words under a header."""

    title: str
    header: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)

    def text(self) -> str:
        """Return it in Markdown."""
        cells = [[f"{x:.3g}" if isinstance(x, float) else f"{x}" for x in row] for row in self.rows]
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, ["---"] * len(self.header), *cells)]
        return f"### {self.title}\n\n" + "\n".join(lines) + "\n"

    def write(self, file: h5py.File) -> None:
        """Write a group with a data set for each column."""
        group = file.create_group(self.title)
        for name, column in zip(self.header, zip(*self.rows, strict=True), strict=True):
            group[name.replace("/", " over ")] = list(column)


def write(tables: Sequence[Table], path: Path) -> None:
    """Write the tables to an HDF5 file; `UserError` where it cannot be written."""

    def fill(file: h5py.File) -> None:
        for table in tables:
            table.write(file)

    with writing(path):
        write_image(path, "benchmark", fill)
