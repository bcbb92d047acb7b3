"""The replicas of a rank evaluated one after the other: the closure is called for each."""

from __future__ import annotations

import math

import torch

from qnewton_mpi.adapter.binding import Binding
from qnewton_mpi.adapter.closures import number
from qnewton_mpi.adapter.passes import Listening
from qnewton_mpi.adapter.present import Present
from qnewton_mpi.arrays import Array
from qnewton_mpi.errors import UserError


class OneByOne:
    """The closure's loss and gradients for one replica at a time. Local.

    Parameters
    ----------
    binding : Binding
    """

    def __init__(self, binding: Binding) -> None:
        self._binding = binding

    def loss_and_gradient(self, present: Present, point: Array, replica: int) -> tuple[float, Array]:
        """Return a replica's loss at a point and its row of the core's gradients; not a number where that fails.

        Parameters
        ----------
        present : Present
        point : (N,)
        replica : int
            Of those of all ranks.
        """
        binding, local = self._binding, self._binding.core.exchange.local
        own = replica - local.start
        loss = present.attempt(self._evaluate_at, present, point, own)
        if own == len(local) - 1:
            binding.tensors.note_gradients()
            self.check(present)
        return loss, binding.core.rows[own]

    def check(self, present: Present) -> None:
        """Take what the closure has done to the parameters, and see that those without a gradient are the model's."""
        present.attempt(self._binding.follow)
        present.attempt(self._binding.tensors.check_present, (~present.found).tolist())

    def check_repeats(self, present: Present) -> None:
        """Raise `UserError` where the closure does not repeat itself."""
        with self._binding.surroundings.on_trial():
            losses = [self._evaluate(present, 0, fresh=True) for _ in range(2)]
            self._binding.tensors.note_gradients()
        if not math.isclose(*losses, rel_tol=1e-6):
            raise UserError(
                f"the closure returned the loss {losses[0]:g}, then {losses[1]:g} for the same parameters: it must use "
                "the same batch at each call within a step, and PyTorch's random numbers only"
            )

    def _evaluate_at(self, present: Present, point: Array, replica: int) -> float:
        binding = self._binding
        if point is binding.core.parameters:
            loss = self._evaluate(present, replica, fresh=binding.several or binding.probes)
        else:
            with binding.at(point, present.frozen):
                loss = self._evaluate(present, replica, fresh=True)
        if (binding.several or binding.whole) and not binding.shares.taken:
            given = "replicas=…" if binding.whole else "several replicas a rank"
            raise UserError(f"with {given} the closure must take its samples by optimizer.share(…)")
        return loss

    def _evaluate(self, present: Present, replica: int, fresh: bool) -> float:
        """Call the closure for one of this rank's replicas; return the loss.

        Its gradients are what is in `.grad` then; where they have to be `fresh`, what the closure has computed alone.
        """
        binding, tensors, surroundings = self._binding, self._binding.tensors, self._binding.surroundings
        binding.shares.turn = replica
        binding.settle()
        if fresh and not surroundings.begun and tensors.has_unused_gradients():
            raise UserError(
                "there are gradients from before the step: with several replicas a rank, and for methods that evaluate "
                "at other parameters, the closure must compute all of them, after optimizer.zero_grad()"
            )
        tensors.drop_gradients(unused=fresh)
        before = tensors.marks()
        binding.passes.begin(Listening.TO_SUMS)
        with surroundings.of(replica), torch.enable_grad():
            loss = number(present.closure())
        self._note_changes(present)
        if not fresh and tensors.marks() == before:  # with one replica there is no telling passes apart
            present.accumulated, present.again, present.told_loss = True, True, loss
        present.found |= tensors.take_gradients(binding.views[replica])
        binding.settle()
        return loss

    def _note_changes(self, present: Present) -> None:
        """Note what the closure has made of its loss's gradient, as by clipping: a trial is to have the same slope."""
        binding = self._binding
        changes = binding.passes.changes()
        binding.passes.listening = Listening.NOT
        for span, change in zip(binding.tensors.spans, changes, strict=True):
            if change is not None:
                if present.slope is None:
                    present.slope = torch.zeros_like(binding.flat)
                present.slope[span] += change.reshape(-1) / len(binding.core.rows)
