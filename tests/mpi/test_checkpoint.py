"""Checkpoints on 1, 2, 3 and 4 ranks: the same state again, on as many ranks and on others."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from problems import VARIANTS, Quadratic, make_optimizer

from qnewton_mpi.core import state
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.training.checkpoint import Checkpoints, steps_in
from qnewton_mpi.training.checkpoint.layout import MASTER, SUMS, name_of
from qnewton_mpi.training.checkpoint.reading import PARAMETERS
from qnewton_mpi.training.position import Position

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
    np.testing.assert_equal(again.noise_scales, optimizer.noise_scales)


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


@contextlib.contextmanager
def limited(kind, most):
    """Set a limit of the system's for this process while the context lasts."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.mark.parametrize("failing", ["first", "last"])
def test_what_cannot_be_written_leaves_the_earlier_ones(communicator, folder, failing):
    optimizer = start("sgd", communicator, "sliced")
    saved = checkpoints(folder, optimizer)
    saved.prepare(resume=False, overwrite=False)
    saved.save(1, {"optimizer": optimizer})
    fails = communicator.rank == (0 if failing == "first" else communicator.size - 1)
    no_room = limited(resource.RLIMIT_FSIZE, 100) if fails else contextlib.nullcontext()
    with no_room, pytest.raises(UserError, match=r"step 2 not written to .*: File too large"):
        saved.save(2, {"optimizer": optimizer})
    communicator.mpi.Barrier()
    assert [path.name for path in folder.iterdir()] == [name_of(1)]
    communicator.mpi.Barrier()
    assert saved.load({"optimizer": optimizer}) == (1, [])


def test_state_that_is_not_finite_is_not_written(communicator, folder):
    optimizer = start("adam", communicator, "sliced")
    saved = checkpoints(folder, optimizer)
    saved.prepare(resume=False, overwrite=False)
    saved.save(1, {"optimizer": optimizer})
    if communicator.rank == communicator.size - 1:
        optimizer.second[-1] = np.inf
    with pytest.raises(UserError, match=r"step 2 not written to .*: optimizer/second is not finite"):
        saved.save(2, {"optimizer": optimizer})
    communicator.mpi.Barrier()
    assert [path.name for path in folder.iterdir()] == [name_of(1)]


def test_a_folder_that_not_all_nodes_see(communicator, folder):
    if communicator.size == 1:
        pytest.skip("needs two ranks")
    optimizer = start("sgd", communicator, "sliced")
    seen = folder if communicator.rank == 0 else folder.with_name("another-disk")
    communicator.from_root(folder.mkdir)
    with pytest.raises(UserError, match=r"step 1 not written to .* a folder that all nodes see"):
        checkpoints(seen, optimizer).save(1, {"optimizer": optimizer})


def forge(source, name, change, everywhere=True):
    """Change a file of a checkpoint, and the sums to match it: in SHA256SUMS alone or in checkpoint.h5 too."""
    if change is not None:
        with h5py.File(source / name, "r+") as file:
            change(file)

    def summed(names):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in map(source.joinpath, names)}

    names = [line.split("  ")[1] for line in (source / SUMS).read_text().splitlines()]
    if everywhere:
        with h5py.File(source / MASTER, "r+") as file:
            document = json.loads(file["configuration"][()])
            document["files"] = summed(names[1:])
            del file["configuration"]
            file["configuration"] = np.bytes_(json.dumps(document))
    (source / SUMS).write_text("".join(f"{value}  {name}\n" for name, value in summed(names).items()))


def replaced(path, **options):
    """Return a change that puts another data set in the place of one."""

    def change(file):
        before = file[path][()]
        del file[path]
        file.create_dataset(path, **{key: made(before) for key, made in options.items()})

    return change


def linked(path, link):
    def change(file):
        file.move(path, "elsewhere")
        file[path] = link

    return change


