"""Where a result is from: the time, the host's job, the command, the commit, and the versions that it depends on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata

from qnewton_mpi import __version__
from qnewton_mpi.origin import commit


def provenance() -> dict[str, str | None]:
    """Return when, in which job and from which commit a run is started; None for what there is none of. Local.

    Of the environment nothing else is told: there may be secrets in it.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def versions() -> dict[str, str]:
    """Return the versions that a result depends on. Local."""
    from mpi4py import MPI

    packages = {f"version_{name}": metadata.version(name) for name in ("numpy", "mpi4py", "h5py")}
    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    return {
        "version_qnewton_mpi": __version__,
        "version_python": platform.python_version(),
        "version_mpi": library,
        **packages,
    }
