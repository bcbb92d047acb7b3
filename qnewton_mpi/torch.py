"""The optimizers for any PyTorch model: `QuasiNewton`, a `torch.optim.Optimizer` (extra `torch`)."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from qnewton_mpi.errors import MissingPackageError, UserError, printable
from qnewton_mpi.origin import pip_install

try:
    import torch
except ModuleNotFoundError as error:
    raise MissingPackageError(f"QuasiNewton needs PyTorch: {pip_install('torch')}") from error

from qnewton_mpi.adapter import groups
from qnewton_mpi.adapter.at_once import AtOnce, NotAtOnceError
from qnewton_mpi.adapter.passes import Listening, Passes
from qnewton_mpi.adapter.saved import agree_on_steps, checked, gathered, saved
from qnewton_mpi.adapter.shares import Shares, number_of_replicas
from qnewton_mpi.adapter.surroundings import Surroundings, without_traces
from qnewton_mpi.adapter.tensors import Tensors, to_array, to_tensor
from qnewton_mpi.arrays import Array
from qnewton_mpi.core import state
from qnewton_mpi.core.create import create, digest, method_settings
from qnewton_mpi.core.optimizers.base import Optimizer
from qnewton_mpi.core.optimizers.groups import Group
from qnewton_mpi.core.optimizers.probing import Probing
from qnewton_mpi.core.optimizers.values import Piggyback
from qnewton_mpi.core.settings import check_count
from qnewton_mpi.parallel.communicator import Communicator, abort_on_exception

Closure = Callable[[], Any]
TO_BE_SEEN, AT_ONCE, ONE_BY_ONE = "to be seen", "at once", "one by one"  # the replicas of a rank, by rows
ALL = -1  # for a replica, whose random numbers are those of all


class QuasiNewton(torch.optim.Optimizer):
    """Any method of this package on the parameters of a PyTorch model, the replicas over the ranks of an MPI job.

    Each rank builds the same model and takes its own samples. A step is given the loss as a function, and this rank's
    batch, of which each replica has an equal share of the rows:

        optimizer.step(lambda x, y: criterion(model(x), y), inputs, targets)

    or a closure as that of `torch.optim.LBFGS`, which computes loss and gradients at each call, with several replicas a
    rank on its `optimizer.share` of the batch:

        def closure():
            mine, answers = optimizer.share(inputs, targets)
            loss = criterion(model(mine), answers)
            loss.backward()
            return loss

        optimizer.step(closure)

    For methods that do not probe (`deflated` does, and the rate "auto" of `sgd` and `momentum`) the gradients may also
    be there before the step, of one `loss.backward()` with one replica a rank, and of one for each with several, as
    where they are accumulated: `optimizer.step(lambda: criterion(model(inputs), targets))`, the last of the losses. By
    `optimizer.step(lambda: loss)`, `kronecker` and `fisher` measure the curvature by successive gradients, which takes
    longer. Nothing else is to average the gradients: no `DistributedDataParallel`.

    The parameters become views of one vector, which the optimizer moves in place; loading, clipping or moving them
    elsewhere in between is seen. Where OMP_NUM_THREADS is not set and there are several ranks, PyTorch is set to one
    thread. An exception that no one catches ends all ranks (`abort_on_exception`), unless the program has an
    `excepthook` of its own.

    Parameters
    ----------
    params : iterable of Parameter, or of dict
        As for any optimizer, the same on all ranks, float32 or float64, on the CPU or one GPU. Those that are frozen
        now, or have no elements, are left out. A group may have an lr and a weight_decay of its own: each step takes
        lr·weight_decay of its parameters off. Where lr is "auto", the groups' rates count relative to the largest of
        them, and the step's root mean square stands in for lr in the decay.
    samples : int
        b, how many independent predictions each replica's loss is the mean of: for a language model, tokens.
    method : str
        A key of `OPTIMIZERS`.
    replicas_per_rank : int, optional
        R, so that M = R · ranks, and a batch is this rank's own; 1 by default.
    replicas : int, optional
        M, in place of that: a batch is that of all ranks, the same on each, which takes its share of the rows. So the
        number of ranks changes nothing of a run but rounding. All ranks have to draw alike, as from one seed; in a step
        each replica has random numbers of its own.
    module : Module, optional
        Whose buffers, as running statistics, are to stay as they are in a probe, and to be those of rank 0 on all ranks
        after each step, as with `DistributedDataParallel`; whose parameters are looked at where one gets no more
        gradients, and whose order tells which biases are of which weights, whatever their groups. Methods that probe
        require it.
    average_buffers : bool
        Whether the module's buffers of real numbers are to be the ranks' means after each step, in place of rank 0's.
    exchange : str
        A key of `EXCHANGES`, or "auto".
    transport : str
        One of `TRANSPORTS`: how vectors on GPUs cross the network.
    communicator : Communicator or MPI.Intracomm, optional
        Of all ranks by default.
    seed : int
        For what a method draws at random.
    stall_timeout : float, optional
        Seconds that a rank may wait for another's program, in a step or here, before the job is ended.
    **settings
        Of the method, as lr, damping: `OPTIMIZERS[method].settings_type`. Where lr is "auto", the groups have lr = 1
        and a scheduler scales the rate that the method finds, one with a max_lr by its share of that.

    Attributes
    ----------
    core : qnewton_mpi.core.optimizers.Optimizer
    figures : dict
        Of the last step, as `core.step` returns them, `noise_scale`, how many samples a batch is worth, among them.

    Raises
    ------
    UserError
        On all ranks: for settings, parameters or a number of replicas that cannot be used, or that differ between
        ranks.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4)
    >>> x = torch.randn(64, 3)
    >>> y = x.sum(1, keepdim=True)
    >>> def squares(x, y):
    ...     return ((model(x) - y) ** 2).mean()
    >>> losses = [optimizer.step(squares, x, y) for _ in range(50)]
    >>> losses[-1] < losses[0]
    True
    """

    _step_supports_amp_scaling = True  # so that a GradScaler comes to `step`, which refuses it on all ranks

    def __init__(
        self,
        params: Iterable[Any],
        *,
        samples: int,
        method: str = "kronecker",
        replicas_per_rank: int | None = None,
        replicas: int | None = None,
        module: torch.nn.Module | None = None,
        average_buffers: bool = False,
        exchange: str = "auto",
        transport: str = "auto",
        communicator: Communicator | MPI.Intracomm | None = None,
        seed: int = 0,
        stall_timeout: float | None = None,
        **settings: Any,
    ) -> None:
        self.communicator = Communicator.of(communicator, stall_timeout)
        abort_on_exception(self.communicator)
        if self.communicator.size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)

        def prepare() -> Tensors:
            check_count("samples", samples, 1)
            self._replicas = number_of_replicas(replicas, replicas_per_rank, self.communicator.size)
            if module is not None and not isinstance(module, torch.nn.Module):
                raise UserError(f"module={module!r:.60}: must be the model, a torch.nn.Module")
            chosen = method_settings(method, **settings)
            self._adaptive = isinstance(chosen.lr, str)
            self._lr = 1.0 if isinstance(chosen.lr, str) else float(chosen.lr)
            return self._gather(params, module, chosen.weight_decay)

        tensors = self.communicator.together(prepare)
        self.communicator.agree(
            {
                "replicas": replicas,
                "replicas_per_rank": 1 if replicas_per_rank is None else replicas_per_rank,
                "module": None if module is None else type(module).__name__,
                "average_buffers": average_buffers,
            },
            "start all ranks with the same settings",
        )
        self._module, self._average_buffers = module, average_buffers
        self._method, self._whole = method, replicas is not None  # whether a batch is that of all ranks

        def build(vector: Array, shapes: list[tuple[int, ...]]) -> Optimizer[Any]:
            return create(
                method,
                vector,
                self._replicas,
                samples,
                shapes=shapes,
                exchange=exchange,
                transport=transport,
                communicator=self.communicator,
                seed=seed,
                **settings,
            )

        self._create = build
        self._build(tensors)

    def _build(self, tensors: Tensors) -> None:
        """Build the method on the parameters, before its first step. Collective."""
        flat = tensors.vector()
        core = self._create(to_array(flat), [tuple(p.shape) or (1,) for p in tensors.moved])
        surroundings = Surroundings(flat.device, self._module, core.exchange.local if self._whole else None)
        buffers = repr([(buffer.dtype, tuple(buffer.shape)) for buffer in surroundings.buffers])
        self.communicator.agree({"buffers": digest(buffers.encode())}, "build the same module on all ranks")
        self._probes = isinstance(core, Probing) and core.probes
        if self._probes and self._module is None:
            raise UserError(
                f"{self._method} evaluates gradients more than once a step: pass module=model, so that running "
                "statistics are left alone"
            )
        core.piggyback = Piggyback(self._flags, self._agree_on_step)
        self.core, self._parameters, self._surroundings = core, tensors, surroundings
        self._tensors = tensors.moved
        self.figures: dict[str, float] = {}
        self._gradient_views = [tensors.views(row) for row in core.rows]
        self._shares = Shares(core.exchange.local, self._replicas if self._whole else None)
        self._passes = Passes(tensors, self._gradient_views)
        self._accumulated = False  # whether a step's gradients are of backward passes before it
        self._told_loss = math.nan  # with those, what the closure has returned
        self._again = False  # whether it may compute that again
        self._lacking: torch.Tensor | None = None  # of the slope of the losses, to that of the gradients that count
        self._given: tuple[Closure, tuple[torch.Tensor, ...]] | None = None  # a loss and the batch of this step
        self._at_once = AtOnce(self._tensors, self._module)
        self._way = TO_BE_SEEN if len(core.rows) > 1 else ONE_BY_ONE
        self._reason: str | None = None  # why they are one by one on this rank
        self._graph = False  # whether a trial needs one
        self._told = False  # that the closure cannot be called for its loss alone
        self._told_one_by_one = False
        self._failure: UserError | None = None  # of this rank, in this step
        self._frozen = [False] * len(self._tensors)
        self._groups: list[Group] = []
        self._bind()

    def share(self, *tensors: torch.Tensor) -> Any:
        """Return the present replica's part of the batch: an equal share of each tensor's rows. Local.

        Raises
        ------
        UserError
            Where the rows of the batch are not a multiple of the replicas that share it.
        """
        parts = self._shares.of(*tensors)
        return parts[0] if len(parts) == 1 else parts

    @torch.no_grad()
    def step(self, closure: Closure | None = None, *batch: torch.Tensor) -> float:  # type: ignore[override]
        """Do one step; return the mean loss of all replicas before it. Collective.

        Parameters
        ----------
        closure : callable
            Without a batch it leaves the gradients of the loss in `.grad` and returns the loss. Where the method does
            not probe, there may be gradients before, and it is called once: with one replica a rank it adds to those
            that no step has used yet; with several, each `backward()` since the last step is a replica's, in turn, its
            loss divided by their number. What has a gradient on no rank does not move.

            With a batch it is a function without side effects that returns the mean loss of rows of the batch's
            tensors, and does not call `backward`; gradients from before the step do not count. The replicas of a rank
            are then evaluated in one forward and backward pass (torch.func.vmap), if the first step finds that to be
            the same as one after the other: running statistics, random numbers and derivatives in the loss forbid it.
        *batch : Tensor
            This rank's samples, or with `replicas` those of all, along the first axis; each replica has an equal share
            of the rows.

        Raises
        ------
        UserError
            On all ranks: without a closure, for sparse gradients or none at all, for a closure that does not take its
            share or does not repeat itself, for parameters or groups that are no longer what they were.
        NonFiniteGradientError
            On all ranks, before any state has changed.
        """
        if vars(self).pop("found_inf", None) is not None:
            raise UserError(
                "a GradScaler has scaled the loss: leave it out, and take torch.autocast(…, dtype=torch.bfloat16), "
                "which needs none"
            )
        if closure is None:
            raise UserError(
                "step() needs the loss: say optimizer.step(lambda: loss) after loss.backward(), or give a closure that "
                "computes both"
            )
        core, self._given = self.core, None
        self._closure, at_once = closure, None
        self._accumulated = not batch and not self._probes and self._passes.begun
        self._told_loss, self._again, self._lacking = math.nan, False, None
        if self._accumulated:
            at_once = self._accumulated_gradients
        if batch:
            self._closure, self._given, at_once = self._of_batch, (closure, batch), self._losses_and_gradients
            self._parameters.drop_gradients(unused=True)
        self._failure = None
        self._surroundings.begin()
        self._found = np.zeros(len(self._tensors), bool)
        self._attempt(self._prepare)
        try:
            self.figures = core.step(Evaluations(self._loss_and_gradient, self._trial_losses, at_once))
        finally:
            self._passes.begin()
        if batch:
            self._parameters.drop_gradients(unused=True)
        if core.parameters is not self._bound:
            self._bind()
        self._surroundings.share_buffers(self.communicator, self._average_buffers)
        return self.figures["loss"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as any optimizer does. Local."""
        super().zero_grad(set_to_none)
        if hasattr(self, "_passes"):
            self._passes.begin(self._passes.listening)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, before the first step. Collective.

        Raises
        ------
        UserError
            On all ranks, for what cannot be used, and later: the method's state covers all parameters from the start.
        """
        if not hasattr(self, "core"):
            super().add_param_group(param_group)
            return

        def add() -> Tensors:
            if self.core.steps:
                raise UserError(
                    "parameters cannot be added after the first step: build another optimizer with all of them, or "
                    "have them in this one from the start, frozen as soon as it is built"
                )
            try:
                super(QuasiNewton, self).add_param_group(param_group)
            except (TypeError, ValueError) as error:
                raise UserError(f"the parameters cannot be used: {error}") from error
            return self._checked(self._module)

        before = list(self.param_groups)
        try:
            self._build(self.communicator.together(add))
        except UserError:
            self.param_groups[:] = before
            raise

    def state_dict(self, gather: bool = False) -> dict[str, Any]:
        """Return the state of this rank, to be saved by each rank in a file of its own. Local, but for `gather`.

        The parameters are not in it: they are the model's.

        Parameters
        ----------
        gather : bool
            Whether it is to be the state of all ranks, which one may save, and any number of ranks with as many
            replicas load. Collective.
        """
        return {**super().state_dict(), **(gathered if gather else saved)(self.core)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state that the same rank of as many saved, and go on bit for bit, or that of all ranks. Collective.

        Raises
        ------
        UserError
            On all ranks, before any state has changed: for the state of another rank, method, or model, states of
            different steps, and what is none.
        """

        def check() -> list[state.Change]:
            found = checked(self.core, state_dict)
            there = state_dict["param_groups"]
            if [groups.size(group) for group in there] != [groups.size(group) for group in self.param_groups]:
                raise UserError("the state does not fit this model: it has other groups of parameters")
            groups.check(there)
            return found

        self.communicator.together(self._follow)  # the model may have been loaded just now
        found = self.communicator.together(check)
        agree_on_steps(self.core, state_dict)
        state.assign(found)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.core.parameters = self.core.exchange.collect(self.core.held)
        self._bind()

    def __getstate__(self) -> NoReturn:
        """Refuse to be copied or pickled: the model's memory and the other ranks do not come along."""
        raise UserError(
            "QuasiNewton cannot be copied or pickled: save its state_dict() on every rank, and load it into another one"
        )

    def _gather(self, params: Iterable[Any], module: torch.nn.Module | None, weight_decay: float) -> Tensors:
        """Take the groups of parameters as PyTorch does."""
        try:
            super().__init__(params, {"lr": self._lr, "weight_decay": weight_decay})
        except (TypeError, ValueError) as error:
            raise UserError(f"the parameters cannot be used: {error}") from error
        return self._checked(module)

    def _checked(self, module: torch.nn.Module | None) -> Tensors:
        """Take the tensors of the groups, and the rate of theirs that is the optimizer's."""
        groups.check(self.param_groups)
        self._unit = groups.unit_of(self.param_groups) if self._adaptive else self._lr
        return Tensors(self.param_groups, module)

    def _bind(self) -> None:
        """Make the parameters views of the core's vector."""
        self._bound = self.core.parameters
        self._flat = to_tensor(self._bound)
        self._parameters.bind(self._bound)

    def _follow(self) -> None:
        """Take what was done to the parameters since the last step, or by the closure."""
        self._parameters.follow()
        if self.core.held is not self.core.parameters:
            self.core.held = self.core.exchange.hold(self.core.parameters)

    def _prepare(self) -> None:
        """Take what has become of the parameters and their groups since the last step."""
        groups.check(self.param_groups)
        self._follow()
        self._frozen = self._parameters.frozen()
        self.core.rate_factor = groups.rate_factor(self.param_groups, self._unit, self._adaptive)
        self._groups = groups.parts(self.param_groups, self._lr, self._tensors, self._parameters.spans)
        if self.core.steps == 0 and self._probes:
            self._try()

    def _try(self) -> None:
        """See that the closure repeats itself."""
        with self._surroundings.on_trial():
            losses = [self._evaluate(0, fresh=True) for _ in range(2)]
            self._parameters.note_gradients()
        if not math.isclose(*losses, rel_tol=1e-6):
            raise UserError(
                f"the closure returned the loss {losses[0]:g}, then {losses[1]:g} for the same parameters: it must use "
                "the same batch at each call within a step, and PyTorch's random numbers only"
            )

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do what may fail on this rank alone, unless something has already; `_agree_on_step` tells all ranks."""
        if self._failure is None:
            try:
                return action(*arguments)
            except UserError as error:
                self._failure = error
        return math.nan

    def _loss_and_gradient(self, point: Array, replica: int) -> tuple[float, Array]:
        own = replica - self.core.exchange.local.start
        loss = self._attempt(self._evaluate_at, point, own)
        if own == len(self.core.exchange.local) - 1:
            self._parameters.note_gradients()
            self._attempt(self._follow)
            self._attempt(self._parameters.check_present, (~self._found).tolist())
        return loss, self.core.rows[own]

    def _losses_and_gradients(self, points: Array, replicas: range) -> tuple[NDArray[np.float64], Array]:
        """Evaluate this rank's replicas: at once, where that is seen to be the same, or one after the other."""
        core, here = self.core, points is self.core.parameters
        if here and self._way == AT_ONCE and self._failure is None:
            found = self._evaluated_at_once()
            if found is not None:
                self._attempt(self._follow)
                self._attempt(self._parameters.check_present, (~self._found).tolist())
                return found, core.gradients
        to_be_seen = here and self._way == TO_BE_SEEN
        losses = np.empty(len(replicas))
        with self._at_once.watching() if to_be_seen else contextlib.nullcontext():
            for k, replica in enumerate(replicas):
                point = points[k, :] if points.ndim > 1 else points
                losses[k], _ = self._loss_and_gradient(point, replica)
        return self._seen_at_once(losses) if to_be_seen else losses, core.gradients

    def _accumulated_gradients(self, points: Array, replicas: range) -> tuple[NDArray[np.float64], Array]:
        """Take the gradients of the backward passes before the step, and the loss that the closure tells for all."""
        self._attempt(self._take_passes, points)
        self._parameters.note_gradients()
        self._attempt(self._follow)
        self._attempt(self._parameters.check_present, (~self._found).tolist())
        return np.full(len(replicas), self._told_loss), self.core.gradients

    def _take_passes(self, points: Array) -> None:
        if points is not self.core.parameters or (self._whole and self.communicator.size > 1):
            raise UserError(
                "there are gradients from before the step: for methods that evaluate at other parameters, and with "
                "replicas=… on several ranks, the closure must compute all of them, after optimizer.zero_grad()"
            )
        self._settle()
        passes = self._passes.number
        with self._surroundings.of(0), torch.enable_grad():
            loss = _number(self._closure())
        self._found |= self._passes.finish()
        self._settle()
        self._told_loss, self._again = loss, self._passes.number == passes

    def _lacking_slope(self) -> torch.Tensor | None:
        """Return ḡ − ∇c(w), (N,), c the loss that the closure computes; None where it computes none. Local.

        So c(w') + (ḡ − ∇c(w))ᵀ(w' − w) has the gradient of all passes at w, and the curvature of those samples of which
        the closure computes the loss.
        """
        free = [k for k, p in enumerate(self._tensors) if p.requires_grad and p.grad is not None]
        slope = torch.zeros_like(self._flat)
        try:
            with self._surroundings.of(0), without_traces(True, self._surroundings.module):
                own = torch.autograd.grad(self._closure(), [self._tensors[k] for k in free], allow_unused=True)
        except Exception:  # as there is nothing to derive, or no longer
            return None
        for k, gradient in zip(free, own, strict=True):
            whole = self._tensors[k].grad
            slope[self._parameters.spans[k]] = (whole if gradient is None else whole - gradient).reshape(-1)
        return slope

    def _evaluated_at_once(self) -> NDArray[np.float64] | None:
        """Return the losses, with the gradients in the core's rows; nothing where that cannot be done. Local."""
        rows = to_tensor(self.core.gradients)
        self._settle()
        try:
            with self._surroundings.of(ALL), without_traces(True, self._surroundings.module):
                losses, gradients = self._at_once.losses_and_gradients(self._loss_of, len(rows), self._frozen)
        except UserError as error:
            self._failure = error
            return np.full(len(rows), math.nan)
        except NotAtOnceError:
            self._way = TO_BE_SEEN  # there may be other modules now
            return None
        except Exception as error:  # of a loss, or of vmap, there is no end of kinds
            self._go_on_one_by_one(error)
            return None
        self._found |= self._parameters.take_rows(rows, gradients)
        self._settle()
        return losses.double().cpu().numpy()

    def _seen_at_once(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """See whether all replicas at once are what they have just been one by one; return the losses. Local.

        If so they count, so that a run that is gone on with is to the bit the one that never stopped.
        """
        rows = to_tensor(self.core.gradients)
        if not (np.isfinite(losses).all() and bool(rows.isfinite().all())):
            return losses  # to be seen at the next step
        self._parameters.drop_gradients(unused=True)
        try:
            with self._surroundings.of(ALL), without_traces(True, self._surroundings.module):
                found, gradients = self._at_once.check(self._loss_of, torch.from_numpy(losses), rows, self._frozen)
        except Exception as error:
            self._go_on_one_by_one(error)
            return losses
        self._way = AT_ONCE
        self._parameters.take_rows(rows, gradients)
        self._settle()
        return found.double().cpu().numpy()

    def _go_on_one_by_one(self, error: Exception) -> None:
        """Evaluate the replicas one after the other from now on, and on all ranks from the next step. Local."""
        self._way = ONE_BY_ONE
        kind = "" if isinstance(error, NotAtOnceError) else f"{type(error).__name__}: "
        self._reason = f"{kind}{printable(str(error)):.200}"

    def _tell_one_by_one(self) -> None:
        """Have all ranks do as one has to. Local."""
        self._way = ONE_BY_ONE
        if self.communicator.rank == 0 and not self._told_one_by_one:
            self._told_one_by_one = True
            warnings.warn(
                "the replicas of a rank are evaluated one after the other, which takes longer: "
                + (self._reason or "another rank cannot do otherwise"),
                stacklevel=2,
            )

    def _loss_of(self, replica: torch.Tensor) -> torch.Tensor:
        """Return the loss of a replica of this rank, which vmap has for all."""
        self._shares.turn = replica
        try:
            loss: torch.Tensor = self._loss_of_share()
            return loss.reshape(())
        finally:
            self._shares.turn = 0

    def _loss_of_share(self) -> Any:
        """Return the loss of the present replica's rows of the batch."""
        assert self._given is not None
        loss_of, batch = self._given
        mine = self.share(*batch)
        loss = loss_of(*(mine if len(batch) > 1 else [mine]))
        if any(p.grad is not None for p in self._tensors if p.requires_grad):
            raise UserError("the loss of a batch is to be returned alone: leave out its backward()")
        return loss

    def _of_batch(self) -> Any:
        """Do what a closure does."""
        loss = self._loss_of_share()
        value = _number(loss)
        if torch.is_grad_enabled():
            if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
                raise UserError("the loss of a batch must be a tensor that depends on the parameters")
            torch.autograd.backward(loss.reshape(()))
        return value

    def _trial_losses(self, point: Array, replicas: range) -> NDArray[np.float64]:
        """Return the closure's losses at a point, without a trace; not a number where it cannot be called again.

        With the slope of the gradients that count, where those are not the loss's. Where they are of passes before the
        step, the closure may compute the loss of the last one anew.
        """
        if self._accumulated and self._again:
            self._again, self._lacking = False, self._lacking_slope()
        if self._accumulated and self._lacking is None:  # as one number, wherever a step leads
            return np.full(len(replicas), self._told_loss)
        kept, gradients = self._flat.clone(), [p.grad for p in self._tensors]
        self._flat.copy_(to_tensor(point))
        here = torch.equal(kept, self._flat)
        for span in itertools.compress(self._parameters.spans, self._frozen):
            self._flat[span] = kept[span]
        losses = np.full(len(replicas), np.nan)
        try:
            at_once = self._trial_at_once() if self._given and self._way == AT_ONCE else None
            for k in range(1 if self._accumulated else len(replicas)):
                losses[k] = self._trial_loss(k, here) if at_once is None else at_once[k]
            if self._accumulated:
                losses[1:] = losses[0]
            if self._lacking is not None and not (self._accumulated and losses[0] == self._told_loss):
                losses += float(torch.sum(self._lacking * (self._flat - kept), dtype=torch.float64))
        finally:
            self._parameters.rebind()
            self._flat.copy_(kept)
            for p, gradient in zip(self._tensors, gradients, strict=True):
                p.grad = gradient
            self._settle()
        return losses

    def _trial_at_once(self) -> NDArray[np.float64] | None:
        """Return the closure's losses, nothing where it fails."""
        for p in self._tensors:
            p.grad = None
        try:
            with self._surroundings.of(ALL), without_traces(False, self._surroundings.module):
                return self._at_once.losses(self._loss_of, len(self.core.rows)).double().cpu().numpy()
        except Exception:  # as where they are one by one
            return None

    def _trial_loss(self, replica: int, here: bool) -> float:
        """Return the closure's loss, not a number where it fails; here: where it has just been called.

        Without a graph, unless it turns out to need one, for derivatives in the loss.
        """
        self._shares.turn = replica
        for graph in (True,) if self._graph else (False, True):
            for p in self._tensors:
                p.grad = None
            try:
                with self._surroundings.of(replica), without_traces(graph, self._surroundings.module):
                    loss = _number(self._closure())
                self._graph = graph
                return loss
            except Exception as error:
                failure = error
        if here and self.communicator.rank == 0 and not self._told:
            self._told = True
            warnings.warn(
                f"the closure cannot be called again for its loss alone ({type(failure).__name__}: "
                f"{printable(str(failure)):.200}): the curvature is taken from successive gradients, a slower start",
                stacklevel=2,
            )
        return math.nan

    def _evaluate_at(self, point: Array, replica: int) -> float:
        several = len(self.core.rows) > 1
        if point is self.core.parameters:
            loss = self._evaluate(replica, fresh=several or self._probes)
        else:
            kept = self._flat.clone()
            self._flat.copy_(to_tensor(point))
            for span in itertools.compress(self._parameters.spans, self._frozen):
                self._flat[span] = kept[span]
            try:
                loss = self._evaluate(replica, fresh=True)
            finally:
                self._parameters.rebind()
                self._flat.copy_(kept)
        if (several or self._whole) and not self._shares.taken:
            given = "replicas=…" if self._whole else "several replicas a rank"
            raise UserError(f"with {given} the closure must take its samples by optimizer.share(…)")
        return loss

    def _flags(self) -> NDArray[np.int64]:
        """Return what each tensor of this rank has: a gradient, or none for good; and what befell the rank. Local."""
        told = [self._shares.mark, groups.digest(self._groups), self._reason is not None, self._failure is not None]
        return np.concatenate([self._found, self._frozen, told]).astype(np.int64)

    def _agree_on_step(self, words: NDArray[np.int64]) -> None:
        """Settle with all ranks what rests in this step: what has a gradient on none. Collective.

        Raises
        ------
        UserError
            On all ranks, where one has failed, or not all have the same groups, frozen parameters or, where it is to
            be that of all, the same first batch.
        """
        known, size, counts = len(self._tensors), len(words), words.sum(axis=0)
        found, frozen, one_by_one, failed = counts[:known], counts[known:-4], counts[-2], counts[-1]
        if failed:
            self.communicator.together(self._fail)
        if others := np.flatnonzero(words[:, -3] != words[0, -3]).tolist():
            raise UserError(
                f"the groups of rank(s) {', '.join(map(str, others))} have other lr or weight_decay than those of rank "
                "0: let all ranks set the same"
            )
        if others := np.flatnonzero(words[:, -4] != words[0, -4]).tolist():
            ranks = ", ".join(map(str, others))
            raise UserError(
                f"with replicas=… each batch is that of all ranks, and rank(s) {ranks} have another than rank 0: leave "
                "out the DistributedSampler and seed all ranks alike, or say replicas_per_rank"
            )
        if one_by_one:
            self._tell_one_by_one()
        for k in np.flatnonzero((frozen > 0) & (frozen < size)):
            ranks = ", ".join(map(str, np.flatnonzero(words[:, known + k])))
            raise UserError(
                f"{self._parameters.name(self._tensors[k])} is frozen on rank(s) {ranks} alone: freeze it on all"
            )
        rests = [Group(group.span, 0.0) for group in self._groups]
        self.core.groups = [rests[k] if found[k] == 0 else group for k, group in enumerate(self._groups)]

    def _fail(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _evaluate(self, replica: int, fresh: bool) -> float:
        """Call the closure for one of this rank's replicas; return the loss.

        Its gradients are what is in `.grad` then; where they have to be `fresh`, what the closure has computed alone.
        """
        self._shares.turn = replica
        self._settle()
        if fresh and not self._surroundings.begun and self._parameters.has_unused_gradients():
            raise UserError(
                "there are gradients from before the step: with several replicas a rank, and for methods that evaluate "
                "at other parameters, the closure must compute all of them, after optimizer.zero_grad()"
            )
        self._parameters.drop_gradients(unused=fresh)
        before = self._parameters.marks()
        self._passes.begin(Listening.TO_SUMS)
        with self._surroundings.of(replica), torch.enable_grad():
            loss = _number(self._closure())
        self._note_changes()
        if not fresh and self._parameters.marks() == before:  # with one replica there is no telling passes apart
            self._accumulated, self._again, self._told_loss = True, True, loss
        found = self._parameters.take_gradients(self._gradient_views[replica])
        self._found |= found
        self._settle()
        return loss

    def _note_changes(self) -> None:
        """Note what the closure has made of its loss's gradient, as by clipping: a trial is to have the same slope."""
        changes = self._passes.changes()
        self._passes.listening = Listening.NOT
        for span, change in zip(self._parameters.spans, changes, strict=True):
            if change is not None:
                if self._lacking is None:
                    self._lacking = torch.zeros_like(self._flat)
                self._lacking[span] += change.reshape(-1) / len(self.core.rows)

    def _settle(self) -> None:
        """Wait for the GPU: PyTorch and CuPy need not be on the same stream."""
        if self._flat.is_cuda:
            torch.cuda.synchronize(self._flat.device)


@dataclass(frozen=True)
class Evaluations:
    """A closure as the core calls it: for the gradient of a replica, or for the losses of all of this rank's."""

    loss_and_gradient: Callable[[Array, int], tuple[float, Array]]
    losses: Callable[[Array, range], NDArray[np.float64]]
    at_once: Callable[[Array, range], tuple[NDArray[np.float64], Array]] | None = None

    def __call__(self, point: Array, replica: int) -> tuple[float, Array]:
        return self.loss_and_gradient(point, replica)


def _number(loss: Any) -> float:
    """Return the loss that a closure has returned."""
    try:
        return float(loss.item() if isinstance(loss, torch.Tensor) else loss)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"{loss!r:.60}"
        raise UserError(f"the closure must return the loss, one number, and has returned {kind}") from error