def virtual(path):
    def change(file):
        shape, dtype = file[path].shape, file[path].dtype
        del file[path]
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource("nothing.h5", path, shape)
        file.create_virtual_dataset(path, layout)

    return change


def with_nan(path):
    def change(file):
        file[path][-1] = np.nan

    return change


HELD = f"held/{PARAMETERS}"
FORGED = {
    "shape": replaced(HELD, data=lambda before: np.zeros((3, 2, 1))),
    "length": replaced(HELD, data=lambda before: before[:-1]),
    "dtype": replaced(HELD, data=lambda before: before.astype(np.float32)),
    "compound": replaced(HELD, data=lambda before: before.astype([("x", "<f8")])),
    "gzip": replaced(HELD, data=lambda before: before, compression=lambda before: "gzip"),
    "never written": replaced(HELD, shape=lambda before: before.shape, dtype=lambda before: before.dtype),
    "a soft link": linked(HELD, h5py.SoftLink("/elsewhere")),
    "an external link": linked(HELD, h5py.ExternalLink("nothing.h5", "/x")),
    "a group that is an external link": linked("held/optimizer", h5py.ExternalLink("nothing.h5", "/x")),
    "a virtual data set": virtual(HELD),
    "not finite": with_nan(HELD),
}


@pytest.fixture
def two(communicator, folder):
    """Return an optimizer of which steps 1 and 2 are saved, what writes them, and damage(action) on the second."""
    optimizer = start("adam", communicator, "sliced")
    saved = checkpoints(folder, optimizer)
    saved.prepare(resume=False, overwrite=False)
    for step in (1, 2):
        go(optimizer, 1)
        saved.save(step, {"optimizer": optimizer})
    go(optimizer, 1)

    def damage(action):
        communicator.mpi.Barrier()
        if communicator.rank == 0:
            action(folder / name_of(2))
        communicator.mpi.Barrier()

    return optimizer, saved, damage


def passed_over(two):
    """Load, and return why step 2 was passed over."""
    optimizer, saved, _ = two
    step, lines = saved.load({"optimizer": optimizer})
    assert (step, optimizer.steps, len(lines)) == (1, 1, 1)
    assert "\n" not in lines[0]
    return lines[0]


def last_file(source):
    return max(source.glob("rank-*.h5")).name


@pytest.mark.parametrize("kind", FORGED)
def test_what_no_run_writes_is_passed_over(two, kind):
    """Even with sums to match: nothing is read from elsewhere, unpacked, or put into another shape."""
    two[2](lambda source: forge(source, last_file(source), FORGED[kind]))
    assert "cannot be restored (" in passed_over(two)


@pytest.mark.parametrize("name", [MASTER, SUMS, "rank"])
def test_what_is_no_file_is_passed_over(two, name):
    def damage(source):
        path = source / (last_file(source) if name == "rank" else name)
        path.unlink()
        os.mkfifo(path)

    two[2](damage)
    assert "is no regular file" in passed_over(two)


def test_one_of_an_earlier_version_is_told(two):
    optimizer, saved, damage = two
    text = replaced("configuration", data=lambda before: before.decode())
    damage(lambda source: forge(source, MASTER, text, everywhere=False))
    with pytest.raises(UserError, match="step-0000000002 is of an earlier version, which alone goes on from it"):
        saved.load({"optimizer": optimizer})


def test_the_other_steps_files_are_not_its_own(two):
    """Files of another step: one with sums to match, then all of them."""

    def one(source):
        name = last_file(source)
        shutil.copy(source.with_name(name_of(1)) / name, source / name)
        forge(source, name, None, everywhere=False)

    def all_of_them(source):
        shutil.rmtree(source)
        shutil.copytree(source.with_name(name_of(1)), source)

    two[2](one)
    assert f"{SUMS} is not of the files" in passed_over(two)
    two[2](all_of_them)
    assert "is of step 1" in passed_over(two)


