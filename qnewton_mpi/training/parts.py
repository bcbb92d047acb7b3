"""What a run is made of: data, network, loss, optimizer, and what is kept beside them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qnewton_mpi.arrays import Array, Device, open_device, to_device, to_host
from qnewton_mpi.config import RunConfig
from qnewton_mpi.core.create import create
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.core.optimizers import Optimizer
from qnewton_mpi.core.optimizers.values import Piggyback
from qnewton_mpi.data import datasets
from qnewton_mpi.data.augmentation import Augmentation, kinds_of
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.errors import UserError
from qnewton_mpi.models import choice
from qnewton_mpi.models.description import Description
from qnewton_mpi.models.network import Network
from qnewton_mpi.options import TrainSettings
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.results.layout import DIGEST, NETWORK, Parameters
from qnewton_mpi.training.averages import Averages
from qnewton_mpi.training.beginning import beginning
from qnewton_mpi.training.best import Best
from qnewton_mpi.training.interruption import Interruption
from qnewton_mpi.training.position import Position
from qnewton_mpi.training.replicas import ReplicaLoss


@dataclass
class Parts:
    """The parts of a run, before its first step or as a checkpoint has them.

    Attributes
    ----------
    config : RunConfig
    communicator : Communicator
    device : str
        The name of the one that the arrays are on.
    dataset : Dataset
    network : Network
    order : BatchOrder
    steps : int
        Of the whole run.
    loss : ReplicaLoss
    optimizer : Optimizer
    averages : Averages
    best : Best or None
        None where nothing is held out to judge by.
    position : Position
    """

    config: RunConfig
    communicator: Communicator
    device: str
    dataset: datasets.Dataset
    network: Network
    order: BatchOrder
    steps: int
    loss: ReplicaLoss
    optimizer: Optimizer[Any]
    averages: Averages
    best: Best | None
    position: Position

    @property
    def exchange(self) -> Exchange:
        """The optimizer's."""
        return self.optimizer.exchange

    @property
    def weights(self) -> Array:
        """The parameters, and after them the network's statistics, (N + K,). Valid until the next step. Local."""
        return weights_of(self.optimizer, self.network)

    @property
    def identifier(self) -> str:
        """What tells this run from all others, of the same options too."""
        assert self.position.run is not None
        return self.position.run.tobytes().hex()

    @property
    def things(self) -> dict[str, Any]:
        """All that has state, by the names that it has in checkpoints."""
        return {
            "optimizer": self.optimizer,
            "exchange": self.exchange,
            "network": self.network,
            "averages": self.averages,
            "position": self.position,
            **({} if self.best is None else {"best": self.best}),
        }

    def named(self, iterates: Mapping[str, Array]) -> dict[str, Parameters]:
        """Return the weights of iterates by name and in shape, in host memory. Local."""
        return {
            iterate: {name: to_host(array) for name, array in self.network.named(weights).items()}
            for iterate, weights in iterates.items()
        }

    @property
    def configuration(self) -> dict[str, Any]:
        """All options and the digest of the data, by which a run is told from another (`whose.differences`)."""
        return {**self.config.flat(), DIGEST: self.dataset.digest}

    @property
    def description(self) -> str:
        """The network's `Description`."""
        return Description.of(self.network, self.dataset).text()

    @property
    def attributes(self) -> dict[str, Any]:
        """What the run's file says of it, before any step."""
        network = self.network
        return {
            **self.configuration,
            "ranks": self.communicator.size,
            "parameters": network.size,
            "device_name": self.device,
            **({"statistics": len(network.statistics)} if len(network.statistics) else {}),
            **{f"{name}_samples": len(split) for name, split in self.dataset.splits.items()},
            NETWORK: self.description,
            "exchange": self.exchange.name,
        }


def made(config: RunConfig, communicator: Communicator, interruption: Interruption) -> Parts:
    """Return the parts of a run that begins. Collective.

    Raises
    ------
    UserError
        On every rank: for data that cannot be had, a device that is not there, options that do not fit the data.
    """
    training = config.training
    communicator.enter("loading")
    device = communicator.together(lambda: open_device(training.device, communicator.node_rank))
    dataset = datasets.load_on_all(communicator, device.xp, **data_options(training))
    interruption.check()
    communicator.enter("algebra")
    network = _network(config, communicator, device, dataset)
    samples = len(dataset.train)
    if training.batch > samples:
        raise UserError(f"a batch of {training.batch} is more than the {samples} training samples of {dataset.name}")
    order = BatchOrder(samples, training.batch, config.replicas, training.seed)
    steps = training.steps or (training.epochs or 0) * order.steps_per_epoch
    shape = dataset.input_shape[1:]
    augmentation = Augmentation(kinds_of(training.augment), shape, order) if training.augment else None
    optimizer = _optimizer(config, communicator, network, dataset, order)
    optimizer.piggyback = Piggyback(interruption.sent, interruption.received)
    weights = weights_of(optimizer, network)
    best = Best(weights) if dataset.validation is not None else None
    if training.patience is not None and best is None:
        raise UserError(f"--patience needs a part of {dataset.name} to judge by: --validation 0.1")
    drawn = communicator.from_root(lambda: secrets.token_bytes(8))
    return Parts(
        config,
        communicator,
        device.name,
        dataset,
        network,
        order,
        steps,
        ReplicaLoss(network, dataset.train, order, augmentation),
        optimizer,
        Averages(weights, steps, training.ema),
        best,
        Position(skipped=np.zeros(0, np.int64), run=np.frombuffer(drawn, np.uint8)),
    )


def _network(config: RunConfig, communicator: Communicator, device: Device, dataset: datasets.Dataset) -> Network:
    """Return the network for the data, its parameters still to be set. Collective."""
    training = config.training
    about = choice.described(asdict(training), dataset.input_shape, len(dataset.classes), training.seed)
    return communicator.together(lambda: choice.build(about, device.xp, smoothing=training.label_smoothing))


def _optimizer(
    config: RunConfig, communicator: Communicator, network: Network, dataset: datasets.Dataset, order: BatchOrder
) -> Optimizer[Any]:
    """Return the method where the run begins. Collective."""
    training = config.training
    return create(
        training.method,
        beginning(network, dataset.classes, training, communicator),
        config.replicas,
        order.share,
        shapes=network.parameter_shapes,
        exchange=training.exchange,
        transport=training.transport,
        communicator=communicator,
        seed=training.seed,
        **asdict(config.optimizer),
    )


def weights_of(optimizer: Optimizer[Any], network: Network) -> Array:
    """Return the parameters, and after them the network's statistics, (N + K,). Local."""
    parameters, statistics = optimizer.parameters, network.statistics
    if not len(statistics):
        return parameters
    return network.xp.concatenate([parameters, to_device(statistics, parameters)])


def data_options(training: TrainSettings) -> dict[str, Any]:
    """Return the options of a run that say which data it has, as `datasets.load_on_all` takes them. Local."""
    return {name: getattr(training, name) for name in datasets.OPTIONS}
