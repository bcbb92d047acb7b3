"""Checkpoints on 1, 2, 3 and 4 ranks: the same state again, on as many ranks and on others."""

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from problems import VARIANTS, Quadratic, make_optimizer

from qnewton_mpi.core import state
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.training import checkpoint
from qnewton_mpi.training.checkpoint import SUMS, Checkpoints, Position, name_of, steps_in
from qnewton_mpi.training.disk import reserved

SIZE, REPLICAS, STEPS = 23, 8, 3


@pytest.fixture
def folder(communicator):
    """A folder that all ranks share."""
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(tempfile.TemporaryDirectory()) if communicator.rank == 0 else None
        yield Path(communicator.mpi.bcast(path)) / "checkpoints"
        communicator.mpi.Barrier()


def start(variant, communicator, exchange):
    return make_optimizer(variant, Quadratic(SIZE, REPLICAS), communicator, REPLICAS, exchange=exchange)


def go(optimizer, steps=STEPS):
    problem = Quadratic(SIZE, REPLICAS)
    for _ in range(steps):
        optimizer.step(problem)
    return np.array(optimizer.parameters)


def checkpoints(folder, optimizer, **configuration):
    return Checkpoints(folder, optimizer.exchange.communicator, optimizer.exchange, {"method": "x", **configuration})


def save(folder, optimizer):
    saved = checkpoints(folder, optimizer)
    saved.prepare(resume=False, overwrite=False)
    saved.save(STEPS, {"optimizer": optimizer})


def restored(folder, optimizer):
    step, passed_over = checkpoints(folder, optimizer).load({"optimizer": optimizer})
    assert (step, passed_over) == (STEPS, [])
    optimizer.parameters = optimizer.exchange.collect(optimizer.held)
    return optimizer


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_goes_on_bitwise(communicator, folder, variant, exchange):
    optimizer = start(variant, communicator, exchange)
    go(optimizer)
    save(folder, optimizer)
    expected = go(optimizer)
    again = restored(folder, start(variant, communicator, exchange))
    np.testing.assert_array_equal(go(again), expected)
    assert (again.steps, again.evaluations) == (optimizer.steps, optimizer.evaluations)


@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_goes_on_on_other_ranks(communicator, folder, variant, exchange):
    """From these ranks to one, and from one to these with another exchange."""
    alone = Communicator(MPI.COMM_SELF)
    optimizer = start(variant, communicator, exchange)
    go(optimizer)
    save(folder, optimizer)
    expected = go(optimizer)
    single = restored(folder, start(variant, alone, "allgather"))
    back = folder.with_name(f"back-{communicator.rank}")
    save(back, single)
    np.testing.assert_allclose(go(single), expected, rtol=1e-8)
    communicator.mpi.Barrier()
    other = restored(folder.with_name("back-0"), start(variant, communicator, "sliced"))
    np.testing.assert_allclose(go(other), expected, rtol=1e-8)


def test_two_are_kept_and_leftovers_go(communicator, folder):
    optimizer = start("sgd", communicator, "sliced")
    saved = checkpoints(folder, optimizer)
    if communicator.rank == 0:
        folder.joinpath(".step-0000000007.partial").mkdir(parents=True)
    saved.prepare(resume=False, overwrite=False)
    for step in (1, 2, 3, 3):
        saved.save(step, {"optimizer": optimizer})
    communicator.mpi.Barrier()
    assert steps_in(folder) == [2, 3]
    assert sorted(path.name for path in folder.iterdir()) == [name_of(2), name_of(3)]


def test_another_run_is_refused(communicator, folder):
    optimizer = start("sgd", communicator, "allgather")
    saved = checkpoints(folder, optimizer, lr=0.1, progress="bar")
    saved.prepare(resume=False, overwrite=False)
    saved.save(1, {"optimizer": optimizer})
    with pytest.raises(UserError, match="earlier run"):
        saved.prepare(resume=False, overwrite=False)
    with pytest.raises(UserError, match=r"another run: lr was 0\.1 and is 0\.2, seed was None and is 1"):
        checkpoints(folder, optimizer, lr=0.2, seed=1, progress="off").load({"optimizer": optimizer})
    saved.prepare(resume=False, overwrite=True)
    assert saved.load({"optimizer": optimizer}) == (None, [])


def test_damage_is_passed_over(communicator, folder):
    optimizer = start("kronecker", communicator, "sliced")
    saved = checkpoints(folder, optimizer)
    saved.prepare(resume=False, overwrite=False)
    for step in (1, 2):
        go(optimizer, 1)
        saved.save(step, {"optimizer": optimizer})
    if communicator.rank == 0:
        last = max((folder / name_of(2)).glob("rank*.h5"))
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    communicator.mpi.Barrier()
    step, (told,) = saved.load({"optimizer": optimizer})
    assert step == 1
    assert "does not match its checksum" in told
    assert optimizer.steps == 1
    communicator.mpi.Barrier()
    if communicator.rank == 0:
        (folder / name_of(1) / SUMS).unlink()
    communicator.mpi.Barrier()
    with pytest.raises(UserError, match="no sound checkpoint"):
        saved.load({"optimizer": optimizer})


@pytest.mark.parametrize("failing", ["first", "last"])
def test_what_cannot_be_written_leaves_the_earlier_ones(communicator, folder, monkeypatch, failing):
    optimizer = start("sgd", communicator, "sliced")
    saved = checkpoints(folder, optimizer)
    saved.prepare(resume=False, overwrite=False)
    saved.save(1, {"optimizer": optimizer})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    @contextlib.contextmanager
    def slowly_given_back(folder, size):
        with reserved(folder, size):
            try:
                yield
            finally:
                time.sleep(0.2)

    if communicator.rank == (0 if failing == "first" else communicator.size - 1):
        monkeypatch.setattr("os.posix_fallocate", full)
    else:
        monkeypatch.setattr(checkpoint, "reserved", slowly_given_back)
    with pytest.raises(UserError, match=r"step 2 not written to .*: No space left on device"):
        saved.save(2, {"optimizer": optimizer})
    communicator.mpi.Barrier()
    assert [path.name for path in folder.iterdir()] == [name_of(1)]
    communicator.mpi.Barrier()
    assert saved.load({"optimizer": optimizer}) == (1, [])


def test_a_folder_that_cannot_be_made(communicator, folder):
    if communicator.rank == 0:
        folder.parent.joinpath("file").touch()
    optimizer = start("sgd", communicator, "allgather")
    with pytest.raises(UserError, match="cannot be written"):
        checkpoints(folder.parent / "file" / "x", optimizer).prepare(resume=False, overwrite=False)


def test_position_is_state():
    position = Position(step=3, seconds=1.5, skipped=np.array([2]))
    values = {path: state.value(owner, name) for path, _, owner, name in state.entries(position)}
    fresh = Position(skipped=np.zeros(0, np.int64))
    state.restore(fresh, lambda path, kind: values[path] if kind is Kind.SHARED else None)
    assert (fresh.step, fresh.seconds, fresh.skipped.tolist()) == (3, 1.5, [2])


def test_folder_is_gone(communicator, folder):
    optimizer = start("sgd", communicator, "allgather")
    saved = checkpoints(folder, optimizer)
    saved.prepare(resume=False, overwrite=False)
    communicator.mpi.Barrier()
    if communicator.rank == 0:
        shutil.rmtree(folder)
    communicator.mpi.Barrier()
    with pytest.raises(UserError, match="No such file"):
        saved.save(1, {"optimizer": optimizer})
