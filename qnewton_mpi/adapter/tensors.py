"""The parameters of a PyTorch model as parts of one vector, and what becomes of their gradients (extra `torch`)."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from qnewton_mpi.arrays import Array
from qnewton_mpi.errors import UserError

FLOATS = (torch.float32, torch.float64)


class Tensors:
    """The tensors that an optimizer moves, each once. Local.

    In the order of the module, where a layer's biases follow its weights whichever groups they are in; what is not in
    it, or all without one, in the order of the groups. Those that are frozen or have no elements at the start are left
    out.

    Parameters
    ----------
    groups : sequence of dict
        The optimizer's `param_groups`.
    module : Module, optional
        Whose parameters they are: for their order and names, and to see where one is no longer.

    Attributes
    ----------
    moved : list of Tensor
        Those that the vector holds.
    spans : list of slice
        Where each is in the vector.

    Raises
    ------
    UserError
        For tensors that cannot be parts of one vector.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], module: torch.nn.Module | None) -> None:
        places = {} if module is None else {p: place for place, p in enumerate(module.parameters())}
        every = list(dict.fromkeys(p for group in groups for p in group["params"]))
        every.sort(key=lambda p: places.get(p, len(places)))
        if any(torch.nn.parameter.is_lazy(p) for p in every):
            raise UserError("a parameter of a lazy layer has no shape yet: call the model once before")
        self.moved = [p for p in every if _moves(p)]
        self._left_out = [p for p in every if not _moves(p)]
        self._module = torch.nn.Module() if module is None else module
        self._inside = set(self._module.parameters())
        named = [pair for group in groups for pair in zip(group.get("param_names", ()), group["params"], strict=False)]
        named += self._module.named_parameters()
        self._names = {id(p): name for name, p in named}
        self._check()
        self._shapes = [p.shape for p in self.moved]
        ends = list(itertools.accumulate(p.numel() for p in self.moved))
        self.spans = [slice(end - p.numel(), end) for end, p in zip(ends, self.moved, strict=True)]
        self._used: list[tuple[weakref.ref[torch.Tensor], int] | None] = [None] * len(self.moved)
        self._idle = [False] * len(self.moved)  # without a gradient at the last step

    def _check(self) -> None:
        if not self.moved:
            raise UserError("all parameters are frozen: none that has elements requires a gradient")
        for what, values in (
            ("dtypes", {str(p.dtype) for p in self.moved}),
            ("devices", {str(p.device) for p in self.moved}),
        ):
            if len(values) > 1:
                raise UserError(f"the parameters have {what} {', '.join(sorted(values))}: give them all the same one")
        if self.moved[0].dtype not in FLOATS:
            raise UserError(
                f"the parameters are {self.moved[0].dtype}: keep them in float32 (model.float()) and use torch.autocast"
            )
        if self.moved[0].device.type not in ("cpu", "cuda"):
            raise UserError(f"the parameters are on {self.moved[0].device}: only CPUs and CUDA GPUs are served")
        dense = [p for p in self.moved if p.is_contiguous()]
        for p, q in itertools.pairwise(sorted(dense, key=torch.Tensor.data_ptr)):
            if q.data_ptr() < p.data_ptr() + p.nbytes:
                raise UserError(
                    f"{self.name(p)} and {self.name(q)} share memory: tie them by one Parameter in both places"
                )

    def name(self, p: torch.Tensor) -> str:
        """Return what to call a parameter in a message."""
        return f"parameter {self._names.get(id(p), tuple(p.shape))}"

    def vector(self) -> torch.Tensor:
        """Return the parameters, (N,), in memory of their own."""
        return torch.cat([p.detach().reshape(-1) for p in self.moved])

    def views(self, vector: Array) -> list[torch.Tensor]:
        """Return the parts of an array (N,) in the shapes of the parameters.

        Each is a tensor with a storage of its own, in the memory of the array: one storage for all would be written
        with each part by `torch.save`, and taken for tied parameters by safetensors.
        """
        parts = zip(self.spans, self._shapes, strict=True)
        return [to_tensor(vector[span]).view(shape) for span, shape in parts]

    def bind(self, vector: Array) -> None:
        """Make the parameters views of an array (N,)."""
        self._vector = vector
        for p, view in zip(self.moved, self.views(vector), strict=True):
            p.data = view
        self._layouts = [_layout(p) for p in self.moved]

    def follow(self) -> None:
        """Take into the vector what has replaced the parameters' memory: values loaded, clipped, or moved elsewhere.

        Raises
        ------
        UserError
            For another shape, dtype or device.
        """
        replaced = [k for k, p in enumerate(self.moved) if _layout(p) != self._layouts[k]]
        if not replaced:
            return
        views = self.views(self._vector)
        for k in replaced:
            p, view = self.moved[k], views[k]
            was, now = (f"{tuple(t.shape)}, {t.dtype}, {t.device}" for t in (view, p))
            if was != now:
                raise UserError(f"{self.name(p)} was {was} and is {now}: build another optimizer after such a change")
            view.copy_(p.data)
            p.data = view
            self._layouts[k] = _layout(p)

    def rebind(self) -> None:
        """Give the parameters the memory of the vector again where something has replaced it, and drop the values."""
        for k, p in enumerate(self.moved):
            if _layout(p) != self._layouts[k]:
                p.data = to_tensor(self._vector[self.spans[k]]).view(self._shapes[k])

    def frozen(self) -> list[bool]:
        """Return for each parameter whether it is frozen now.

        Raises
        ------
        UserError
            Where all are, or one that was frozen or empty at the start is so no longer.
        """
        for p in self._left_out:
            if _moves(p):
                raise UserError(
                    f"{self.name(p)} was frozen or empty when the optimizer was built and is not now: build another one"
                )
        frozen = [not p.requires_grad for p in self.moved]
        if all(frozen):
            raise UserError("all parameters are frozen: none requires a gradient")
        return frozen

    def drop_gradients(self, unused: bool) -> None:
        """Set gradients to None: those that a step has used and, for `unused`, the others.

        A gradient that was used and that was changed since counts as unused: PyTorch adds to it, unless it is cleared.
        """
        for k, p in enumerate(self.moved):
            if p.requires_grad and (unused or self._is_used(k)):
                p.grad = None

    def has_unused_gradients(self) -> bool:
        """Whether there are gradients, other than zeros, that no step has used."""
        return any(
            p.requires_grad and p.grad is not None and not self._is_used(k) and bool(_values(p.grad).any())
            for k, p in enumerate(self.moved)
        )

    def marks(self) -> list[tuple[int, int]]:
        """Return what changes where something is added to the gradients."""
        return [(0, 0) if p.grad is None else (id(p.grad), p.grad._version) for p in self.moved]

    def note_gradients(self) -> None:
        """Take the gradients that are there for used, by a step or in vain by one that fails."""
        self._used = [p.grad if p.grad is None else (weakref.ref(p.grad), p.grad._version) for p in self.moved]

    def take_gradients(self, views: Iterable[torch.Tensor]) -> list[bool]:
        """Copy the gradients to views, zero where there are none; return for each parameter whether there is one.

        Raises
        ------
        UserError
            For a sparse gradient, or none at all.
        """
        found = [p.grad if p.requires_grad else None for p in self.moved]
        if all(gradient is None for gradient in found):
            self.check_present([True] * len(found))
            raise UserError(
                "no parameter has a gradient: the closure must call loss.backward() for this model, at each call where "
                "there are several replicas a rank or the method probes"
            )
        for k, (view, gradient) in enumerate(zip(views, found, strict=True)):
            if gradient is None:  # the loss does not depend on it
                view.zero_()
            elif gradient.is_sparse:
                raise UserError(f"{self.name(self.moved[k])} has a sparse gradient: use sparse=False in its layer")
            else:
                view.copy_(gradient)
        return [gradient is not None for gradient in found]

    def take_rows(self, rows: torch.Tensor, gradients: Sequence[torch.Tensor | None]) -> list[bool]:
        """Copy the gradients of all replicas, each (R, *shape), to rows (R, N); return which are not all zero.

        To vmap, what a loss does not depend on has a gradient of zeros.
        """
        for span, gradient in zip(self.spans, gradients, strict=True):
            rows[:, span] = 0 if gradient is None else gradient.reshape(len(rows), -1)
        # The first replica's tell nearly always; together, as a GPU is waited for at each look.
        first = torch.stack([torch.stack(rows[0, span].aminmax()) for span in self.spans]).any(1).tolist()
        return [some or bool(rows[:, span].any()) for some, span in zip(first, self.spans, strict=True)]

    def check_present(self, idle: list[bool]) -> None:
        """Raise `UserError` where a parameter that had no gradient in this step is no longer one of the model's."""
        lacking = [k for k, p in enumerate(self.moved) if idle[k] and p.requires_grad]
        new = [k for k in lacking if self.moved[k] in self._inside and not self._idle[k]]
        inside = set(self._module.parameters()) if new else set()
        gone = [k for k in new if self.moved[k] not in inside]
        gone += [k for k in lacking if self.moved[k] not in self._inside and self._is_held_here_only(k)]
        if gone:
            raise UserError(
                f"{self.name(self.moved[gone[0]])} has been replaced in the model: build another optimizer after that"
            )
        self._idle = idle

    def _is_held_here_only(self, k: int) -> bool:
        """Whether nobody but the optimizer holds a parameter, so that no model can use it."""
        stand_in = torch.empty(0)
        holders = [stand_in], [stand_in]  # as `moved` and a group hold the parameter
        p = self.moved[k]
        return sys.getrefcount(p) <= sys.getrefcount(stand_in) and bool(holders)

    def _is_used(self, k: int) -> bool:
        gradient, used = self.moved[k].grad, self._used[k]
        return used is not None and used[0]() is gradient and gradient is not None and used[1] == gradient._version


def _moves(p: torch.Tensor) -> bool:
    return p.requires_grad and p.numel() > 0


def _layout(p: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return p.data_ptr(), p.shape, p.stride()


def _values(gradient: torch.Tensor) -> torch.Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def to_array(tensor: torch.Tensor) -> Array:
    """Return a NumPy or CuPy array that shares the memory of a tensor."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    import cupy

    torch.cuda.current_stream(tensor.device).synchronize()  # CuPy has a stream of its own
    return cupy.from_dlpack(tensor)


def to_tensor(array: Array) -> torch.Tensor:
    """Return a tensor that shares the memory of a NumPy or CuPy array, and whose storage is that of the array alone."""
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array)
    array.device.synchronize()
    return torch.utils.dlpack.from_dlpack(array)
