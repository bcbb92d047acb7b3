"""The training loop: replicas on their shares of the batches, steps, evaluations, the run's file."""

from __future__ import annotations

import contextlib
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array, open_device, to_device, to_host
from qnewton_mpi.config import RunConfig, TrainSettings
from qnewton_mpi.core.create import create
from qnewton_mpi.core.optimizers.values import Piggyback
from qnewton_mpi.core.schedules import factor
from qnewton_mpi.data import datasets
from qnewton_mpi.data.augmentation import Augmentation, kinds_of
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.data.parts import TRAIN
from qnewton_mpi.errors import DivergedError, InterruptedRunError, NonFiniteGradientError, UserError, printable
from qnewton_mpi.models import choice
from qnewton_mpi.models.description import Description
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.log import LOG, logging_to
from qnewton_mpi.parallel.watchdog import Watchdog
from qnewton_mpi.results.runfile import EPOCH_FIGURES, NETWORK, Parameters, RunFile
from qnewton_mpi.training.averages import Averages
from qnewton_mpi.training.beginning import beginning
from qnewton_mpi.training.best import Best
from qnewton_mpi.training.checkpoint import Checkpoints, Position
from qnewton_mpi.training.evaluation import evaluate
from qnewton_mpi.training.interruption import Interruption
from qnewton_mpi.training.listeners import Listener, Listeners
from qnewton_mpi.training.progress import Progress
from qnewton_mpi.training.replicas import ReplicaLoss
from qnewton_mpi.training.whose import DIGEST, NONE_SAVED, SAVED, SAVED_IN, Rows, held, rows_of

PHASES = ("seconds_gradient", "seconds_communication", "seconds_algebra")
DIVERGED = 2.0  # times the first training NLL, and a run that ends there has diverged
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
        stack.enter_context(held(config, communicator))
        if training.stall_timeout is not None:
            stack.enter_context(Watchdog(communicator, training.stall_timeout))
        told = stack.enter_context(Interruption(communicator, training.stop_signals, training.time_limit, halted))
        run = Run(config, communicator, labels or {}, told, listener)
        communicator.together(run.go)  # rank 0 alone may fail to end its file
    return config.output


