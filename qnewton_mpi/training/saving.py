"""The checkpoints of a run, as its loop opens, writes and goes back to them."""

from __future__ import annotations

from pathlib import Path

from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.log import LOG
from qnewton_mpi.training.checkpoint import Checkpoints
from qnewton_mpi.training.output import Output
from qnewton_mpi.training.parts import Parts


class Saving:
    """The checkpoints of a run, if it has a folder for them. All methods are collective.

    Parameters
    ----------
    parts : Parts
    output : Output
        Which is told of those that are written.
    """

    def __init__(self, parts: Parts, output: Output) -> None:
        self._parts, self._output = parts, output
        self._checkpoints: Checkpoints | None = None

    def open(self) -> int | None:
        """Return the step of the checkpoint that the run goes on from, if any.

        Raises
        ------
        UserError
            On every rank: for a folder that cannot be written or is another run's, a checkpoint that cannot be gone on
            from.
        """
        parts, training = self._parts, self._parts.config.training
        if training.checkpoint is None:
            return None
        self._checkpoints = Checkpoints(
            Path(training.checkpoint), parts.communicator, parts.exchange, parts.configuration, parts.description
        )
        self._checkpoints.prepare(training.resume, training.overwrite)
        return self.restore() if training.resume else None

    def restore(self) -> int | None:
        """Go back to the newest sound checkpoint; return its step, or None if there is none."""
        assert self._checkpoints is not None
        parts, communicator, exchange = self._parts, self._parts.communicator, self._parts.exchange
        communicator.enter("restore")
        step, passed_over = self._checkpoints.load(parts.things)
        for line in passed_over if communicator.rank == 0 else ():
            LOG.warning("passed over %s", line)
        if step is not None:
            counted = exchange.bytes_sent, exchange.bytes_sent_by_replicas
            parts.optimizer.parameters = exchange.collect(parts.optimizer.held)
            # The run that was not interrupted did without this collective.
            exchange.bytes_sent, exchange.bytes_sent_by_replicas = counted
            if step >= parts.steps != parts.averages.steps or step > parts.steps:
                raise UserError(
                    f"--resume: {self._checkpoints.folder} is at step {step} already, of {parts.steps}: ask for more "
                    "--steps or --epochs"
                )
            parts.averages.lengthen(parts.steps, step)
        communicator.enter("algebra")
        return step

    def save(self) -> bool:
        """Write a checkpoint, if there is a folder; return whether it was written.

        Where it cannot be, the run goes on: its state is not lost, and the next try may find room.
        """
        if self._checkpoints is None:
            return False
        communicator, step = self._parts.communicator, self._parts.position.step
        communicator.enter("checkpoint")
        self._output.before_save()
        try:
            self._checkpoints.save(step, self._parts.things)
        except UserError as error:
            if communicator.rank == 0:
                LOG.warning("%s; the run goes on", error)
            return False
        self._output.saved()
        communicator.enter("algebra")
        LOG.info("checkpoint of step %d in %s", step, self._checkpoints.folder)
        return True
