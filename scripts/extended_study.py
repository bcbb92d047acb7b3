"""`qnewton-mpi compare` with methods that the package does not have: for scripts that bring some."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qnewton_mpi.core.optimizers import OPTIMIZERS, Optimizer
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator, abort_on_exception


def run(arguments: Sequence[str], methods: Mapping[str, type[Optimizer[Any]]]) -> int:
    """Do the study of STUDY.toml STUDY.h5, the arguments, and return the exit code. Collective.

    Call it before anything imports `qnewton_mpi.config`, which lists the methods.
    """
    OPTIMIZERS.update(methods)
    from qnewton_mpi.studies.compare import compare
    from qnewton_mpi.studies.plan import read_study

    world = Communicator()
    abort_on_exception(world)
    try:
        if len(arguments) != 2:
            raise UserError(f"usage: {Path(sys.argv[0]).name} STUDY.toml STUDY.h5")
        compare(world.from_root(lambda: read_study(arguments[0])), Path(arguments[1]), 1, world)
    except UserError as error:
        if world.rank == 0:
            print(error, file=sys.stderr)
        return 2
    return 0
