"""Any PyTorch module as a network (extra `torch`): its gradients, random numbers and running statistics."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, log_softmax

from qnewton_mpi.adapter.tensors import to_array, to_tensor
from qnewton_mpi.arrays import Array, to_host
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.models.description import changed
from qnewton_mpi.models.network import Seeds


class ModuleNetwork:
    """A module from normalised images (B, C, H, W) to logits (B, K): a `Network`. Local.

    Its parameters are those that require a gradient; its statistics the buffers that change when it is called while it
    trains. Whatever else it has, frozen parameters and other buffers, is as `make` leaves it, which begins with
    PyTorch's random numbers seeded.

    Parameters
    ----------
    make : callable
        Returns the module.
    about : mapping
        The network's description: "input_shape", "classes", "seed", for messages "kind" or "factory", and, where it is
        made once more, "shapes" of parameters and statistics, in turn, and "constants", a number for each of those that
        are as `make` leaves them.
    xp : module, optional
        numpy, or cupy for the GPU that is current.
    dtype : optional
        float32 or float64.
    smoothing : float, optional
        ε of label smoothing.

    Raises
    ------
    UserError
        Where `make` fails or returns no module, or one that has no parameters, or does not take the images, or gives
        something other than K numbers an image, or has other shapes or constants than before.
    """

    state: ClassVar[Mapping[str, Kind]] = {"statistics": Kind.SHARED}
    hessian_dtype = np.float64

    def __init__(
        self,
        make: Callable[[], Any],
        about: Mapping[str, Any],
        xp: ModuleType = np,
        dtype: Any = np.float32,
        smoothing: float = 0.0,
    ) -> None:
        self.description = dict(about)
        self.xp, self.dtype, self._smoothing = xp, np.dtype(dtype), smoothing
        self.input_shape, self.classes = about["input_shape"], about["classes"]
        self.seen: NDArray[np.float64] | None = None
        self._name = printable(str(about.get("factory", about["kind"])))
        self._device = torch.device("cpu") if xp is np else torch.device("cuda", xp.cuda.Device().id)
        with self._seeded(about["seed"]):
            try:
                module = make()
            except (Exception, SystemExit) as error:
                raise UserError(f"{self._name}: fails when it is called: {_said(error)}") from error
        if not isinstance(module, torch.nn.Module):
            raise UserError(f"{self._name}: makes {type(module).__name__}, and must make a torch.nn.Module")
        self._module = module
        self._check_whole()
        self._module.to(self._device, getattr(torch, self.dtype.name))
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad and p.numel()}
        if not self._parameters:
            raise UserError(f"{self._name}: has no parameters that require a gradient")
        self.parameter_shapes = [tuple(p.shape) or (1,) for p in self._parameters.values()]
        self.size = sum(p.numel() for p in self._parameters.values())
        self._initial = to_array(torch.cat([p.detach().reshape(-1) for p in self._parameters.values()]))
        self._running = self._try_out()
        self._check_description()
        self.statistics = self._read_statistics()

    def _check_whole(self) -> None:
        parts = itertools.chain(self._module.named_parameters(), self._module.named_buffers())
        for name, tensor in parts:
            if torch.nn.parameter.is_lazy(tensor):
                raise UserError(f"{self._name}: {name} has no shape yet: have the factory call the module once")
            if tensor.is_complex():
                raise UserError(f"{self._name}: {name} is complex: only real numbers are served")

    def _check_description(self) -> None:
        """Note shapes, and what is neither a parameter nor a statistic, or compare with what the description says."""
        tensors = itertools.chain(self._module.named_parameters(), self._module.named_buffers())
        rest = {name: t for name, t in tensors if name not in (*self._parameters, *self._running) and t.numel()}
        kept = {**self._parameters, **dict(zip(self._running, self._buffers(), strict=True))}
        found: dict[str, dict[str, Any]] = {
            "shapes": {name: list(tensor.shape) for name, tensor in kept.items()},
            "constants": {name: _sign(tensor) for name, tensor in rest.items()},
        }
        if other := changed(self.description, found):
            where = f"{self._name}: {printable(other)}"
            if other in {**found["shapes"], **self.description.get("shapes", {})}:
                raise UserError(f"{where} is another than in the run: the module has changed since")
            raise UserError(
                f"{where}, which no step changes, is another than in the run: give --seed as the run had it, or has "
                "the module changed since?"
            )
        self.description = {**found, **self.description}

    def _try_out(self) -> list[str]:
        """Call the module on two images of noise; put back the buffers that this changes, and return their names."""
        before = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        shape = "×".join(map(str, self.input_shape))
        images = torch.randn(2, *self.input_shape, generator=torch.Generator().manual_seed(0))
        self._module.train()
        try:
            with self._seeded(0), torch.no_grad():
                logits = self._module(images.to(self._device, getattr(torch, self.dtype.name)))
        except Exception as error:
            raise UserError(f"{self._name}: does not take images of {shape}: {_said(error)}") from error
        if not isinstance(logits, torch.Tensor) or logits.shape != (2, self.classes):
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise UserError(
                f"{self._name}: makes {found} of 2 images of {shape}, and must make logits of {self.classes} classes, "
                f"(2, {self.classes})"
            )
        after = dict(self._module.named_buffers())
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        for name, value in before.items():
            after[name].copy_(value)
        return changed

    def initial_parameters(self, seed: int) -> Array:
        """Return (N,), as the module was made, with the seed of its description."""
        if seed != self.description["seed"]:
            raise ValueError(f"the module was made with seed {self.description['seed']}, not {seed}")
        return self._initial

    def losses_and_gradients(
        self, parameters: Array, images: Array, labels: Array, seeds: Seeds = ()
    ) -> tuple[Array, Array]:
        every, replicas = parameters.reshape(-1, self.size), len(labels)
        losses, seen = np.empty(replicas), []
        rows = torch.empty((replicas, self.size), dtype=getattr(torch, self.dtype.name), device=self._device)
        for r, row in enumerate(rows):
            self._forget_gradients()
            with self._seeded(seeds[r] if seeds else 0):
                loss = self._loss(every[r if len(every) > 1 else 0], images[r], labels[r])
                loss.backward()  # type: ignore[no-untyped-call]
            losses[r] = float(loss.detach())
            for view, gradient in zip(self._views(row), self._gradients(), strict=True):
                view.copy_(gradient)
            seen.append(self._read_statistics())
        self.seen = np.stack(seen)
        return self.xp.asarray(losses), to_array(rows)

    def losses(self, parameters: Array, images: Array, labels: Array, seeds: Seeds = ()) -> Array:
        found = np.empty(len(labels))
        for r in range(len(labels)):
            with self._seeded(seeds[r] if seeds else 0):
                # With a graph, though nothing is derived: without one PyTorch may take other kernels.
                found[r] = float(self._loss(parameters, images[r], labels[r]).detach())
        return self.xp.asarray(found)

    def log_probabilities(self, weights: Array, images: Array) -> Array:
        with torch.no_grad(), self._reproducible():
            return to_array(log_softmax(self._in_use(weights)(to_tensor(images)), dim=1))

    def hessian_times(self, weights: Array, direction: Array, images: Array, labels: Array) -> Array:
        """Return H q, the gradient of ∇fᵀq.

        Raises
        ------
        UserError
            Where a layer has no second derivative in PyTorch.
        """
        places = list(self._parameters.values())
        q = self._views(to_tensor(direction))
        try:
            loss = cross_entropy(self._in_use(weights)(to_tensor(images)), to_tensor(labels.astype(np.int64)))
            first = torch.autograd.grad(loss, places, create_graph=True, allow_unused=True)
            slope = sum(((g * v).sum() for g, v in zip(first, q, strict=True) if g is not None), loss.new_zeros(()))
            self._forget_gradients()
            if slope.requires_grad:
                # Not by `grad`, which passes over what can be derived only once.
                slope.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, NotImplementedError) as error:
            said = printable(" ".join(str(error).split()))
            raise UserError(f"{self._name}: has no second derivatives in PyTorch: {said}") from error
        return to_array(torch.cat([part.reshape(-1) for part in self._gradients()]))

    def named(self, weights: Array) -> dict[str, Array]:
        shapes = [*self.parameter_shapes, *(tuple(buffer.shape) or (1,) for buffer in self._buffers())]
        bounds = list(itertools.accumulate((int(np.prod(shape)) for shape in shapes), initial=0))
        parts = [weights[a:b].reshape(shape) for shape, (a, b) in zip(shapes, itertools.pairwise(bounds), strict=True)]
        return dict(zip([*self._parameters, *self._running], parts, strict=True))

    def torch_layers(self, weights: Array) -> dict[str, torch.nn.Module]:
        """Return a copy of the module, which evaluates: `train()` has it train again."""
        self._in_use(weights)
        return {"network": copy.deepcopy(self._module)}

    def _loss(self, parameters: Array, images: Array, labels: Array) -> torch.Tensor:
        """Return the loss of a replica's samples, with the statistics as they are before the step."""
        self._put(parameters, self.statistics)
        self._module.train()
        with torch.enable_grad():
            logits = self._module(to_tensor(images))
            return cross_entropy(logits, to_tensor(labels.astype(np.int64)), label_smoothing=self._smoothing)

    def _in_use(self, weights: Array) -> torch.nn.Module:
        """Return the module with some weights, in the mode of evaluation."""
        self._put(weights[: self.size], np.asarray(to_host(weights[self.size :]), np.float64))
        return self._module.eval()

    def _forget_gradients(self) -> None:
        for p in self._parameters.values():
            p.grad = None

    def _gradients(self) -> list[torch.Tensor]:
        """Return what `backward` has left of each parameter, zeros where the loss does not depend on it."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters.values()]

    def _put(self, parameters: Array, statistics: NDArray[np.float64]) -> None:
        """Have the module compute with parameters, which its own become views of, and statistics."""
        for p, view in zip(self._parameters.values(), self._views(to_tensor(parameters)), strict=True):
            p.data = view
        start = 0
        for buffer in self._buffers():
            values = torch.from_numpy(statistics[start : start + buffer.numel()])
            buffer.copy_(values.view(buffer.shape))
            start += buffer.numel()

    def _read_statistics(self) -> NDArray[np.float64]:
        parts = [buffer.detach().double().cpu().numpy().reshape(-1) for buffer in self._buffers()]
        return np.concatenate([np.zeros(0), *parts])

    def _buffers(self) -> list[torch.Tensor]:
        """Return the buffers that are statistics: looked up, as a module may put another tensor in a buffer's place."""
        return [self._module.get_buffer(name) for name in self._running]

    def _views(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of a vector (N,) in the shapes of the parameters."""
        parts = torch.split(vector, [p.numel() for p in self._parameters.values()])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters.values(), strict=True)]

    @contextlib.contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Have PyTorch draw the numbers that follow from a seed, and be as it was afterwards."""
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []), self._reproducible():
            torch.manual_seed(seed)
            yield

    @contextlib.contextmanager
    def _reproducible(self) -> Iterator[None]:
        """Have cuDNN take the same algorithms each time."""
        before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic = before


def _said(error: BaseException) -> str:
    """Return an exception in one line."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


def _sign(tensor: torch.Tensor) -> float:
    """Return a number that tells a tensor from others: what is not finite, as in masks, counts as small numbers."""
    values = tensor.detach().double().cpu().nan_to_num(1.0, 2.0, -2.0).reshape(-1)
    waves = torch.cos(torch.arange(len(values), dtype=torch.float64))
    return float(values @ waves) / math.sqrt(len(values))
