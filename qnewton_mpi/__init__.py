"""Data-parallel quasi-Newton training over MPI.

What is named here is loaded when it is first asked for. Importing the package loads neither NumPy nor MPI, so that the
entry point can set the number of threads first, and what only reads files does without an MPI library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnewton_mpi.core.create import create
    from qnewton_mpi.parallel.communicator import Communicator
    from qnewton_mpi.torch import QuasiNewton
    from qnewton_mpi.trained import Model, load
    from qnewton_mpi.training.call import train
    from qnewton_mpi.training.listeners import Record

__version__ = "0.1.0"
__all__ = ["Communicator", "Model", "QuasiNewton", "Record", "__version__", "create", "load", "train"]

_MODULES = {
    "Communicator": "parallel.communicator",
    "Model": "trained",
    "QuasiNewton": "torch",
    "Record": "training.listeners",
    "create": "core.create",
    "load": "trained",
    "train": "training.call",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
