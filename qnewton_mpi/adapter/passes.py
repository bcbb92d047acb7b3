"""Gradients that a program accumulates before a step, by backward passes of its own: what each pass has added."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from qnewton_mpi.adapter.tensors import Tensors
from qnewton_mpi.errors import UserError


class Passes:
    """The backward passes since the last step, in turn of the replicas of this rank. Local.

    PyTorch adds the gradients of a pass to those that are there. So the k-th pass has the samples of replica k mod R,
    and g_i is R times what its passes have added: the sum of all is the mean over the replicas, as losses are divided
    by the number of passes. A parameter counts its own passes, since nothing else tells where one ends.

    Parameters
    ----------
    tensors : Tensors
    rows : sequence of list of Tensor
        Where the gradients g_i go, as views in the shapes of the parameters.
    """

    def __init__(self, tensors: Tensors, rows: Sequence[list[torch.Tensor]]) -> None:
        self._moved, self._name = tensors.moved, tensors.name
        self._rows = rows
        self.listening = True
        self.clear()
        for k, p in enumerate(self._moved):
            p.register_post_accumulate_grad_hook(_note(weakref.ref(self), k))

    def clear(self) -> None:
        """Forget all passes."""
        self._counts = [0] * len(self._moved)
        self._sums: list[torch.Tensor | None] = [None] * len(self._moved)  # what `.grad` was after the last pass
        self._holders: list[weakref.ref[torch.Tensor] | None] = [None] * len(self._moved)

    @property
    def begun(self) -> bool:
        """Whether there has been one."""
        return any(self._counts)

    @torch.no_grad()
    def take(self, k: int) -> None:
        """Take what a pass has added to the gradient of a parameter."""
        gradient, holder, before = self._moved[k].grad, self._holders[k], self._sums[k]
        assert gradient is not None
        turn, again = divmod(self._counts[k], len(self._rows))[::-1]
        self._counts[k] += 1
        if gradient.is_sparse:  # told by `finish`: an exception has no place here
            return
        goes_on = before is not None and holder is not None and holder() is gradient
        added = gradient - before if goes_on and before is not None else gradient
        row = self._rows[turn][k]
        row.copy_(row + added if again else added)
        if before is None:
            self._sums[k] = gradient.clone()
        else:
            before.copy_(gradient)
        self._holders[k] = weakref.ref(gradient)

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
        for k, here in enumerate(found):
            if here and self._moved[k].grad.is_sparse:  # type: ignore[union-attr]
                raise UserError(f"{self._name(self._moved[k])} has a sparse gradient: use sparse=False in its layer")
        factor = self._factor(found)
        for k, here in enumerate(found):
            total, now = self._sums[k], self._moved[k].grad
            for row in self._rows:
                if here and total is not None and now is not None:
                    row[k].mul_(replicas * factor).add_(now - factor * total)
                else:
                    row[k].zero_()
        return found

    def _factor(self, found: Sequence[bool]) -> float:
        """Return by what the sums have been multiplied since the last pass, as far as that can be told."""
        pairs = [
            (total, p.grad)
            for total, p, here in zip(self._sums, self._moved, found, strict=True)
            if here and total is not None and p.grad is not None
        ]
        if all(torch.equal(total, now) for total, now in pairs):
            return 1.0
        square = sum(float(torch.sum(total * total)) for total, _ in pairs)
        return sum(float(torch.sum(total * now)) for total, now in pairs) / square if square else 1.0


def _note(passes: weakref.ref[Passes], k: int) -> Callable[[torch.Tensor], None]:
    """Return a hook of parameter k, which keeps nothing alive."""

    def hook(_: torch.Tensor) -> None:
        owner = passes()
        if owner is not None and owner.listening:
            owner.take(k)

    return hook
