"""Send vectors of more than 2³¹ bytes through each exchange and compare what arrives.

Usage: mpiexec -n 2 python scripts/large_vectors.py [--parameters N] [--dtype float32]

The default is N = 2²⁹ + 3 in float32, 2.1 GB a vector, of which each rank needs about three. With N beyond 2³¹, it is
MPI's counts that are too large for 32 bits; mpi4py then needs a library with MPI 4's large counts.
"""

from __future__ import annotations

import argparse
import sys

from qnewton_mpi.parallel.environment import prepare

prepare()

import numpy as np  # noqa: E402

from qnewton_mpi.core.exchange import EXCHANGES  # noqa: E402
from qnewton_mpi.parallel.communicator import Communicator, abort_on_exception  # noqa: E402


def main() -> int:
    """Return 0 if all that arrived is right. Collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=(1 << 29) + 3, metavar="N")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    communicator = Communicator()
    abort_on_exception(communicator)
    size, ranks = arguments.parameters, communicator.size
    bad = 0
    for name in ("allgather", "sliced", "server"):
        exchange = EXCHANGES[name](communicator, ranks, size)
        # Numbers that show where they come from, and that float32 holds exactly.
        rows = np.empty((1, size), arguments.dtype)
        for start in range(0, size, 1 << 24):
            stop = min(start + (1 << 24), size)
            rows[0, start:stop] = np.arange(start, stop) % 1009 + communicator.rank
        mean = exchange.mean(rows)
        del rows
        whole = exchange.collect(mean)
        right = whole.shape == (size,)
        for start in range(0, size, 1 << 24):
            stop = min(start + (1 << 24), size)
            expected = (np.arange(start, stop) % 1009 + (ranks - 1) / 2).astype(arguments.dtype)
            right = right and bool(np.array_equal(whole[start:stop], expected))
        right = all(communicator.mpi.allgather(right))
        bad += not right
        if communicator.rank == 0:
            nbytes = size * np.dtype(arguments.dtype).itemsize
            print(
                f"{name}: {size:,} numbers, {nbytes:,} bytes, {ranks} ranks: {'right' if right else 'WRONG'}",
                flush=True,
            )
        del whole, mean, exchange
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
