"""The training loop: replicas on their shares of the batches, steps, evaluations, the run's file."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.config import RunConfig
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.schedules import factor
from qnewton_mpi.data import datasets
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.errors import UserError
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.parallel import cost, partition
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.device import Array, open_device, to_host
from qnewton_mpi.training.averages import Averages
from qnewton_mpi.training.progress import Progress
from qnewton_mpi.training.runfile import EPOCH_FIGURES, RunFile

PHASES = ("seconds_gradient", "seconds_communication", "seconds_algebra")
EVALUATION_BATCH = 1024


@dataclass
class ReplicaLoss:
    """`loss, gradient = f(w, replica)` on the replica's share of the batch of the current step. Local.

    Within a step it may be called again, at other parameters, and sees the same samples.
    """

    network: Convnet
    split: datasets.Split
    order: BatchOrder
    step: int = 0

    def __call__(self, parameters: Array, replica: int) -> tuple[float, Array]:
        return self.network.loss_and_gradient(parameters, *self.split.batch(self.order.indices(self.step, replica)))


def train(config: RunConfig, communicator: Communicator, labels: Mapping[str, Any] | None = None) -> Path:
    """Do a run and return the path of its file. Collective.

    Parameters
    ----------
    config : RunConfig
        Resolved (`config.resolve`) and the same on every rank.
    communicator : Communicator
    labels : mapping, optional
        More attributes for the run's file.

    Raises
    ------
    UserError
        On every rank: for data that cannot be had, a device that is not there, a gradient that is not finite.
    """
    training = config.training
    device = communicator.together(lambda: open_device(training.device, communicator.node_rank))
    dataset = load_data(config, communicator, device.xp)
    network = Convnet(dataset.input_shape, training.activation, device.xp)
    if training.batch > len(dataset.train):
        raise UserError(
            f"a batch of {training.batch} is more than the {len(dataset.train)} training samples of {dataset.name}"
        )

    order = BatchOrder(len(dataset.train), training.batch, config.replicas, training.seed)
    steps = training.steps or (training.epochs or 0) * order.steps_per_epoch
    loss = ReplicaLoss(network, dataset.train, order)
    kind = OPTIMIZERS[training.method]
    name = training.exchange
    if name == "auto":
        name = cost.choose(kind.traffic(config.optimizer), communicator.size, config.replicas, network.size)
    exchange = EXCHANGES[name](communicator, config.replicas, network.size)
    optimizer = kind(
        config.optimizer,
        network.initial_parameters(training.seed),
        exchange,
        order.share,
        training.seed,
        network.parameter_shapes,
    )

    machine = {"ranks": communicator.size, "parameters": network.size, "device_name": device.name}
    attributes = {**config.flat(), **machine, "exchange": name, **(labels or {})}
    root = communicator.rank == 0
    label, epochs = f"{training.method} M={config.replicas}", steps / order.steps_per_epoch
    with contextlib.ExitStack() as stack:
        figures_of_steps = (*optimizer.figures, *PHASES)
        file = communicator.together(
            lambda: stack.enter_context(RunFile(config.output, attributes, figures_of_steps)) if root else None
        )
        progress = Progress(training.progress if root else "off", steps, epochs, training.batch, label)
        stack.enter_context(contextlib.closing(progress))

        averages = Averages(optimizer.parameters, steps, training.ema)

        def readings() -> NDArray[np.float64]:
            """Seconds in all, in gradients and in communication, up to now."""
            return np.array([time.perf_counter(), optimizer.gradient_seconds, communicator.seconds])

        spent, evaluation_seconds = np.zeros(3), 0.0
        for step in range(steps + 1):
            if step > 0:
                loss.step = step - 1
                optimizer.rate_factor = factor(training.schedule, training.warmup, step - 1, steps)
                before = readings()
                figures = optimizer.step(loss)
                whole, gradient, communication = took = readings() - before
                spent += took
                averages.add(optimizer.parameters, step)
                progress.step(figures["loss"])
                if file is not None:
                    phases = (gradient, communication, whole - gradient - communication)
                    file.add_step({**figures, **dict(zip(PHASES, phases, strict=True))})
            if step % (training.evaluate_every or order.steps_per_epoch) == 0 or step == steps:
                started = time.perf_counter()
                iterates = {"": optimizer.parameters}
                if step == steps:
                    iterates |= {"ema_": averages.exponential, "tail_": averages.tail}
                quality = {
                    iterate + name: value
                    for iterate, parameters in iterates.items()
                    for name, value in evaluate(network, parameters, dataset, communicator).items()
                }
                evaluation_seconds += time.perf_counter() - started
                figures = {
                    **dict.fromkeys(EPOCH_FIGURES, math.nan),
                    **quality,
                    "epoch": step / order.steps_per_epoch,
                    "step": step,
                    "sample_gradients": optimizer.evaluations * order.share,
                    "wall_seconds": spent[0],
                    "evaluation_seconds": evaluation_seconds,
                    "bytes_sent": exchange.bytes_sent,
                    "bytes_sent_by_replicas": exchange.bytes_sent_by_replicas,
                }
                if file is not None:
                    file.add_epoch(figures, to_host(optimizer.parameters))
                progress.evaluated(figures)
    return config.output


def load_data(config: RunConfig, communicator: Communicator, xp: ModuleType = np) -> datasets.Dataset:
    """Return the data set; the first rank of each node fetches what is missing, once. Collective."""
    name, folder = config.training.data, config.training.data_dir

    def fetch() -> None:
        if communicator.node_rank == 0 and datasets.may_download(name, folder):
            datasets.download(name)

    communicator.together(fetch)
    return communicator.together(lambda: datasets.load(name, folder, xp))


def evaluate(
    network: Convnet, parameters: Array, dataset: datasets.Dataset, communicator: Communicator
) -> dict[str, float]:
    """Return the mean negative log-likelihoods (nats) of both splits and the test accuracy. Collective.

    The samples are shared by the ranks.
    """
    sums = np.zeros((2, 2))
    splits = (dataset.train, dataset.test)
    for k, split in enumerate(splits):
        mine = partition.share(len(split), communicator.size, communicator.rank)
        for start in range(mine.start, mine.stop, EVALUATION_BATCH):
            sums[k] += network.evaluate(
                parameters, *split.batch(slice(start, min(start + EVALUATION_BATCH, mine.stop)))
            )
    (train_nll, _), (test_nll, accuracy) = communicator.allreduce(sums) / [[len(split)] for split in splits]
    return {"train_nll": float(train_nll), "test_nll": float(test_nll), "test_accuracy": float(accuracy)}
