"""A step on this rank: what is known of it, prepared, evaluated as the core asks, agreed on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qnewton_mpi.adapter import agreement, groups
from qnewton_mpi.adapter.accumulated import Accumulated
from qnewton_mpi.adapter.binding import Binding
from qnewton_mpi.adapter.closures import BatchLoss, Closure, Evaluations
from qnewton_mpi.adapter.one_by_one import OneByOne
from qnewton_mpi.adapter.present import Present
from qnewton_mpi.adapter.together import Together
from qnewton_mpi.adapter.trials import Trials
from qnewton_mpi.core.optimizers.groups import Group


class Stepping:
    """The steps of one binding, one at a time.

    Parameters
    ----------
    binding : Binding
    module : Module, optional
        Whose the parameters are.
    """

    def __init__(self, binding: Binding, module: torch.nn.Module | None) -> None:
        self._binding, self._one_by_one = binding, OneByOne(binding)
        self._together = Together(binding, self._one_by_one, module)
        self._accumulated = Accumulated(binding, self._one_by_one)
        self._trials = Trials(binding, self._together, self._accumulated)
        self._present: Present

    def begin(
        self,
        closure: Closure,
        batch: tuple[torch.Tensor, ...],
        param_groups: Sequence[Mapping[str, Any]],
        rates: groups.Rates,
    ) -> Evaluations:
        """Return the evaluations of a step, as the core asks for them. Local.

        What is wrong with the groups or the parameters is told as the ranks agree.

        Parameters
        ----------
        closure : callable
        batch : tuple of Tensor
            Of whose rows `closure` returns the loss, where there are any.
        param_groups : sequence of mapping
            The optimizer's.
        rates : Rates
        """
        binding, tensors = self._binding, self._binding.tensors
        loss = BatchLoss(closure, batch, binding.shares, tensors) if batch else None
        accumulated = not batch and not binding.probes and binding.passes.begun
        if batch:
            tensors.drop_gradients(unused=True)
        binding.surroundings.begin()
        count = len(tensors.moved)
        self._present = present = Present(
            loss or closure, loss, accumulated, np.zeros(count, bool), frozen=[False] * count
        )
        present.attempt(self._prepare, present, param_groups, rates)
        at_once = None
        if accumulated:
            at_once = functools.partial(self._accumulated.losses_and_gradients, present)
        if batch:
            at_once = functools.partial(self._together.losses_and_gradients, present)
        return Evaluations(
            functools.partial(self._one_by_one.loss_and_gradient, present),
            functools.partial(self._trials.losses, present),
            at_once,
        )

    def end(self, batch: tuple[torch.Tensor, ...]) -> None:
        """Leave no gradients of a batch, and bind the parameters to where the core has them now. Local."""
        if batch:
            self._binding.tensors.drop_gradients(unused=True)
        self._binding.renew()

    def flags(self) -> NDArray[np.int64]:
        """Return what this rank tells the others of the present step. Local."""
        return agreement.flags(self._present, self._binding, self._together)

    def agreed(self, words: NDArray[np.int64]) -> list[Group]:
        """Return the groups of the present step, from the flags of all ranks (ranks, …). Collective.

        Raises
        ------
        UserError
            On all ranks, as `agreement.agreed`.
        """
        return agreement.agreed(words, self._present, self._binding, self._together)

    def _prepare(self, present: Present, param_groups: Sequence[Mapping[str, Any]], rates: groups.Rates) -> None:
        """Take what has become of the parameters and their groups since the last step."""
        binding, tensors = self._binding, self._binding.tensors
        groups.check(param_groups)
        binding.follow()
        present.frozen = tensors.frozen()
        binding.core.rate_factor = rates.factor(param_groups)
        present.groups = rates.parts(param_groups, tensors.moved, tensors.spans)
        if binding.core.steps == 0 and binding.probes:
            self._one_by_one.check_repeats(present)
