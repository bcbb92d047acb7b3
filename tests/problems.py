"""Small problems with known answers, and methods on them, shared by the tests."""

import array_api_strict
import numpy as np
from array_api_compat import array_namespace

from qnewton_mpi.arrays import to_host
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.optimizers.natural.bounds import BOUNDS
from qnewton_mpi.core.settings import build

SIZE, REPLICAS = 12, 6
# Nothing bounds a step of the natural-gradient methods.
UNBOUNDED = dict.fromkeys((*BOUNDS, "gain_share"), 0)

# Every method, with the options that change its algebra.
VARIANTS = {
    "sgd": ("sgd", {}),
    "heavy-ball": ("momentum", {}),
    "nesterov": ("momentum", {"nesterov": True}),
    "adam": ("adam", {}),
    "nadam": ("adam", {"nesterov": True}),
    "multisecant": ("multisecant", {}),
    "multisecant-tikhonov": ("multisecant", {"tikhonov": 1e-3}),
    "independent": ("multisecant", {"spread": "independent"}),
    "random": ("multisecant", {"spread": "random"}),
    "deflated": ("deflated", {"probe_every": 2}),
    "sgd-auto": ("sgd", {"lr": "auto"}),
    "nesterov-auto": ("momentum", {"lr": "auto", "nesterov": True, "probe_every": 2}),
    "deflated-auto": ("deflated", {"lr": "auto", "probe_every": 2}),
    "fisher-auto": ("fisher", {"lr": "auto", "rank": 6}),
    "kronecker": ("kronecker", {"update_every": 2, "basis_every": 2}),
    "fisher": ("fisher", {"rank": 6, "update_every": 2}),
}


# Array libraries beside NumPy, as a namespace and a device. Arrays on the second may not meet those in host memory, as
# those on a GPU may not.
LIBRARIES = {
    "strict": (array_api_strict, array_api_strict.Device("CPU_DEVICE")),
    "strict, not in host memory": (array_api_strict, array_api_strict.Device("device1")),
}


def found_cupy():
    """Return CuPy where it sees a GPU, else None."""
    try:
        import cupy
    except ImportError:
        return None
    return cupy if cupy.is_available() else None


CUPY = found_cupy()


class Quadratic:
    """½ (w − x_i)ᵀ H (w − x_i): every replica its own centre x_i, all the same Hessian H."""

    def __init__(self, size, replicas, seed=0, dtype=np.float64, xp=np, device=None):
        random = np.random.default_rng(seed)
        basis = np.linalg.qr(random.standard_normal((size, size)))[0]
        self.hessian = basis @ np.diag(np.geomspace(0.1, 10, size)) @ basis.T
        self.centres = random.standard_normal((replicas, size))
        place = {} if device is None else {"device": device}  # CuPy's own asarray knows none
        arrays = random.standard_normal(size), self.hessian, self.centres
        self.start, self._hessian, self._centres = (xp.asarray(a, dtype=dtype, **place) for a in arrays)

    def __call__(self, w, replica):
        offset = w - self._centres[replica, :]
        gradient = self._hessian @ offset
        return float(offset @ gradient) / 2, gradient


class Listing(Quadratic):
    """The same with losses alone, as a list."""

    def losses(self, w, replicas):
        return [self(w, replica)[0] for replica in replicas]


class Together(Quadratic):
    """The same with all that a network offers: replicas at once, and losses alone, in arrays of where it is."""

    def offsets(self, w, replicas):
        return w - self._centres[replicas.start : replicas.stop, :]

    def losses(self, w, replicas):
        offsets = self.offsets(w, replicas)
        return array_namespace(offsets).vecdot(offsets, offsets @ self._hessian) / 2

    def at_once(self, w, replicas):
        return self.losses(w, replicas), self.offsets(w, replicas) @ self._hessian


def make_optimizer(variant, problem, communicator, replicas, exchange="allgather", **options):
    method, own = VARIANTS[variant]
    kind = OPTIMIZERS[method]
    settings = build(kind.settings_type, {**own, **options})
    chosen = EXCHANGES[exchange](communicator, replicas, problem.start.shape[0])
    return kind(settings, problem.start, chosen, samples=4, seed=3)


def trajectory(optimizer, problem, steps):
    """Return the parameters after each of some steps, (steps, N)."""
    points = []
    for _ in range(steps):
        optimizer.step(problem)
        points.append(to_host(optimizer.parameters).copy())
    return np.array(points)
