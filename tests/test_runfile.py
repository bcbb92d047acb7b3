"""The file of a run: written as it goes on, read whatever it may be, and watched."""

import contextlib
import errno
import os
import re
import subprocess

import h5py
import numpy as np
import pytest

from qnewton_mpi.errors import UserError
from qnewton_mpi.files.images import write_image
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.log import LOG, logging_to
from qnewton_mpi.results import runfile
from qnewton_mpi.results.layout import EPOCH_FIGURES, NOISE_SCALES
from qnewton_mpi.results.rows import table
from qnewton_mpi.results.run import Run
from qnewton_mpi.results.runfile import RunFile
from qnewton_mpi.results.watching import summary, watch

ATTRIBUTES = {"method": "sgd", "data": "none", "activation": "tanh", "replicas": 2, "batch": 8, "seed": 0, "lr": 0.1}
EVALUATION = dict.fromkeys(EPOCH_FIGURES, 1.0)
ITERATES = {"": {"w": np.zeros(3)}}


def run_file(path, **options):
    return RunFile(path, ATTRIBUTES, ["step", "seconds_gradient"], ITERATES, **options)


def add_steps(file, *steps):
    for step in steps:
        file.add_step({"step": step, "seconds_gradient": 0.5})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_rows_wait_until_they_can_be_written(tmp_path, monkeypatch, caplog, number):
    path = tmp_path / "run.h5"
    room = [True]

    def fsync(_):
        if not room[0]:
            raise OSError(number, "no room")

    monkeypatch.setattr("os.fsync", fsync)
    file = run_file(path)
    room[0] = False
    for step in range(3):
        add_steps(file, step)
        assert not file.flush()
    file.add_epoch(EVALUATION, {"": {"w": np.ones(3)}})
    assert caplog.text.count("not written (no room)") == 1
    assert len(Run(path).steps["step"]) == 0
    room[0] = True
    assert file.flush()
    assert Run(path).steps["step"].tolist() == [0, 1, 2]
    assert Run(path, "").parameters["w"].tolist() == [1, 1, 1]
    room[0] = False
    add_steps(file, 3, 4)
    with pytest.raises(UserError, match=r"cannot be written \(no room\): it lacks .*\(2 steps\)"):
        file.__exit__(None, None, None)
    assert Run(path).steps["step"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"cannot be written \(no room\)"):
        run_file(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.h5"]


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder that is a file system of 400 kB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_others_fill_costs_no_rows(small_disk):
    path, others = small_disk / "run.h5", small_disk / "others"
    with run_file(path) as file:
        add_steps(file, *range(100))
        assert file.flush()
        with others.open("wb", 0) as taking, contextlib.suppress(OSError):
            while taking.write(bytes(4096)):
                pass
        add_steps(file, *range(100, 200))
        assert not file.flush()
        assert len(Run(path).steps["step"]) == 100
        others.unlink()
    run = Run(path)
    assert run.finished
    assert run.steps["step"].tolist() == list(range(200))


def test_a_log_that_finds_no_room_is_no_matter(small_disk):
    with logging_to(Communicator(), str(small_disk / "logs")):
        LOG.info("in time")
        (small_disk / "others").write_bytes(bytes(300_000))
        with (small_disk / "more").open("wb", 0) as taking, contextlib.suppress(OSError):
            while taking.write(bytes(4096)):
                pass
        for _ in range(100):
            LOG.info("too late to find room, the last page of the file included")
    assert "in time" in (small_disk / "logs" / "rank-00000-of-00001.log").read_text()


def test_writing_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    """A write takes 3 s of a clock that the test turns, a step 1 s, and every tenth has an evaluation."""
    clock, writes = [0.0], []

    def slowly(*arguments):
        writes.append(clock[0])
        clock[0] += 3
        write_image(*arguments)

    monkeypatch.setattr(runfile.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(runfile, "write_image", slowly)
    path = tmp_path / "run.h5"
    with run_file(path) as file:
        for step in range(3000):
            clock[0] += 1
            add_steps(file, step)
            if step % 10 == 0:
                file.add_epoch(EVALUATION, ITERATES)
        assert 8 <= len(writes) <= 13
        add_steps(file, 3000)
        file.flush()  # as before a checkpoint
        assert len(Run(path).steps["step"]) == 3001
    assert (len(Run(path).steps["step"]), len(Run(path).epochs["step"])) == (3001, 300)


def test_every_evaluation_is_written_where_that_costs_little(tmp_path, monkeypatch):
    monkeypatch.setattr(runfile.time, "monotonic", lambda: 0.0)
    path = tmp_path / "run.h5"
    with run_file(path) as file:
        for count in range(1, 4):
            add_steps(file, count)
            file.add_epoch(EVALUATION, ITERATES)
            assert len(Run(path).epochs["step"]) == len(Run(path).steps["step"]) == count


def test_a_run_goes_on_with_its_rows(tmp_path):
    path = tmp_path / "run.h5"
    with run_file(path) as file:
        file.add_epoch({**EVALUATION, "step": 0}, ITERATES)
        add_steps(file, 1, 2, 3, 4)
    with run_file(path, resumed=2) as file:
        assert Run(path).steps["step"].tolist() == [1, 2]
        add_steps(file, 3)
    run = Run(path)
    assert run.steps["step"].tolist() == [1, 2, 3]
    assert run.steps["seconds_gradient"].tolist() == [0.5] * 3
    assert run.epochs["step"].tolist() == [0]


def test_a_run_of_an_earlier_version_has_no_noise_scale(tmp_path, sound):
    """It is read, and gone on with."""
    path = tmp_path / "run.h5"
    write_image(path, "run", filled(sound, lambda file: [file.__delitem__(f"epochs/{name}") for name in NOISE_SCALES]))
    run = Run(path)
    assert all(np.isnan(run.last(name)) for name in NOISE_SCALES)
    assert "  –  " in table([run])
    assert "batch" not in summary(run, 80)[2]
    with run_file(path, resumed=2) as file:
        file.add_epoch(EVALUATION, ITERATES)
    np.testing.assert_array_equal(Run(path).epochs["noise_scale"], [np.nan, np.nan, 1])


@pytest.mark.parametrize(
    ("plain", "preconditioned", "cell", "told"),
    [
        (4321.0, np.nan, "4,300", "a larger batch would help up to about 4,300 samples"),
        (4321.0, 1e5, "100,000", "a larger batch would help up to about 100,000 samples"),
        (4321.0, 3.0, "3", "a larger batch would hardly help: about 3 samples would do"),
        (np.inf, np.nan, "∞", "a larger batch would help: no signal is seen above the noise"),
        (np.nan, np.nan, "–", ""),
    ],
)
def test_what_a_batch_is_worth_is_told(tmp_path, plain, preconditioned, cell, told):
    """By the method's own noise scale, at the last evaluation."""
    with run_file(tmp_path / "run.h5") as file:
        for scales in ((1.0, 1.0), (plain, preconditioned)):
            file.add_epoch({**EVALUATION, **dict(zip(NOISE_SCALES, scales, strict=True))}, ITERATES)
    run = Run(tmp_path / "run.h5")
    header, _, row = (re.split(r"  +", line.strip()) for line in table([run]).splitlines())
    assert row[header.index("noise scale")] == cell
    assert summary(run, 80)[2] == told


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "finished"),
        (ValueError("é" * 1000), "failed: " + "é" * 496),
        (ValueError("one\n two\x00\udcff"), "failed: one two"),
        (KeyboardInterrupt(), "failed: KeyboardInterrupt"),
    ],
)
def test_what_became_of_a_run(tmp_path, error, status):
    path = tmp_path / "run.h5"
    file = run_file(path)
    add_steps(file, 1)
    file.__exit__(type(error), error, None)
    run = Run(path)
    assert run.attributes["status"].startswith(status)
    assert run.state == run.attributes["status"]
    assert run.steps["step"].tolist() == [1]


