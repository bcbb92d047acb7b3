"""The MPI library, which is loaded when it is first needed."""

from __future__ import annotations

from types import ModuleType

from qnewton_mpi.errors import UserError
from qnewton_mpi.origin import pip_install


def load_mpi() -> ModuleType:
    """Return mpi4py's MPI. Importing it loads and starts the library, which what only reads files does without. Local.

    Raises
    ------
    UserError
        Where there is no library.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason}: load your site's MPI module, or {pip_install('mpich')}") from error
    return MPI
