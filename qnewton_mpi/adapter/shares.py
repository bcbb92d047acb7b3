"""Which rows of a batch are a replica's."""

from __future__ import annotations

import zlib

import torch

from qnewton_mpi.core.settings import check_count
from qnewton_mpi.errors import UserError


class Shares:
    """The parts of a batch that the replicas of this rank have, and whose turn it is. Local.

    Parameters
    ----------
    local : range
        The replicas of this rank, of those of all.
    replicas : int, optional
        M, where a batch is that of all ranks, the same on each; otherwise it is this rank's.

    Attributes
    ----------
    turn : int or Tensor
        Of this rank's replicas, counted from 0, the one that is being evaluated; to vmap, all.
    taken : bool
        Whether anybody has asked for a share yet.
    mark : int
        Of the first batch, where it is that of all ranks: so they notice where each has another, as by a
        DistributedSampler.
    """

    def __init__(self, local: range, replicas: int | None) -> None:
        self.turn: int | torch.Tensor = 0
        self.taken = False
        self.mark = 0
        self._parts = replicas or len(local)
        self._first = local.start if replicas else 0
        self._whose = "" if replicas else " on this rank"

    def of(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return an equal share of each tensor's rows.

        Raises
        ------
        UserError
            Where the rows are not a multiple of the replicas.
        """
        first, self.taken = not self.taken, True
        for k, tensor in enumerate(tensors, 1):
            if not isinstance(tensor, torch.Tensor):
                raise UserError(f"a batch is of tensors, and part {k} of this one is {tensor!r:.60}")
            rows = len(tensor) if tensor.ndim else 0
            if rows % self._parts or not rows:
                raise UserError(
                    f"a batch of {rows} rows cannot be shared evenly by {self._parts} replicas{self._whose}: give the "
                    f"loader a multiple of {self._parts} as batch size, and drop_last=True"
                )
        if first and not self._whose:
            for tensor in tensors:
                self.mark = zlib.crc32(
                    tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), self.mark
                )
        return [self._rows(tensor) for tensor in tensors]

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(self.turn, int):
            return tensor.tensor_split(self._parts)[self._first + self.turn]
        parts = tensor.reshape(self._parts, -1, *tensor.shape[1:])
        return parts.index_select(0, self._first + self.turn.to(tensor.device).reshape(1)).squeeze(0)


def number_of_replicas(replicas: int | None, per_rank: int | None, ranks: int) -> int:
    """Return M, given as that or for each rank; one a rank, where as neither. Local.

    Raises
    ------
    UserError
        For what is no number of replicas.
    """
    if replicas is None:
        check_count("replicas_per_rank", 1 if per_rank is None else per_rank, 1)
        return (per_rank or 1) * ranks
    if per_rank is not None:
        raise UserError("give replicas, of all ranks, or replicas_per_rank, not both")
    check_count("replicas", replicas, 1)
    if replicas < ranks:
        raise UserError(f"replicas={replicas}: there are {ranks} ranks, and each needs one at least")
    return replicas
