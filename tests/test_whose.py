"""Whose an output and its checkpoints are: what --resume takes over, refuses, leaves alone, and tells."""

import contextlib
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_data import write_mnist

from qnewton_mpi.config import resolve, run_config
from qnewton_mpi.errors import InterruptedRunError, UserError
from qnewton_mpi.files.images import USER_BLOCK
from qnewton_mpi.files.locks import lock_of, locked
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.results.runfile import Run
from qnewton_mpi.training import loop
from qnewton_mpi.training.checkpoint import name_of, steps_in

STEPS, SAVES = 6, 3


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Return go(**options): a short run of `sgd` in an empty folder, with checkpoints.

    With `stop` it is stopped after that step; with `fail` it fails after the first.
    """
    monkeypatch.chdir(tmp_path)
    data = tmp_path.with_name(f"{tmp_path.name}-data")
    write_mnist(data, 64)
    communicator, one_step, done = Communicator(), loop.Run.step, [0]

    def counted(run):
        done[0] = one_step(run)
        return done[0]

    monkeypatch.setattr(loop.Run, "step", counted)

    def go(stop=10**6, fail=False, **options):
        done[0] = 0
        defaults = {"method": "sgd", "lr": 0.01, "replicas": 2, "batch": 32, "steps": STEPS, "evaluate_every": 1000}
        defaults |= {"data": "mnist", "data_dir": str(data), "output": "r.h5", "checkpoint": "c"}
        defaults |= {"checkpoint_every": SAVES, "progress": "off"}
        options = {name: value for name, value in {**defaults, **options}.items() if value is not None}
        halted = (lambda: done[0] and 1 // 0) if fail else (lambda: done[0] >= stop - 1)  # a stop is a step late
        loop.train(resolve(run_config(options), 1), communicator, halted=halted)

    return go


@pytest.fixture
def whole(go, tmp_path):
    """Return the path of a finished run."""
    go()
    return tmp_path / "r.h5"


def steps_here():
    """Return the steps of the checkpoints."""
    return steps_in(Path("c"))


def back_to(step):
    """Remove the checkpoints after a step."""
    for later in steps_here():
        if later > step:
            shutil.rmtree(f"c/{name_of(later)}")


def unfinished(go, stop=2):
    """Leave a run that was stopped, with a checkpoint."""
    with pytest.raises(InterruptedRunError, match=f"stopped after step {stop} of {STEPS}"):
        go(stop=stop)


def refused(go, match, path="r.h5", **options):
    """See that a start is refused in one line, and leaves the output as it is and nothing of its own."""
    before, there = Path(path).read_bytes(), sorted(Path().iterdir())
    with pytest.raises(UserError, match=match) as caught:
        go(**options)
    assert "\n" not in str(caught.value)
    assert (Path(path).read_bytes(), sorted(Path().iterdir())) == (before, there)


def test_a_finished_run_is_left_as_it_is(go, whole, caplog):
    before, modified = whole.read_bytes(), whole.stat().st_mtime_ns
    go(resume=True)
    go(resume=True, overwrite=True)
    back_to(SAVES)
    go(resume=True)
    assert (whole.read_bytes(), whole.stat().st_mtime_ns) == (before, modified)
    assert caplog.text.count("r.h5 is finished") == 3
    assert steps_in(Path("c"))[-1] == STEPS  # what is lacking at the end is done again
    back_to(SAVES)
    go(resume=True, overwrite=True)  # this says to write the end again
    assert whole.stat().st_mtime_ns > modified
    assert Run(whole).steps["step"].tolist() == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"no checkpoint in typo, but r.h5 is finished: is --checkpoint right\?.*--overwrite"),
        ({"seed": 9}, r"no checkpoint in typo, but r.h5 is of another run: seed was 0 and is 9: .*--overwrite"),
    ],
)
def test_a_mistyped_folder_starts_nothing(go, whole, options, match):
    refused(go, match, checkpoint="typo", resume=True, **options)


def test_a_mistyped_folder_of_a_run_that_had_saved(go):
    unfinished(go)
    there = os.path.realpath("c")
    refused(go, f"r.h5 is of a run that has one of step 2, in {there}: is --ch", checkpoint="typo", resume=True)
    go(checkpoint="typo", resume=True, overwrite=True)


def test_what_was_killed_before_its_first_save_begins_again(go, caplog):
    with pytest.raises(ZeroDivisionError):
        go(fail=True)
    assert steps_here() == []
    refused(go, "lr was 0.01 and is 0.02", resume=True, lr=0.02)
    go(resume=True)
    assert "no checkpoint in c, and none was made before: starts from the beginning" in caplog.text


def test_the_first_start_of_a_script_that_always_resumes(go, tmp_path, caplog):
    go(resume=True)
    assert "no checkpoint in c yet: starts from the beginning" in caplog.text
    assert Run(tmp_path / "r.h5").finished


def test_a_file_of_another_run_of_the_same_options(go, whole):
    go(output="other.h5", checkpoint="d")
    back_to(SAVES)
    refused(
        go, "other.h5 is of another run than c: the options are the same", "other.h5", output="other.h5", resume=True
    )
    go(output="other.h5", resume=True, overwrite=True)
    assert Run(whole.with_name("other.h5")).steps["step"].tolist() == list(range(SAVES + 1, STEPS + 1))


def test_a_file_of_other_options(go, whole):
    go(output="other.h5", checkpoint="d", seed=3)
    refused(go, "other.h5 is of another run than c: seed was 3 and is 0:", "other.h5", output="other.h5", resume=True)


@pytest.mark.parametrize("content", [b"text", b"\x89HDF\r\n\x1a\n"])
def test_a_file_that_is_of_no_run(go, whole, content):
    whole.with_name("x.h5").write_bytes(content)
    back_to(SAVES)
    refused(go, "x.h5", "x.h5", output="x.h5", resume=True)
    refused(go, "x.h5", "x.h5", output="x.h5", resume=True, overwrite=True)
    refused(go, "x.h5", "x.h5", output="x.h5", resume=True, checkpoint="none")
    refused(go, "x.h5 exists: .*--overwrite", "x.h5", output="x.h5", checkpoint="none")


def test_a_file_that_is_damaged(go, whole):
    whole.write_bytes(whole.read_bytes()[:-1])
    refused(go, "is damaged.*: name another --output, or replace it with --overwrite", resume=True)
    refused(go, "is damaged.*: name another --output, or replace it with --overwrite", resume=True, checkpoint="none")
    back_to(SAVES)
    go(resume=True, overwrite=True)
    assert Run(whole).steps["step"].tolist() == list(range(SAVES + 1, STEPS + 1))


def test_another_output_begins_after_the_checkpoint(go, whole, caplog):
    back_to(SAVES)
    go(output="new.h5", resume=True)
    assert f"new.h5 is not there: it starts after step {SAVES}" in caplog.text
    new, run = Run(whole.with_name("new.h5")), Run(whole)
    np.testing.assert_array_equal(new.steps["loss"], run.steps["loss"][SAVES:])
    assert new.epochs["step"].tolist() == [SAVES, STEPS]
    assert new.epochs["tail_train_nll"][-1] == run.epochs["tail_train_nll"][-1]
    assert new.attributes["run"] == run.attributes["run"]


def test_rows_after_the_checkpoint_are_done_again(go, tmp_path, caplog):
    unfinished(go, stop=5)
    back_to(SAVES)
    go(resume=True)
    assert f"r.h5: its rows after step {SAVES} are done again" in caplog.text
    assert Run(tmp_path / "r.h5").steps["step"].tolist() == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 4}, "c is at step 6 already, of 4: ask for more"),
        (
            {"steps": 10, "schedule": "cosine"},
            "schedule was constant and is cosine, steps was 6 and is 10, .* begin another",
        ),
        ({"seed": 1, "batch": 64}, "batch was 32 and is 64, seed was 0 and is 1$"),
        ({"replicas": 4}, "replicas was 2 and is 4$"),
    ],
)
def test_other_options_are_refused(go, whole, options, match):
    refused(go, match, resume=True, **options)


def test_other_data_are_refused(go, tmp_path):
    for name in ("a", "b", "same"):
        write_mnist(tmp_path / name, 64, labels=np.arange(64) % (9 if name == "b" else 10))
    go(data_dir="a")
    refused(go, "the data set differs", resume=True, data_dir="b")
    refused(go, "the data set differs", resume=True, data_dir="b", checkpoint="d")
    go(resume=True, data_dir="same")


@pytest.mark.parametrize("path", [lock_of, lambda _: _.with_name("c") / ".lock"], ids=["output", "checkpoint"])
def test_one_run_at_a_time(go, whole, path):
    with locked(path(whole), "--output r.h5"):
        refused(go, f"is being written by process {os.getpid()} on ", resume=True)
        refused(go, f"is being written by process {os.getpid()} on ", overwrite=True)
    go(resume=True)


def test_locks_do_not_outlast_a_run_however_it_ends(go, tmp_path):
    unfinished(go)
    with pytest.raises(UserError):
        go(batch=10**6, overwrite=True)
    with contextlib.suppress(ZeroDivisionError):
        go(fail=True, overwrite=True)
    assert list(tmp_path.rglob("*lock*")) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder", "is a folder"),
        ("fifo", "is no regular file"),
        ("link", "is a symbolic link"),
        ("file/run.h5", "cannot be written"),
        ("a" * 300, "File name too long"),
        ("a/" * 3000 + "run.h5", "File name too long"),
    ],
)
@pytest.mark.parametrize("option", ["output", "overwrite", "resume"])
def test_outputs_that_are_never_replaced(go, tmp_path, output, message, option):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match=message) as caught:
        go(output=output, **{"overwrite": option == "overwrite", "resume": option == "resume"})
    assert len(str(caught.value)) < 800
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file", "folder", "link"]


def test_files_of_earlier_versions_are_compared_by_their_options(go):
    """They have no identifier, no digest of the data, and do not tell whether there was a checkpoint."""
    unfinished(go, stop=5)
    Path("r.h5").write_bytes(Path("r.h5").read_bytes()[USER_BLOCK:])  # nor sums
    with h5py.File("r.h5", "r+") as file:
        for name in ("run", "data_digest", "saved_step", "saved_in"):
            del file.attrs[name]
    refused(go, "seed was 0 and is 1", resume=True, seed=1)
    refused(go, "r.h5 has rows that would be lost: is --checkpoint right", resume=True, checkpoint="typo")
    go(resume=True)
