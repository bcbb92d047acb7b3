"""What each backward pass adds to the gradients, and what becomes of them after the last one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from enum import Enum

import torch

from qnewton_mpi.adapter.tensors import Tensors
from qnewton_mpi.errors import UserError


class Listening(Enum):
    """What is done at a backward pass."""

    NOT = 0
    TO_SUMS = 1  # what the gradients are after it is kept
    TO_PARTS = 2  # and what it has added is a replica's


class Passes:
    """The backward passes since the last step, in turn of the replicas of this rank, or those of a closure. Local.

    PyTorch adds the gradients of a pass to those that are there. So of passes before a step the k-th has the samples of
    replica k mod R, and g_i is R times what its passes have added: the sum of all is the mean over the replicas, as
    losses are divided by the number of passes. A parameter counts its own passes, since nothing else tells where one
    ends.

    Parameters
    ----------
    tensors : Tensors
    rows : sequence of list of Tensor
        Where the gradients g_i go, as views in the shapes of the parameters.

    Attributes
    ----------
    listening : Listening
    """

    def __init__(self, tensors: Tensors, rows: Sequence[list[torch.Tensor]]) -> None:
        self._moved, self._name = tensors.moved, tensors.name
        self._rows = rows
        self.between_steps = Listening.TO_PARTS if len(rows) > 1 else Listening.NOT
        self.begin()
        for k, p in enumerate(self._moved):
            p.register_post_accumulate_grad_hook(_note(weakref.ref(self), k))

    def begin(self, listening: Listening | None = None) -> None:
        """Forget all passes; by default listen as between steps."""
        self.listening = self.between_steps if listening is None else listening
        self._counts = [0] * len(self._moved)
        self._sums: list[torch.Tensor | None] = [None] * len(self._moved)  # what `.grad` was after the last pass
        self._marks: list[tuple[weakref.ref[torch.Tensor], int] | None] = [None] * len(self._moved)  # of `.grad` then

    @property
    def begun(self) -> bool:
        """Whether there has been one, whose gradients are still there."""
        live = [p.grad for k, p in enumerate(self._moved) if self._counts[k] and self._holds(k)]
        return any(gradient is not None and (gradient.is_sparse or bool(gradient.any())) for gradient in live)

    @property
    def number(self) -> int:
        """How many there have been."""
        return max(self._counts)

    @torch.no_grad()
    def take(self, k: int) -> None:
        """Take what a pass has added to the gradient of a parameter."""
        gradient, before, goes_on = self._moved[k].grad, self._sums[k], self._holds(k)
        count = self._counts[k] if goes_on else 0  # they may have been cleared meanwhile
        self._counts[k], (again, turn) = count + 1, divmod(count, len(self._rows))
        if gradient is None:
            return
        self._marks[k] = weakref.ref(gradient), gradient._version
        if gradient.is_sparse:  # told later: an exception has no place here
            return
        if self.listening is Listening.TO_PARTS:
            added = gradient - before if before is not None and goes_on else gradient
            row = self._rows[turn][k]
            row.copy_(row + added if again else added)
        if before is None:
            self._sums[k] = gradient.clone()
        else:
            before.copy_(gradient)

    @torch.no_grad()
    def changes(self) -> list[torch.Tensor | None]:
        """Return what has been added to the gradients since the last pass, as by clipping; None where nothing has."""
        return [self._change(k) for k in range(len(self._moved))]

    def _change(self, k: int) -> torch.Tensor | None:
        gradient, total, mark = self._moved[k].grad, self._sums[k], self._marks[k]
        if gradient is None or total is None or mark is None:
            return None
        untouched = self._holds(k) and mark[1] == gradient._version  # a GPU need not be waited for
        return None if untouched or torch.equal(gradient, total) else gradient - total

    def _holds(self, k: int) -> bool:
        """Whether the gradient of a parameter is the one of the last pass, whatever its values."""
        mark = self._marks[k]
        return mark is not None and mark[0]() is not None and mark[0]() is self._moved[k].grad

    @torch.no_grad()
    def finish(self) -> list[bool]:
        """Leave the replicas' gradients in the rows; return for each parameter whether there is one.

        What the program has made of the sum since the last pass counts: a factor, as by clipping, for each replica, all
        else for all alike.

        Raises
        ------
        UserError
            Where the replicas have not had as many passes, or some parameters not all of them.
        """
        replicas, counts = len(self._rows), set(self._counts) - {0}
        if len(counts) > 1:
            few, many = (self._name(self._moved[self._counts.index(f(counts))]) for f in (min, max))
            raise UserError(
                f"{few} has had gradients from {min(counts)} of the backward passes before the step, {many} from "
                f"{max(counts)}: where they are those of replicas, all have to reach the same parameters"
            )
        if max(counts) % replicas:
            raise UserError(
                f"there are gradients from before the step, of {max(counts)} backward pass(es), and {replicas} "
                f"replicas on this rank: let there be a multiple of {replicas}, or the closure compute all of them, "
                "after optimizer.zero_grad()"
            )
        found = [count > 0 and p.grad is not None for count, p in zip(self._counts, self._moved, strict=True)]
        factor = self._factor(found)
        for k, here in enumerate(found):
            total, now = self._sums[k], self._moved[k].grad
            if here and now is not None and now.is_sparse:
                raise UserError(f"{self._name(self._moved[k])} has a sparse gradient: use sparse=False in its layer")
            for row in self._rows:
                if here and total is not None and now is not None:
                    row[k].mul_(replicas * factor).add_(now - factor * total)
                else:
                    row[k].zero_()
        return found

    def _factor(self, found: Sequence[bool]) -> float:
        """Return by what the sums have been multiplied since the last pass, as far as that can be told."""
        if not any(change is not None for change in self.changes()):
            return 1.0
        pairs = [(s, p.grad) for s, p, here in zip(self._sums, self._moved, found, strict=True) if here]
        known = [(s, g) for s, g in pairs if s is not None and g is not None]
        square = sum(float(torch.sum(s * s)) for s, _ in known)
        return sum(float(torch.sum(s * g)) for s, g in known) / square if square else 1.0


def _note(passes: weakref.ref[Passes], k: int) -> Callable[[torch.Tensor], None]:
    """Return a hook of parameter k, which keeps nothing alive."""

    def hook(_: torch.Tensor) -> None:
        owner = passes()
        if owner is not None and owner.listening is not Listening.NOT:
            owner.take(k)

    return hook
