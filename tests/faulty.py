"""Run under mpiexec: the command line with a fault on rank 1.

Usage: faulty.py nan|sleep|stop|stop-in-collective|drift|none ARGUMENTS…
"""

import os
import signal
import sys
import threading
import time

from qnewton_mpi.parallel.environment import prepare

prepare()

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from qnewton_mpi import cli  # noqa: E402
from qnewton_mpi.training.loop import ReplicaLoss, Run  # noqa: E402

gradients, check = ReplicaLoss.at_once, Run.check_replicas


def faulty_gradients(self, parameters, replicas):
    losses, found = gradients(self, parameters, replicas)
    if fault == "sleep" and rank == 1 and self.step == 6:
        time.sleep(60)
    if rank == 0 and self.step == 6 and fault == "stop-in-collective":
        time.sleep(0.5)
    if rank == 1 and self.step == 6 and fault.startswith("stop"):
        threading.Timer(0.3 * (fault != "stop"), os.kill, (os.getpid(), signal.SIGSTOP)).start()
        time.sleep(0.1 * (fault == "stop"))
    return losses, found * (np.nan if fault == "nan" and rank == 1 and self.step == 6 else 1)


def drifting_check(self):
    if fault == "drift" and rank == 1 and self.position.step == 8:
        self.optimizer.held[3] += 1
    return check(self)


if __name__ == "__main__":
    fault, rank = sys.argv[1], MPI.COMM_WORLD.rank
    ReplicaLoss.at_once, Run.check_replicas = faulty_gradients, drifting_check
    sys.exit(cli.run(sys.argv[2:]))
