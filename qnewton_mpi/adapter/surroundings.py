"""What a loss depends on besides the parameters: random numbers, and the buffers of a module."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from qnewton_mpi.parallel.communicator import Communicator


class Surroundings:
    """Has the evaluations of a step that repeat one before see what that saw, and leave no trace. Local.

    Parameters
    ----------
    device : torch.device
        Of the parameters, whose random numbers are repeated beside those of the CPU.
    module : Module, optional
        Whose buffers are left alone.
    replicas : range, optional
        Of this rank, of those of all, where all ranks draw the same random numbers: each then has some of its own,
        whichever rank it is on, and what the program draws elsewhere remains the same on all.
    """

    def __init__(self, device: torch.device, module: torch.nn.Module | None, replicas: range | None = None) -> None:
        self._device = device
        self.module = module
        self._replicas, self._drawn = replicas, 0
        self._first: dict[int, list[torch.Tensor]] = {}  # random states at the first evaluation in a step, by replica

    def begin(self) -> None:
        """Begin a step."""
        self._first.clear()
        if self._replicas is not None:
            self._drawn = int(torch.randint(2**62, ()))

    @property
    def begun(self) -> bool:
        """Whether there has been an evaluation in this step."""
        return bool(self._first)

    @contextlib.contextmanager
    def of(self, replica: int) -> Iterator[None]:
        """Let a replica's first evaluation in a step be; give each after it the random numbers of the first."""
        if replica in self._first:
            with self._kept():
                self._set_random(self._first[replica])
                yield
            return
        before = self._random()
        if self._replicas is not None:
            torch.manual_seed(self._drawn + self._replicas[replica])
        self._first[replica] = self._random()
        try:
            yield
        finally:
            if self._replicas is not None:
                self._set_random(before)

    @contextlib.contextmanager
    def on_trial(self) -> Iterator[None]:
        """Leave no trace of the evaluations in the context, as if the step were still to begin."""
        with self._kept():
            yield
        self._first.clear()

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

    def share_buffers(self, communicator: Communicator, average: bool) -> None:
        """Give all ranks the buffers of rank 0; to `average`, those of real numbers as the ranks' means. Collective."""
        values = [buffer.cpu().contiguous() for buffer in self.buffers]
        if communicator.size == 1 or not values:
            return
        real = [value for value in values if average and value.is_floating_point()]
        own = np.concatenate([np.empty(0), *(value.double().numpy().reshape(-1) for value in real)])
        means = torch.from_numpy(communicator.allgather(own[None], [1] * communicator.size).mean(axis=0))
        bits = [value.reshape(-1).view(torch.uint8) for value in values]
        whole = torch.cat(bits)
        communicator.broadcast(whole.numpy())
        for part, shared in zip(bits, torch.split(whole, [len(part) for part in bits]), strict=True):
            part.copy_(shared)
        for value, mean in zip(real, torch.split(means, [value.numel() for value in real]), strict=True):
            value.copy_(mean.reshape(value.shape))
        self.set_buffers(values)

    def _random(self) -> list[torch.Tensor]:
        on_gpu = self._device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self._device)] if on_gpu else [])]

    def _set_random(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)


@contextlib.contextmanager
def in_float32(device: torch.device) -> Iterator[bool]:
    """Have a GPU compute in float32 what PyTorch rounds to less there; tell whether it would have.

    TF32 is the default of convolutions. How far its roundings lead apart depends on how gradients cancel.
    """
    with contextlib.ExitStack() as after:
        otherwise = False
        for read, write, exact in _roundings() if device.type == "cuda" else ():
            before = read()
            if before != exact:
                write(exact)
                after.callback(write, before)
                otherwise = True
        yield otherwise


def _roundings() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """Yield how to read and to write what layers on a GPU round to, and the value that is float32."""

    def attribute(owner: Any, name: str, exact: Any) -> tuple[Callable[[], Any], Callable[[Any], None], Any]:
        return functools.partial(getattr, owner, name), functools.partial(setattr, owner, name), exact

    cudnn: Any = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # from PyTorch 2.9 on, where to mix both ways is an error
        yield attribute(cudnn.conv, "fp32_precision", "ieee")
        yield attribute(cudnn.rnn, "fp32_precision", "ieee")
    else:
        yield attribute(cudnn, "allow_tf32", False)
    try:
        torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer way
        yield attribute(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    else:
        yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"


class Called:
    """The modules that are called, what their buffers were before, and what autocast rounds to there. Local.

    Attributes
    ----------
    epsilon : float
        Of the coarsest dtype; 0 without autocast.
    """

    def __init__(self) -> None:
        self._modules: dict[torch.nn.Module, None] = {}
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.epsilon = 0.0

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is called in the context."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def note(module: torch.nn.Module, _: Any) -> None:
            self._modules[module] = None
            for buffer in module.buffers(recurse=False):
                self._buffers.setdefault(id(buffer), (buffer, buffer.clone()))
            for device in {p.device.type for p in module.parameters(recurse=False)}:
                if torch.is_autocast_enabled(device):
                    self.epsilon = max(self.epsilon, torch.finfo(torch.get_autocast_dtype(device)).eps)

        hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Those that were called."""
        return list(self._modules)

    @property
    def steady(self) -> bool:
        """Whether all buffers are what they were."""
        return all(torch.equal(buffer, value) for buffer, value in self._buffers.values())

    def put_back(self) -> None:
        """Let all buffers be what they were."""
        with torch.no_grad():
            for buffer, value in self._buffers.values():
                buffer.copy_(value)


@contextlib.contextmanager
def without_traces(graph: bool, module: torch.nn.Module | None) -> Iterator[None]:
    """Let what is called compute a loss, and leave neither gradients nor running statistics.

    In this thread `backward` and `zero_grad` do nothing. Afterwards the buffers of the modules that were called are
    what they were; where their owner is known, `Surroundings` sees to that, as a hook would have torch.compile start
    anew.
    """
    thread, called = threading.get_ident(), Called()

    def silent(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            return None if threading.get_ident() == thread else function(*arguments, **options)

        return call

    places: list[tuple[Any, str]] = [
        (torch.autograd, "backward"),  # Tensor.backward calls it
        (torch.nn.Module, "zero_grad"),
        (torch.optim.Optimizer, "zero_grad"),
    ]
    before = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, silent(function))
        with called.noted() if module is None else contextlib.nullcontext(), torch.set_grad_enabled(graph):
            yield
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)
        called.put_back()
