"""The parameters that a run left, in its file or in its checkpoints, and what is said of them there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.models.network import Network
from qnewton_mpi.parallel.log import LOG
from qnewton_mpi.results.layout import NETWORK, Parameters
from qnewton_mpi.results.run import Run
from qnewton_mpi.training.checkpoint import parameters_of
from qnewton_mpi.training.checkpoint.layout import UNREADABLE

WHICH = {"last": "", "ema": "ema_", "tail": "tail_", "best": "best_"}
"""An iterate by what users call it.

The last, the exponential mean (`--ema`), the mean of the last quarter, the one with the lowest validation NLL.
"""


@dataclass(frozen=True)
class Saved:
    """Parameters, and what a run's file or a checkpoint says of them.

    Attributes
    ----------
    path : Path
    parameters : dict of arrays
        By name, in the network's order; of a checkpoint, or a file of earlier versions, all in one.
    options : mapping
        Of the run, and the digest of its data; of a file all attributes.
    network : str
        Its `Description`; empty in files of earlier versions.
    history : dict of (rows,) float64
        The evaluations of a run, by figure; of a checkpoint nothing.
    """

    path: Path
    parameters: Parameters
    options: Mapping[str, Any]
    network: str
    history: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def flat(self) -> NDArray[Any]:
        """All parameters in one array, (N,)."""
        return np.concatenate([array.reshape(-1) for array in self.parameters.values()])


def weights_for(network: Network, saved: Saved) -> NDArray[Any]:
    """Return the saved parameters as a network takes them, (N + K,). Local.

    Raises
    ------
    UserError
        Where they are not as many, or not of those names and shapes.
    """
    where, flat = printable(saved.path), np.asarray(saved.flat, network.dtype)
    count = network.size + len(network.statistics)
    if len(flat) != count:
        raise UserError(f"{where}: has {len(flat):,} parameters, and its network takes {count:,}")
    wanted = {name: array.shape for name, array in network.named(flat).items()}
    found = {name: array.shape for name, array in saved.parameters.items()}
    if "" not in found and found != wanted:
        name = next(name for name in [*found, *wanted] if found.get(name) != wanted.get(name))
        raise UserError(f"{where}: its parameters are not those of its network: {printable(name)} is another, or lacks")
    return flat


def read(path: Path, which: str = "last") -> Saved:
    """Read the parameters in a run's file, or in the newest sound checkpoint of a folder. Local.

    Parameters
    ----------
    path : Path
    which : {"last", "ema", "tail", "best"}
        See `WHICH`.

    Raises
    ------
    UserError
        For what is neither, or does not have these parameters, or has some that are not finite.
    """
    if which not in WHICH:
        raise UserError(f"which = {which!r:.60}: must be one of {', '.join(WHICH)}")
    try:
        if path.is_dir():
            flat, about, passed_over = parameters_of(path, WHICH[which])
            for line in passed_over:
                LOG.warning("passed over %s", line)
            found = Saved(path, {"": flat}, about["configuration"], about.get("network", ""))
        else:
            run = Run(path, WHICH[which])
            if not run.parameters:
                why = "no part was held out (--validation)" if which == "best" else "they come with the end of a run"
                raise UserError(f"{printable(path)}: has no {which} parameters: {why}")
            found = Saved(path, run.parameters, run.attributes, str(run.attributes.get(NETWORK, "")), run.epochs)
    except UNREADABLE as error:
        raise UserError(
            f"{printable(path)}: is neither a run nor a folder of checkpoints ({' '.join(str(error).split())})"
        ) from error
    if not np.isfinite(found.flat).all():
        raise UserError(f"{printable(path)}: its parameters are not finite: the run diverged")
    return found
