"""The optimizers for any PyTorch model: `QuasiNewton`, a `torch.optim.Optimizer` (extra `torch`).

What it is made of is in `qnewton_mpi.adapter`. This module is as long as it is for the documentation of its one class,
which is half of it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from qnewton_mpi.errors import MissingPackageError, UserError
from qnewton_mpi.origin import pip_install

try:
    import torch
except ModuleNotFoundError as error:
    raise MissingPackageError(f"QuasiNewton needs PyTorch: {pip_install('torch')}") from error

from qnewton_mpi.adapter import groups
from qnewton_mpi.adapter.binding import Binding
from qnewton_mpi.adapter.closures import Closure
from qnewton_mpi.adapter.refusals import check_addition, check_module, check_probing, check_step
from qnewton_mpi.adapter.saved import agree_on_steps, checked, gathered, saved
from qnewton_mpi.adapter.shares import number_of_replicas
from qnewton_mpi.adapter.stepping import Stepping
from qnewton_mpi.adapter.surroundings import Surroundings
from qnewton_mpi.adapter.tensors import Tensors, to_array
from qnewton_mpi.core import state
from qnewton_mpi.core.create import create, digest, method_settings
from qnewton_mpi.core.optimizers.probing import Probing
from qnewton_mpi.core.optimizers.settings import Settings
from qnewton_mpi.core.optimizers.values import Piggyback
from qnewton_mpi.core.settings import check_count
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.ending import abort_on_exception


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
        self._module, self._average_buffers = module, average_buffers
        self._method, self._whole = method, replicas is not None  # whether a batch is that of all ranks

        def prepare() -> Tensors:
            check_count("samples", samples, 1)
            self._replicas = number_of_replicas(replicas, replicas_per_rank, self.communicator.size)
            check_module(module)
            return self._gather(params, method_settings(method, **settings))

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
        self._create = functools.partial(
            create,
            method,
            replicas=self._replicas,
            samples=samples,
            exchange=exchange,
            transport=transport,
            communicator=self.communicator,
            seed=seed,
            **settings,
        )
        self._build(tensors)

    def _build(self, tensors: Tensors) -> None:
        """Build the method on the parameters, before its first step. Collective."""
        flat = tensors.vector()
        core = self._create(parameters=to_array(flat), shapes=[tuple(p.shape) or (1,) for p in tensors.moved])
        surroundings = Surroundings(flat.device, self._module, core.exchange.local if self._whole else None)
        buffers = repr([(buffer.dtype, tuple(buffer.shape)) for buffer in surroundings.buffers])
        self.communicator.agree({"buffers": digest(buffers.encode())}, "build the same module on all ranks")
        probes = isinstance(core, Probing) and core.probes
        if probes:
            check_probing(self._method, self._module)
        core.piggyback = Piggyback(self._flags, self._agree_on_step)
        self.core, self.figures = core, dict[str, float]()
        self._binding = Binding(core, tensors, surroundings, self._whole, probes)
        self._stepping = Stepping(self._binding, self._module)

    def _flags(self) -> NDArray[np.int64]:
        return self._stepping.flags()

    def _agree_on_step(self, words: NDArray[np.int64]) -> None:
        self.core.groups = self._stepping.agreed(words)

    def share(self, *tensors: torch.Tensor) -> Any:
        """Return the present replica's part of the batch: an equal share of each tensor's rows. Local.

        Raises
        ------
        UserError
            Where the rows of the batch are not a multiple of the replicas that share it.
        """
        parts = self._binding.shares.of(*tensors)
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
        check_step(closure, scaled=vars(self).pop("found_inf", None) is not None)
        assert closure is not None
        evaluations = self._stepping.begin(closure, batch, self.param_groups, self._rates)
        try:
            self.figures = self.core.step(evaluations)
        finally:
            self._binding.passes.begin()
        self._stepping.end(batch)
        self._binding.surroundings.share_buffers(self.communicator, self._average_buffers)
        return self.figures["loss"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as any optimizer does. Local."""
        super().zero_grad(set_to_none)
        if hasattr(self, "_binding"):
            self._binding.passes.begin(self._binding.passes.listening)

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
            check_addition(self.core.steps)
            try:
                super(QuasiNewton, self).add_param_group(param_group)
            except (TypeError, ValueError) as error:
                raise UserError(f"the parameters cannot be used: {error}") from error
            return self._checked()

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

        self.communicator.together(self._binding.follow)  # the model may have been loaded just now
        found = self.communicator.together(check)
        agree_on_steps(self.core, state_dict)
        state.assign(found)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.core.parameters = self.core.exchange.collect(self.core.held)
        self._binding.bind()

    def __getstate__(self) -> NoReturn:
        """Refuse to be copied or pickled: the model's memory and the other ranks do not come along."""
        raise UserError(
            "QuasiNewton cannot be copied or pickled: save its state_dict() on every rank, and load it into another one"
        )

    def _gather(self, params: Iterable[Any], settings: Settings) -> Tensors:
        """Take the groups of parameters as PyTorch does."""
        self._lr = settings.lr
        usual = 1.0 if isinstance(self._lr, str) else float(self._lr)
        try:
            super().__init__(params, {"lr": usual, "weight_decay": settings.weight_decay})
        except (TypeError, ValueError) as error:
            raise UserError(f"the parameters cannot be used: {error}") from error
        return self._checked()

    def _checked(self) -> Tensors:
        """Take the tensors of the groups, and what their rates are relative to."""
        groups.check(self.param_groups)
        self._rates = groups.Rates.of(self._lr, self.param_groups)
        return Tensors(self.param_groups, self._module)
