"""Entry point of `qnewton-mpi` and `python -m qnewton_mpi`."""

from __future__ import annotations

import sys


def main() -> int:
    """Set up threads before NumPy and MPI are loaded, then run the command line."""
    from qnewton_mpi.parallel.environment import prepare

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
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