HOURS = {"before": 3 * 3600.0, "now": 0.0}


@pytest.mark.parametrize(
    ("writer", "written", "state"),
    [
        ({}, "now", "running"),
        ({}, "before", "running: no write for 3 h"),
        ({"started": 1}, "now", r"killed: process \d+ on .* is gone, last write 0 s ago"),
        ({"started": 1}, "before", r"killed: process \d+ on .* is gone, last write 3 h ago"),
        ({"host": "elsewhere"}, "now", "running"),
        ({"host": "elsewhere"}, "before", "perhaps dead: no write for 3 h"),
        ({"pid": "many"}, "before", "perhaps dead: no write for 3 h"),
        ({"pid": -1}, "before", "perhaps dead: no write for 3 h"),
        ({"host": None}, "before", "perhaps dead: no write for 3 h"),
    ],
)
def test_a_run_that_is_dead_is_told_from_one_that_is_slow(tmp_path, monkeypatch, writer, written, state):
    path = tmp_path / "run.h5"
    file = run_file(path)
    file.attributes |= {f"writer_{name}": value for name, value in writer.items()}
    file.flush()
    now = path.stat().st_mtime
    monkeypatch.setattr(runfile.time, "time", lambda: now + HOURS[written])
    assert re.fullmatch(state, Run(path).state)


