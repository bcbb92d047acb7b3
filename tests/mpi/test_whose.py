"""Locks and data of a run on several ranks: an error on all of them, or none."""

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from test_data import write_mnist

from qnewton_mpi.config import resolve, run_config
from qnewton_mpi.data import datasets
from qnewton_mpi.errors import NonFiniteGradientError, UserError
from qnewton_mpi.studies.halt import Halt
from qnewton_mpi.training.whose import held


@pytest.fixture
def folder(communicator):
    """A folder that all ranks share."""
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(tempfile.TemporaryDirectory()) if communicator.rank == 0 else None
        yield Path(communicator.mpi.bcast(path))
        communicator.mpi.Barrier()


def test_a_lock_is_held_by_all_or_none(communicator, folder):
    options = {"output": str(folder / "r.h5"), "checkpoint": str(folder / "c")}
    config = resolve(run_config(options), communicator.size)
    with held(config, communicator):
        with pytest.raises(UserError, match=r"--output .*r.h5: is being written by process"):
            held(config, communicator).__enter__()
        other = resolve(run_config(options | {"output": str(folder / "s.h5")}), communicator.size)
        with pytest.raises(UserError, match=r"--checkpoint .*c: is being written by process"):
            held(other, communicator).__enter__()
    communicator.mpi.Barrier()
    assert list(folder.iterdir()) == []


def test_rank_0_alone_reads_the_data(communicator, folder):
    mine = folder / str(communicator.rank)
    if communicator.rank == 0:
        write_mnist(mine, 20)
    data = datasets.load_on_all(communicator, data="mnist", data_dir=str(mine))
    assert (
        communicator.mpi.allgather((data.digest, len(data.train), data.classes))
        == [(data.digest, 20, tuple("0123456789"))] * communicator.size
    )
    pixels = np.array([data.train.batch(slice(None))[0].sum(dtype="f8")])
    assert (communicator.allgather(pixels, [1] * communicator.size) == pixels).all()
    if communicator.rank == 0:
        (mine / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="no mnist files"):
        datasets.load_on_all(communicator, data="mnist", data_dir=str(mine))


@pytest.mark.parametrize("at_once", [False, True])
def test_a_halt_is_heard_by_the_first_ranks_of_the_other_groups(communicator, at_once):
    leaders = range(0, communicator.size, 2)
    halt = Halt(communicator, leaders)
    if communicator.rank < 2:
        halt.send(at_once)
    listens = communicator.rank in leaders[1:]
    while listens and not halt.came():  # a message is on its way, however slow
        pass
    assert halt.came() == listens
    assert halt.came_at_once() == (listens and at_once)
    halt.end(lambda: False)
    assert not halt.came()


def test_who_waits_for_other_groups_is_told_to_stop_for_them(communicator):
    """Any of its ranks; the first group has runs to do until it hears of it."""
    halt, last = Halt(communicator, [0]), communicator.size - 1
    while communicator.rank == 0 < last and not halt.came_at_once():
        pass
    halt.end(lambda: communicator.rank == last)
    assert not halt.came()


def test_what_passes_between_ranks(communicator):
    def fail():
        if communicator.rank == communicator.size - 1:
            raise NonFiniteGradientError(3, 1, np.nan, 1.0)

    with pytest.raises(NonFiniteGradientError, match="step 3: replica 1 has loss nan") as caught:
        communicator.together(fail)
    assert (caught.value.step, caught.value.replica) == (3, 1)