class Run:
    """A run: its parts, and how far it is. All methods are collective."""

    def __init__(
        self,
        config: RunConfig,
        communicator: Communicator,
        labels: Mapping[str, Any],
        interruption: Interruption,
        listener: Listener | None,
    ) -> None:
        training = config.training
        self.config, self.training, self.communicator, self.interruption = config, training, communicator, interruption
        communicator.enter("loading")
        device = communicator.together(lambda: open_device(training.device, communicator.node_rank))
        self.dataset = datasets.load_on_all(communicator, device.xp, **data_options(training))
        interruption.check()
        communicator.enter("algebra")
        shape, classes = self.dataset.input_shape, len(self.dataset.classes)
        about = choice.described(asdict(training), shape, classes, training.seed)
        smoothing = training.label_smoothing
        self.network = network = communicator.together(lambda: choice.build(about, device.xp, smoothing=smoothing))
        samples = len(self.dataset.train)
        if training.batch > samples:
            raise UserError(
                f"a batch of {training.batch} is more than the {samples} training samples of {self.dataset.name}"
            )
        self.order = BatchOrder(samples, training.batch, config.replicas, training.seed)
        self.steps = training.steps or (training.epochs or 0) * self.order.steps_per_epoch
        self.listeners = Listeners(communicator, listener, self.steps, self.order.steps_per_epoch)

        augmentation = Augmentation(kinds_of(training.augment), shape[1:], self.order) if training.augment else None
        self.loss = ReplicaLoss(network, self.dataset.train, self.order, augmentation)
        self.optimizer = create(
            training.method,
            beginning(network, self.dataset.classes, training, communicator),
            config.replicas,
            self.order.share,
            shapes=network.parameter_shapes,
            exchange=training.exchange,
            transport=training.transport,
            communicator=communicator,
            seed=training.seed,
            **asdict(config.optimizer),
        )
        self.optimizer.piggyback = Piggyback(interruption.sent, interruption.received)
        self.exchange = self.optimizer.exchange
        self.averages = Averages(self.weights, self.steps, training.ema)
        self.best = Best(self.weights) if self.dataset.validation is not None else None
        if training.patience is not None and self.best is None:
            raise UserError(f"--patience needs a part of {self.dataset.name} to judge by: --validation 0.1")
        drawn = communicator.from_root(lambda: secrets.token_bytes(8))
        self.position = Position(skipped=np.zeros(0, np.int64), run=np.frombuffer(drawn, np.uint8))
        machine = {"ranks": communicator.size, "parameters": network.size, "device_name": device.name}
        machine |= {"statistics": len(network.statistics)} if len(network.statistics) else {}
        samples_of = {f"{name}_samples": len(split) for name, split in self.dataset.splits.items()}
        self.configuration = {**config.flat(), DIGEST: self.dataset.digest}
        self.description = Description.of(network, self.dataset).text()
        self.attributes = {
            **self.configuration,
            **machine,
            **samples_of,
            NETWORK: self.description,
            "exchange": self.exchange.name,
            **labels,
        }

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do: all steps are done, or patience is at its end."""
        patience = self.training.patience
        waited = self.best is not None and patience is not None and self.best.since >= patience
        return waited or self.position.step >= self.steps

    def go(self) -> None:
        """Do all steps that are left, evaluate and save between them."""
        resumed = self.open_checkpoints()
        self.interruption.check()
        self.communicator.enter("output")
        rows = self.communicator.from_root(
            lambda: rows_of(self.config, self.configuration, self.identifier, resumed, self.steps, self.over)
        )
        if rows is Rows.DONE and self.over:
            return
        if resumed is not None:
            LOG.info("goes on after step %d", resumed)
        writes = self.communicator.rank == 0 and rows is not Rows.DONE
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.listeners.open(self.config, self.identifier, resumed, rows))
            self.file = self.communicator.together(
                lambda: stack.enter_context(self.open_file(resumed, rows)) if writes else None
            )
            self.progress = self.open_progress()
            stack.enter_context(contextlib.closing(self.progress))
            if rows is Rows.NEW:
                self.evaluate()
            if resumed is None and self.training.on_nonfinite == "rollback":
                self.save()
            every = self.training.evaluate_every or self.order.steps_per_epoch
            saves = self.training.checkpoint_every or self.order.steps_per_epoch
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
            if self.position.step < self.steps and self.best is not None and self.communicator.rank == 0:
                text = "ends after step %d of %d: no lower validation NLL since step %d"
                LOG.info(text, self.position.step, self.steps, self.best.step)
            self.communicator.enter("output")
            self.communicator.from_root(self.check_end)

    def check_end(self) -> None:
        """Raise `DivergedError` where the run ended far above where it began. Local."""
        if self.file is None:
            return
        nll = self.file.evaluations("train_nll")
        chance = math.log(self.network.classes)  # below which a run may have begun that others' parameters were given
        if len(nll) and not nll[-1] <= DIVERGED * max(nll[0], chance):
            raise DivergedError(
                f"diverged: training NLL {nll[-1]:.4g} after step {self.position.step}, {nll[0]:.4g} at the start "
                f"({printable(self.config.output)} has the curve): use a smaller --lr, or auto"
            )

    def open_checkpoints(self) -> int | None:
        """Return the step of the checkpoint that this run goes on from, if any."""
        training, step = self.training, None
        self.checkpoints: Checkpoints | None = None
        if training.checkpoint is not None:
            folder = Path(training.checkpoint)
            self.checkpoints = Checkpoints(
                folder, self.communicator, self.exchange, self.configuration, self.description
            )
            self.checkpoints.prepare(training.resume, training.overwrite)
            step = self.restore() if training.resume else None
        return step

    @property
    def identifier(self) -> str:
        """What tells this run from all others, of the same options too."""
        assert self.position.run is not None
        return self.position.run.tobytes().hex()

    def restore(self) -> int | None:
        """Go back to the newest sound checkpoint; return its step, or None if there is none."""
        assert self.checkpoints is not None
        self.communicator.enter("restore")
        step, passed_over = self.checkpoints.load(self.things)
        for line in passed_over if self.communicator.rank == 0 else ():
            LOG.warning("passed over %s", line)
        if step is not None:
            counted = self.exchange.bytes_sent, self.exchange.bytes_sent_by_replicas
            self.optimizer.parameters = self.exchange.collect(self.optimizer.held)
            # The run that was not interrupted did without this collective.
            self.exchange.bytes_sent, self.exchange.bytes_sent_by_replicas = counted
            if step >= self.steps != self.averages.steps or step > self.steps:
                raise UserError(
                    f"--resume: {self.checkpoints.folder} is at step {step} already, of {self.steps}: ask for more "
                    "--steps or --epochs"
                )
            self.averages.lengthen(self.steps, step)
        self.communicator.enter("algebra")
        return step

    @property
    def things(self) -> dict[str, Any]:
        """All that has state."""
        return {
            "optimizer": self.optimizer,
            "exchange": self.exchange,
            "network": self.network,
            "averages": self.averages,
            "position": self.position,
            **({} if self.best is None else {"best": self.best}),
        }

    def open_file(self, resumed: int | None, rows: Rows) -> RunFile:
        """Return the run's file. Local."""
        figures = ("step", *self.optimizer.figure_names, *PHASES)
        attributes = {**self.attributes, "run": self.identifier}
        if self.checkpoints is not None:
            saved = NONE_SAVED if resumed is None else resumed
            attributes |= {SAVED: saved, SAVED_IN: printable(self.checkpoints.folder.resolve())}
        best, told = self.best.among({}, {}, 0) if self.best is not None else ({}, {})
        attributes |= told
        iterates = self.named({"": self.weights, **best})
        kept = resumed if rows is Rows.KEPT else None
        return RunFile(self.config.output, attributes, figures, iterates, kept)

    def named(self, iterates: Mapping[str, Array]) -> dict[str, Parameters]:
        """Return the weights of iterates by name and in shape, in host memory. Local."""
        return {
            iterate: {name: to_host(array) for name, array in self.network.named(weights).items()}
            for iterate, weights in iterates.items()
        }

    @property
    def weights(self) -> Array:
        """The parameters, and after them the network's statistics, (N + K,). Valid until the next step. Local."""
        parameters, statistics = self.optimizer.parameters, self.network.statistics
        if not len(statistics):
            return parameters
        return self.network.xp.concatenate([parameters, to_device(statistics, parameters)])

    def open_progress(self) -> Progress:
        """Return what tells of the run, on one rank. Local."""
        training, kind = self.training, self.training.progress if self.communicator.rank == 0 else "off"
        epochs, label = self.steps / self.order.steps_per_epoch, f"{training.method} M={self.config.replicas}"
        before = self.position.step, self.position.evaluation_seconds
        return Progress(kind, self.steps, epochs, training.batch, label, *before)

    def step(self) -> int:
        """Do the next step, or pass it over as `on_nonfinite` says; return its number."""
        position, optimizer = self.position, self.optimizer
        position.step += 1
        step = position.step
        assert position.skipped is not None
        if step in position.skipped:  # of a run that was set back
            return step
        self.loss.step = step - 1
        optimizer.rate_factor = factor(self.training.schedule, self.training.warmup, step - 1, self.steps)
        before = self.readings()
        try:
            figures = optimizer.step(self.loss)
        except NonFiniteGradientError as error:
            if self.training.on_nonfinite == "abort":
                raise
            return self.pass_over(error)
        whole, gradient, communication = self.readings() - before
        position.seconds += whole
        self.share_statistics()
        self.averages.add(self.weights, step)
        self.check_replicas()
        self.progress.step(figures["loss"])
        phases = (gradient, communication, whole - gradient - communication)
        row = {"step": step, **figures, **dict(zip(PHASES, phases, strict=True))}
        if self.file is not None:
            self.file.add_step(row)
        self.listeners.tell("step", step, row)
        return step

    def share_statistics(self) -> None:
        """Take the mean of the statistics that all replicas have left, if the network has any."""
        network = self.network
        if len(network.statistics):
            assert network.seen is not None
            network.statistics = self.communicator.allgather(network.seen, self.exchange.counts).mean(axis=0)

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
            self.restore()
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
        position, optimizer, started = self.position, self.optimizer, time.perf_counter()
        self.communicator.enter("evaluation")
        quality = self.judged("", self.weights)
        if self.best is not None:
            self.best.add(self.weights, quality["validation_nll"], position.step)
        averages = self.averages.iterates(position.step) if self.over else {}
        for iterate, weights in averages.items():
            quality |= self.judged(iterate, weights)
        self.communicator.enter("algebra")
        position.evaluation_seconds += time.perf_counter() - started
        figures = {
            **dict.fromkeys(EPOCH_FIGURES, math.nan),
            **quality,
            **optimizer.noise_scales,
            "epoch": position.step / self.order.steps_per_epoch,
            "step": position.step,
            "sample_gradients": optimizer.evaluations * self.order.share,
            "wall_seconds": position.seconds,
            "evaluation_seconds": position.evaluation_seconds,
            "bytes_sent": self.exchange.bytes_sent,
            "bytes_sent_by_replicas": self.exchange.bytes_sent_by_replicas,
        }
        if self.file is not None:
            kept, told = self.best.among(averages, figures, position.step) if self.best is not None else ({}, {})
            self.file.attributes |= told
            self.file.add_epoch(figures, self.named({"": self.weights, **averages, **kept}))
        LOG.debug("step %d: train NLL %.6f, %d bytes sent", position.step, figures["train_nll"], figures["bytes_sent"])
        self.progress.evaluated(figures, [part for part in self.dataset.splits if part != TRAIN])
        self.listeners.tell("evaluation", position.step, figures)

    def judged(self, iterate: str, weights: Array) -> dict[str, float]:
        """Return the qualities of an iterate, by their names in the file."""
        found = evaluate(self.network, weights, self.dataset, self.communicator)
        return {iterate + name: value for name, value in found.items()}

    def save(self) -> bool:
        """Write a checkpoint, if there is a folder; return whether it was written.

        Where it cannot be, the run goes on: its state is not lost, and the next try may find room.
        """
        if self.checkpoints is None:
            return False
        self.communicator.enter("checkpoint")
        if self.file is not None:
            self.file.flush()
        try:
            self.checkpoints.save(self.position.step, self.things)
        except UserError as error:
            if self.communicator.rank == 0:
                LOG.warning("%s; the run goes on", error)
            return False
        if self.file is not None:
            first = self.file.attributes[SAVED] == NONE_SAVED
            self.file.attributes[SAVED] = self.position.step
            if first:  # later ones are told with the next rows: that there is one is what counts
                self.file.flush()
        self.communicator.enter("algebra")
        LOG.info("checkpoint of step %d in %s", self.position.step, self.checkpoints.folder)
        return True


def data_options(training: TrainSettings) -> dict[str, Any]:
    """Return the options of a run that say which data it has, as `datasets.load_on_all` takes them. Local."""
    return {name: getattr(training, name) for name in datasets.OPTIONS}
