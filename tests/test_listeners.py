"""Who else is told of a run: a function of the program's own, TensorBoard."""

import dataclasses
import os
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from qnewton_mpi import train
from qnewton_mpi.errors import MissingPackageError, UserError
from qnewton_mpi.results.run import Run

pytestmark = pytest.mark.slow

SHORT = {"method": "sgd", "replicas": 2, "batch": 32, "steps": 4, "evaluate_every": 2, "progress": "off"}


@pytest.mark.parametrize("steps", [False, True])
def test_what_a_callback_gets(tmp_path, steps):
    records = []
    path = train(**SHORT, output=tmp_path / "run.h5", callback=records.append, callback_steps=steps).path
    run, places = Run(path), [(record.kind, record.step) for record in records]
    evaluations = [("evaluation", step) for step in (0, 2, 4)]
    both = [evaluations[0], *(("step", k) for k in (1, 2)), evaluations[1], *(("step", k) for k in (3, 4))]
    assert places == ([*both, evaluations[2]] if steps else evaluations)
    for kind, columns in (("evaluation", run.epochs), ("step", run.steps)):
        told = [record for record in records if record.kind == kind]
        for name in columns if told else ():
            np.testing.assert_array_equal([record.figures[name] for record in told], columns[name], name)
    assert {record.steps for record in records} == {4}
    assert records[-1].epoch == 4 / (10_000 // 32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        records[0].step = 3
    with pytest.raises(TypeError):
        records[0].figures["train_nll"] = 0


def test_a_callback_that_is_none(tmp_path):
    with pytest.raises(UserError, match="callback=3: must be a function"):
        train(**SHORT, output=tmp_path / "run.h5", callback=3)
    assert not (tmp_path / "run.h5").exists()


PROGRAM = """
    import sys
    from mpi4py import MPI
    from qnewton_mpi import train

    rank = MPI.COMM_WORLD.rank
    asked = []

    def callback(record):
        asked.append(record)
        if record.step == 2:
            {fails}

    options = {options}
    train(**options, output="run.h5", {given})
    both = MPI.COMM_WORLD.gather(len(asked))  # told by one rank: what two print may come out in each other's lines
    if both:
        print(*both)
"""


@pytest.mark.parametrize(
    "given", ["callback=callback", "callback=callback if rank == 0 else None, callback_steps=rank < 1"]
)
@pytest.mark.parametrize("fails", ["pass", "1 / 0", "raise SystemError('two\\nlines')"])
def test_on_two_ranks(mpiexec, tmp_path, given, fails):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM).format(given=given, fails=fails, options=SHORT))
    finished = mpiexec(2, program, cwd=tmp_path, timeout=120)
    if fails == "pass":
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.splitlines()[-1] == f"{3 + 4 * ('steps' in given)} 0"
        return
    kind = "step" if "steps" in given else "evaluation"
    what = "ZeroDivisionError: division by zero" if "/" in fails else "SystemError: two lines"
    told = [line for line in finished.stderr.splitlines() if line.startswith("qnewton-mpi:")]
    assert told == [f"qnewton-mpi: the callback failed at the {kind} of step 2: {what} (program.py, line 12)"]
    assert "Traceback" not in finished.stderr
    assert finished.returncode == 2
    assert "the callback failed" in Run(tmp_path / "run.h5").attributes["status"]


def test_a_callback_that_leaves(mpiexec, tmp_path):
    """The other rank does not wait for ever."""
    program = tmp_path / "program.py"
    text = textwrap.dedent(PROGRAM).format(given="callback=callback", fails="sys.exit(3)", options=SHORT)
    program.write_text(text)
    finished = mpiexec(2, program, cwd=tmp_path, timeout=120)
    assert finished.returncode == 2
    assert "rank 0 has left after step 2" in finished.stderr


def events(folder):
    """Return all events in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("*tfevents*")):
        raw, place = path.read_bytes(), 0
        while place < len(raw):
            size = struct.unpack_from("<Q", raw, place)[0]
            found.append(Event.FromString(raw[place + 12 : place + 12 + size]))
            place += size + 16
        assert place == len(raw)
    return found


def scalars(folder):
    """Return steps and values by tag."""
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def agrees(folder, run):
    """Hold the events to the rows of the run's file."""
    told = scalars(folder)
    for group, columns in (("epochs", run.epochs), ("steps", run.steps)):
        for name, values in columns.items():
            there = ~np.isnan(values)
            if name != "step" and there.any():
                steps, numbers = zip(*told.pop(f"{group}/{name}"), strict=True)
                np.testing.assert_array_equal(steps, columns["step"][there])
                np.testing.assert_allclose(numbers, values[there], rtol=1e-6)
    assert told == {}


