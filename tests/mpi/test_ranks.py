"""Ranks that differ: in settings at the start, in step, rate or parameters later on, or not even in their batches."""

import warnings

import numpy as np
import pytest
from mpi4py import MPI

from qnewton_mpi.core.create import create
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator

SIZE = 12
COMMON = {
    "method": "momentum",
    "parameters": np.ones(SIZE),
    "replicas": 8,
    "samples": 4,
    "shapes": [(3, 4)],
    "exchange": "sliced",
    "transport": "auto",
    "seed": 1,
    "lr": 0.1,
    "momentum": 0.9,
}
several = pytest.mark.skipif(MPI.COMM_WORLD.size == 1, reason="ranks that differ are two")


@pytest.fixture
def last(communicator):
    return communicator.rank == communicator.size - 1


def loss_and_gradient(w, replica):
    return float(w @ w) / 2 + replica * float(w.sum()), w + replica


@several
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("method", "adam", "has method=adam, rank 0 has method=momentum"),
        ("replicas", 16, "has replicas=16, rank 0 has replicas=8"),
        ("samples", 5, "has samples=5, rank 0 has samples=4"),
        ("exchange", "allgather", "has exchange=allgather, rank 0 has exchange=sliced"),
        ("transport", "host", "has transport=host, rank 0 has transport=auto"),
        ("seed", 2, "has seed=2, rank 0 has seed=1"),
        ("lr", 0.2, "has lr=0.2, rank 0 has lr=0.1"),
        ("momentum", 0.5, "has momentum=0.5, rank 0 has momentum=0.9"),
        ("shapes", [(4, 3)], r"the shapes of rank\(s\) \d differ from those of rank 0"),
        ("parameters", np.ones(SIZE, np.float32), "has dtype=float32, rank 0 has dtype=float64"),
        ("parameters", np.ones(SIZE + 1), r"rank \d: the shapes have 12 numbers, the parameters 13"),
        ("parameters", np.arange(SIZE) / 1.0, r"the parameters of rank\(s\) \d differ from those of rank 0"),
        ("lr", -1, r"rank \d: lr = -1: must be greater than 0"),
        ("exchange", "ring", r"rank \d: exchange='ring': must be one of"),
    ],
)
def test_settings_of_one_rank(communicator, last, name, value, told):
    options = COMMON | ({name: value} if last else {})
    if name == "method" and last:
        del options["momentum"]
    with pytest.raises(UserError, match=told) as error:
        create(**options, communicator=communicator)
    assert len(set(communicator.mpi.allgather(str(error.value)))) == 1


@several
def test_each_rank_has_another_mistake(communicator):
    options = COMMON | ({"method": "newton"} if communicator.rank == 0 else {"momentum": 2})
    with pytest.raises(UserError, match="method='newton': must be one of"):
        create(**options, communicator=communicator)


def the_rate(optimizer):
    optimizer.rate_factor = 0.5


def the_parameters(optimizer):
    optimizer.parameters[7] += 1e-6


def the_step(optimizer):
    optimizer.steps += 1


@several
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (the_rate, r"step 4: rank \d has 0.5 times the learning rate, rank 0 1 times"),
        (the_parameters, r"step 4: the parameters of rank \d differ from those of rank 0"),
        (the_step, r"rank \d is at step 5, rank 0 at step 4"),
    ],
)
def test_what_one_rank_changes_between_steps(communicator, last, exchange, dtype, change, told):
    """Also of an odd number of parameters."""
    options = COMMON | {"parameters": np.ones(SIZE - 1, dtype), "shapes": None, "exchange": exchange}
    optimizer = create(**options, communicator=communicator)
    for _ in range(3):
        optimizer.step(loss_and_gradient)
    before = optimizer.velocity.copy()
    if last:
        change(optimizer)
    with pytest.raises(UserError, match=told) as error:
        optimizer.step(loss_and_gradient)
    assert len(set(communicator.mpi.allgather(str(error.value)))) == 1
    np.testing.assert_array_equal(optimizer.velocity, before)
    assert optimizer.steps == 3 + (last and change is the_step)


@pytest.mark.parametrize("change", [the_rate, the_parameters])
def test_what_all_change_alike_is_right(communicator, change):
    optimizer = create(**COMMON, communicator=communicator)
    optimizer.step(loss_and_gradient)
    change(optimizer)
    optimizer.step(loss_and_gradient)


def of_one_batch(w, replica):
    return float(w @ w) / 2, 1.0 * w


@pytest.mark.parametrize("method", ["kronecker", "fisher", "sgd", "momentum", "deflated"])
def test_one_batch_for_all_is_an_error_where_the_method_looks_at_noise(communicator, method):
    optimizer = create(method, np.ones(SIZE), 8, 32, communicator=communicator, lr="auto")
    with pytest.raises(
        UserError, match="step 1: all 8 replicas have the same batch: give each rank samples of its own"
    ):
        optimizer.step(of_one_batch)
    assert optimizer.steps == 0


@pytest.mark.parametrize("method", ["sgd", "adam", "deflated"])
def test_one_batch_for_all_is_a_warning_elsewhere(communicator, method):
    optimizer = create(method, np.ones(SIZE), 8, 32, communicator=communicator)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            optimizer.step(of_one_batch)
    assert [str(warning.message)[:43] for warning in told] == ["all 8 replicas have the same batch: give ea"][
        : communicator.rank == 0
    ]


def test_few_equal_samples_are_chance(communicator):
    """Two replicas of one sample each: of a small set of data they are often the same, but not for ever."""
    replicas = max(2, communicator.size)
    optimizer = create("fisher", np.ones(SIZE), replicas, 1, communicator=communicator)
    enough = -(-8 // (replicas - 1))  # steps
    for k in range(3 * enough):
        chance = k % enough < enough - 1
        optimizer.step(of_one_batch if chance else loss_and_gradient)
    for _ in range(enough - 1):
        optimizer.step(of_one_batch)
    with pytest.raises(UserError, match="have the same batch"):
        optimizer.step(of_one_batch)


def test_without_a_gradient_batches_are_not_told_apart(communicator):
    optimizer = create("fisher", np.zeros(SIZE), 4, 32, communicator=communicator)
    for _ in range(3):
        optimizer.step(of_one_batch)


def test_communicators_share_a_duplicate(communicator):
    part = communicator.mpi.Split(communicator.rank % 2)
    first, second, world = Communicator(part), Communicator(part), Communicator()
    assert first.mpi == second.mpi != part
    assert world.mpi == Communicator(MPI.COMM_WORLD).mpi
    assert first.mpi != world.mpi
    part.Free()
    assert first.allreduce(np.ones(1)) == first.size  # it outlives what it was made of


def test_many_communicators_in_one_program(communicator):
    """More than MPI has: of the world, of one rank, and of parts that the program makes and frees."""
    kept = []
    for k in range(2400):
        part = communicator.mpi.Split(k % 2) if k % 2 else MPI.COMM_SELF if k % 4 else None
        kept.append(Communicator(part))
        if part != MPI.COMM_SELF and part is not None:
            part.Free()
            kept.pop()
    assert len({each.mpi.handle for each in kept}) <= 2


@pytest.mark.parametrize("wrong", [3, "world", MPI.COMM_NULL])
def test_what_is_no_communicator(wrong):
    with pytest.raises(UserError, match=r"must be a Communicator, an MPI.Intracomm, or None"):
        create("sgd", np.ones(4), 4, communicator=wrong)
    with pytest.raises(UserError, match="stall_timeout=0: must be more than 0 seconds"):
        create("sgd", np.ones(4), 4, stall_timeout=0)
