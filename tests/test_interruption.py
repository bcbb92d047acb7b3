"""Runs that are stopped, killed, stalled or fed with NaN, as a batch system and bad luck do it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qnewton_mpi.cli import INTERRUPTED
from qnewton_mpi.training import interruption
from qnewton_mpi.training.checkpoint import steps_in
from qnewton_mpi.training.runfile import Run

OPTIONS = ("train", "--replicas", "4", "--batch", "64", "--evaluate-every", "1000", "--progress", "lines")


@pytest.fixture
def started(mpiexec):
    """Return start(ranks, *arguments): a process group that is killed at the end."""
    processes = []

    def start(ranks, *arguments, program=("-m", "qnewton_mpi"), **env):
        command = [mpiexec.launcher, "-n", str(ranks), sys.executable, *program, *map(str, arguments)]
        process = subprocess.Popen(
            command, env=mpiexec.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def saved(folder):
    return bool(steps_in(folder)) if folder.exists() else False


STEPS = 800  # so that a fast machine is not done before it is stopped


@pytest.fixture(scope="module")
def whole(qnewton, tmp_path_factory):
    """Return the run that was not interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run.h5"
    finished = qnewton(2, *OPTIONS, "--steps", STEPS, "--output", path)
    assert finished.returncode == 0, finished.stderr
    return Run(path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(started, qnewton, tmp_path, whole, number):
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--steps", STEPS, "--output", path, "--checkpoint", folder, "--checkpoint-every", "20")
    process = started(2, *arguments)
    wait_for(lambda: saved(folder) or process.poll() is not None)
    os.kill(ranks_of(path)[1], number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, err
    stopped = int(re.search(r"stopped after step (\d+) of 800; go on with --resume", err)[1])
    assert err.count("stopped") == 1
    assert steps_in(folder)[-1] == stopped
    assert Run(path).attributes["status"].startswith("failed: stopped")
    finished = qnewton(2, *arguments, "--resume")
    assert finished.returncode == 0, finished.stderr
    runs = [whole, Run(path)]
    for figure in ("loss", "step", "rate"):
        np.testing.assert_array_equal(*(run.steps[figure] for run in runs))
    np.testing.assert_array_equal(*(run.epochs["tail_train_nll"] for run in runs))


def test_a_killed_rank_ends_the_job_and_the_run_goes_on(started, qnewton, tmp_path, whole):
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--steps", STEPS, "--output", path, "--checkpoint", folder, "--checkpoint-every", "10")
    process = started(2, *arguments)
    wait_for(lambda: saved(folder) or process.poll() is not None)
    os.kill(ranks_of(path)[1], signal.SIGKILL)
    process.communicate(timeout=5)
    assert process.returncode != 0
    finished = qnewton(2, *arguments, "--resume")
    assert finished.returncode == 0, finished.stderr
    for figure in ("loss", "step"):
        np.testing.assert_array_equal(Run(path).steps[figure], whole.steps[figure])


def test_a_limit_of_time(qnewton, tmp_path):
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--epochs", "500", "--output", path)
    saves = ("--checkpoint", folder, "--checkpoint-every", "1000000")  # none but that of the stop
    finished = qnewton(2, *arguments, "--time-limit", "0.5", *saves)
    assert finished.returncode == INTERRUPTED
    stopped = re.search(r"stopped after step (\d+) of \d+; go on with --resume", finished.stderr)
    assert steps_in(folder) == [int(stopped[1])]
    finished = qnewton(2, *arguments, "--time-limit", "0.5", "--overwrite")
    assert finished.returncode == INTERRUPTED
    assert "without a checkpoint" in finished.stderr


def test_limit_of_slurm():
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 100)}
    assert interruption.seconds_left(end) == pytest.approx(40, abs=2)
    assert interruption.seconds_left({"SLURM_JOB_END_TIME": "1"}) == 0
    assert interruption.seconds_left({}) is None


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
    ("how", "phase"), [("sleep", "gradient"), ("stop", "gradient"), ("stop-in-collective", "communication")]
)
def test_a_stalled_rank_is_named(started, tmp_path, how, phase):
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--epochs", "500", "--output", path, "--checkpoint", folder, "--checkpoint-every", "5")
    program = (Path(__file__).parent / "faulty.py", how)
    process = started(2, *arguments, "--stall-timeout", "3", program=program)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert re.search(rf"stalled: rank 1 has been in phase '{phase}' for \d+ s", err), err
    assert err.count("stalled: ") == 1


def test_a_job_that_is_suspended_whole_goes_on(started, tmp_path):
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--epochs", "500", "--output", path, "--checkpoint", folder, "--checkpoint-every", "5")
    process = started(2, *arguments, "--stall-timeout", "3")
    wait_for(lambda: saved(folder) or process.poll() is not None)
    for number, seconds in ((signal.SIGSTOP, 5), (signal.SIGCONT, 2), (signal.SIGTERM, 0)):
        for rank in ranks_of(path):
            os.kill(rank, number)
        time.sleep(seconds)
    _, err = process.communicate(timeout=60)
    assert "stalled" not in err
    assert process.returncode == INTERRUPTED, err


@pytest.mark.parametrize(("policy", "every"), [("skip", 100), ("rollback", 4)])
def test_gradients_that_are_not_finite(mpiexec, tmp_path, policy, every):
    """Rank 1's gradient is NaN once, in the 7th step."""
    path, folder = tmp_path / "run.h5", tmp_path / "checkpoints"
    arguments = (*OPTIONS, "--steps", "12", "--output", path, "--checkpoint", folder, "--checkpoint-every", every)
    faulty = Path(__file__).parent / "faulty.py"
    finished = mpiexec(2, faulty, "nan", *arguments, "--on-nonfinite", policy)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("step 7 skipped") == 1
    assert ("back at step 4" in finished.stderr) == (policy == "rollback")
    done = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert Run(path).steps["step"].tolist() == (done if policy == "skip" else [*done[:6], 5, 6, *done[6:]])
    assert mpiexec(2, faulty, "nan", *arguments, "--overwrite").returncode == 2


def test_parameters_that_differ_are_told(mpiexec, tmp_path):
    arguments = (*OPTIONS, "--steps", "12", "--output", tmp_path / "run.h5", "--exchange", "allgather")
    faulty = Path(__file__).parent / "faulty.py"
    finished = mpiexec(3, faulty, "drift", *arguments, "--check-replicas", "5")
    assert finished.returncode == 2
    assert "after step 10 the parameters of rank(s) 1 differ from those of rank 0" in finished.stderr
    assert mpiexec(3, faulty, "none", *arguments, "--overwrite", "--check-replicas", "5").returncode == 0


def test_the_file_of_a_run_is_readable_while_it_goes_on(started, qnewton, tmp_path):
    path = tmp_path / "run.h5"
    process = started(1, "train", "--replicas", "4", "--epochs", "500", "--evaluate-every", "5", "--output", path)
    wait_for(path.exists)
    wait_for(lambda: len(Run(path).epochs["train_nll"]) >= 2)
    assert Run(path).attributes["status"] == "running"
    watched = qnewton(1, "watch", path, "--once")
    assert watched.returncode == 0, watched.stderr
    assert re.search(r"kronecker M=4 lr=auto: running.*, step \d+, .*samples/s +epoch .*train NLL", watched.stdout)
    process.kill()


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
    """Each phase killed in, each damage done, once: scripts/soak.py has the long version."""
    for what, count in (("kills", 7), ("mutations", 5)):
        command = [sys.executable, Path(__file__).parents[1] / "scripts" / "soak.py", what, str(count), tmp_path / what]
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
