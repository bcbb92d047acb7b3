"""Runs that are stopped, killed, stalled or fed with NaN, as a batch system and bad luck do it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from qnewton_mpi.errors import ENDED_BY_CTRL_C, INTERRUPTED, InterruptedRunError, UserError
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.results.run import Run
from qnewton_mpi.training import interruption
from qnewton_mpi.training.checkpoint import steps_in
from qnewton_mpi.training.interruption import Interruption, Noted

pytestmark = pytest.mark.slow

FAULTY = Path(__file__).parent / "faulty.py"
STEPS = 60
OPTIONS = ("train", "--replicas", "4", "--batch", "64", "--evaluate-every", "1000", "--progress", "lines")


@pytest.fixture
def started(mpiexec):
    """Return start(ranks, *program, **env): a process group of its own that is killed at the end."""
    processes = []

    def start(ranks, *program, **env):
        command = [mpiexec.launcher, "-n", str(ranks), sys.executable, *map(str, program)]
        process = subprocess.Popen(
            command,
            env=mpiexec.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ranks_of(path):
    """Return the process ids of the ranks whose command line has a path, in the order of their ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environ = dict(line.partition(b"=")[::2] for line in (folder / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        rank = environ.get(b"PMI_RANK", environ.get(b"OMPI_COMM_WORLD_RANK"))
        if rank is not None and str(path).encode() in command and command[0].endswith(sys.executable.encode()):
            found[int(rank)] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def takes(pid, number):
    """Tell whether a process takes a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def saved(folder):
    return bool(steps_in(folder)) if folder.exists() else False


@pytest.fixture(scope="module")
def whole(qnewton, tmp_path_factory):
    """Return the run that was not interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run.h5"
    finished = qnewton(2, *OPTIONS, "--steps", STEPS, "--output", path)
    assert finished.returncode == 0, finished.stderr
    return Run(path)


def same_run(a, b):
    for figure in ("loss", "step", "rate"):
        np.testing.assert_array_equal(a.steps[figure], b.steps[figure])
    np.testing.assert_array_equal(a.epochs["tail_train_nll"], b.epochs["tail_train_nll"])


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM", "INT"])
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(mpiexec, qnewton, tmp_path, whole, name):
    """Agreed upon in the step after the one in which it comes."""
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--steps", STEPS, "--output", path, "--checkpoint", folder, "--checkpoint-every", "20")
    stopped = mpiexec(2, FAULTY, f"{name}@gradient:25", *arguments)
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert stopped.stderr.count("stopped") == 1
    assert f"stopped after step 26 of {STEPS}; go on with --resume (SIG{name})" in stopped.stderr
    assert steps_in(folder) == [20, 26]
    assert "stopped after step 26" in Run(path).attributes["status"]
    finished = qnewton(2, *arguments, "--resume")
    assert finished.returncode == 0, finished.stderr
    same_run(whole, Run(path))


@pytest.mark.skipif("MPICH" not in MPI.Get_library_version(), reason="another launcher's way with Ctrl-C")
def test_ctrl_c_in_a_terminal(started, tmp_path):
    """It reaches the launcher, which passes it on to all ranks."""
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    saves = ("--checkpoint", folder, "--checkpoint-every", "20")
    process = started(2, FAULTY, "wait@gradient:25", *OPTIONS, "--steps", STEPS, "--output", path, *saves)
    wait_for(lambda: saved(folder) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == INTERRUPTED, err
    assert len(re.findall(r"stopped after step \d+ of 60; go on with --resume \(SIGINT\)", err)) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(("place", "file"), [("loading:1", False), ("evaluation:1", True)])
def test_a_signal_before_the_first_step(mpiexec, tmp_path, place, file):
    path = tmp_path / "run.h5"
    stopped = mpiexec(2, FAULTY, f"TERM@{place}", *OPTIONS, "--steps", STEPS, "--output", path)
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert stopped.stderr.count("stopped") == 1
    assert "stopped before the first step, nothing is lost: start it again (SIGTERM)" in stopped.stderr
    assert path.exists() == file


def test_a_signal_while_the_program_is_loaded(mpiexec, tmp_path):
    program = (
        "import os, signal, sys;"
        "from qnewton_mpi import __main__;"
        "from qnewton_mpi.parallel import environment;"
        "environment.prepare = lambda: os.kill(os.getpid(), signal.SIGUSR2);"
        "sys.exit(__main__.main())"
    )
    stopped = mpiexec(2, "-c", program, *OPTIONS, "--output", tmp_path / "run.h5")
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert stopped.stderr.count("stopped before the first step, nothing is lost: start it again (SIGUSR2)") == 1


def test_a_signal_before_the_first_step_while_the_ranks_do_not_come_to_agree(started, tmp_path):
    """As in a download that takes minutes: rank 0 is told and waits for rank 1, which is not."""
    path = tmp_path / "run.h5"
    process = started(2, FAULTY, "block@loading:1", *OPTIONS, "--output", path)
    wait_for(lambda: len(ranks_of(path)) == 2 and takes(ranks_of(path)[0], signal.SIGTERM))
    os.kill(ranks_of(path)[0], signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == INTERRUPTED, err
    assert "stopped before the first step, nothing is lost: start it again (SIGTERM)" in err


def test_signals_while_the_program_ends_are_the_same_word(mpiexec, tmp_path):
    """Launchers and batch systems say it to each task, and again: at the end of the run, of Python and of MPI."""
    program = (
        "import atexit, os, signal, sys; from qnewton_mpi import __main__\n"
        "def again():\n"
        "    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):\n"
        "        os.kill(os.getpid(), number)\n"
        "atexit.register(again)\n"
        "from qnewton_mpi.training.interruption import Interruption\n"
        "leave = Interruption.__exit__\n"
        "Interruption.__exit__ = lambda *arguments: (leave(*arguments), again())[0]\n"
        "sys.exit(__main__.main())"
    )
    arguments = (*OPTIONS, "--steps", STEPS, "--output", tmp_path / "run.h5", "--time-limit", "0.01")
    stopped = mpiexec(2, "-c", program, *arguments)
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert "stopped after step" in stopped.stderr


def test_between_runs_signals_are_noted_once(monkeypatch, clock):
    ended = []
    monkeypatch.setattr(interruption.os, "_exit", ended.append)
    clock.readings = iter([0.0, 10.0, 10.9, 11.1])  # as a run begins, and at each signal
    before = signal.getsignal(signal.SIGTERM)
    with Noted() as noted:
        with Interruption(Communicator(MPI.COMM_SELF), "TERM"):
            pass
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        wait_for(lambda: noted.came)
        assert (noted.came, ended) == (signal.SIGUSR1, [])
        os.kill(os.getpid(), signal.SIGTERM)  # not SIGINT: what a shell starts in the background ignores it
        wait_for(lambda: ended)
    assert ended == [128 + signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_a_rank_that_waits_in_mpi(started, tmp_path):
    path, log = tmp_path / "run.h5", tmp_path / "rank-00000-of-00002.log"
    arguments = (*OPTIONS, "--evaluate-every", "1", "--output", path, "--log-dir", tmp_path)
    process = started(2, FAULTY, "block@gradient:5", *arguments)

    def logged(text):
        return log.exists() and text in log.read_text()

    wait_for(lambda: logged("step 4: train NLL"))
    rank = ranks_of(path)[0]
    os.kill(rank, signal.SIGTERM)
    wait_for(lambda: logged("SIGTERM: stops after this step"))
    time.sleep(interruption.ECHO)  # what comes sooner is the same word
    os.kill(rank, signal.SIGTERM)
    process.communicate()
    assert process.returncode not in (0, INTERRUPTED)


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that `interruption` reads, and which stands still unless it is set."""
    hands = SimpleNamespace(readings=iter(()))
    fake = SimpleNamespace(monotonic=lambda: next(hands.readings), time=time.time, sleep=time.sleep)
    monkeypatch.setattr(interruption, "time", fake)
    return hands


def test_signals_within_a_second_are_one(monkeypatch, clock):
    ended = []
    monkeypatch.setattr(interruption.os, "_exit", ended.append)
    clock.readings = iter([0.0, 10.0, 10.2, 10.9, 11.1])  # as it is made, and at each signal
    with Interruption(Communicator(MPI.COMM_SELF), "USR1,USR2,TERM,INT") as told:
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
            wait_for(lambda: told._told)
        wait_for(lambda: ended)
    assert told._told == signal.SIGUSR2
    assert ended == [128 + signal.SIGINT]


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Interruption(Communicator(MPI.COMM_SELF), "TERM,INT"):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_that_the_shell_has_us_ignore():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption(Communicator(MPI.COMM_SELF), "TERM,INT"):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_killed_rank_ends_the_job_and_the_run_goes_on(mpiexec, qnewton, tmp_path, whole):
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--steps", STEPS, "--output", path, "--checkpoint", folder, "--checkpoint-every", "10")
    assert mpiexec(2, FAULTY, "KILL@gradient:25", *arguments).returncode != 0
    finished = qnewton(2, *arguments, "--resume")
    assert finished.returncode == 0, finished.stderr
    same_run(whole, Run(path))


def test_a_limit_of_time(qnewton, tmp_path):
    """However short it is, every start gets on."""
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--steps", STEPS, "--output", path, "--time-limit", "1e-3")
    saves = ("--checkpoint", folder, "--checkpoint-every", "1000000")  # none but that of the stop
    for done in (2, 4):
        stopped = qnewton(2, *arguments, *saves, "--resume")
        assert stopped.returncode == INTERRUPTED, stopped.stderr
        assert f"stopped after step {done} of {STEPS}; go on with --resume (--time-limit)" in stopped.stderr
    assert steps_in(folder) == [2, 4]
    stopped = qnewton(2, *arguments, "--overwrite")
    assert stopped.returncode == INTERRUPTED
    assert "without a checkpoint (--checkpoint DIR) (--time-limit)" in stopped.stderr


def test_the_end_that_slurm_tells(caplog):
    now = time.time()
    assert interruption.seconds_left({"SLURM_JOB_END_TIME": str(int(now) + 1000)}) == pytest.approx(1000, abs=100)
    assert interruption.seconds_left({"SLURM_JOB_END_TIME": f"{now + 1000:.3f}"}) == pytest.approx(1000, abs=100)
    assert interruption.seconds_left({"SLURM_JOB_END_TIME": "1"}) < -1e9
    assert interruption.seconds_left({}) == np.inf
    assert not caplog.records
    milliseconds = str(int(now * 1000))
    for text in ("", "soon", "-5", "nan", "inf", "1" * 5000, milliseconds, "\x001"):
        assert interruption.seconds_left({"SLURM_JOB_END_TIME": text}) == np.inf
        assert "SLURM_JOB_END_TIME=" in caplog.records.pop().getMessage()


@pytest.mark.parametrize(
    ("left", "number", "ends"),
    [
        (12, None, UserError),  # the minute before the end has begun
        (-5, None, UserError),
        (1200, None, None),
        (1200, signal.SIGTERM, InterruptedRunError),
        (90, signal.SIGUSR2, UserError),  # the notice of an end that is too near: requeued, it would come again
        (90, signal.SIGINT, InterruptedRunError),
    ],
)
def test_how_a_start_without_a_step_ends(monkeypatch, left, number, ends):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + left))
    with Interruption(Communicator(MPI.COMM_SELF), "USR2,TERM,INT") as told:
        if number:
            os.kill(os.getpid(), number)
            wait_for(lambda: told._told)
        if ends is None:
            told.begin()
            return
        with pytest.raises(ends) as raised:
            told.begin()
    named = re.search(r"SLURM_JOB_END_TIME leaves (-?\d+) s", str(raised.value))
    assert (named is not None) == (ends is UserError)


def test_too_near_an_end_is_one_line_and_no_reason_to_try_again(qnewton, tmp_path):
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 30)}
    stopped = qnewton(2, *OPTIONS, "--steps", STEPS, "--output", tmp_path / "run.h5", env=end)
    assert stopped.returncode == 2
    assert len(stopped.stderr.splitlines()) == 1
    assert "SLURM_JOB_END_TIME leaves" in stopped.stderr
    limit = ("--time-limit", "1e-3")
    assert qnewton(2, *OPTIONS, "--output", tmp_path / "run.h5", *limit, env=end).returncode == INTERRUPTED


@pytest.mark.parametrize(("ranks", "command"), [(1, "watch"), (1, "info"), (2, "info")])
def test_ctrl_c_at_other_commands(mpiexec, ranks, command):
    """In a command that needs MPI, and in one that does not."""
    program = (
        "import os, signal, sys\n"
        "from qnewton_mpi import cli\n"
        "def process(*_): os.kill(os.getpid(), signal.SIGINT)\n"
        f"cli.{command}.process = process\n"
        f"sys.exit(cli.run(['{command}', 'run.h5'][:{2 if command == 'watch' else 1}]))"
    )
    ended = mpiexec(ranks, "-c", program)
    assert ended.returncode == ENDED_BY_CTRL_C, ended.stderr
    assert [line for line in ended.stderr.splitlines() if line and "Abort(" not in line] == ["qnewton-mpi: interrupted"]


def test_resume_without_any_checkpoint_starts(qnewton, tmp_path):
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    finished = qnewton(2, *OPTIONS, "--steps", "3", "--output", path, "--checkpoint", folder, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert steps_in(folder) == [3]


def test_a_run_that_is_done_stays_so(qnewton, tmp_path):
    arguments = (*OPTIONS, "--steps", "3", "--output", tmp_path / "run.h5", "--checkpoint", tmp_path / "checkpoints")
    assert qnewton(1, *arguments).returncode == 0
    finished = qnewton(1, *arguments, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert Run(tmp_path / "run.h5").steps["step"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("block@loading:2", "loading"),
        ("block@restore:1", "restore"),
        ("block@output:1", "output"),
        ("block@gradient:7", "gradient"),
        ("block@evaluation:2", "evaluation"),
        ("block@checkpoint:1", "checkpoint"),
        ("block@output:3", "output"),  # at the end
        ("stop@gradient:7", "gradient"),
        ("stop@communication:40", "communication"),
    ],
)
def test_a_stalled_rank_is_named(mpiexec, qnewton, tmp_path, fault, phase):
    """The watchdogs are patient until the rank has come to where it stays."""
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--output", path, "--checkpoint", folder, "--stall-timeout", "100000", "--steps", "12")
    if phase == "restore":
        assert qnewton(2, *arguments).returncode == 0
        arguments += ("--resume",)
    stalled = mpiexec(2, FAULTY, fault, *arguments)
    assert stalled.returncode == 1, stalled.stderr
    assert re.search(rf"stalled: rank 1 has been in phase '{phase}' for \d+ s", stalled.stderr), stalled.stderr
    assert stalled.stderr.count("stalled: ") == 1


@pytest.mark.parametrize(("policy", "every"), [("skip", 100), ("rollback", 4)])
def test_gradients_that_are_not_finite(mpiexec, tmp_path, policy, every):
    """Rank 1's gradient is NaN once, in the 7th step."""
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--steps", "12", "--output", path, "--checkpoint", folder, "--checkpoint-every", every)
    finished = mpiexec(2, FAULTY, "nan", *arguments, "--on-nonfinite", policy)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("step 7 skipped") == 1
    assert ("back at step 4" in finished.stderr) == (policy == "rollback")
    done = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert Run(path).steps["step"].tolist() == (done if policy == "skip" else [*done[:6], 5, 6, *done[6:]])
    assert mpiexec(2, FAULTY, "nan", *arguments, "--overwrite").returncode == 2


def test_parameters_that_differ_are_told(mpiexec, tmp_path):
    arguments = (*OPTIONS, "--steps", "12", "--output", tmp_path / "run.h5", "--exchange", "allgather")
    for options, told in (
        ([], "step 9: the parameters of rank 1 differ from those of rank 0"),
        (["--overwrite", "--check-replicas", "4"], "after step 8 the parameters of rank(s) 1 differ from"),
    ):
        finished = mpiexec(3, FAULTY, "drift", *arguments, *options)
        assert finished.returncode == 2
        assert told in finished.stderr
    assert mpiexec(3, FAULTY, "none", *arguments, "--overwrite", "--check-replicas", "5").returncode == 0


def test_the_file_of_a_run_is_readable_while_it_goes_on(started, qnewton, tmp_path):
    path = tmp_path / "run.h5"
    arguments = (*OPTIONS, "--steps", STEPS, "--evaluate-every", "5", "--output", path)
    started(2, FAULTY, "wait@gradient:25", *arguments)
    wait_for(path.exists)
    wait_for(lambda: len(Run(path).epochs["train_nll"]) >= 2)
    assert Run(path).attributes["status"] == "running"
    watched = qnewton(1, "watch", path, "--once")
    assert watched.returncode == 0, watched.stderr
    assert re.search(r"kronecker M=4 lr=auto: running.*, step \d+, .*samples/s +epoch .*train NLL", watched.stdout)


def test_watch_ends_with_the_run(qnewton, tmp_path):
    path = tmp_path / "run.h5"
    assert qnewton(1, *OPTIONS, "--steps", "3", "--output", path).returncode == 0
    assert "finished" in qnewton(1, "watch", path).stdout
    assert qnewton(1, "watch", tmp_path / "none.h5").returncode == 2
    assert qnewton(1, "watch", path, "--every", "0").returncode == 2


def test_a_log_for_each_rank(qnewton, tmp_path):
    arguments = (*OPTIONS, "--steps", "4", "--output", tmp_path / "run.h5", "--log-dir", tmp_path / "logs")
    finished = qnewton(2, *arguments, "--checkpoint", tmp_path / "checkpoints")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("rank 0/2 INFO checkpoint of step 4") == 1
    assert "rank 1/2" not in finished.stderr
    for rank in (0, 1):
        text = (tmp_path / "logs" / f"rank-0000{rank}-of-00002.log").read_text()
        assert f"rank {rank}/2 INFO checkpoint of step 4" in text
        assert f"rank {rank}/2 DEBUG step 4: train NLL" in text


def test_short_soak(tmp_path):
    """Each event and each damage once: scripts/soak.py has the long version."""
    for what, count in (("jobs", 4), ("mutations", 5)):
        soak = Path(__file__).parents[1] / "scripts" / "soak.py"
        command = [sys.executable, soak, what, str(count), tmp_path / what]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stdout + finished.stderr + (tmp_path / what).read_text()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--resume"], "--resume needs a folder"),
        (["--stop-signals", "USR1,HUB"], "stop_signals = USR1,HUB: must be names of signals"),
        (["--checkpoint-every", "3"], "--checkpoint-every needs a folder"),
        (["--on-nonfinite", "rollback"], "--checkpoint DIR"),
        (["--checkpoint", "/proc/x"], "/proc/x: cannot be written"),
    ],
)
def test_options_that_do_not_fit(qnewton, tmp_path, arguments, match):
    finished = qnewton(2, *OPTIONS, "--steps", "1", "--output", tmp_path / "run.h5", *arguments)
    assert finished.returncode == 2
    assert match in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
