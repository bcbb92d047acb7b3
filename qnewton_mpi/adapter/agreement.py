"""What the ranks tell each other in a step, beside the losses: which parameters rest in it, and what befell a rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.adapter import groups
from qnewton_mpi.adapter.binding import Binding
from qnewton_mpi.adapter.present import Present
from qnewton_mpi.adapter.together import Together
from qnewton_mpi.core.optimizers.groups import Group
from qnewton_mpi.errors import UserError


def flags(present: Present, binding: Binding, together: Together) -> NDArray[np.int64]:
    """Return what each tensor of this rank has: a gradient, or none for good; and what befell the rank. Local.

    Returns
    -------
    words : (2 · tensors + 4,)
        `found` and `frozen` of each, then the mark of the first batch, the digest of the groups, whether the replicas
        have to be one by one, whether something has failed.
    """
    told = [
        binding.shares.mark,
        groups.digest(present.groups),
        together.reason is not None,
        present.failure is not None,
    ]
    return np.concatenate([present.found, present.frozen, told]).astype(np.int64)


def agreed(words: NDArray[np.int64], present: Present, binding: Binding, together: Together) -> list[Group]:
    """Return the groups of the step, in which rests what has a gradient on no rank. Collective.

    Parameters
    ----------
    words : (ranks, 2 · tensors + 4)
        The `flags` of all ranks.
    present : Present
    binding : Binding
    together : Together

    Raises
    ------
    UserError
        On all ranks, where one has failed, or not all have the same groups, frozen parameters or, where it is to
        be that of all, the same first batch.
    """
    tensors, communicator = binding.tensors, binding.core.exchange.communicator
    known, size, counts = len(tensors.moved), len(words), words.sum(axis=0)
    found, frozen, one_by_one, failed = counts[:known], counts[known:-4], counts[-2], counts[-1]
    if failed:
        communicator.together(present.fail)
    if others := _unlike_first(words[:, -3]):
        raise UserError(
            f"the groups of rank(s) {others} have other lr or weight_decay than those of rank 0: let all ranks set the "
            "same"
        )
    if others := _unlike_first(words[:, -4]):
        raise UserError(
            f"with replicas=… each batch is that of all ranks, and rank(s) {others} have another than rank 0: leave "
            "out the DistributedSampler and seed all ranks alike, or say replicas_per_rank"
        )
    if one_by_one:
        together.give_up(communicator.rank)
    for k in np.flatnonzero((frozen > 0) & (frozen < size)):
        ranks = ", ".join(map(str, np.flatnonzero(words[:, known + k])))
        raise UserError(f"{tensors.name(tensors.moved[k])} is frozen on rank(s) {ranks} alone: freeze it on all")
    return [Group(group.span, 0.0) if found[k] == 0 else group for k, group in enumerate(present.groups)]


def _unlike_first(words: NDArray[np.int64]) -> str:
    """Return the ranks, in words, that have another word (ranks,) than rank 0."""
    return ", ".join(map(str, np.flatnonzero(words != words[0])))
