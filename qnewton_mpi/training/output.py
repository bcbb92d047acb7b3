"""What a run leaves and tells as it goes on: its file, its progress, those who listen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qnewton_mpi.arrays import Array
from qnewton_mpi.data.parts import TRAIN
from qnewton_mpi.errors import DivergedError, printable
from qnewton_mpi.parallel.log import LOG
from qnewton_mpi.results.layout import NONE_SAVED, SAVED, SAVED_IN
from qnewton_mpi.results.runfile import RunFile
from qnewton_mpi.training.listeners import Listener, Listeners
from qnewton_mpi.training.parts import Parts
from qnewton_mpi.training.progress import Progress
from qnewton_mpi.training.whose import Rows

SECONDS = ("seconds_gradient", "seconds_communication", "seconds_algebra")
DIVERGED = 2.0  # times the first training NLL, and a run that ends there has diverged


class Output:
    """The output of a run.

    Parameters
    ----------
    parts : Parts
    labels : mapping
        More attributes for the run's file.
    listener : Listener or None

    Attributes
    ----------
    file : RunFile or None
        On rank 0, while it is open.
    """

    def __init__(self, parts: Parts, labels: Mapping[str, Any], listener: Listener | None) -> None:
        self._parts, self._labels = parts, labels
        self._listeners = Listeners(parts.communicator, listener, parts.steps, parts.order.steps_per_epoch)
        self.file: RunFile | None = None

    @contextlib.contextmanager
    def opened(self, resumed: int | None, rows: Rows) -> Iterator[None]:
        """Have all of it while the context lasts; the file then says how it was left. Collective.

        Parameters
        ----------
        resumed : int, optional
            The step that the run goes on after.
        rows : Rows
            What becomes of the file that is there.
        """
        parts = self._parts
        writes = parts.communicator.rank == 0 and rows is not Rows.DONE
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._listeners.open(parts.config, parts.identifier, resumed, rows))
            self.file = parts.communicator.together(
                lambda: stack.enter_context(self._file(resumed, rows)) if writes else None
            )
            self._progress = self._opened_progress()
            stack.enter_context(contextlib.closing(self._progress))
            yield

    def _file(self, resumed: int | None, rows: Rows) -> RunFile:
        """Return the run's file. Local."""
        parts, folder = self._parts, self._parts.config.training.checkpoint
        figures = ("step", *parts.optimizer.figure_names, *SECONDS)
        attributes = {**parts.attributes, **self._labels, "run": parts.identifier}
        if folder is not None:
            saved = NONE_SAVED if resumed is None else resumed
            attributes |= {SAVED: saved, SAVED_IN: printable(Path(folder).resolve())}
        best, told = parts.best.among({}, {}, 0) if parts.best is not None else ({}, {})
        attributes |= told
        iterates = parts.named({"": parts.weights, **best})
        kept = resumed if rows is Rows.KEPT else None
        return RunFile(parts.config.output, attributes, figures, iterates, kept)

    def _opened_progress(self) -> Progress:
        """Return what tells of the run, on one rank. Local."""
        parts, training = self._parts, self._parts.config.training
        kind = training.progress if parts.communicator.rank == 0 else "off"
        epochs, label = parts.steps / parts.order.steps_per_epoch, f"{training.method} M={parts.config.replicas}"
        before = parts.position.step, parts.position.evaluation_seconds
        return Progress(kind, parts.steps, epochs, training.batch, label, *before)

    def add_step(self, step: int, row: Mapping[str, float]) -> None:
        """Tell of a step. Collective where there is a callback for it, else local."""
        self._progress.step(row["loss"])
        if self.file is not None:
            self.file.add_step(row)
        self._listeners.tell("step", step, row)

    def add_evaluation(self, figures: Mapping[str, float], averages: Mapping[str, Array]) -> None:
        """Tell of an evaluation after the present step. Collective where there is a callback, else local.

        Parameters
        ----------
        figures : mapping
        averages : mapping
            The averages that were evaluated, by their names in the run's file.
        """
        parts, step = self._parts, self._parts.position.step
        if self.file is not None:
            kept, told = parts.best.among(averages, figures, step) if parts.best is not None else ({}, {})
            self.file.attributes |= told
            self.file.add_epoch(figures, parts.named({"": parts.weights, **averages, **kept}))
        LOG.debug("step %d: train NLL %.6f, %d bytes sent", step, figures["train_nll"], figures["bytes_sent"])
        self._progress.evaluated(figures, [part for part in parts.dataset.splits if part != TRAIN])
        self._listeners.tell("evaluation", step, figures)

    def before_save(self) -> None:
        """Have the file no older than the checkpoint to come. Local."""
        if self.file is not None:
            self.file.flush()

    def saved(self) -> None:
        """Note in the file that there is a checkpoint of the present step. Local."""
        if self.file is not None:
            first = self.file.attributes[SAVED] == NONE_SAVED
            self.file.attributes[SAVED] = self._parts.position.step
            if first:  # later ones are told with the next rows: that there is one is what counts
                self.file.flush()

    def check_end(self) -> None:
        """Raise `DivergedError` where the run ended far above where it began. Local."""
        if self.file is None:
            return
        parts = self._parts
        nll = self.file.evaluations("train_nll")
        chance = math.log(parts.network.classes)  # below which a run may have begun that others' parameters were given
        if len(nll) and not nll[-1] <= DIVERGED * max(nll[0], chance):
            raise DivergedError(
                f"diverged: training NLL {nll[-1]:.4g} after step {parts.position.step}, {nll[0]:.4g} at the start "
                f"({printable(parts.config.output)} has the curve): use a smaller --lr, or auto"
            )
