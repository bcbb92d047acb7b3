"""Optimizers by name: what is chosen, and what is refused in one line."""

import numpy as np
import pytest

from qnewton_mpi.core.create import create
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator


@pytest.fixture(scope="module")
def communicator():
    return Communicator()


@pytest.mark.parametrize("method", OPTIMIZERS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_builds_what_was_named(communicator, method, exchange):
    words = {"lr": "0.25"}
    optimizer = create(method, np.ones(6), 4, 3, exchange=exchange, communicator=communicator, seed=7, **words)
    assert type(optimizer) is OPTIMIZERS[method]
    assert type(optimizer.exchange) is EXCHANGES[exchange]
    assert (optimizer.settings.lr, optimizer.samples, optimizer.seed, optimizer.exchange.replicas) == (0.25, 3, 7, 4)
    assert optimizer.exchange.communicator is communicator


def test_shapes_are_layers_and_the_exchange_is_chosen():
    optimizer = create("kronecker", np.zeros(8), replicas=2, shapes=[(2, 3), (2,)])
    assert [(layer.left.length, layer.right.length) for layer in optimizer.layers] == [(2, 4)]
    assert optimizer.exchange.name == "allgather"  # nothing to save on one rank


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "newton"}, "must be one of kronecker"),
        ({"exchange": "ring"}, "must be one of auto, allgather"),
        ({"transport": "pigeon"}, "must be one of auto, host"),
        ({"transport": "cuda"}, "for arrays on GPUs"),
        ({"replicas": 1}, "kronecker, lr=auto, needs 2 replicas and has 1: start more ranks"),
        ({"damping": 0}, "must be greater than 0"),
        ({"width": 3}, "unknown option 'width'"),
        ({"replicas": 2.5}, "replicas=2.5: must be an integer"),
        ({"samples": 16.5}, "samples=16.5: must be an integer, at least 1"),
        ({"samples": True}, "samples=True: must be an integer"),
        ({"samples": float("nan")}, "samples=nan: must be an integer"),
        ({"seed": "a"}, "seed='a': must be an integer"),
        ({"seed": -1}, "seed=-1: must be an integer, at least 0"),
        ({"shapes": [(3,)]}, "the shapes have 3 numbers, the parameters 4"),
        ({"parameters": [0.0, 1.0]}, "the parameters are list"),
        ({"parameters": np.zeros((2, 2))}, r"the parameters are float64 \(2, 2\): give one vector"),
        ({"parameters": np.zeros(4, int)}, "the parameters are int64"),
        ({"stall_timeout": "x"}, "stall_timeout='x': must be more than 0 seconds"),
    ],
)
def test_refuses_what_cannot_be_used(communicator, wrong, message):
    options = {"method": "kronecker", "parameters": np.zeros(4), "replicas": 2, "communicator": communicator, **wrong}
    with pytest.raises(UserError, match=message):
        create(**options)
