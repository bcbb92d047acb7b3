"""All replicas of a rank in one forward and backward pass, where the loss allows it."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.func import grad_and_value, vmap

from qnewton_mpi.adapter.surroundings import Called

# Relative to a gradient's norm: some hundred roundings of float32, a few of what is lower. Another loss is off by more.
TOLERANCE, ROUNDINGS = 1e-4, 4.0

# What vmap goes through replica by replica, and that the hook of `watching` is called twice for what is compiled.
warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented the batching rule")
warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")


class NotAtOnceError(Exception):
    """All replicas at once would not be what they are one after the other."""


class AtOnce:
    """The losses of several replicas and their gradients, f_i(w) and ∇f_i(w) for all i, in one call. Local.

    That is torch.func.vmap over i: whatever depends on the samples of a replica has a dimension more. Which modules
    have the parameters is seen from those that are called. `Tensor.backward` is to do nothing meanwhile.

    Parameters
    ----------
    moved : list of Tensor
        The parameters.
    module : Module, optional
        Whose they are.
    """

    def __init__(self, moved: Sequence[torch.Tensor], module: torch.nn.Module | None) -> None:
        self._moved = moved
        # Weakly: that a layer was replaced in a model is seen from nobody holding its parameters.
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet([] if module is None else [module])
        self._epsilon = 0.0  # of autocast, where there is any
        self._steady = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[Called]:
        """Note the modules that are called, whether their buffers change, and what autocast rounds to; yields them."""
        called = Called()
        with called.noted():
            yield called
        self._modules.update(called.modules)
        self._epsilon = max(self._epsilon, called.epsilon)
        self._steady = called.steady

    def check(
        self,
        loss: Callable[[torch.Tensor], torch.Tensor],
        expected: torch.Tensor,
        rows: torch.Tensor,
        frozen: Sequence[bool],
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Return what `losses_and_gradients` does, if it is the same as one by one: `expected` (R,) and `rows` (R, N).

        Raises
        ------
        NotAtOnceError
            Where they are not, or something would be left behind.
        """
        if not self._steady:
            raise NotAtOnceError("there are running statistics")
        places = [(vars(module), module._buffers) for module in self._parts()]
        before = [(owner, dict(owner)) for pair in places for owner in pair]
        try:
            losses, gradients = self.losses_and_gradients(loss, len(rows), frozen)
        finally:
            kept = [
                name
                for owner, values in before
                for name, value in owner.items()
                if isinstance(value, torch.Tensor) and value is not values.get(name)
            ]
            for owner, values in before:
                for name in [name for name in owner if name not in values]:
                    del owner[name]
                owner.update(values)
        if kept:
            raise NotAtOnceError(f"a module changes its attribute {kept[0]} when it is called")
        tolerance = max(TOLERANCE, ROUNDINGS * self._epsilon)
        if not torch.allclose(losses.to(expected), expected, rtol=tolerance, atol=0):
            raise NotAtOnceError("the losses are others at once")
        found = torch.cat([_row(g, p, len(rows)) for g, p in zip(gradients, self._moved, strict=True)], 1)
        far = torch.linalg.vector_norm(found - rows, dim=1) > tolerance * torch.linalg.vector_norm(rows, dim=1)
        if bool(far.any()):
            raise NotAtOnceError("the gradients are others at once")
        return losses, gradients

    def losses(self, loss: Callable[[torch.Tensor], torch.Tensor], replicas: int) -> torch.Tensor:
        """Return the losses (R,) at the parameters as they are; `loss` is given the replica's index.

        Raises
        ------
        Exception
            Whatever vmap and the loss raise where one does not do for the other.
        """
        return vmap(loss)(self._numbers(replicas))

    def losses_and_gradients(
        self, loss: Callable[[torch.Tensor], torch.Tensor], replicas: int, frozen: Sequence[bool]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Return the losses (R,), and of each parameter the gradients (R, *shape); None of one that is frozen.

        Raises
        ------
        NotAtOnceError
            Where the loss depends on parameters in places that are not known: their gradients would be missing.
        Exception
            As `losses`.
        """
        free = [k for k, rests in enumerate(frozen) if not rests]
        places = self._places(free)

        def at(parameters: list[torch.Tensor], replica: torch.Tensor) -> torch.Tensor:
            with _in_place_of(places, parameters):
                return loss(replica)

        parameters = [self._moved[k].detach() for k in free]
        with torch.enable_grad():  # so that what is not in its place, and so derived by vmap, is seen
            gradients, losses = vmap(grad_and_value(at), in_dims=(None, 0))(parameters, self._numbers(replicas))
        if losses.requires_grad:
            raise NotAtOnceError(
                "it depends on parameters that are in no module which is called, or not the optimizer's"
            )
        found: list[torch.Tensor | None] = [None] * len(frozen)
        for k, gradient in zip(free, gradients, strict=True):
            found[k] = gradient
        return losses, found

    def _numbers(self, replicas: int) -> torch.Tensor:
        return torch.arange(replicas, device=self._moved[0].device)

    def _parts(self) -> list[torch.nn.Module]:
        return list(dict.fromkeys(part for module in list(self._modules) for part in module.modules()))

    def _places(self, free: Sequence[int]) -> list[tuple[dict[str, Any], str, int]]:
        """Return where the parameters are: a module's dictionary, a name in it, and which of the free ones it is."""
        which = {id(self._moved[k]): n for n, k in enumerate(free)}
        return [
            (module._parameters, name, which[id(p)])
            for module in self._parts()
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


def _row(gradient: torch.Tensor | None, parameter: torch.Tensor, replicas: int) -> torch.Tensor:
    return parameter.new_zeros(replicas, parameter.numel()) if gradient is None else gradient.reshape(replicas, -1)
