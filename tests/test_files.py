"""Files that are whole or not there, images with sums, locks."""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
from dataclasses import asdict, replace

import h5py
import numpy as np
import pytest

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files import locks
from qnewton_mpi.files.images import column, dataset, image_of, open_image, open_summed, write_image
from qnewton_mpi.files.locks import Holder, locked
from qnewton_mpi.files.outputs import check_output
from qnewton_mpi.files.whole import read_whole, replace_whole


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "folder" / "file"
    replace_whole(path, b"one")
    replace_whole(path, b"tw", b"o")
    assert read_whole(path) == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    mask = os.umask(0o027)
    try:
        replace_whole(path, b"three")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").write_text("another's")
    (tmp_path / "link").symlink_to("other")
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "link", "fifo"):
        with pytest.raises(UserError):
            replace_whole(tmp_path / name, b"ours")
    for name in ("folder", "fifo", "missing", "a\0b", "n" * 300):
        with pytest.raises(UserError):
            read_whole(tmp_path / name)
    assert (tmp_path / "other").read_text() == "another's"


def test_where_there_is_no_room_the_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_whole(path, b"one")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_whole(path, b"two")
    assert path.read_bytes() == b"one"
    assert len(list(tmp_path.iterdir())) == 1


def test_paths_in_messages():
    assert printable("a\nb\0\udcff\ud800") == r"a\nb\x00\xff\ud800"
    assert len(printable("a" * 5000)) < 200


def test_only_what_is_of_the_kind_is_replaced(tmp_path):
    write_image(tmp_path / "run", "run", filled)
    write_image(tmp_path / "spectrum", "spectrum", filled)
    with h5py.File(tmp_path / "old", "w") as file:
        file.attrs["version_qnewton_mpi"] = "0.1.0"
    with h5py.File(tmp_path / "another", "w") as file:
        file["measured"] = np.zeros(3)
    (tmp_path / "text").write_text("precious")
    (tmp_path / "table").write_text("| row | rate |\n")
    (tmp_path / "empty").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "text.png").write_text("precious")
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "folder").mkdir()
    may = {"run": {"run", "old", "empty"}, "spectrum": {"spectrum", "empty"}, "table": {"table", "empty"}}
    names = [path.name for path in tmp_path.iterdir()]
    for kind in (*may, "picture"):
        for name in names:
            with pytest.raises(UserError):
                check_output(tmp_path / name, kind, overwrite=False)
            allowed = name in may.get(kind, {"picture.png"})
            with contextlib.nullcontext() if allowed else pytest.raises(UserError):
                check_output(tmp_path / name, kind, overwrite=True)
    check_output(tmp_path / "new" / "file", "run", overwrite=False)
    check_output(tmp_path / "new" / "file.SVG", "picture", overwrite=False)
    with pytest.raises(UserError, match="Not a directory"):
        check_output(tmp_path / "text" / "file", "run", overwrite=True)
    assert names == [path.name for path in tmp_path.iterdir()]


def filled(file):
    file.attrs["seed"] = 3
    file["steps/loss"] = np.arange(5.0)


def test_an_image_is_read_as_it_was_written(tmp_path):
    write_image(tmp_path / "run.h5", "run", filled)
    with open_image(tmp_path / "run.h5", "run") as file:
        assert (file.attrs["seed"], column(file, "steps/loss").tolist()) == (3, [0, 1, 2, 3, 4])
    with h5py.File(tmp_path / "run.h5") as file:  # as any HDF5 library does
        assert file["steps/loss"][-1] == 4
    with pytest.raises(UserError, match="file of a run, not of a study"), open_image(tmp_path / "run.h5", "study"):
        pass


