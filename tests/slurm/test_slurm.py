"""The batch scripts on a real SLURM: jobs that are preempted, signalled, on two nodes, in an array."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qnewton_mpi import cli
from qnewton_mpi.results.run import Run
from qnewton_mpi.training.checkpoint import steps_in

ROOT = Path(__file__).parents[2]
OPTIONS = ("--replicas", "4", "--steps", "60", "--evaluate-every", "20")
SAVES = ("--checkpoint-every", "20")
# The command of the jobs. The first start of those with HELD waits in step 30, on rank 1, until it is told to stop.
COMMAND = f"""#!/bin/sh
fault=none
[ -n "$HELD" ] && [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] && fault=wait@gradient:30
exec {sys.executable} {ROOT}/tests/faulty.py "$fault" "$@"
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Return run(*command): its output, in a folder with an environment and, elsewhere, the scripts: `run.scripts`."""
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Path(__file__).parent / "cluster.sh"
    subprocess.run([cluster, "start", folder], check=True, timeout=600)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "MPI", "OMPI_", "HYDI_"))}
    environ["SLURM_CONF"] = str(folder / "slurm.conf")
    work = folder / "work"
    (work / "runs").mkdir(parents=True)
    assert cli.run(["slurm", str(folder / "the scripts")]) == 0
    program = work / ".venv" / "bin" / "qnewton-mpi"
    program.parent.mkdir(parents=True)
    program.write_text(COMMAND)
    program.chmod(0o755)

    def run(*command, cwd=work, **env):
        finished = subprocess.run(
            [str(word) for word in command], env=environ | env, cwd=cwd, capture_output=True, text=True, timeout=600
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    run.work, run.scripts, run.program = work, folder / "the scripts", program
    yield run
    subprocess.run(["scancel", "--user=root"], env=environ, check=False)
    subprocess.run([cluster, "stop", folder], check=True)


@pytest.fixture(scope="module")
def whole(qnewton, tmp_path_factory):
    """Return the run of the same options that was not interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run.h5"
    finished = qnewton(2, "train", *OPTIONS, "--output", path)
    assert finished.returncode == 0, finished.stderr
    return Run(path)


def submit(slurm, *arguments, **options):
    words = [slurm.scripts / word if str(word).endswith(".sbatch") else word for word in arguments]
    return int(re.search(r"Submitted batch job (\d+)", slurm("sbatch", *words, **options))[1])


def state(slurm, job):
    return re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))[1]


def wait_for(condition, seconds=800):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def completed(slurm, job, folder=None):
    """Return the log of a job, or of ARRAY_TASK, that came to its end as it should; pytest shows it where not."""
    path = (folder or slurm.work) / f"qnewton-{str(job).replace('_', '-')}.out"
    try:
        wait_for(lambda: state(slurm, job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))
    finally:
        log = path.read_text() if path.exists() else ""
        print(slurm("scontrol", "show", "job", job), log, sep="\n")
    assert state(slurm, job) == "COMPLETED"
    return log


def test_a_preempted_job_goes_on(slurm, whole):
    job = submit(slurm, "--ntasks=2", "train.sbatch", *OPTIONS, *SAVES, HELD="1")
    folder, path = slurm.work / "runs" / str(job), slurm.work / "runs" / f"{job}.h5"
    wait_for(lambda: folder.exists() and steps_in(folder))
    urgent = submit(slurm, "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    wait_for(lambda: state(slurm, urgent) == "COMPLETED")
    log = completed(slurm, job)
    assert "Restarts=1" in slurm("scontrol", "show", "job", job)
    assert "go on with --resume" in log
    run = Run(path)
    assert run.attributes["status"] == "finished"
    for figure in ("step", "loss"):
        np.testing.assert_array_equal(run.steps[figure], whole.steps[figure])


def test_a_signal_to_the_script_requeues_the_job(slurm, whole):
    """As --signal=B:USR2@120 sends it."""
    job = submit(slurm, "--ntasks=2", "train.sbatch", *OPTIONS, *SAVES, HELD="1")
    folder, path = slurm.work / "runs" / str(job), slurm.work / "runs" / f"{job}.h5"
    wait_for(lambda: folder.exists() and steps_in(folder))
    slurm("scancel", "--signal=USR2", "--batch", job)
    wait_for(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job))
    completed(slurm, job)
    np.testing.assert_array_equal(Run(path).steps["loss"], whole.steps["loss"])


def test_a_killed_job_goes_on_in_the_queue(slurm, whole):
    """As after a node's failure. The killed ranks leave their shared memory behind on the node."""
    job = submit(slurm, "--ntasks=2", "--nodelist=n1", "train.sbatch", *OPTIONS, *SAVES, HELD="1")
    folder, path = slurm.work / "runs" / str(job), slurm.work / "runs" / f"{job}.h5"
    wait_for(lambda: folder.exists() and steps_in(folder))
    slurm("scancel", "--signal=KILL", f"{job}.0")
    slurm("scontrol", "requeue", job)
    wait_for(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job))
    completed(slurm, job)
    np.testing.assert_array_equal(Run(path).steps["loss"], whole.steps["loss"])