def test_tensorboard_has_the_rows_of_the_file(tmp_path):
    pytest.importorskip("tensorboardX")
    train(**SHORT, output=tmp_path / "run.h5", log="tensorboard")
    agrees(tmp_path / "run.tensorboard", Run(tmp_path / "run.h5"))
    before = {path.name for path in (tmp_path / "run.tensorboard").iterdir()}
    (tmp_path / "run.tensorboard" / "notes").touch()
    (tmp_path / "run.h5").unlink()
    with pytest.raises(UserError, match=r"run.tensorboard: has events of another run: .*--overwrite"):
        train(**SHORT, output=tmp_path / "run.h5", log="tensorboard")
    assert not (tmp_path / "run.h5").exists()
    train(**SHORT, output=tmp_path / "run.h5", log="tensorboard", overwrite=True)
    agrees(tmp_path / "run.tensorboard", Run(tmp_path / "run.h5"))
    after = {path.name for path in (tmp_path / "run.tensorboard").iterdir()}
    assert "notes" in after
    assert not before & after


def test_a_run_that_goes_on_has_no_step_twice(qnewton, tmp_path):
    """Rows after the checkpoint are done again, as the run was killed."""
    pytest.importorskip("tensorboardX")
    saves = ("--checkpoint", "saved", "--checkpoint-every", "4", "--log", "tensorboard", "--evaluate-every", "1")
    command = ("train", "--method", "sgd", "--steps", "9", *saves, "--output", "run.h5", "--resume")
    program = tmp_path / "killed.py"
    program.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            from qnewton_mpi import cli
            from qnewton_mpi.training import tensorboard

            write = tensorboard.Events.write

            def killing(self, record):
                write(self, record)
                self._file and self._file.flush()
                if (record.kind, record.step) == ("step", int(sys.argv[1])):
                    os.kill(os.getpid(), signal.SIGKILL)

            tensorboard.Events.write = killing
            cli.run(sys.argv[2:])
            """
        )
    )
    for step in (3, 7, 6):  # before any checkpoint, too
        killed = subprocess.run([sys.executable, program, str(step), *command], cwd=tmp_path, check=False)
        assert killed.returncode == -9
    newest = sorted((tmp_path / "run.tensorboard").glob("*tfevents*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-5])  # as where the last of it was not on the disk
    finished = qnewton(2, *command, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    agrees(tmp_path / "run.tensorboard", Run(tmp_path / "run.h5"))
    starts = [event.step for event in events(tmp_path / "run.tensorboard") if event.session_log.status == 1]
    assert starts == [1, 5]
    before = {path: path.stat() for path in (tmp_path / "run.tensorboard").iterdir()}
    assert qnewton(1, *command, cwd=tmp_path).returncode == 0  # it is finished: nothing is touched
    assert before == {path: path.stat() for path in (tmp_path / "run.tensorboard").iterdir()}


def test_a_step_back_takes_the_place_of_what_followed(tmp_path):
    pytest.importorskip("tensorboardX")
    from qnewton_mpi.training.listeners import Record
    from qnewton_mpi.training.tensorboard import Events

    with Events(tmp_path, "a1", None, False) as writer:
        for attempt in range(2):
            for step in (1, 2, 3)[attempt:]:
                writer.write(Record("step", step, 0.0, 3, {"loss": step + 10 * attempt}))
    assert scalars(tmp_path) == {"steps/loss": [(1, 1.0), (2, 12.0), (3, 13.0)]}


def test_a_disk_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    pytest.importorskip("tensorboardX")
    from tensorboardX.event_file_writer import EventsWriter

    def refuses(self, event):
        raise OSError(28, os.strerror(28))

    opened = EventsWriter.write_event
    count = []

    def full(self, event):
        count.append(event)
        return opened(self, event) if len(count) < 6 else refuses(self, event)

    monkeypatch.setattr(EventsWriter, "write_event", full)
    train(**SHORT, output=tmp_path / "run.h5", log="tensorboard")
    assert Run(tmp_path / "run.h5").finished
    assert len(count) == 6


def test_without_tensorboardx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingPackageError, match=r"--log tensorboard needs tensorboardX: pip install .*tensorboard"):
        train(**SHORT, output=tmp_path / "run.h5", log="tensorboard")
    assert not (tmp_path / "run.h5").exists()
    with pytest.raises(UserError, match="log = wandb: must be one of tensorboard"):
        train(**SHORT, output=tmp_path / "run.h5", log="wandb")
