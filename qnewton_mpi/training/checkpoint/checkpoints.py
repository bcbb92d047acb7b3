"""The checkpoints of a run: made ready, saved and gone on from by all ranks, and compared with the run."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qnewton_mpi.core import state
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.whole import reason
from qnewton_mpi.models.description import changed
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.training.checkpoint.folder import (
    attempted,
    fresh,
    newest_sound,
    put_in_place,
    remove,
    steps_in,
    tidy,
)
from qnewton_mpi.training.checkpoint.layout import is_whole, name_of
from qnewton_mpi.training.checkpoint.reading import Saved
from qnewton_mpi.training.checkpoint.writing import Arrays, write_common, write_rank
from qnewton_mpi.training.whose import differences

T = TypeVar("T")
KEPT = 2
STEP = "position/step"


class Checkpoints:
    """The checkpoints of a run in a folder. All methods are collective.

    Parameters
    ----------
    folder : Path
    communicator : Communicator
    exchange : Exchange
        Which tells what each rank holds.
    configuration : mapping
        All options of the run and the digest of its data, compared with those of a checkpoint (`differences`).
    network : str
        Its `Description`, for those who load the parameters alone.
    """

    def __init__(
        self,
        folder: Path,
        communicator: Communicator,
        exchange: Exchange,
        configuration: Mapping[str, Any],
        network: str = "",
    ) -> None:
        self.folder, self.communicator, self.exchange = folder, communicator, exchange
        self.configuration, self.network = dict(configuration), network
        self._unsound: set[int] = set()  # steps that were passed over

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Make the folder, and see that it can be written and has no checkpoints of another run.

        Raises
        ------
        UserError
        """

        def make() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
                tidy(self.folder)
                earlier = steps_in(self.folder)
                if earlier and not resume:
                    if not overwrite:
                        raise UserError(
                            f"--checkpoint {self.folder} has checkpoints of an earlier run: go on with it by --resume, "
                            "name another folder, or remove them with --overwrite"
                        )
                    for step in earlier:
                        remove(self.folder / name_of(step))
            except (OSError, ValueError) as error:  # ValueError: a NUL in the path
                raise UserError(
                    f"--checkpoint {printable(self.folder)}: cannot be written ({reason(error)})"
                ) from error

        self.communicator.from_root(make)

    def save(self, step: int, things: Mapping[str, Any]) -> None:
        """Write the state of all things, by name, after a step.

        Raises
        ------
        UserError
            On every rank, where it cannot be written or is not finite; earlier checkpoints are then as they were.
        """
        final = self.folder / name_of(step)
        partial = final.with_name(f".{final.name}.partial")
        guarded = functools.partial(self._guarded, step)
        try:
            self.communicator.from_root(lambda: guarded(lambda: fresh(partial)))
            arrays, about = self.communicator.together(
                lambda: guarded(lambda: write_rank(partial, things, self.exchange))
            )
            with self.communicator.waiting():
                everyone = self.communicator.mpi.gather(about)
            self.communicator.from_root(lambda: guarded(lambda: self._finish(partial, step, arrays, everyone or [])))
        except UserError:
            if self.communicator.rank == 0:
                with contextlib.suppress(OSError):
                    remove(partial)
            raise

    def load(self, things: Mapping[str, Any]) -> tuple[int | None, list[str]]:
        """Restore the state of all things from the newest sound checkpoint.

        Returns
        -------
        step : int or None
            Of the checkpoint; None where there is none in the folder.
        passed_over : list of str
            Why newer ones are not sound, a line each.

        Raises
        ------
        UserError
            Where there are checkpoints but none is sound, or the configuration contradicts the newest sound one. No
            state has been changed.
        """

        def attempt(source: Path, step: int) -> tuple[list[state.Change] | None, str | None]:
            """Have all ranks read what they need; no rank leaves before all have: rank 0 may then remove the files."""
            changes, problem = self.communicator.together(
                lambda: attempted(source, lambda: self._checked(source, step, things))
            )
            return changes, self._first(problem)

        steps = self.communicator.from_root(lambda: steps_in(self.folder))
        found, changes, passed_over = newest_sound(self.folder, steps, attempt)
        self._unsound.update(step for step in steps if found is not None and step > found)
        state.assign(changes or [])
        return found, passed_over

    def _finish(self, partial: Path, step: int, arrays: Arrays, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Write what is common, give the checkpoint its name, and remove those that are not kept."""
        about = {
            "step": step,
            "size": self.exchange.size,
            "replicas": self.exchange.replicas,
            "configuration": self.configuration,
            "network": self.network,
        }
        write_common(partial, about, arrays, ranks)
        old = put_in_place(partial, self.folder / name_of(step))
        self._unsound.discard(step)
        for folder in (old, *self._superfluous(step)):
            with contextlib.suppress(OSError):  # the next save tries again
                remove(folder)

    def _superfluous(self, step: int) -> list[Path]:
        """Return the checkpoints from before a step that was saved but the newest sound ones.

        Later ones stay: there are none but those that were passed over, which the run replaces as it gets there.
        """
        earlier = [other for other in steps_in(self.folder) if other < step]
        sound = [other for other in earlier if other not in self._unsound and is_whole(self.folder / name_of(other))]
        return [self.folder / name_of(other) for other in earlier if other not in sound[1 - KEPT :]]

    def _checked(self, source: Path, step: int, things: Mapping[str, Any]) -> list[state.Change]:
        """Return what is to be restored on this rank, compared with its sums and with what is there. Local."""
        exchange, communicator = self.exchange, self.communicator
        wanted = {path: kind for name, thing in things.items() for path, kind, *_ in state.entries(thing, f"{name}/")}
        with contextlib.ExitStack() as stack:
            saved = Saved(source, step, stack)
            self._compare(source, saved.about)
            arrays = saved.read(wanted, exchange.held, communicator.rank, communicator.size)
        if arrays.get(STEP, step) != step:
            raise ValueError(f"its position is step {arrays[STEP]}")
        return [
            change
            for name, thing in things.items()
            for change in state.checked(thing, lambda path, _: arrays.get(path), f"{name}/")
        ]

    def _first(self, problem: str | None) -> str | None:
        """Return the lowest rank's problem on all ranks."""
        with self.communicator.waiting():
            return next((found for found in self.communicator.mpi.allgather(problem) if found), None)

    def _compare(self, source: Path, about: Mapping[str, Any]) -> None:
        """Raise `UserError` where a checkpoint is of a run with other options, or of another model."""
        if told := differences(about["configuration"], self.configuration, going_on=True):
            raise UserError(f"--resume: {source} is of another run: {told}")
        if about["size"] != self.exchange.size:
            raise UserError(
                f"--resume: {source} is of another run: of {about['size']} parameters, not {self.exchange.size}"
            )
        theirs, ours = (json.loads(text or "{}").get("network", {}) for text in (about.get("network"), self.network))
        if other := changed(theirs, ours):
            raise UserError(
                f"--resume: {source} is of another run: {printable(other)} was another, as the module has changed since"
            )

    def _guarded(self, step: int, action: Callable[[], T]) -> T:
        """Run an action; raise `UserError` where the system or HDF5 refuses to write, or state is not to be written."""
        try:
            return action()
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            raise UserError(f"checkpoint of step {step} not written to {self.folder}: {reason(error)}") from error
