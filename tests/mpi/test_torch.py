"""The PyTorch adapter over the ranks: the built-in network's trajectory, and what only several ranks can get wrong."""

import numpy as np
import pytest
import torch

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import build
from qnewton_mpi.data import datasets
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.errors import UserError
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.models.reference import torch_convnet
from qnewton_mpi.torch import QuasiNewton
from qnewton_mpi.training.loop import ReplicaLoss

STEPS, BATCH = 50, 32


@pytest.fixture(scope="module")
def sample():
    return datasets.load(datasets.EMBEDDED, None, dtype=np.float64).train


@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
@pytest.mark.parametrize("method", ["kronecker", "deflated"])
def test_same_trajectory_as_the_built_in_network(communicator, sample, method, exchange):
    """In float64: in float32 the rounding of two libraries differs, and 50 steps amplify it."""
    per_rank = 2 if communicator.size < 4 else 1
    replicas = per_rank * communicator.size
    network = Convnet((1, 28, 28), "tanh", dtype=np.float64)
    start = network.initial_parameters(0)
    order = BatchOrder(len(sample), BATCH * replicas, replicas, 0)
    loss = ReplicaLoss(network, sample, order)
    kind = OPTIMIZERS[method]
    built_in = kind(
        build(kind.settings_type, {}),
        start,
        EXCHANGES[exchange](communicator, replicas, network.size),
        order.share,
        0,
        network.parameter_shapes,
    )
    model = torch_convnet(network, start)
    optimizer = QuasiNewton(
        model.parameters(),
        samples=order.share,
        method=method,
        replicas_per_rank=per_rank,
        module=model,
        exchange=exchange,
        communicator=communicator,
    )
    local = optimizer.core.exchange.local

    def closure():
        images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
        x, y = optimizer.share(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))
        value = torch.nn.functional.cross_entropy(model(x), y)
        value.backward()
        return value

    for step in range(STEPS):
        loss.step = step
        expected = built_in.step(loss)["loss"]
        batches = [sample.batch(order.indices(step, replica)) for replica in local]
        assert optimizer.step(closure) == pytest.approx(expected, rel=1e-5)
    found = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    np.testing.assert_allclose(found, built_in.parameters, atol=1e-5)


def test_parameters_that_differ_are_told(communicator):
    torch.manual_seed(communicator.rank)
    model = torch.nn.Linear(3, 1)
    options = {"samples": 4, "replicas_per_rank": 2, "communicator": communicator}
    if communicator.size == 1:
        QuasiNewton(model.parameters(), **options)
        return
    others = ", ".join(map(str, range(1, communicator.size)))
    with pytest.raises(UserError, match=rf"rank\(s\) {others} differ from those of rank 0: call torch.manual_seed"):
        QuasiNewton(model.parameters(), **options)


def test_every_rank_loads_its_own_state(communicator):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = QuasiNewton(model.parameters(), samples=4, replicas_per_rank=2, communicator=communicator)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    swapped = communicator.mpi.bcast(state)
    if communicator.size == 1:
        return
    with pytest.raises(UserError, match="every rank saves and loads its own"):
        optimizer.load_state_dict(swapped)