def test_a_limit_in_which_no_step_can_be_done_is_not_tried_for_ever(slurm):
    """Versions of SLURM that do not say when the job ends do so by the test."""
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 50)}
    job = submit(slurm, "--ntasks=2", "--time=1", "--signal=B:USR2@1", "train.sbatch", *OPTIONS, *SAVES, **end)
    wait_for(lambda: state(slurm, job) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"))
    shown = slurm("scontrol", "show", "job", job)
    log = (slurm.work / f"qnewton-{job}.out").read_text()
    assert "JobState=FAILED" in shown, shown + log
    assert "Restarts=0" in shown
    assert "ExitCode=2:0" in shown, shown + log
    assert "SLURM_JOB_END_TIME leaves" in log


def test_two_nodes(slurm, whole):
    job = submit(slurm, "--ntasks-per-node=1", "nodes.sbatch", *OPTIONS, *SAVES)
    completed(slurm, job)
    assert "NumNodes=2" in slurm("scontrol", "show", "job", job)
    run = Run(slurm.work / "runs" / f"{job}.h5")
    assert run.attributes["ranks"] == 2
    np.testing.assert_array_equal(run.steps["loss"], whole.steps["loss"])


def test_an_array(slurm):
    (slurm.work / "runs.txt").write_text("--seed 3\n--seed 4 --method sgd\n")
    job = submit(slurm, "--array=1-2", "array.sbatch", "runs.txt", "--replicas", "4", "--steps", "5")
    paths = [slurm.work / "runs" / f"{job}-{k}.h5" for k in (1, 2)]
    for k in (1, 2):
        completed(slurm, f"{job}_{k}")
    assert [(run.attributes["seed"], run.attributes["method"]) for run in map(Run, paths)] == [
        (3, "kronecker"),
        (4, "sgd"),
    ]


SHORT = ("--replicas", "4", "--steps", "2", "--output", "run.h5")


@pytest.mark.parametrize("how", ["path", "command", "setup"])
def test_where_the_program_is(slurm, tmp_path, how):
    """From another folder, which has no .venv: on the PATH, behind another program, named by a file of set-up."""
    beside, environ = slurm.program.parent, {}
    if how == "path":
        environ["PATH"] = f"{beside}:{os.environ['PATH']}"
    elif how == "command":
        wrapper = tmp_path / "container"
        wrapper.write_text(f'#!/bin/sh\n[ "$1 $2" = "exec an.sif" ] && shift 3 && exec {slurm.program} "$@"\n')
        wrapper.chmod(0o755)
        environ["QNEWTON_COMMAND"] = f"{wrapper} exec an.sif qnewton-mpi"
    else:
        (tmp_path / "setup").write_text(f"export PATH={beside}:$PATH\n")
        environ["QNEWTON_SETUP"] = "setup"
    job = submit(slurm, "--ntasks=2", "train.sbatch", *SHORT, cwd=tmp_path, **environ)
    completed(slurm, job, tmp_path)
    assert Run(tmp_path / "run.h5").attributes["ranks"] == 2
    assert (tmp_path / "runs" / str(job)).is_dir()


def test_a_program_that_is_nowhere(slurm, tmp_path):
    job = submit(slurm, "train.sbatch", *SHORT, cwd=tmp_path)
    wait_for(lambda: state(slurm, job) == "FAILED")
    assert "ExitCode=2:0" in slurm("scontrol", "show", "job", job)
    told = (tmp_path / f"qnewton-{job}.out").read_text()
    assert told.startswith("resumable.sh: qnewton-mpi is not there: activate its environment before sbatch")
    assert told.count("\n") == 1


def test_the_partition_by_option_and_environment(slurm, tmp_path):
    assert cli.run(["slurm", str(tmp_path / "jobs"), "--partition", "urgent", "--account", "physics"]) == 0
    written = tmp_path / "jobs" / "train.sbatch"
    for environ, options, partition, account in (
        ({}, (), "urgent", "physics"),
        ({"SBATCH_PARTITION": "main", "SBATCH_ACCOUNT": "maths"}, (), "main", "maths"),
        ({"SBATCH_PARTITION": "main"}, ("--partition=urgent",), "urgent", "physics"),
    ):
        job = submit(slurm, "--hold", *options, written, **environ)
        shown = slurm("scontrol", "show", "job", job)
        slurm("scancel", job)
        assert f"Partition={partition}" in shown
        assert f"Account={account}" in shown


def test_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    globs = ("slurm/*", "qnewton_mpi/batch/*.s*", "scripts/*.sh", "tests/slurm/*.sh", ".ci/run")
    scripts = [path for pattern in globs for path in ROOT.glob(pattern)]
    subprocess.run(["shellcheck", *scripts], check=True)
