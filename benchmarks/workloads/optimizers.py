"""Who learns: the package's methods, and peers of maintained packages (extra `peers`), all without weight decay."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.workloads.problems import REPLICAS, Batch, Problem
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.errors import MissingPackageError, UserError
from qnewton_mpi.origin import pip_install
from qnewton_mpi.torch import QuasiNewton

DEFAULT = "default"
CONSTANT, COSINE = "constant", "cosine"
WARM_UP = 0.05  # of the steps


class Trainer(Protocol):
    """What a run does steps with.

    Attributes
    ----------
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, batch: Batch) -> float:
        """Do a step; return the loss of the batch before it."""

    def averaged(self) -> contextlib.AbstractContextManager[bool]:
        """Have the parameters be those that are to be judged; tells whether they are others than those trained."""


class Ours:
    """A method of this package, each replica on its share of the batch."""

    def __init__(
        self, problem: Problem, model: nn.Module, method: str, settings: dict[str, str], replicas: int
    ) -> None:
        self.problem, self.model = problem, model
        self.optimizer: QuasiNewton = QuasiNewton(
            model.parameters(),
            samples=problem.samples // replicas,
            method=method,
            replicas_per_rank=replicas,
            module=model if method != "kronecker" or any(True for _ in model.buffers()) else None,
            **settings,
        )

    def step(self, batch: Batch) -> float:
        return self.optimizer.step(functools.partial(self.problem.loss, self.model), *batch)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[bool]:
        yield False


class Peer:
    """An optimizer of PyTorch's interface on the gradient of the whole batch."""

    def __init__(self, problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.problem, self.model, self.optimizer = problem, model, optimizer

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        loss = self.problem.loss(self.model, *batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[bool]:
        yield False


class Averaging(Peer):
    """A peer that is judged at an average of where it was, with `train` and `eval` to go there and back."""

    def __init__(self, problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(problem, model, optimizer)
        self.optimizer.train()  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[bool]:
        held = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield True
        finally:
            self.optimizer.train()  # type: ignore[attr-defined]
            with torch.no_grad():
                for p, was in zip(self.model.parameters(), held, strict=True):
                    p.copy_(was)  # there and back rounds


Build = Callable[[nn.Module, float, int], torch.optim.Optimizer]


@dataclass(frozen=True)
class Kind:
    """A peer that there is.

    Attributes
    ----------
    about : str
    group : str
        "first order" or "preconditioned".
    lowest : int
        The first of the grid's rates, in half decades: 10^(lowest / 2).
    build : callable
        From a model, a rate and the number of steps.
    schedules : tuple of str
    trainer : type
    package : str, optional
        Beside PyTorch.
    """

    about: str
    group: str
    lowest: int
    build: Build
    schedules: tuple[str, ...] = (CONSTANT, COSINE)
    trainer: type[Peer] = Peer
    package: str | None = None


FIRST_ORDER, PRECONDITIONED = "first order", "preconditioned"


def _heavyball() -> Any:
    import heavyball

    heavyball.utils.compile_mode = None  # compiling takes longer than these runs
    return heavyball


def _sgd(model: nn.Module, lr: float, steps: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def _nesterov(model: nn.Module, lr: float, steps: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)


def _adamw(model: nn.Module, lr: float, steps: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def _schedulefree(model: nn.Module, lr: float, steps: int) -> torch.optim.Optimizer:
    from pytorch_optimizer import ScheduleFreeAdamW

    return ScheduleFreeAdamW(model.parameters(), lr=lr, weight_decay=0.0, warmup_steps=max(1, int(WARM_UP * steps)))


def _soap(model: nn.Module, lr: float, steps: int) -> torch.optim.Optimizer:
    return _heavyball().SOAP(model.parameters(), lr=lr, weight_decay=0.0)


def _muon(model: nn.Module, lr: float, steps: int) -> torch.optim.Optimizer:
    heavyball = _heavyball()
    rounded = heavyball.utils.stochastic_round_

    def exact(ref: Tensor, source: Tensor | None = None) -> Tensor:
        return ref if source is None else rounded(ref, source)

    # Its Newton-Schulz is in bfloat16, which on a CPU without it takes 20 times the time of float32, for less accuracy.
    if rounded.__name__ != exact.__name__:
        heavyball.utils.stochastic_round_ = exact
    return heavyball.MuonAdamW(model.parameters(), lr=lr, weight_decay=0.0)


def _psgd(model: nn.Module, lr: float, steps: int) -> torch.optim.Optimizer:
    return _heavyball().PSGDKron(model.parameters(), lr=lr, weight_decay=0.0)


PEERS: dict[str, Kind] = {
    "sgd": Kind("SGD", FIRST_ORDER, -3, _sgd),
    "nesterov": Kind("SGD with Nesterov's momentum of 0.9", FIRST_ORDER, -5, _nesterov),
    "adamw": Kind("AdamW", FIRST_ORDER, -7, _adamw),
    "schedulefree": Kind(
        "Schedule-Free AdamW", FIRST_ORDER, -6, _schedulefree, (CONSTANT,), Averaging, "pytorch-optimizer"
    ),
    "soap": Kind("SOAP", PRECONDITIONED, -7, _soap, package="heavyball"),
    "muon": Kind("Muon with AdamW for vectors", PRECONDITIONED, -6, _muon, package="heavyball"),
    "psgd": Kind("PSGD with Kronecker factors", PRECONDITIONED, -7, _psgd, package="heavyball"),
}


def parse(text: str) -> tuple[str, dict[str, str]]:
    """Return the method and the settings of "default", or of "METHOD:name=value,name=value".

    Raises
    ------
    UserError
        For what is neither a peer nor a method.
    """
    name, _, words = text.partition(":")
    settings = dict(word.partition("=")[::2] for word in words.split(",") if word)
    if name == DEFAULT and not words:
        return "kronecker", {}
    if name not in OPTIMIZERS or not all(settings.values()):
        known = ", ".join([DEFAULT, *PEERS, *OPTIMIZERS])
        raise UserError(f"no optimizer is called {text!r:.60}: there are {known}; a method's settings as name:lr=0.1")
    return name, settings


def check(text: str) -> None:
    """Raise `UserError` where an optimizer cannot be had: no such name, or its package is not installed."""
    if text not in PEERS:
        parse(text)
        return
    if PEERS[text].package is not None:
        try:
            PEERS[text].build(nn.Linear(2, 2), 0.1, 1)
        except ImportError as error:
            raise MissingPackageError(f"{text} needs {PEERS[text].package}: {pip_install('peers')}") from error


def build(
    text: str, problem: Problem, model: nn.Module, lr: float | None, steps: int, replicas: int = REPLICAS
) -> Trainer:
    """Return what trains a model: a peer at a rate, or a method of this package with so many replicas.

    Raises
    ------
    UserError
        For names and settings that there are not, a peer without a rate, or without its package.
    """
    check(text)
    if text in PEERS:
        if lr is None:
            raise UserError(f"{text} needs a rate: --lr")
        return PEERS[text].trainer(problem, model, PEERS[text].build(model, lr, steps))
    method, settings = parse(text)
    return Ours(problem, model, method, settings | ({} if lr is None else {"lr": str(lr)}), replicas)
