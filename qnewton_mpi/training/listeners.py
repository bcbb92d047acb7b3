"""Who else is told of a run while it goes on, on rank 0: a function of a program's own, TensorBoard."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from qnewton_mpi.config import RunConfig
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.training.tensorboard import Events, folder_of
from qnewton_mpi.training.whose import Rows


@dataclass(frozen=True)
class Record:
    """An evaluation or a step of a run, as a callback gets it.

    Attributes
    ----------
    kind : {"evaluation", "step"}
    step, epoch : int, float
        How far the run is: steps, and passes over the training set.
    steps : int
        In the whole run.
    figures : mapping of str to float
        By the names that the run's file has them under: of an evaluation those of /epochs, of a step those of /steps.
        NaN where there is no such part of the data.
    """

    kind: Literal["evaluation", "step"]
    step: int
    epoch: float
    steps: int
    figures: Mapping[str, float]


Callback = Callable[[Record], object]


@dataclass(frozen=True)
class Listener:
    """A program's own function, and whether it wants steps as well as evaluations.

    Attributes
    ----------
    call : callable, optional
        On rank 0; other ranks need none.
    steps : bool
    """

    call: Callback | None = None
    steps: bool = False

    def check(self) -> None:
        """Raise `UserError` for what cannot be called. Local."""
        if self.call is not None and not callable(self.call):
            raise UserError(f"callback={self.call!r:.60}: must be a function of one argument, a Record")


@dataclass
class Listeners:
    """All that listen to a run.

    Attributes
    ----------
    communicator : Communicator
    listener : Listener or None
        The same on all ranks, but for its `call`.
    steps, steps_per_epoch : int
        In the whole run, and in a pass over the training set.
    events : Events or None
        On rank 0.
    """

    communicator: Communicator
    listener: Listener | None
    steps: int
    steps_per_epoch: int
    events: Events | None = None

    @contextlib.contextmanager
    def open(self, config: RunConfig, run: str, resumed: int | None, rows: Rows) -> Iterator[None]:
        """Have the loggers of the configuration while the context lasts. Collective.

        Parameters
        ----------
        config : RunConfig
        run : str
            The identifier of the run.
        resumed : int, optional
            The step that it goes on after.
        rows : Rows
            What becomes of the run's file, which is not written yet: where it is replaced, so are its events.

        Raises
        ------
        UserError
            On every rank, where a logger's package is missing, or what it would write is there already.
        """
        with contextlib.ExitStack() as stack:

            def begin() -> Events | None:
                if config.training.log is None or self.communicator.rank > 0 or rows is Rows.DONE:
                    return None
                replaced = config.training.overwrite or (rows is Rows.NEW and config.output.exists())
                return stack.enter_context(Events(folder_of(config.output), run, resumed, replaced))

            self.events = self.communicator.together(begin)
            yield

    def tell(self, kind: Literal["evaluation", "step"], step: int, figures: Mapping[str, float]) -> None:
        """Let all of them know. Collective where there is a callback for this, else local.

        Raises
        ------
        UserError
            On every rank, where the callback raises an exception.
        """
        record = Record(kind, step, step / self.steps_per_epoch, self.steps, MappingProxyType(dict(figures)))
        if self.events is not None:
            self.events.write(record)
        if self.listener is not None and (kind == "evaluation" or self.listener.steps):
            self.communicator.enter("callback")
            self.communicator.from_root(lambda: self._call(record))
            self.communicator.enter("algebra")

    def _call(self, record: Record) -> None:
        assert self.listener is not None
        if self.listener.call is None:
            return
        try:
            self.listener.call(record)
        except UserError:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = frames[min(1, len(frames) - 1)]  # in the callback itself, which this frame has called
            told = " ".join(str(error).split())
            raise UserError(
                f"the callback failed at the {record.kind} of step {record.step}: {type(error).__name__}: "
                f"{printable(told)} ({Path(place.filename).name}, line {place.lineno})"
            ) from error
