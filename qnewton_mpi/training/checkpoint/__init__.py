"""Checkpoints: all state of a run, written side by side by the ranks, complete or not there at all.

DIR/step-0000000040/
    rank-00000-of-00004.h5 …   what a rank holds: its coordinates of /held, and the layers that it keeps sums for
    ranks.h5                   instead of those, with a group a rank, where h5py is built with parallel HDF5
    checkpoint.h5              /shared, and /configuration (JSON): the options, the step, what is where, the sums of
                               the files of the ranks
    SHA256SUMS                 of all files above, as `sha256sum -c` reads it

A checkpoint is written under another name, every file and folder is fsynced, and then it is renamed. The last two that
are sound are kept.

A file is opened once, compared with its sum, and read by HDF5 through the same descriptor: checkpoint.h5 with the sum
in SHA256SUMS, the others with those in checkpoint.h5, so that one of another step or run is not taken for its own. A
rank opens those that it needs, one after the other, and puts its coordinates together from their parts. Nothing of the
run is changed before all ranks have all that they need.
"""

from __future__ import annotations

from qnewton_mpi.training.checkpoint.checkpoints import Checkpoints
from qnewton_mpi.training.checkpoint.folder import steps_in
from qnewton_mpi.training.checkpoint.reading import parameters_of

__all__ = ["Checkpoints", "parameters_of", "steps_in"]