def test_the_table_marks_what_is_not_finished(tmp_path):
    for name in ("one", "two"):
        with run_file(tmp_path / name) as file:
            file.add_epoch(EVALUATION, ITERATES)
    finished = [Run(tmp_path / name) for name in ("one", "two")]
    assert "status" not in table(finished)
    going_on = run_file(tmp_path / "three")
    last = table([*finished, Run(going_on.path)]).splitlines()[-1]
    assert last.endswith("2 finished, 1 running")
    assert "nan" in table([Run(going_on.path)])
    assert table([Run(going_on.path)]).splitlines()[-1].endswith(" running")


def put(name, value, **options):
    def damage(file):
        file.pop(name, None)
        file.create_dataset(name, data=value, **options)

    return damage


def link(name, target):
    def damage(file):
        del file[name]
        file[name] = target

    return damage


def give(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def virtual(file):
    layout = h5py.VirtualLayout((2,), "f8")
    layout[:] = h5py.VirtualSource("run.h5", "epochs/step", (2,))
    del file["steps/step"]
    file.create_virtual_dataset("steps/step", layout)


def huge(file):
    for name in file["steps"]:
        del file["steps"][name]
        file.create_dataset(f"steps/{name}", (10**12,), "f8")


def huge_chunked(file):
    for name in file["steps"]:
        del file["steps"][name]
        file.create_dataset(f"steps/{name}", (10**18,), "f8", chunks=(1024,))


DAMAGES = {
    "no status": lambda file: file.__delitem__("status"),
    "status a number": put("status", 5),
    "status unknown": put("status", b"well"),
    "status many": put("status", np.array([b"finished"] * 2)),
    "status of any length": put("status", "finished"),
    "no attributes": lambda file: [file.attrs.__delitem__(name) for name in list(file.attrs)],
    "rate a list": give("lr", [1.0, 2.0]),
    "rate a word": give("lr", "fast"),
    "rate NaN": give("lr", np.nan),
    "rate empty": give("lr", h5py.Empty("f8")),
    "rate compound": give("lr", np.zeros((), [("a", "f8")])),
    "seed text": give("seed", "seven"),
    "replicas a float": give("replicas", 2.5),
    "batch a switch": give("batch", True),
    "method with an escape": give("method", "\x1b[2J"),
    "a reference": lambda file: file.attrs.__setitem__("seed", file.ref),
    "epochs no group": put("epochs", np.zeros(3)),
    "steps no group": put("steps", np.zeros(3)),
    "steps missing": lambda file: file.__delitem__("steps"),
    "a column missing": lambda file: file.__delitem__("epochs/test_nll"),
    "scalar": put("epochs/epoch", 5.0),
    "matrix": put("epochs/epoch", np.zeros((2, 2))),
    "text": put("epochs/epoch", np.array([b"a", b"b"])),
    "compound": put("epochs/epoch", np.zeros(2, [("a", "f8")])),
    "complex": put("epochs/epoch", np.zeros(2, complex)),
    "gzip": put("steps/step", np.zeros(2), compression="gzip"),
    "shorter": put("steps/step", np.zeros(1)),
    "no number": put("steps/step", np.array([1, np.nan])),
    "soft link": link("steps/step", h5py.SoftLink("/epochs/step")),
    "loop": link("steps/step", h5py.SoftLink("/steps/step")),
    "external link": link("steps", h5py.ExternalLink("/dev/zero", "/steps")),
    "external link to what earlier versions lack": link("epochs/noise_scale", h5py.ExternalLink("/dev/zero", "/x")),
    "virtual": virtual,
    "external": put("steps/step", np.zeros(2), external=[("/dev/zero", 0, 16)]),
    "huge": huge,
    "huge, chunked": huge_chunked,
    "parameters missing": lambda file: file.__delitem__("parameters"),
    "parameters a matrix": put("parameters", np.zeros((2, 2))),
    "parameters too few": put("parameters", np.zeros(2)),
}


def in_place(path, kind, fill):
    """Write a file as earlier versions did, without a user block."""
    with h5py.File(path, "w", libver="latest") as file:
        fill(file)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Return an open file that has all that a run's has."""
    path = tmp_path_factory.mktemp("sound") / "run.h5"
    with RunFile(path, {**ATTRIBUTES, "parameters": 3}, ["step", "seconds_gradient"], ITERATES) as file:
        add_steps(file, 1, 2)
        for _ in range(2):
            file.add_epoch(EVALUATION, ITERATES)
    with h5py.File(path) as opened:
        yield opened


def filled(sound, damage):
    def fill(file):
        for name in sound:
            sound.copy(name, file)
        file.attrs.update(sound.attrs)
        damage(file)

    return fill


@pytest.mark.parametrize("write", [write_image, in_place])
@pytest.mark.parametrize("name", DAMAGES)
def test_files_that_are_not_as_a_runs(tmp_path, sound, write, name):
    path = tmp_path / "run.h5"
    write(path, "run", filled(sound, lambda file: None))
    assert Run(path, "").finished
    write(path, "run", filled(sound, DAMAGES[name]))
    with pytest.raises(UserError, match="is not the file of a run") as raised:
        Run(path, "")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("write", [write_image, in_place])
def test_files_cut_off_anywhere(tmp_path, sound, write):
    path = tmp_path / "run.h5"
    write(path, "run", filled(sound, lambda file: None))
    raw = path.read_bytes()
    for length in {*range(0, len(raw), 101), *range(0, 600, 7), *range(len(raw) - 50, len(raw))}:
        path.write_bytes(raw[:length])
        with pytest.raises(UserError):
            Run(path)


def test_what_is_no_file_of_a_run(tmp_path):
    with h5py.File(tmp_path / "study", "w") as file:
        file.create_group("one/epochs")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("method = 'sgd'")
    (tmp_path / "empty").touch()
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(1 << 42)
    run_file(tmp_path / "long").__exit__(None, None, None)
    with (tmp_path / "long").open("r+b") as file:
        file.truncate(1 << 42)
    write_image(tmp_path / "another", "spectrum", lambda file: None)
    for name in ("study", "folder", "fifo", "text", "empty", "endless", "long", "another", "missing", "/dev/zero"):
        with pytest.raises(UserError):
            Run(tmp_path / name)


def watched(path, capsys, once=False):
    watch(path, 0.001, once)
    return capsys.readouterr().out


def test_watch_ends_with_a_run_that_is_dead(tmp_path, capsys):
    file = run_file(tmp_path / "run.h5")
    assert re.search(r"running, step 0  no evaluation yet", watched(file.path, capsys, once=True))
    add_steps(file, 1, 2)
    file.add_epoch(EVALUATION, ITERATES)
    file.attributes["writer_started"] = 1
    file.flush()
    assert re.search(r"killed: process .* is gone, .* step 2, 16 samples/s +epoch 1: train", watched(file.path, capsys))


def test_watch_of_a_file_that_is_replaced_or_goes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.h5"
    file = run_file(path)
    file.add_epoch(EVALUATION, ITERATES)
    events = iter([lambda: run_file(path), path.unlink])
    monkeypatch.setattr("time.sleep", lambda _: next(events)())
    with pytest.raises(UserError, match="no such file"):
        watch(path, 1.0, once=False)
    one, other = capsys.readouterr().out.splitlines()
    assert "epoch 1" in one
    assert "no evaluation yet" in other


def test_watch_is_left_by_an_interrupt(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    file = run_file(tmp_path / "run.h5")
    monkeypatch.setattr("time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):  # which the command line tells in a line
        watch(file.path, 1.0, once=False)


@pytest.mark.parametrize("columns", [0, 1, 30])
def test_watch_in_a_narrow_terminal(tmp_path, monkeypatch, capsys, columns):
    file = run_file(tmp_path / "run.h5")
    add_steps(file, 1)
    for value in (4.0, 2.0, np.nan, np.inf, 0.0):
        file.add_epoch({**EVALUATION, "train_nll": value}, ITERATES)
    file.__exit__(ValueError, ValueError("one\nline\tafter another" * 9), None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 2)))
    lines = watched(tmp_path / "run.h5", capsys).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= max(1, columns)
