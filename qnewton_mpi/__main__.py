"""Entry point of `qnewton-mpi` and `python -m qnewton_mpi`."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Set up threads before NumPy and MPI are loaded, then run the command line."""
    from qnewton_mpi.errors import ENDED_BY_CTRL_C
    from qnewton_mpi.parallel.environment import launched_tasks, prepare

    prepare()
    try:
        from qnewton_mpi.cli import run
    except RuntimeError as error:  # mpi4py finds no MPI library
        reason = str(error).splitlines()[0]
        print(
            f"qnewton-mpi: error: {reason}: load your site's MPI module, or pip install 'qnewton_mpi[mpich]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        if launched_tasks()[1] == 0:
            print("qnewton-mpi: interrupted", file=sys.stderr, flush=True)
        os._exit(ENDED_BY_CTRL_C)  # MPI is half set up perhaps: its end would wait for other ranks
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
