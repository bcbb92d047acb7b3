"""The training loop: steps, evaluations and checkpoints in turn, until the run is over or told to stop."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array, to_host
from qnewton_mpi.config import RunConfig
from qnewton_mpi.core.schedules import factor
from qnewton_mpi.errors import InterruptedRunError, NonFiniteGradientError, UserError
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.log import LOG, logging_to
from qnewton_mpi.parallel.watchdog import Watchdog
from qnewton_mpi.results.layout import EPOCH_FIGURES
from qnewton_mpi.training.evaluation import evaluate
from qnewton_mpi.training.interruption import Interruption
from qnewton_mpi.training.listeners import Listener
from qnewton_mpi.training.output import SECONDS, Output
from qnewton_mpi.training.parts import made
from qnewton_mpi.training.saving import Saving
from qnewton_mpi.training.whose import Rows, reserved, rows_of

MOST_SKIPPED = 10  # steps with gradients that are not finite, before it is the run that is at fault


def train(
    config: RunConfig,
    communicator: Communicator,
    labels: Mapping[str, Any] | None = None,
    halted: Callable[[], bool] = lambda: False,
    listener: Listener | None = None,
) -> Path:
    """Do a run, or go on with one, and return the path of its file. Collective.

    Parameters
    ----------
    config : RunConfig
        Resolved (`config.resolve`) and the same on every rank.
    communicator : Communicator
    labels : mapping, optional
        More attributes for the run's file.
    halted : callable, optional
        Asked at each step whether to stop for a reason of the caller's, as by `Interruption`.
    listener : Listener, optional
        Told of evaluations and steps; on every rank or on none.

    Raises
    ------
    UserError
        On every rank: for an output or checkpoints that are another's, data that cannot be had, a device that is not
        there, a gradient that is not finite, a checkpoint that cannot be gone on from, parameters that differ between
        ranks.
    InterruptedRunError
        On every rank, where it was told to stop; a checkpoint has been written, if there is a folder for them.
    """
    training = config.training
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(communicator, training.log_dir))
        stack.enter_context(reserved(config, communicator))
        if training.stall_timeout is not None:
            stack.enter_context(Watchdog(communicator, training.stall_timeout))
        told = stack.enter_context(Interruption(communicator, training.stop_signals, training.time_limit, halted))
        run = Trainer(config, communicator, labels or {}, told, listener)
        communicator.together(run.go)  # rank 0 alone may fail to end its file
    return config.output


class Trainer:
    """A run: its parts, and how far it is. All methods are collective.

    Parameters
    ----------
    config : RunConfig
    communicator : Communicator
    labels : mapping
        More attributes for the run's file.
    interruption : Interruption
    listener : Listener or None
    """

    def __init__(
        self,
        config: RunConfig,
        communicator: Communicator,
        labels: Mapping[str, Any],
        interruption: Interruption,
        listener: Listener | None,
    ) -> None:
        self.config, self.training = config, config.training
        self.communicator, self.interruption = communicator, interruption
        self.parts = parts = made(config, communicator, interruption)
        self.optimizer, self.position, self.steps = parts.optimizer, parts.position, parts.steps
        self.output = Output(parts, labels, listener)
        self.saving = Saving(parts, self.output)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do: all steps are done, or patience is at its end."""
        patience, best = self.training.patience, self.parts.best
        waited = best is not None and patience is not None and best.since >= patience
        return waited or self.position.step >= self.steps

    def go(self) -> None:
        """Do all steps that are left, evaluate and save between them."""
        resumed = self.saving.open()
        self.interruption.check()
        self.communicator.enter("output")
        identifier, configuration = self.parts.identifier, self.parts.configuration
        rows = self.communicator.from_root(
            lambda: rows_of(self.config, configuration, identifier, resumed, self.steps, self.over)
        )
        if rows is Rows.DONE and self.over:
            return
        if resumed is not None:
            LOG.info("goes on after step %d", resumed)
        with self.output.opened(resumed, rows):
            if rows is Rows.NEW:
                self.evaluate()
            if resumed is None and self.training.on_nonfinite == "rollback":
                self.save()
            self.go_on()
            self.communicator.enter("output")
            self.communicator.from_root(self.output.check_end)

    def go_on(self) -> None:
        """Do the steps until the run is over.

        Raises
        ------
        InterruptedRunError
            On every rank, where it was told to stop before.
        """
        steps_per_epoch = self.parts.order.steps_per_epoch
        every = self.training.evaluate_every or steps_per_epoch
        saves = self.training.checkpoint_every or steps_per_epoch
        if not self.over:
            self.interruption.begin()
        while not self.over:
            step = self.step()
            if step % every == 0 or step == self.steps:
                self.evaluate()
            stop = self.interruption.agreed()
            if stop or step % saves == 0 or self.over:
                saved = self.save()
                if stop and not self.over:
                    how = "; go on with --resume" if saved else ", without a checkpoint (--checkpoint DIR)"
                    raise InterruptedRunError(f"stopped after step {step} of {self.steps}{how} ({stop})")
        best = self.parts.best
        if self.position.step < self.steps and best is not None and self.communicator.rank == 0:
            text = "ends after step %d of %d: no lower validation NLL since step %d"
            LOG.info(text, self.position.step, self.steps, best.step)

    def step(self) -> int:
        """Do the next step, or pass it over as `on_nonfinite` says; return its number."""
        position, optimizer, parts = self.position, self.optimizer, self.parts
        position.step += 1
        step = position.step
        assert position.skipped is not None
        if step in position.skipped:  # of a run that was set back
            return step
        parts.loss.step = step - 1
        optimizer.rate_factor = factor(self.training.schedule, self.training.warmup, step - 1, self.steps)
        before = self.readings()
        try:
            figures = optimizer.step(parts.loss)
        except NonFiniteGradientError as error:
            if self.training.on_nonfinite == "abort":
                raise
            return self.pass_over(error)
        whole, gradient, communication = self.readings() - before
        position.seconds += whole
        self.share_statistics()
        parts.averages.add(parts.weights, step)
        self.check_replicas()
        phases = (gradient, communication, whole - gradient - communication)
        self.output.add_step(step, {"step": step, **figures, **dict(zip(SECONDS, phases, strict=True))})
        return step

    def share_statistics(self) -> None:
        """Take the mean of the statistics that all replicas have left, if the network has any."""
        network = self.parts.network
        if len(network.statistics):
            assert network.seen is not None
            network.statistics = self.communicator.allgather(network.seen, self.parts.exchange.counts).mean(axis=0)

    def readings(self) -> NDArray[np.float64]:
        """Return the seconds in all, in gradients and in communication, up to now. Local."""
        return np.array([time.perf_counter(), self.optimizer.gradient_seconds, self.communicator.seconds])

    def pass_over(self, error: NonFiniteGradientError) -> int:
        """Leave out the batch of the step that failed, from here or from the last checkpoint on; return the step."""
        failed, skipped = self.position.step, self.position.skipped
        assert skipped is not None
        if len(skipped) == MOST_SKIPPED:
            raise UserError(f"{error}; {MOST_SKIPPED} steps were skipped before") from error
        if self.training.on_nonfinite == "rollback":
            self.saving.restore()
        self.position.skipped = np.append(skipped, failed)
        if self.communicator.rank == 0:
            where = f", back at step {self.position.step}" if self.training.on_nonfinite == "rollback" else ""
            LOG.warning("step %d skipped%s: %s (%d so far)", failed, where, error, len(self.position.skipped))
        return self.position.step

    def check_replicas(self) -> None:
        """Compare the parameters over the ranks, every few steps."""
        every = self.training.check_replicas
        if not every or self.position.step % every:
            return
        digest = hashlib.blake2b(to_host(self.optimizer.parameters).tobytes(), digest_size=16).digest()
        digests = self.communicator.allgather(np.frombuffer(digest, np.uint8)[None, :], [1] * self.communicator.size)
        differing = np.flatnonzero((digests != digests[0]).any(axis=1))
        if len(differing):
            ranks = ", ".join(map(str, differing))
            raise UserError(
                f"after step {self.position.step} the parameters of rank(s) {ranks} differ from those of rank 0: look "
                "for nodes with another CPU or library, or bad memory"
            )

    def evaluate(self) -> None:
        """Evaluate the iterate, at the end its averages too, and write and tell the figures."""
        position, optimizer, parts, started = self.position, self.optimizer, self.parts, time.perf_counter()
        self.communicator.enter("evaluation")
        quality = self.judged("", parts.weights)
        if parts.best is not None:
            parts.best.add(parts.weights, quality["validation_nll"], position.step)
        averages = parts.averages.iterates(position.step) if self.over else {}
        for iterate, weights in averages.items():
            quality |= self.judged(iterate, weights)
        self.communicator.enter("algebra")
        position.evaluation_seconds += time.perf_counter() - started
        figures = {
            **dict.fromkeys(EPOCH_FIGURES, math.nan),
            **quality,
            **optimizer.noise_scales,
            "epoch": position.step / parts.order.steps_per_epoch,
            "step": position.step,
            "sample_gradients": optimizer.evaluations * parts.order.share,
            "wall_seconds": position.seconds,
            "evaluation_seconds": position.evaluation_seconds,
            "bytes_sent": parts.exchange.bytes_sent,
            "bytes_sent_by_replicas": parts.exchange.bytes_sent_by_replicas,
        }
        self.output.add_evaluation(figures, averages)

    def judged(self, iterate: str, weights: Array) -> dict[str, float]:
        """Return the qualities of an iterate, by their names in the file."""
        found = evaluate(self.parts.network, weights, self.parts.dataset, self.communicator)
        return {iterate + name: value for name, value in found.items()}

    def save(self) -> bool:
        """Write a checkpoint, if there is a folder; return whether it was written."""
        return self.saving.save()
