"""An optimizer by its method's name: settings checked, exchange chosen, transport opened."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from array_api_compat import is_cupy_array
from mpi4py import MPI
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array, to_host
from qnewton_mpi.core.exchange import EXCHANGES, choose
from qnewton_mpi.core.optimizers import OPTIMIZERS, Optimizer, Settings
from qnewton_mpi.core.settings import build, check_count
from qnewton_mpi.errors import UserError, did_you_mean
from qnewton_mpi.parallel import farewell
from qnewton_mpi.parallel.communicator import Communicator, abort_on_exception
from qnewton_mpi.parallel.transport import TRANSPORTS, open_transport

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
    shapes: Sequence[tuple[int, ...]] | None = None,
    exchange: str = "auto",
    transport: str = "auto",
    communicator: Communicator | MPI.Intracomm | None = None,
    seed: int = 0,
    stall_timeout: float | None = None,
    **settings: Any,
) -> Optimizer[Any]:
    """Return an optimizer. Collective.

    An exception that no one catches ends all ranks (`abort_on_exception`), unless the program has an `excepthook` of
    its own, and so does a rank that leaves while others wait for it.

    Parameters
    ----------
    method : str
        A key of `OPTIMIZERS`.
    parameters : (N,) float32 or float64
        The same on every rank; copied.
    replicas : int
        M, over all ranks.
    samples : int
        b, how many samples each replica's loss is the mean of.
    shapes : sequence of tuple of int, optional
        Of the tensors that the parameters are the concatenation of, for methods that know layers; default: one vector.
    exchange : str
        A key of `EXCHANGES`; "auto" is what should take the least time.
    transport : str
        One of `TRANSPORTS`: how arrays on GPUs cross the network.
    communicator : Communicator or MPI.Intracomm, optional
        Of all ranks by default.
    seed : int
        For what a method draws at random.
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
    >>> centres = np.random.default_rng(0).standard_normal((4, 10))
    >>> def loss_and_gradient(w, replica):
    ...     return np.sum((w - centres[replica]) ** 2) / 2, w - centres[replica]
    >>> optimizer = create("momentum", np.zeros(10), replicas=4, lr=0.1)
    >>> for _ in range(100):
    ...     figures = optimizer.step(loss_and_gradient)
    >>> bool(np.allclose(optimizer.parameters, centres.mean(axis=0), atol=0.01))
    True
    """
    communicator = Communicator.of(communicator, stall_timeout)
    abort_on_exception(communicator)

    def check() -> Settings:
        options = method_settings(method, **settings)
        for name, count, smallest in (("replicas", replicas, 1), ("samples", samples, 1), ("seed", seed, 0)):
            check_count(name, count, smallest)
        check_parameters(parameters, shapes)
        for name, value, known in (("exchange", exchange, ["auto", *EXCHANGES]), ("transport", transport, TRANSPORTS)):
            if value not in known:
                raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
        least = OPTIMIZERS[method].least_replicas(options)
        if replicas < least:
            raise UserError(
                f"{method}, lr={options.lr}, needs {least} replicas and has {replicas}: start more ranks with mpiexec, "
                "or have more replicas a rank"
            )
        return options

    options = communicator.together(check)
    device = "cuda" if is_cupy_array(parameters) else "cpu"
    communicator.agree(
        {
            "method": method,
            **asdict(options),
            "replicas": replicas,
            "samples": samples,
            "seed": seed,
            "exchange": exchange,
            "transport": transport,
            "device": device,
            "dtype": str(parameters.dtype),
        },
        "start all ranks with the same settings",
    )
    communicator.agree(
        {"shapes": digest(repr(shapes).encode()), "parameters": digest(to_host(parameters))},
        "draw them from the same seed on every rank (torch.manual_seed before a model is built), or load one file",
    )
    kind = OPTIMIZERS[method]
    if exchange == "auto":
        exchange = choose(kind.traffic(options), communicator.size, replicas, len(parameters))
    mover = EXCHANGES[exchange](
        communicator, replicas, len(parameters), open_transport(transport, device, communicator)
    )
    optimizer = kind(options, parameters, mover, samples, seed, shapes)
    optimizer.most_alike = MOST_ALIKE
    return optimizer


def check_parameters(parameters: Any, shapes: Sequence[tuple[int, ...]] | None) -> None:
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
