"""Entry point of `qnewton-mpi` and `python -m qnewton_mpi`."""

from __future__ import annotations

import sys


def main() -> int:
    """Settle streams and threads before NumPy and MPI are loaded, then run the command line."""
    from qnewton_mpi import streams
    from qnewton_mpi.parallel.environment import prepare

    streams.settle()
    prepare()
    from qnewton_mpi.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
