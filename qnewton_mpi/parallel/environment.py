"""What has to be settled before NumPy and MPI are loaded. Imports neither."""

from __future__ import annotations

import os
import resource
import signal
import warnings
from collections.abc import Mapping, MutableMapping

from qnewton_mpi.errors import UserError

LEAST_FILES = 48  # open at a time: with MPICH one rank needs 24, and 7 on a node start with so many
HELD = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)  # by which batch systems tell a job to stop
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")

# (number of tasks, index of this task, what has to be there too) as launchers tell them. srun's are the step's, since a
# batch script itself, which may rightly start a one-rank program, also sees SLURM_NTASKS. WORLD_SIZE and RANK are also
# set by hand, for torch.distributed under mpiexec: they count with what torchrun (and `accelerate launch`, which uses
# it) or `deepspeed` set beside them.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", None),
    ("PMI_SIZE", "PMI_RANK", None),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", None),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", None),
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", None),
    ("HOROVOD_SIZE", "HOROVOD_RANK", None),
    ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"),
    ("WORLD_SIZE", "RANK", "CROSS_SIZE"),
)
# Those that tell the index alone; the first task is not seen through, but the others, which end the job.
INDICES = ("PMIX_RANK", "PALS_RANKID")


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set one BLAS thread per rank, where the user has not set the number.

    The default of most BLAS libraries, a thread per core in every rank, was measured 20 to 30 times slower.
    """
    for name in THREAD_VARIABLES:
        environ.setdefault(name, "1")
    # mpi4py's own word on a mismatched launcher, three lines from each task: `check_launcher` says it in one.
    warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)


def hold_signals() -> None:
    """Have what would end a run without a word wait until the run takes it (`training.interruption`).

    To import everything takes seconds, on a parallel file system minutes.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def ignore_signals() -> None:
    """Have a process that ends because it was told to end so, whatever it is told again.

    Launchers and batch systems say it several times, and the end of Python and MPI takes a while, in which Python's own
    handlers are gone.
    """
    for number in (*HELD, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def check_descriptors() -> None:
    """Raise the number of files that may be open where it is very low.

    Raises
    ------
    UserError
        Where it cannot be: MPI would end the job without a reason that can be read.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < LEAST_FILES:
        if resource.RLIM_INFINITY != hard < LEAST_FILES:
            raise UserError(f"only {hard} files may be open at a time: ulimit -n {LEAST_FILES}, or more")
        resource.setrlimit(resource.RLIMIT_NOFILE, (LEAST_FILES, hard))


def launched_tasks(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return (number of tasks, index of this task) as the launcher tells them; (1, 0) without one."""

    def number(name: str) -> int:
        text = environ.get(name, "")
        return int(text) if text.isdecimal() else 0

    told = [(number(size), number(index)) for size, index, sign in LAUNCHERS if sign is None or sign in environ]
    told += [(number(index) + 1, number(index)) for index in INDICES]
    return max((1, 0), *told)


def check_launcher(size: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise `UserError` when a launcher started several tasks but MPI sees a single rank.

    A launcher that does not belong to the MPI library gives n separate one-rank jobs, without any error of its own.
    """
    tasks, _ = launched_tasks(environ)
    if size == 1 and tasks > 1:
        raise UserError(
            f"the launcher started {tasks} tasks, but each sees an MPI world of one rank: use the mpiexec that belongs "
            "to the MPI library of `qnewton-mpi info`, or srun --mpi=pmi2 (MPICH) or --mpi=pmix (Open MPI); torchrun "
            "and its like start no MPI ranks"
        )
