"""The log of a run: on stderr from rank 0, warnings from the others too; in a file for each rank where wanted."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.whole import check_replaceable, reason
from qnewton_mpi.parallel.communicator import Communicator

LOG = logging.getLogger("qnewton_mpi")


class BesideBar(logging.Handler):
    """Writes lines to stderr above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


class LogFile(logging.FileHandler):
    """Writes lines to a file; one that finds no room there is lost, and the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Leave the line out."""

    def close(self) -> None:
        """Close the file; what it still has to write is lost where there is no room."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logging_to(communicator: Communicator, folder: str | None) -> Iterator[None]:
    """Have `LOG` write while the context lasts: each line says rank and size. Collective.

    Parameters
    ----------
    communicator : Communicator
    folder : str or None
        For rank-00003-of-00008.log and the like, which get everything; made if it is not there.

    Raises
    ------
    UserError
        On every rank, where the folder cannot be written.
    """
    rank, size = communicator.rank, communicator.size
    layout = logging.Formatter(f"%(asctime)s rank {rank}/{size} %(levelname)s %(message)s")
    handlers: list[logging.Handler] = [BesideBar()]
    handlers[0].setLevel(logging.INFO if rank == 0 else logging.WARNING)

    def open_file() -> None:
        if folder is not None:
            path = Path(folder) / f"rank-{rank:05d}-of-{size:05d}.log"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                check_replaceable(path)
                handlers.append(LogFile(path, encoding="utf-8"))
            except OSError as error:
                raise UserError(f"--log-dir {printable(folder)}: cannot be written ({reason(error)})") from error

    communicator.together(open_file)
    level = LOG.level
    LOG.setLevel(logging.DEBUG)
    for handler in handlers:
        handler.setFormatter(layout)
        LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.setLevel(level)
        for handler in handlers:
            LOG.removeHandler(handler)
            handler.close()
