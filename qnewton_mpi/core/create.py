"""An optimizer by its method's name: settings checked, exchange chosen, transport opened."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from array_api_compat import is_cupy_array
from mpi4py import MPI
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array, to_host
from qnewton_mpi.core.exchange import EXCHANGES, Exchange, choose
from qnewton_mpi.core.exchange.cost import Traffic
from qnewton_mpi.core.optimizers import OPTIMIZERS, Optimizer, Settings
from qnewton_mpi.core.settings import build, check_count
from qnewton_mpi.errors import UserError, did_you_mean
from qnewton_mpi.parallel import farewell
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.ending import abort_on_exception
from qnewton_mpi.parallel.transport import TRANSPORTS, open_transport

Shapes = Sequence[tuple[int, ...]] | None
MOST_ALIKE = 8  # samples that all replicas have in common, one step after the other, before that is no chance


def method_settings(method: str, **settings: Any) -> Settings:
    """Return the settings of a method; those not given have their defaults. Local.

    Raises
    ------
    UserError
        For a method, a setting or a value that does not exist.
    """
    if method not in OPTIMIZERS:
        like = did_you_mean(str(method), OPTIMIZERS)
        raise UserError(f"method={method!r}: must be one of {', '.join(OPTIMIZERS)}{like}")
    return build(OPTIMIZERS[method].settings_type, settings)


def create(
    method: str,
    parameters: Array,
    replicas: int,
    samples: int = 1,
    *,
    shapes: Shapes = None,
    exchange: str = "auto",
    transport: str = "auto",
    communicator: Communicator | MPI.Intracomm | None = None,
    seed: int = 0,
    stall_timeout: float | None = None,
    **settings: Any,
) -> Optimizer[Any]:
    """Return an optimizer. Collective.

    An exception that no one catches ends all ranks (`abort_on_exception`), as does a rank that leaves others waiting.

    Parameters
    ----------
    method : str
        A key of `OPTIMIZERS`.
    parameters : (N,) float32 or float64
        The same on every rank; copied.
    replicas, samples, seed : int
        M, over all ranks; b, how many samples each replica's loss is the mean of; for what a method draws at random.
    shapes : sequence of tuple of int, optional
        Of the tensors that the parameters concatenate, for methods that know layers; default: one vector.
    exchange, transport : str
        A key of `EXCHANGES`, or "auto", what should take the least time; one of `TRANSPORTS`: how arrays on GPUs cross.
    communicator : Communicator or MPI.Intracomm, optional
        Of all ranks by default.
    stall_timeout : float, optional
        Seconds that a rank may wait for another's program, in a step or here, before the job is ended.
    **settings
        Of the method, as lr, damping: numbers, or words as on the command line.

    Raises
    ------
    UserError
        On every rank, for any of these that cannot be used, or that is not the same on all.

    Examples
    --------
    >>> import numpy as np
    >>> optimizer = create("momentum", np.zeros(2), replicas=4, lr=0.1)  # f_i(w) = ‖w − i‖²/2
    >>> losses = [optimizer.step(lambda w, i: (np.sum((w - i) ** 2) / 2, w - i))["loss"] for _ in range(100)]
    >>> optimizer.parameters.round(1).tolist()
    [1.5, 1.5]
    """
    ranks = Communicator.of(communicator, stall_timeout)
    abort_on_exception(ranks)
    counts = {"replicas": replicas, "samples": samples, "seed": seed}
    ways = {"exchange": exchange, "transport": transport}
    options = ranks.together(lambda: _checked(method, settings, counts, ways, parameters, shapes))
    _agree(ranks, {"method": method, **asdict(options), **counts, **ways}, parameters, shapes)
    mover = _exchange(exchange, transport, OPTIMIZERS[method].traffic(options), ranks, replicas, parameters)
    optimizer = OPTIMIZERS[method](options, parameters, mover, samples, seed, shapes)
    optimizer.most_alike = MOST_ALIKE
    return optimizer


def _checked(
    method: str,
    settings: Mapping[str, Any],
    counts: Mapping[str, int],
    ways: Mapping[str, str],
    parameters: Array,
    shapes: Shapes,
) -> Settings:
    """Return the settings of the method; raise `UserError` for what `create` cannot be given. Local."""
    options = method_settings(method, **settings)
    for name, count in counts.items():
        check_count(name, count, 0 if name == "seed" else 1)
    check_parameters(parameters, shapes)
    known = {"exchange": ("auto", *EXCHANGES), "transport": tuple(TRANSPORTS)}
    for name, value in ways.items():
        if value not in known[name]:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known[name])}")
    least = OPTIMIZERS[method].least_replicas(options)
    if counts["replicas"] < least:
        raise UserError(
            f"{method}, lr={options.lr}, needs {least} replicas and has {counts['replicas']}: start more ranks with "
            "mpiexec, or have more replicas a rank"
        )
    return options


def _agree(communicator: Communicator, chosen: Mapping[str, Any], parameters: Array, shapes: Shapes) -> None:
    """Raise `UserError` where not all ranks have chosen the same, or do not begin at the same point. Collective."""
    communicator.agree(
        {**chosen, "device": _device(parameters), "dtype": str(parameters.dtype)},
        "start all ranks with the same settings",
    )
    communicator.agree(
        {"shapes": digest(repr(shapes).encode()), "parameters": digest(to_host(parameters))},
        "draw them from the same seed on every rank (torch.manual_seed before a model is built), or load one file",
    )


def _exchange(
    name: str, transport: str, traffic: Traffic, communicator: Communicator, replicas: int, parameters: Array
) -> Exchange:
    """Return the exchange of a name, for "auto" the one that should take the least time. Collective."""
    size = len(parameters)
    chosen = choose(traffic, communicator.size, replicas, size) if name == "auto" else name
    return EXCHANGES[chosen](communicator, replicas, size, open_transport(transport, _device(parameters), communicator))


def _device(parameters: Array) -> str:
    """Return where the parameters are, in a word that all ranks compare."""
    return "cuda" if is_cupy_array(parameters) else "cpu"


def check_parameters(parameters: Any, shapes: Shapes) -> None:
    """Raise `UserError` for no vector of float32 or float64, or one of another length than the shapes'. Local."""
    found = f"{getattr(parameters, 'dtype', type(parameters).__name__)} {tuple(getattr(parameters, 'shape', ()))}"
    name = str(getattr(parameters, "dtype", "")).rpartition(".")[2]
    if name not in ("float32", "float64") or len(parameters.shape) != 1 or not len(parameters):
        raise UserError(f"the parameters are {found}: give one vector of float32 or float64, as w.ravel() is")
    count = len(parameters) if shapes is None else sum(math.prod(shape) for shape in shapes)
    if count != len(parameters):
        raise UserError(f"the shapes have {count} numbers, the parameters {len(parameters)}: give those of all tensors")


def digest(content: bytes | NDArray[Any]) -> bytes:
    """Return a digest by which the ranks compare. Local."""
    return hashlib.blake2b(content).digest()  # type: ignore[arg-type]


if MPI.Is_initialized() and MPI.COMM_WORLD.Get_size() > 1:  # what fails before the first optimizer is waited for, too
    abort_on_exception(MPI.COMM_WORLD)
    farewell.watch()
