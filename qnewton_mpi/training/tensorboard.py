"""Events for TensorBoard, by tensorboardX: what the run's file has as rows, in a folder beside it. Local, on one rank.

The files of a run have its identifier in their names. Where a run goes on from an earlier step, what they have of later
ones is cut off, and a mark tells a TensorBoard that is looking to forget it: no step is there twice.

tensorboardX's own writer has a thread and a queue, and waits for ever where the disk is full; its parts have neither.
"""

from __future__ import annotations

import contextlib
import math
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qnewton_mpi.errors import MissingPackageError, UserError, printable
from qnewton_mpi.files.whole import reason, writing
from qnewton_mpi.origin import pip_install
from qnewton_mpi.parallel.log import LOG

if TYPE_CHECKING:
    from qnewton_mpi.training.listeners import Record

PATTERN = "events.out.tfevents.*.qnewton-{run}-*"
GROUPS = {"evaluation": "epochs", "step": "steps"}  # as the run's file calls them
FLUSH_SECONDS = 5.0
LONGEST_RECORD = 1 << 20  # bytes; what promises more is damaged
FRAME = struct.Struct("<QI")  # before a record: its length, and a sum of that; a sum of the record follows it


def folder_of(output: Path) -> Path:
    """Return where the events of a run are, by its file."""
    return output.with_suffix(".tensorboard")


class Events:
    """The events of a run that begins or goes on, a context manager.

    What cannot be written is told once; the run goes on without.

    Parameters
    ----------
    folder : Path
        Made where it is not there.
    run : str
        The identifier of the run.
    resumed : int, optional
        The step that it goes on after.
    replaces : bool
        Whether events of other runs may be removed.

    Raises
    ------
    UserError
        Where the folder cannot be written or has events of another run.
    MissingPackageError
        Without tensorboardX.
    """

    def __init__(self, folder: Path, run: str, resumed: int | None, replaces: bool) -> None:
        try:
            import tensorboardX  # noqa: F401
        except ImportError as error:
            raise MissingPackageError(f"--log tensorboard needs tensorboardX: {pip_install('tensorboard')}") from error
        self.folder, self.run = folder, run
        self._file: Any = None
        self._last, self._flushed = 0, 0.0  # the last step that was told, and when the file was last put on the disk
        with writing(folder):
            others = set(folder.glob(PATTERN.format(run="*"))) - set(self._ours())
            if others and not replaces:
                raise UserError(
                    f"{printable(folder)}: has events of another run: name another --output, or replace them with "
                    "--overwrite"
                )
            for path in others:
                path.unlink()
            self._open(resumed or 0)

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._try(lambda file: file.close())

    def write(self, record: Record) -> None:
        """Add an evaluation or a step; after a step back to a checkpoint, in place of those that followed it."""
        if record.kind == "step" and record.step <= self._last:
            self._try(lambda file: file.close())
            self._try(lambda file: self._open(record.step - 1))
        self._last = max(self._last, record.step)
        values = {f"{GROUPS[record.kind]}/{name}": value for name, value in record.figures.items()}
        self._try(lambda file: self._add(file, record, values))

    def _add(self, file: Any, record: Record, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        told = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
            if not math.isnan(value) and not tag.endswith("/step")
        ]
        file.write_event(Event(wall_time=time.time(), step=record.step, summary=Summary(value=told)))
        if record.kind == "evaluation" or time.monotonic() - self._flushed > FLUSH_SECONDS:
            file.flush()
            self._flushed = time.monotonic()

    def _open(self, step: int) -> None:
        """Begin a file for what follows a step, and cut off what earlier ones have of it."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        for path in self._ours():
            cut(path, step)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._last, self._flushed = step, time.monotonic()
        self._file = EventsWriter(str(self.folder / "events"), f".qnewton-{self.run}-{step:010d}")
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._file.flush()

    def _ours(self) -> list[Path]:
        return sorted(self.folder.glob(PATTERN.format(run=self.run)))

    def _try(self, action: Any) -> None:
        file = self._file
        if file is None:
            return
        try:
            action(file)
        except (OSError, ValueError) as error:
            self._file = None
            with contextlib.suppress(OSError, ValueError):
                file.close()
            LOG.warning("%s: not written any more (%s); the run goes on", self.folder, reason(error))


def cut(path: Path, step: int) -> None:
    """Cut a file of events off before the first of a later step, or the first that is not whole. Local."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    with path.open("r+b") as file:
        end = 0
        while len(frame := file.read(FRAME.size)) == FRAME.size:
            size = FRAME.unpack(frame)[0]
            record = file.read(size + 4) if size < LONGEST_RECORD else b""
            try:
                event = Event.FromString(record[:size])
            except DecodeError:
                break
            if len(record) < size + 4 or event.step > step:
                break
            end = file.tell()
        file.truncate(end)
