"""The optimizers for any PyTorch model: `QuasiNewton`, a `torch.optim.Optimizer` (extra `torch`)."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from qnewton_mpi.core import state
from qnewton_mpi.core.create import create, method_settings
from qnewton_mpi.core.optimizers.probing import Probing
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator, abort_on_exception
from qnewton_mpi.parallel.device import Array, to_host

Closure = Callable[[], Any]
FLOATS = (torch.float32, torch.float64)


class QuasiNewton(torch.optim.Optimizer):
    """Any method of this package on the parameters of a PyTorch model, the replicas over the ranks of an MPI job.

    Each rank builds the same model and takes its own samples. A step reads the gradients that a closure leaves in
    `.grad`, and moves all ranks' parameters alike:

        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step(lambda: loss)

    Nothing else is to average the gradients: no `DistributedDataParallel`. With several replicas a rank, and for the
    methods that probe (`deflated`, the rate "auto" of `sgd` and `momentum`), the closure computes loss and gradients
    anew at each call, as that of `torch.optim.LBFGS` does, on its `optimizer.share` of the rank's batch:

        def closure():
            mine, answers = optimizer.share(inputs, targets)
            loss = criterion(model(mine), answers)
            loss.backward()
            return loss

        optimizer.step(closure)

    The parameters become views of one vector, which the optimizer moves in place; loading, clipping or moving them
    elsewhere in between is seen. Where OMP_NUM_THREADS is not set and there are several ranks, PyTorch is set to one
    thread. An exception that no one catches ends all ranks (`abort_on_exception`), unless the program has an
    `excepthook` of its own.

    Parameters
    ----------
    params : iterable of Parameter, or of dict
        As for any optimizer, the same on all ranks, float32 or float64, on the CPU or one GPU. Those frozen now are
        left out. All groups have one learning rate.
    samples : int
        b, how many independent predictions each replica's loss is the mean of: for a language model, tokens.
    method : str
        A key of `OPTIMIZERS`.
    replicas_per_rank : int
        R, so that M = R · ranks.
    module : Module, optional
        Whose buffers, as running statistics, are to stay as they are in a probe. Methods that probe require it.
    exchange : str
        A key of `EXCHANGES`, or "auto".
    transport : str
        One of `TRANSPORTS`: how vectors on GPUs cross the network.
    communicator : Communicator, optional
        Of all ranks by default.
    seed : int
        For what a method draws at random.
    **settings
        Of the method, as lr, damping: `OPTIMIZERS[method].settings_type`. Where lr is "auto", the groups have lr = 1
        and a scheduler scales the rate that the method finds.

    Attributes
    ----------
    core : qnewton_mpi.core.optimizers.Optimizer
    figures : dict
        Of the last step, as `core.step` returns them.

    Raises
    ------
    UserError
        On all ranks: for settings, parameters or a number of replicas that cannot be used, and where the parameters
        differ between ranks.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4)
    >>> x = torch.randn(64, 3)
    >>> y = x.sum(1, keepdim=True)
    >>> def closure():
    ...     mine, answers = optimizer.share(x, y)
    ...     loss = ((model(mine) - answers) ** 2).mean()
    ...     loss.backward()
    ...     return loss
    >>> losses = [optimizer.step(closure) for _ in range(50)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        samples: int,
        method: str = "kronecker",
        replicas_per_rank: int = 1,
        module: torch.nn.Module | None = None,
        exchange: str = "auto",
        transport: str = "auto",
        communicator: Communicator | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.communicator = Communicator() if communicator is None else communicator
        abort_on_exception(self.communicator)
        if self.communicator.size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)

        if samples < 1 or replicas_per_rank < 1:
            raise UserError(f"samples={samples}, replicas_per_rank={replicas_per_rank}: both must be at least 1")
        lr = method_settings(method, **settings).lr
        self._lr = 1.0 if isinstance(lr, str) else float(lr)
        groups = list(params)
        if not groups:
            raise UserError("the optimizer was given no parameters")
        super().__init__(groups, {"lr": self._lr})
        self._tensors = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        flat = self.communicator.together(self._flattened)
        self._agree(flat)

        self.core = create(
            method,
            _array(flat),
            replicas_per_rank * self.communicator.size,
            samples,
            shapes=[tuple(p.shape) or (1,) for p in self._tensors],
            exchange=exchange,
            transport=transport,
            communicator=self.communicator,
            seed=seed,
            **settings,
        )
        self.figures: dict[str, float] = {}
        self._gradient_views = [self._views(_tensor(row)) for row in self.core.rows]
        self._module = module
        self._probes = isinstance(self.core, Probing) and self.core.probes
        if self._probes and module is None:
            raise UserError(
                f"{method} evaluates gradients more than once a step: pass module=model, so that running statistics "
                "are left alone"
            )
        self._replica = 0  # of this rank's, the one being evaluated
        self._shared = False  # whether the closure has asked for its share
        self._random: dict[int, list[torch.Tensor]] = {}  # states at the first evaluation of a step, by replica
        self._bind()

    def share(self, *tensors: torch.Tensor) -> Any:
        """Return the present replica's part of this rank's batch: an equal share of each tensor's rows. Local.

        Raises
        ------
        UserError
            Where the rows of the batch are not a multiple of this rank's replicas.
        """
        own = len(self.core.exchange.local)
        self._shared = True
        for tensor in tensors:
            if len(tensor) % own or not len(tensor):
                raise UserError(
                    f"a batch of {len(tensor)} rows cannot be shared evenly by {own} replicas on this rank: give the "
                    f"loader a multiple of {own} as batch size, and drop_last=True"
                )
        parts = [tensor.tensor_split(own)[self._replica] for tensor in tensors]
        return parts[0] if len(parts) == 1 else parts

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """Do one step; return the mean loss of all replicas before it. Collective.

        Parameters
        ----------
        closure : callable
            Leaves the gradients of the loss in `.grad` and returns it. Where there is one replica a rank and the
            method does not probe, it is called once, and `lambda: loss` after `loss.backward()` does.

        Raises
        ------
        UserError
            On all ranks or, from within the closure, on one: without a closure, for sparse gradients or none at all,
            for a closure that does not take its share or does not repeat itself.
        NonFiniteGradientError
            On all ranks, before any state has changed.
        """
        if closure is None:
            raise UserError(
                "step() needs the loss: say optimizer.step(lambda: loss) after loss.backward(), or give a closure that "
                "computes both"
            )
        core = self.core
        self._closure = closure
        self._follow()
        core.rate_factor = self._rate_factor()
        self._random.clear()
        if core.steps == 0 and self._probes:
            self.communicator.together(self._try)
        self.figures = core.step(self._loss_and_gradient)
        if core.parameters is not self._bound:
            self._bind()
        return self.figures["loss"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the method's state covers all parameters from the start."""
        if hasattr(self, "core"):
            raise UserError("parameters cannot be added later: build another optimizer with all of them")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank, to be saved by each rank in a file of its own. Local.

        Of the replicas' sums a rank has a part. The parameters are not in it: they are the model's.
        """
        entries = state.entries(self.core)
        arrays = {path: state.value(owner, name) for path, _, owner, name in entries if path != "held"}
        tensors = {path: torch.tensor(array) for path, array in arrays.items() if array is not None}
        place = [self.communicator.rank, self.communicator.size, type(self.core).__name__]
        return {**super().state_dict(), "core": tensors, "place": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state that the same rank of as many saved; it then goes on bit for bit. Collective.

        Raises
        ------
        UserError
            On all ranks: for the state of another rank, method, or model.
        """
        here = [self.communicator.rank, self.communicator.size, type(self.core).__name__]

        def load() -> None:
            place = list(state_dict.get("place", ()))
            if place != here:
                raise UserError(
                    f"the state is of (rank, ranks, method) {place}, this is {here}: every rank saves and loads its own"
                )
            try:
                super(QuasiNewton, self).load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
            except ValueError as error:
                raise UserError(f"the state does not fit this model: {error}") from error

        def read(path: str, _: state.Kind) -> np.ndarray[Any, Any] | None:
            if path == "held":
                return to_host(self.core.held)
            found = state_dict["core"].get(path)
            return None if found is None else found.cpu().numpy()

        def restore() -> None:
            try:
                state.restore(self.core, read)
            except ValueError as error:
                raise UserError(f"the state does not fit this model: {error}") from error

        self.communicator.together(load)
        self.communicator.together(restore)
        self.core.parameters = self.core.exchange.collect(self.core.held)
        self._bind()

    def _flattened(self) -> torch.Tensor:
        """Return the parameters as one vector of their own."""
        if not self._tensors:
            raise UserError("all parameters are frozen: none requires a gradient")
        for what, values in (
            ("dtypes", {str(p.dtype) for p in self._tensors}),
            ("devices", {str(p.device) for p in self._tensors}),
        ):
            if len(values) > 1:
                raise UserError(f"the parameters have {what} {', '.join(sorted(values))}: give them all the same one")
        if self._tensors[0].dtype not in FLOATS:
            raise UserError(
                f"the parameters are {self._tensors[0].dtype}: keep them in float32 (model.float()) and use "
                "torch.autocast"
            )
        if self._tensors[0].device.type not in ("cpu", "cuda"):
            raise UserError(f"the parameters are on {self._tensors[0].device}: only CPUs and CUDA GPUs are served")
        return torch.cat([p.detach().reshape(-1) for p in self._tensors])

    def _agree(self, flat: torch.Tensor) -> None:
        """Raise `UserError` where the ranks do not start with the same parameters. Collective."""
        text = repr([tuple(p.shape) for p in self._tensors]).encode()
        digest = hashlib.sha256(text + flat.cpu().numpy().tobytes()).digest()
        digests = self.communicator.mpi.allgather(digest)
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise UserError(
                f"the parameters of rank(s) {', '.join(map(str, others))} differ from those of rank 0: call "
                "torch.manual_seed with the same seed on every rank before the model is built, or load one file"
            )

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of a vector, in the shapes of the parameters."""
        parts = torch.split(flat, [p.numel() for p in self._tensors])
        return [part.view(p.shape) for part, p in zip(parts, self._tensors, strict=True)]

    def _bind(self) -> None:
        """Make the parameters views of the core's vector."""
        self._bound = self.core.parameters
        self._flat = _tensor(self._bound)
        self._parameter_views = self._views(self._flat)
        for p, view in zip(self._tensors, self._parameter_views, strict=True):
            p.data = view

    def _follow(self) -> None:
        """Take what was done to the parameters since the last step."""
        for p, view in zip(self._tensors, self._parameter_views, strict=True):
            if p.data_ptr() != view.data_ptr():
                view.copy_(p.data)
                p.data = view
        if self.core.held is not self.core.parameters:
            self.core.held = self.core.exchange.hold(self.core.parameters)

    def _rate_factor(self) -> float:
        rates = {float(group["lr"]) for group in self.param_groups}
        if len(rates) > 1:
            raise UserError(f"the groups have learning rates {sorted(rates)}: all must have the same")
        return rates.pop() / self._lr

    def _try(self) -> None:
        """See that the closure repeats itself."""
        buffers, before = self._buffers(), self._random_state()
        losses = [self._evaluate(0, fresh=True) for _ in range(2)]
        self._set_random_state(before)
        self._random.clear()
        self._set_buffers(buffers)
        if not math.isclose(*losses, rel_tol=1e-6):
            raise UserError(
                f"the closure returned the loss {losses[0]:g}, then {losses[1]:g} for the same parameters: it must use "
                "the same batch at each call within a step, and PyTorch's random numbers only"
            )

    def _loss_and_gradient(self, point: Array, replica: int) -> tuple[float, Array]:
        own = replica - self.core.exchange.local.start
        several = len(self.core.exchange.local) > 1
        fresh = several or own in self._random
        if point is self.core.parameters:
            loss = self._evaluate(own, fresh)
        else:
            kept = self._flat.clone()
            self._flat.copy_(_tensor(point))
            try:
                loss = self._evaluate(own, fresh)
            finally:
                self._flat.copy_(kept)
        if several and not self._shared:
            raise UserError("with several replicas a rank the closure must take its samples by optimizer.share(…)")
        return loss, self.core.rows[own]

    def _evaluate(self, replica: int, fresh: bool) -> float:
        """Call the closure for one of this rank's replicas; return the loss.

        Its gradients are those that it computes or, unless they have to be `fresh`, those that were there before.
        """
        self._replica = replica
        self._settle()
        before = [p.grad for p in self._tensors]
        for p in self._tensors:
            p.grad = None  # not to be added to, where the closure does not call zero_grad
        with self._as_before(replica), torch.enable_grad():
            loss = self._closure()
        if isinstance(loss, torch.Tensor):
            loss = loss.item()
        gradients = [p.grad for p in self._tensors]
        if not fresh and all(gradient is None for gradient in gradients):
            gradients = before
            for p, gradient in zip(self._tensors, before, strict=True):
                p.grad = gradient
        if all(gradient is None for gradient in gradients):
            raise UserError(
                "no parameter has a gradient: the closure must call loss.backward(), at each call where there are "
                "several replicas a rank or the method probes"
            )
        for view, gradient in zip(self._gradient_views[replica], gradients, strict=True):
            if gradient is None:  # the loss does not depend on it
                view.zero_()
            elif gradient.is_sparse:
                raise UserError("a parameter has a sparse gradient: use sparse=False in its layer")
            else:
                view.copy_(gradient)
        self._settle()
        return float(loss)

    def _settle(self) -> None:
        """Wait for the GPU: PyTorch and CuPy need not be on the same stream."""
        if self._flat.is_cuda:
            torch.cuda.synchronize(self._flat.device)

    @contextlib.contextmanager
    def _as_before(self, replica: int) -> Iterator[None]:
        """Give a second evaluation in a step the random numbers of the first, and leave no trace of it."""
        first = self._random.get(replica)
        if first is None:
            self._random[replica] = self._random_state()
            yield
            return
        buffers, now = self._buffers(), self._random_state()
        self._set_random_state(first)
        yield
        self._set_random_state(now)
        self._set_buffers(buffers)

    def _random_state(self) -> list[torch.Tensor]:
        device = self._flat.device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def _set_random_state(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._flat.device)

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer.clone() for buffer in self._module.buffers()] if self._module is not None else []

    def _set_buffers(self, values: list[torch.Tensor]) -> None:
        if self._module is not None:
            for buffer, value in zip(self._module.buffers(), values, strict=True):
                buffer.copy_(value)


def _array(tensor: torch.Tensor) -> Array:
    """Return a NumPy or CuPy array that shares the memory of a tensor."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    import cupy

    torch.cuda.current_stream(tensor.device).synchronize()  # CuPy has a stream of its own
    return cupy.from_dlpack(tensor)


def _tensor(array: Array) -> torch.Tensor:
    """Return a tensor that shares the memory of a NumPy or CuPy array."""
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array)
    array.device.synchronize()
    return torch.utils.dlpack.from_dlpack(array)
