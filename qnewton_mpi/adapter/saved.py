"""The state of a rank's optimizer as tensors in a dict, to be saved with `torch.save`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qnewton_mpi.arrays import to_host
from qnewton_mpi.core import state
from qnewton_mpi.core.optimizers import Optimizer
from qnewton_mpi.errors import UserError

PLACE = ("rank", "ranks", "exchange")  # where a rank's own state belongs; the gathered one of all belongs anywhere
TYPES = {"state": dict, "param_groups": list, "core": dict, "origin": dict, "digest": str}


def saved(core: Optimizer[Any]) -> dict[str, Any]:
    """Return the state, without the parameters: what it is ("core"), whose ("origin"), and a digest of it. Local."""
    arrays = {path: state.value(owner, name) for path, _, owner, name in state.entries(core) if path != "held"}
    tensors = {path: torch.tensor(array) for path, array in arrays.items() if array is not None}
    return {"core": tensors, "origin": origin(core), "digest": digest(tensors)}


def gathered(core: Optimizer[Any]) -> dict[str, Any]:
    """Return as `saved` the state of all ranks, for any number of ranks with as many replicas. Collective."""
    communicator, own = core.exchange.communicator, {}
    for path, kind, owner, name in state.entries(core):
        array = state.value(owner, name)
        if path != "held" and array is not None and (kind is not state.Kind.OWNED or core.exchange.first):
            own[path] = kind, array[..., core.exchange.summed()] if kind is state.Kind.HELD else array
    parts: dict[str, list[NDArray[Any]]] = {}
    kinds = {}
    for theirs in communicator.mpi.allgather(own):
        for path, (kind, array) in theirs.items():
            kinds[path] = kind
            parts.setdefault(path, []).append(array)
    tensors = {
        path: torch.tensor(np.concatenate(found, axis=-1) if kinds[path] is state.Kind.HELD else found[0])
        for path, found in parts.items()
    }
    whole = {what: value for what, value in origin(core).items() if what not in PLACE}
    return {"core": tensors, "origin": whole, "digest": digest(tensors)}


def origin(core: Optimizer[Any]) -> dict[str, Any]:
    """Return what a state has to have in common with the optimizer that takes it. Local."""
    communicator = core.exchange.communicator
    return {
        "rank": communicator.rank,
        "ranks": communicator.size,
        "method": type(core).__name__,
        "exchange": core.exchange.name,
        "replicas": core.exchange.replicas,
        "seed": core.seed,
        "dtype": str(core.held.dtype),
        "shapes": [list(shape) for shape in core.shapes],
    }


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of tensors by name. Local."""
    sha = hashlib.sha256()
    for path, tensor in sorted(tensors.items()):
        sha.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().numpy().tobytes())
    return sha.hexdigest()


def checked(core: Optimizer[Any], found: Any) -> list[state.Change]:
    """Return what `state.assign` is to set for this rank's state of such an optimizer, or that of all. Local.

    Raises
    ------
    UserError
        For what is none.
    """
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in TYPES.items()):
        raise UserError("this is no state of QuasiNewton: load what its state_dict() has returned")
    whole = not any(what in found["origin"] for what in PLACE)
    for what, here in origin(core).items():
        there = found["origin"].get(what)
        if there == here or (whole and what in PLACE):
            continue
        if what == "shapes":
            raise UserError("the state does not fit this model: its parameters have other shapes")
        own = "every rank saves and loads its own, or state_dict(gather=True) for any number of ranks"
        hint = own if what in PLACE else "build the optimizer as the one that saved it"
        raise UserError(f"the state is of {what} {there!r:.40}, this is {here!r}: {hint}")
    tensors = found["core"]
    named = all(isinstance(path, str) and isinstance(tensor, torch.Tensor) for path, tensor in tensors.items())
    if not named or digest(tensors) != found["digest"]:
        raise UserError("the state is not as it was saved: load another one")

    def read(path: str, kind: state.Kind) -> NDArray[Any] | None:
        if path == "held":
            return to_host(core.held)
        array = tensors[path].cpu().numpy() if path in tensors else None
        return array[..., core.exchange.held] if whole and array is not None and kind is state.Kind.HELD else array

    try:
        return state.checked(core, read)
    except ValueError as error:
        raise UserError(f"the state does not fit this optimizer (of another release?): {error}") from error


def agree_on_steps(core: Optimizer[Any], found: Mapping[str, Any]) -> None:
    """Raise `UserError` where the states that the ranks have found, and checked, are of different steps. Collective."""
    steps = core.exchange.communicator.mpi.allgather(int(found["core"]["steps"]))
    if len(set(steps)) > 1:
        raise UserError(f"the ranks' states are of steps {', '.join(map(str, steps))}: load those of one step")
