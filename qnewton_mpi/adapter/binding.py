"""The core of an optimizer and a model's parameters, bound to each other: these are views of its vector."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qnewton_mpi.adapter.passes import Passes
from qnewton_mpi.adapter.shares import Shares
from qnewton_mpi.adapter.surroundings import Surroundings
from qnewton_mpi.adapter.tensors import Tensors, to_tensor
from qnewton_mpi.arrays import Array
from qnewton_mpi.core.optimizers import Optimizer


class Binding:
    """What the evaluations of this rank work on. Local.

    Parameters
    ----------
    core : Optimizer
    tensors : Tensors
    surroundings : Surroundings
    whole : bool
        Whether a batch is that of all ranks.
    probes : bool
        Whether the method evaluates gradients more than once a step.

    Attributes
    ----------
    shares : Shares
    views : list of list of Tensor
        Of each replica of this rank where its gradients go, in the shapes of the parameters.
    passes : Passes
    flat : (N,) Tensor
        The core's vector, whose views the parameters are.
    """

    def __init__(
        self, core: Optimizer[Any], tensors: Tensors, surroundings: Surroundings, whole: bool, probes: bool
    ) -> None:
        self.core, self.tensors, self.surroundings = core, tensors, surroundings
        self.whole, self.probes = whole, probes
        self.views = [tensors.views(row) for row in core.rows]
        self.shares = Shares(core.exchange.local, core.exchange.replicas if whole else None)
        self.passes = Passes(tensors, self.views)
        self.bind()

    @property
    def several(self) -> bool:
        """Whether this rank has more than one replica."""
        return len(self.core.rows) > 1

    def bind(self) -> None:
        """Make the parameters views of the core's vector."""
        self._bound = self.core.parameters
        self.flat = to_tensor(self._bound)
        self.tensors.bind(self._bound)

    def renew(self) -> None:
        """Bind them to the vector that the core has now, where that is another."""
        if self.core.parameters is not self._bound:
            self.bind()

    def follow(self) -> None:
        """Take what was done to the parameters since the last step, or by the closure."""
        self.tensors.follow()
        if self.core.held is not self.core.parameters:
            self.core.held = self.core.exchange.hold(self.core.parameters)

    @contextlib.contextmanager
    def at(self, point: Array, frozen: Sequence[bool]) -> Iterator[torch.Tensor]:
        """Have the parameters at a point (N,) while the context lasts, but for those that are frozen.

        What the context is given is a copy of the parameters as they were, (N,).
        """
        kept = self.flat.clone()
        self.flat.copy_(to_tensor(point))
        for span in itertools.compress(self.tensors.spans, frozen):
            self.flat[span] = kept[span]
        try:
            yield kept
        finally:
            self.tensors.rebind()
            self.flat.copy_(kept)

    def settle(self) -> None:
        """Wait for the GPU: PyTorch and CuPy need not be on the same stream."""
        if self.flat.is_cuda:
            torch.cuda.synchronize(self.flat.device)