def test_the_position_is_that_of_the_folder(communicator, folder):
    optimizer, position = start("sgd", communicator, "sliced"), Position(step=1, skipped=np.zeros(0, np.int64))
    saved = checkpoints(folder, optimizer)
    saved.prepare(resume=False, overwrite=False)
    saved.save(2, {"optimizer": optimizer, "position": position})
    with pytest.raises(UserError, match=r"no sound checkpoint .*its position is step 1"):
        saved.load({"optimizer": optimizer, "position": position})


def test_nothing_is_changed_where_none_is_sound(communicator, two, folder):
    optimizer, saved, damage = two
    before = np.array(optimizer.held)
    for step in (1, 2):
        damage(lambda source, step=step: (source.with_name(name_of(step)) / last_file(source)).unlink())
    with pytest.raises(UserError, match="no sound checkpoint"):
        saved.load({"optimizer": optimizer})
    assert optimizer.steps == 3
    np.testing.assert_array_equal(optimizer.held, before)


@pytest.mark.parametrize("free", [1, 2])
def test_few_files_may_be_open(communicator, two, free):
    """The common file and one of a rank at a time are enough; with fewer, it is the limit that is told."""
    optimizer, saved, _ = two
    saved.load({"optimizer": optimizer})  # so that nothing is imported under the limit
    go(optimizer, 1)
    before = np.array(optimizer.held)
    with contextlib.ExitStack() as stack:
        stack.enter_context(limited(resource.RLIMIT_NOFILE, 128))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(stack.enter_context(open(os.devnull)))  # noqa: PTH123
        for file in taken[-free:]:
            file.close()
        if free == 2:
            assert saved.load({"optimizer": optimizer}) == (2, [])
            assert optimizer.steps == 2
        else:
            with pytest.raises(UserError, match=r"Too many open files.*ulimit -n"):
                saved.load({"optimizer": optimizer})
            np.testing.assert_array_equal(optimizer.held, before)


def test_files_that_nobody_needs_are_compared(communicator, folder):
    """With `server` all is on rank 0; the others' files have nothing in them."""
    optimizer = start("sgd", communicator, "server")
    save(folder, optimizer)
    if communicator.rank == 0:
        last = folder / name_of(STEPS) / last_file(folder / name_of(STEPS))
        last.write_bytes(last.read_bytes() + b"x")
    communicator.mpi.Barrier()
    with pytest.raises(UserError, match=r"no sound checkpoint .* does not match its checksum"):
        checkpoints(folder, optimizer).load({"optimizer": optimizer})


def test_what_was_written_last_is_kept_and_what_is_not_sound_does_not_count(communicator, folder):
    optimizer = start("sgd", communicator, "sliced")
    things, saved = {"optimizer": optimizer}, checkpoints(folder, optimizer)
    saved.prepare(resume=False, overwrite=False)

    def on_root(action):
        communicator.mpi.Barrier()
        if communicator.rank == 0:
            action()
        communicator.mpi.Barrier()

    def append(step):
        with (folder / name_of(step) / MASTER).open("ab") as file:
            file.write(b"x")

    saved.save(10, things)
    on_root(lambda: shutil.copytree(folder / name_of(10), folder.with_name("backup")))
    for step in (20, 30):
        saved.save(step, things)
    on_root(lambda: (append(20), append(30), shutil.copytree(folder.with_name("backup"), folder / name_of(10))))
    assert saved.load(things)[0] == 10
    saved.save(15, things)
    communicator.mpi.Barrier()
    assert steps_in(folder) == [10, 15, 20, 30]
    assert saved.load(things)[0] == 15
    saved.save(25, things)  # 20 is in the past now, and not sound
    communicator.mpi.Barrier()
    assert steps_in(folder) == [15, 25, 30]
    on_root(lambda: (folder / name_of(25) / last_file(folder / name_of(25))).unlink())
    saved.save(30, things)
    communicator.mpi.Barrier()
    assert steps_in(folder) == [15, 30]
    assert saved.load(things) == (30, [])


