"""What a loss depends on besides the parameters: random numbers, and the buffers of a module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Surroundings:
    """Has the evaluations of a step that repeat one before see what that saw, and leave no trace. Local.

    Parameters
    ----------
    device : torch.device
        Of the parameters, whose random numbers are repeated beside those of the CPU.
    module : Module, optional
        Whose buffers are left alone.
    """

    def __init__(self, device: torch.device, module: torch.nn.Module | None) -> None:
        self._device = device
        self.module = module
        self._first: dict[int, list[torch.Tensor]] = {}  # random states at the first evaluation in a step, by replica

    def begin(self) -> None:
        """Begin a step."""
        self._first.clear()

    @property
    def begun(self) -> bool:
        """Whether there has been an evaluation in this step."""
        return bool(self._first)

    @contextlib.contextmanager
    def of(self, replica: int) -> Iterator[None]:
        """Let a replica's first evaluation in a step be; give each after it the random numbers of the first."""
        if replica not in self._first:
            self._first[replica] = self._random()
            yield
            return
        with self._kept():
            self._set_random(self._first[replica])
            yield

    @contextlib.contextmanager
    def on_trial(self) -> Iterator[None]:
        """Leave no trace of the evaluations in the context, as if the step were still to begin."""
        with self._kept():
            yield
        self.begin()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        random, buffers = self._random(), [buffer.clone() for buffer in self.buffers]
        try:
            yield
        finally:
            self._set_random(random)
            self.set_buffers(buffers)

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The module's buffers."""
        return [] if self.module is None else list(self.module.buffers())

    def set_buffers(self, values: list[torch.Tensor]) -> None:
        """Copy values into the module's buffers."""
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value)

    def _random(self) -> list[torch.Tensor]:
        on_gpu = self._device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self._device)] if on_gpu else [])]

    def _set_random(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)
