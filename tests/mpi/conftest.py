"""Tests that run under mpiexec: the ranks agree on each test's outcome, or the job ends.

A rank that fails before a collective leaves the others waiting in it. So after each test the ranks meet in a barrier
that does not block: a rank that failed waits a few seconds for the others, and if they do not come it prints its
traceback and aborts the job. (pytest's own time-out, by a thread, is the last resort.)
"""

import os
import sys
import time

import pytest
from mpi4py import MPI

from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.ending import LAST_WORDS

MEETING_SECONDS = 5.0
MUTED = pytest.StashKey()


@pytest.fixture(autouse=True)
def shares_of_signal_soon(monkeypatch):
    """The steps of these tests are few: let `kronecker` know its shares of signal after the first."""
    monkeypatch.setattr("qnewton_mpi.core.optimizers.natural.kronecker.FIRST_SHARES", 2)


def abort(text, code):
    os.write(sys.__stderr__.fileno(), text.encode())  # pytest holds sys.stderr
    time.sleep(LAST_WORDS)
    MPI.COMM_WORLD.Abort(code)


@pytest.hookimpl(trylast=True)  # after the terminal reporter is there
def pytest_configure(config):
    if MPI.COMM_WORLD.rank > 0:
        config.get_terminal_writer()._file = config.stash[MUTED] = open(os.devnull, "w")  # noqa: PTH123, SIM115


def pytest_unconfigure(config):
    if MUTED in config.stash:
        config.stash[MUTED].close()


def pytest_internalerror(excrepr):
    abort(f"rank {MPI.COMM_WORLD.rank}: {excrepr}\n", 3)


def pytest_report_header(config):
    return f"MPI: {MPI.COMM_WORLD.size} rank(s), {MPI.Get_library_version().splitlines()[0].strip(chr(0))}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when in ("setup", "call"):
        meeting, started = MPI.COMM_WORLD.Ibarrier(), time.monotonic()
        while not meeting.Test():
            if report.failed and time.monotonic() - started > MEETING_SECONDS:
                text = f"\nrank {MPI.COMM_WORLD.rank} failed {item.nodeid}; others wait:\n{report.longreprtext}\n"
                abort(text, 1)
            time.sleep(0.001)
        failed = MPI.COMM_WORLD.allgather(report.failed)
        if any(failed) and not report.failed:
            report.outcome = "failed"
            report.longrepr = f"failed on rank(s) {[rank for rank, bad in enumerate(failed) if bad]}"
    return report


@pytest.fixture(scope="session")
def communicator():
    return Communicator()
