"""All replicas of a rank in one forward and backward pass, where a closure allows it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.func import grad_and_value, vmap

TOLERANCE = 1e-4  # some hundred roundings of float32, relative to a gradient's norm: another loss is off by far more


class AtOnce:
    """The losses of several replicas and their gradients, f_i(w) and ∇f_i(w) for all i, in one call. Local.

    That is torch.func.vmap over i: whatever depends on the samples of a replica has a dimension more. Which modules
    have the parameters is seen from those that are called. `Tensor.backward` is to do nothing meanwhile.

    Parameters
    ----------
    moved : list of Tensor
        The parameters.

    Attributes
    ----------
    steady : bool
        Whether no buffer, as a running statistic, changed while this was `watching`.
    """

    def __init__(self, moved: Sequence[torch.Tensor]) -> None:
        self._moved = moved
        self._modules: dict[torch.nn.Module, None] = {}  # in the order in which they were called
        self.steady = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note the modules that are called, and their buffers."""
        before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(module: torch.nn.Module, _: Any) -> None:
            self._modules.setdefault(module)
            for buffer in module.buffers(recurse=False):
                before.setdefault(id(buffer), (buffer, buffer.clone()))

        hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()
        self.steady = all(torch.equal(buffer, value) for buffer, value in before.values())

    def losses(self, loss: Callable[[torch.Tensor], torch.Tensor], replicas: int) -> torch.Tensor:
        """Return the losses (R,) at the parameters as they are; `loss` is given the replica's index.

        Raises
        ------
        Exception
            Whatever vmap and the closure raise where one does not do for the other.
        """
        return vmap(loss)(torch.arange(replicas))

    def losses_and_gradients(
        self, loss: Callable[[torch.Tensor], torch.Tensor], replicas: int, frozen: Sequence[bool]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Return the losses (R,), and of each parameter the gradients (R, *shape); None of one that is frozen.

        Raises
        ------
        Exception
            As `losses`.
        """
        free = [k for k, rests in enumerate(frozen) if not rests]
        places = self._places(free)

        def at(parameters: list[torch.Tensor], replica: torch.Tensor) -> torch.Tensor:
            with _in_place_of(places, parameters):
                return loss(replica)

        with torch.no_grad():  # but for what vmap is to derive
            parameters = [self._moved[k].detach() for k in free]
            gradients, losses = vmap(grad_and_value(at), in_dims=(None, 0))(parameters, torch.arange(replicas))
        found: list[torch.Tensor | None] = [None] * len(frozen)
        for k, gradient in zip(free, gradients, strict=True):
            found[k] = gradient
        return losses, found

    def _places(self, free: Sequence[int]) -> list[tuple[dict[str, Any], str, int]]:
        """Return where the parameters are: a module's dictionary, a name in it, and which of the free ones it is."""
        which = {id(self._moved[k]): n for n, k in enumerate(free)}
        modules = dict.fromkeys(part for module in self._modules for part in module.modules())
        return [
            (module._parameters, name, which[id(p)])
            for module in modules
            for name, p in module._parameters.items()
            if id(p) in which
        ]


@contextlib.contextmanager
def _in_place_of(places: Sequence[tuple[dict[str, Any], str, int]], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Have values in the places of parameters."""
    before = [owner[name] for owner, name, _ in places]
    try:
        for owner, name, k in places:
            owner[name] = values[k]
        yield
    finally:
        for (owner, name, _), parameter in zip(places, before, strict=True):
            owner[name] = parameter


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what PyTorch says of operations that vmap does one by one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


def alike(losses: torch.Tensor, expected: torch.Tensor, rows: torch.Tensor, others: torch.Tensor) -> bool:
    """Tell whether losses (R,) and gradients (R, N) are others' to rounding. Local."""
    far = torch.linalg.vector_norm(rows - others, dim=1) > TOLERANCE * torch.linalg.vector_norm(others, dim=1)
    return not bool(far.any()) and torch.allclose(losses, expected.to(losses), rtol=TOLERANCE, atol=0)