def test_whatever_byte_is_changed_or_lost_is_told(tmp_path):
    path = tmp_path / "run.h5"
    write_image(path, "run", filled)
    raw = path.read_bytes()
    for k in [*range(0, len(raw), 97), *range(530)]:
        for damaged in (raw[:k], raw[:k] + bytes([raw[k] ^ 0x10]) + raw[k + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(UserError), open_image(path, "run"):
                pass
    path.write_bytes(raw + b"x")
    with pytest.raises(UserError, match=r"it has .* bytes"), open_image(path, "run"):
        pass


@pytest.mark.parametrize("damage", ["link", "virtual", "external", "filter", "compound", "group", "missing", "scalar"])
def test_columns_that_are_none(tmp_path, damage):
    def fill(file):
        file["true"] = np.arange(5.0)
        if damage == "link":
            file["loss"] = h5py.ExternalLink("other.h5", "loss")
        elif damage == "virtual":
            layout = h5py.VirtualLayout((5,), "f8")
            layout[:] = h5py.VirtualSource("other.h5", "loss", (5,))
            file.create_virtual_dataset("loss", layout)
        elif damage == "external":
            file.create_dataset("loss", (5,), "f8", external=[(str(tmp_path / "raw"), 0, 40)])
        elif damage == "filter":
            file.create_dataset("loss", data=np.zeros(1000), compression="gzip")
        elif damage == "compound":
            file["loss"] = np.zeros(5, [("a", "f8")])
        elif damage == "group":
            file.create_group("loss")
        elif damage == "scalar":
            file["loss"] = 1.0

    write_image(tmp_path / "run.h5", "run", fill)
    with pytest.raises(UserError, match="loss"), open_image(tmp_path / "run.h5", "run") as file:
        column(file, "loss")


HOLD = """
import sys
from pathlib import Path
from qnewton_mpi.files.locks import locked
with locked(Path(sys.argv[1]), "--output r.h5"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """Return the path of a lock that another process holds, and the process."""
    path = tmp_path / ".r.h5.lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], **pipes)
    assert process.stdout.readline() == "held\n"
    yield path, process
    process.kill()
    process.communicate()


def without_locks(monkeypatch):
    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("system", [True, False])
def test_one_at_a_time(held, monkeypatch, system):
    path, process = held
    if not system:
        without_locks(monkeypatch)
    with pytest.raises(UserError, match=rf"--output r.h5: is being written by process {process.pid} on "):
        locked(path, "--output r.h5").__enter__()
    process.kill()
    process.wait()
    for _ in range(2):
        with locked(path, "--output r.h5"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_holder_on_another_host_is_not_taken_for_dead(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(replace(Holder.here(), host="elsewhere"))))
    without_locks(monkeypatch)
    with pytest.raises(UserError, match=r"on elsewhere .* or remove .*lock if that process is gone"):
        locked(path, "--checkpoint c").__enter__()


def test_a_holder_is_dead_only_where_that_is_certain(monkeypatch):
    here = Holder.here()
    assert replace(here, pid=os.getppid(), started=locks.UNKNOWN).dead() is False
    assert replace(here, space="a container").dead() is None
    assert replace(here, boot="another").dead() is True
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        started = Holder.here().started
    assert replace(here, pid=ended.pid, started=started).dead() is True
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first = replace(Holder.here(), host="elsewhere")
    assert first.dead() is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # its earlier start is over
    assert first.dead() is True
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert first.dead() is None


def test_a_file_that_alone_was_the_lock_is_one_where_there_are_locks_again(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(replace(Holder.here(alone=True), host="elsewhere"))))
    with pytest.raises(UserError, match="on elsewhere"):
        locked(path, "--checkpoint c").__enter__()
    path.write_text(json.dumps(asdict(replace(Holder.here(), host="elsewhere"))))  # and its lock is free: it is gone
    with locked(path, "--checkpoint c"):
        pass


@pytest.mark.parametrize(
    ("mount", "held"),
    [
        ("nfs4 server:/x rw,local_lock=none", False),
        ("nfs server:/x rw,local_lock=all", True),
        ("lustre x rw,flock", False),
        ("lustre x rw,localflock", True),
        ("beegfs beegfs_nodev rw", True),
    ],
)
def test_locks_that_end_at_the_host(tmp_path, monkeypatch, mount, held):
    path, device = tmp_path / "lock", tmp_path.stat().st_dev
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"1 1 999:999 / / rw - ext4 x rw\n36 35 {os.major(device)}:{os.minor(device)} / / rw m:1 - {mount}\n"
    )
    monkeypatch.setattr(locks, "MOUNTS", mounts)
    path.write_text(json.dumps(asdict(replace(Holder.here(), host="elsewhere"))))
    if held:
        with pytest.raises(UserError, match="on elsewhere"):
            locked(path, "--checkpoint c").__enter__()
    else:
        with locked(path, "--checkpoint c"):
            pass


def test_one_takes_over_from_a_dead_holder(tmp_path, monkeypatch):
    """Another that saw the same one, and comes to write its name later, sees who was faster."""
    path = tmp_path / "lock"
    dead = replace(Holder.here(alone=True), boot="another")
    path.write_text(json.dumps(asdict(dead)))
    without_locks(monkeypatch)
    faster = contextlib.ExitStack()
    taking = locks._may_live

    def slow(holder, without):
        if holder == dead and not faster._exit_callbacks:
            faster.push(lambda *_: None)
            faster.enter_context(locked(path, "--output r.h5"))
        return taking(holder, without)

    monkeypatch.setattr(locks, "_may_live", slow)
    with faster, pytest.raises(UserError, match=f"process {os.getpid()} on "):
        locked(path, "--output r.h5").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_one_warning_for_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    without_locks(monkeypatch)
    monkeypatch.setattr(locks, "_TOLD", set())
    for name in ("a", "b"):
        with locked(tmp_path / name / "lock", "--output r.h5"):
            pass
    assert caplog.text.count("this file system has no locks (No locks available)") == 1


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 3000, b'{"pid": 1}', b"\xff", b"null"], ids=["", "{}", "[[[", "few", "ff", "null"]
)
def test_a_lock_file_that_says_nothing(tmp_path, monkeypatch, content):
    path = tmp_path / "lock"
    path.write_bytes(content)
    with locked(path, "--output r.h5"):
        pass
    path.write_bytes(content)
    without_locks(monkeypatch)
    with pytest.raises(UserError, match="written by another program"):
        locked(path, "--output r.h5").__enter__()


def test_hostile_holders(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    path = tmp_path / "lock"
    for change in ({"pid": -1}, {"pid": 1 << 40}, {"host": "a\nb"}, {"started": "x"}):
        path.write_text(json.dumps(asdict(Holder.here()) | change))
        with pytest.raises(UserError, match="written by another program") as caught:
            locked(path, "--output r.h5").__enter__()
        assert "\n" not in str(caught.value)


def test_a_process_of_the_same_number_is_not_the_holder():
    here = Holder.here()
    assert here.dead() is False
    assert replace(here, started=here.started - 1).dead() is True
    assert replace(here, host="elsewhere").dead() is None


def test_a_lock_is_no_link(tmp_path):
    (tmp_path / "lock").symlink_to("precious")
    with pytest.raises(UserError, match="cannot be made"):
        locked(tmp_path / "lock", "--output r.h5").__enter__()
    assert not (tmp_path / "precious").exists()


def test_an_open_file_is_the_one_that_was_compared(tmp_path):
    path, image = tmp_path / "part.h5", bytes(image_of(lambda file: file.update({"x": np.arange(1e5)})))
    path.write_bytes(image)
    digest = hashlib.sha256(image).hexdigest()
    with open_summed(path, digest) as file:
        path.unlink()
        path.write_bytes(b"another")
        assert dataset(file, "x")[-1] == 99999
    with pytest.raises(ValueError, match=r"part.h5 does not match"), open_summed(path, digest):
        pass
    path.write_bytes(image)
    with open_summed(path, digest) as file:
        os.truncate(path, 4000)
        with pytest.raises(OSError, match="cut off while it was read"):
            dataset(file, "x")[()]


def test_data_that_is_elsewhere_or_nowhere_is_refused(tmp_path):
    def fill(file):
        file["group/x"] = np.arange(3)
        file["link"] = h5py.SoftLink("/group")
        file.create_dataset("unwritten", (1000,), np.float64)

    path, image = tmp_path / "part.h5", image_of(fill)
    path.write_bytes(image)
    with open_summed(path, hashlib.sha256(image).hexdigest()) as file:
        assert dataset(file, "group/x")[()].tolist() == [0, 1, 2]
        for name, told in (
            ("link/x", "is a link"),
            ("unwritten", "is not all there"),
            ("group/x/y", "is no group"),
            ("group", "is not an array"),
        ):
            with pytest.raises(ValueError, match=told):
                dataset(file, name)
