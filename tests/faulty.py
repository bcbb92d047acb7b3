"""Run under mpiexec: the command line with a fault at an exact place, most of them on rank 1.

Usage: faulty.py nan|drift|none ARGUMENTS…
       faulty.py block|stop|wait|SIGNAL@PHASE:COUNT ARGUMENTS…

The second form is for the COUNT-th time that the ranks enter a phase (a step's number for "gradient"):

block   rank 1 does not go on; rank 0's watchdog, patient so far, gives it two seconds once it waits for it
stop    so it does for a process of rank 1 that is stopped
wait    rank 1 goes on when it was told to stop
SIGNAL  as TERM: rank 1 gets it, and goes on when it is noted
"""

import collections
import os
import signal
import sys
import threading
import time

from qnewton_mpi.parallel.environment import hold_signals, prepare

hold_signals()  # as the program itself does
prepare()

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from qnewton_mpi import cli  # noqa: E402
from qnewton_mpi.parallel.communicator import COMMUNICATION, Communicator  # noqa: E402
from qnewton_mpi.training import loop  # noqa: E402
from qnewton_mpi.training.loop import Run  # noqa: E402
from qnewton_mpi.training.replicas import ReplicaLoss  # noqa: E402

gradients, check, enter = ReplicaLoss.at_once, Run.check_replicas, Communicator.enter
made = {}  # the run's watchdog and interruption
entered = collections.Counter()
PATIENCE = 2.0


def remembered(kind):
    class Remembered(kind):
        def __enter__(self):
            made[kind.__name__] = self
            return super().__enter__()

    return Remembered


def faulty_gradients(self, parameters, replicas):
    losses, found = gradients(self, parameters, replicas)
    return losses, found * (np.nan if fault == "nan" and rank == 1 and self.step == 6 else 1)


def drifting_check(self):
    if fault == "drift" and rank == 1 and self.position.step == 8:
        self.optimizer.held[3] += 1
    return check(self)


def faulty_enter(self, phase):
    enter(self, phase)
    entered[phase] += 1
    if rank == 1 and phase == place and entered[phase] == count:
        happens()
    watchdog = made.get("Watchdog")
    if rank == 0 and phase == COMMUNICATION and entered[place] >= count and watchdog and watchdog._limit != PATIENCE:
        MPI.COMM_WORLD.recv(source=1)  # which is where it stays, so that this rank will wait for it
        watchdog._limit = PATIENCE


def happens():
    if fault in ("block", "stop"):
        MPI.COMM_WORLD.send(None, 0)
    if fault == "block":
        threading.Event().wait()
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        if fault != "wait":
            os.kill(os.getpid(), signal.Signals[f"SIG{fault}"])
        while not made["Interruption"]._told:
            time.sleep(0.01)


if __name__ == "__main__":
    fault, _, where = sys.argv[1].partition("@")
    rank = MPI.COMM_WORLD.rank
    ReplicaLoss.at_once, Run.check_replicas = faulty_gradients, drifting_check
    loop.Watchdog, loop.Interruption = remembered(loop.Watchdog), remembered(loop.Interruption)
    if where:
        place, _, count = where.partition(":")
        count = int(count)
        Communicator.enter = faulty_enter
    sys.exit(cli.run(sys.argv[2:]))
