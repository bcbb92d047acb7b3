"""What all tests share: one thread, reproducible examples, and a way to run the command line on several ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from qnewton_mpi.parallel.environment import prepare

prepare()

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("suite")

# A shell has what it starts in the background ignore Ctrl-C, and all that this starts would: the suite is no such job.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What starts processes of its own; `make test-quick` leaves it out.
STARTERS = {"mpiexec", "qnewton"}


def pytest_collection_modifyitems(items):
    for item in items:
        if STARTERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


LAUNCHER_PREFIXES = ("PMI", "MPI_", "OMPI_", "PMIX_", "HYDI_", "SLURM_")


@pytest.fixture(scope="session")
def mpiexec():
    """Return run(ranks, *program, **options): a finished process; extra ranks than cores are allowed."""
    launcher = os.environ.get("MPIEXEC", str(Path(sys.executable).with_name("mpiexec")))
    environ = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    # Open MPI only: more ranks than cores, and as root, as in a container.
    environ |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def run(ranks, *program, timeout=600, env=None, **options):
        command = [launcher, "-n", str(ranks), sys.executable, *map(str, program)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environ | (env or {}), **options
        )

    run.launcher, run.environ = launcher, environ
    return run


@pytest.fixture(scope="session")
def qnewton(mpiexec):
    """Return run(ranks, *arguments): the command line under mpiexec."""

    def run(ranks, *arguments, **options):
        return mpiexec(ranks, "-m", "qnewton_mpi", *arguments, **options)

    return run


@pytest.fixture(scope="session")
def communicator():
    """Return the communicator of all ranks."""
    from qnewton_mpi.parallel.communicator import Communicator

    return Communicator()