def test_links_are_no_checkpoints_of_ours(communicator, folder):
    """What links lead to stays as it is, whatever their names."""
    optimizer = start("sgd", communicator, "sliced")
    elsewhere = folder.with_name("elsewhere")
    if communicator.rank == 0:
        folder.mkdir()
        elsewhere.mkdir()
        (elsewhere / "precious").touch()
        for name in (name_of(1), name_of(3), f".{name_of(2)}.partial", f".{name_of(1)}.old", f".{name_of(3)}.old"):
            (folder / name).symlink_to(elsewhere)
    communicator.mpi.Barrier()
    saved = checkpoints(folder, optimizer)
    saved.prepare(resume=False, overwrite=True)
    for step in (2, 3, 4):
        saved.save(step, {"optimizer": optimizer})
    communicator.mpi.Barrier()
    assert steps_in(folder) == [3, 4]
    assert (elsewhere / "precious").exists()


def test_a_link_to_a_checkpoint_is_no_empty_folder(communicator, two, folder):
    """As where it was moved to another disk: a run that goes on does not start from the beginning."""
    optimizer, saved, damage = two
    damage(lambda _: [path.symlink_to(path.rename(folder.with_name(path.name))) for path in [*folder.glob("step-*")]])
    with pytest.raises(UserError, match=r"no sound checkpoint in .*\(is a link: put the folder itself there\)"):
        saved.load({"optimizer": optimizer})


def test_one_that_was_being_replaced_gets_back_its_name(communicator, two, folder):
    optimizer, saved, damage = two
    damage(lambda source: source.rename(source.with_name(f".{source.name}.old")))
    saved.prepare(resume=True, overwrite=False)
    assert saved.load({"optimizer": optimizer}) == (2, [])


@pytest.mark.parametrize("variant", ["kronecker", "deflated-auto", "fisher"])
def test_goes_on_on_fewer_ranks(communicator, folder, variant):
    optimizer = start(variant, communicator, "sliced")
    go(optimizer)
    save(folder, optimizer)
    expected = go(optimizer)
    fewer = Communicator(communicator.mpi.Split(communicator.rank < max(1, communicator.size - 1)))
    if communicator.rank < max(1, communicator.size - 1):
        other = restored(folder, start(variant, fewer, "sliced"))
        np.testing.assert_allclose(go(other), expected, rtol=1e-8)


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


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("step", None, "step is missing"),
        ("step", np.array(1.0), "step is float64"),
        ("seconds", np.array(np.nan), "seconds is not finite"),
        ("seconds", np.zeros(2), "seconds is float64 (2,), not float64 ()"),
        ("skipped", np.zeros((1, 1), np.int64), "skipped is int64 (1, 1), not int64 (1,)"),
    ],
)
def test_state_is_checked_before_any_is_set(path, value, told):
    """The entry that does not fit may be the last one."""
    position = Position(skipped=np.zeros(0, np.int64))
    values = {"step": np.array(3), "seconds": np.array(1.5), "evaluation_seconds": np.array(0.5)}
    values |= {"skipped": np.array([2]), path: value}
    with pytest.raises(ValueError, match="is ") as raised:
        state.restore(position, lambda path, _: values[path])
    assert told in str(raised.value)
    assert (position.step, position.seconds, position.skipped.tolist()) == (0, 0.0, [])


def test_attributes_of_one_length_stay_so():
    class Thing:
        state = dict.fromkeys(("values", "vectors"), Kind.SHARED)
        lengths = dict.fromkeys(("values", "vectors"), "pairs")
        values, vectors = np.zeros(0), np.zeros((0, 2))

    thing = Thing()
    state.restore(thing, lambda path, _: np.ones(3) if path == "values" else np.ones((3, 2)))
    assert thing.vectors.shape == (3, 2)
    with pytest.raises(ValueError, match="vectors is float64"):
        state.restore(thing, lambda path, _: np.ones(3) if path == "values" else np.ones((2, 2)))
