"""Entry point of `qnewton-mpi` and `python -m qnewton_mpi`."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Settle streams and threads before NumPy and MPI are loaded, then run the command line."""
    from qnewton_mpi import streams
    from qnewton_mpi.errors import ENDED_BY_CTRL_C, INTERRUPTED
    from qnewton_mpi.parallel.environment import hold_signals, ignore_signals, launched_tasks, prepare

    streams.settle()
    if sys.argv[1:2] in (["train"], ["compare"]):
        hold_signals()
    prepare()
    try:
        from qnewton_mpi.cli import run
    except KeyboardInterrupt:
        if launched_tasks()[1] == 0:
            print("qnewton-mpi: interrupted", file=sys.stderr, flush=True)
        os._exit(ENDED_BY_CTRL_C)  # MPI is half set up perhaps: its end would wait for other ranks
    code = run(sys.argv[1:])
    if code == INTERRUPTED:
        ignore_signals()
    return code


if __name__ == "__main__":
    sys.exit(main())
