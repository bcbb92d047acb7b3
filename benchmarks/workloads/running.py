"""One run: an optimizer on a workload, and the record of it."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from dataclasses import dataclass, field

import numpy as np
import torch

import qnewton_mpi
from benchmarks import store
from benchmarks.workloads import optimizers
from benchmarks.workloads.optimizers import COSINE, PEERS, WARM_UP, Trainer
from benchmarks.workloads.problems import Batch, Problem
from qnewton_mpi.errors import NonFiniteGradientError, UserError

POINTS, HELD_OUT_POINTS, TAIL = 60, 10, 0.05


@dataclass(frozen=True)
class Key(store.Key):
    """What makes a run."""

    lr: float | None
    schedule: str
    seed: int
    steps: int

    def __str__(self) -> str:
        rate = "" if self.lr is None else f" {self.lr:g}"
        return f"{self.workload} {self.optimizer}{rate} {self.schedule} seed {self.seed}"


@dataclass(frozen=True)
class Record(store.Record):
    """What became of a run; a loss that is not finite is ∞.

    Attributes
    ----------
    key : Key
    loss : float
        Training loss at the end: the mean of the last 5% of the steps.
    held_out : float
    losses : list
        At steps evenly spaced from the first to the last (`places`), the mean training loss of the 5% before.
    held_out_losses : list
        The same of the held-out loss; shorter where the run diverged.
    cpu_ms : float, optional
        CPU milliseconds a step, mean over all steps but the first; none of a run on a GPU.
    diverged : bool
    versions : dict
    """

    key: Key
    loss: float
    held_out: float
    losses: list[float]
    held_out_losses: list[float]
    cpu_ms: float | None
    diverged: bool
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def at(self) -> list[int]:
        """The steps done at each of the losses."""
        return places(self.key.steps, len(self.losses))

    @property
    def outcome(self) -> str:
        """The loss at the end."""
        return f"{self.loss:.6g}"


def factor(schedule: str, step: int, steps: int) -> float:
    """Return what a schedule multiplies the rate of a step with, counted from 0: a warm-up, then half a cosine."""
    if schedule != COSINE:
        return 1.0
    return min(1.0, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def run(problem: Problem, key: Key, device: str = "cpu") -> Record:
    """Do a run, on a device of PyTorch's: a GPU makes the same run to rounding, sooner.

    Raises
    ------
    UserError
        For an optimizer that cannot be had, or data that are not there.
    """
    model, batches = problem.model(key.seed).to(device), problem.batches(key.seed)
    trainer = optimizers.build(key.optimizer, problem, model, key.lr, key.steps)
    base = [group["lr"] for group in trainer.optimizer.param_groups]
    points = places(key.steps, HELD_OUT_POINTS)
    losses, seconds, held_out = [], [], {}
    for step in range(key.steps):
        for group, lr in zip(trainer.optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor(key.schedule, step, key.steps)
        batch = tuple(part.to(device) for part in next(batches))
        judged = _judged(problem, trainer, batch)
        started = time.process_time()
        loss = do_step(trainer, batch)
        seconds.append(time.process_time() - started)
        losses.append(loss if judged is None or not math.isfinite(loss) else judged)
        if not math.isfinite(losses[-1]):
            break
        if step + 1 in points:
            with trainer.averaged():
                held_out[step + 1] = problem.evaluate(model, problem.held_out)
    diverged = len(losses) < key.steps or not all(math.isfinite(loss) for loss in (losses[-1], *held_out.values()))
    losses += [math.inf] * (key.steps - len(losses))
    means = [_short(loss, problem) for loss in thinned(losses)]
    return Record(
        key,
        loss=means[-1],
        held_out=_short(held_out.get(key.steps, math.inf), problem),
        losses=means,
        held_out_losses=[_short(loss, problem) for loss in held_out.values()],
        cpu_ms=float(f"{1e3 * np.mean(seconds[1:] or seconds):.4g}") if device == "cpu" else None,
        diverged=diverged,
        versions=versions(key.optimizer),
    )


def do_step(trainer: Trainer, batch: Batch) -> float:
    """Do a step; return the loss before it, ∞ where the step could not be done for numbers that are not finite."""
    try:
        return trainer.step(batch)
    except NonFiniteGradientError:
        return math.inf
    except UserError:
        raise
    except (ArithmeticError, ValueError, RuntimeError):  # LAPACK's of PyTorch are RuntimeErrors, as is much else
        parts = [part for p in trainer.optimizer.param_groups for part in p["params"]]
        gradients = [part.grad for part in parts if part.grad is not None]
        if all(bool(part.isfinite().all()) and float(part.abs().max()) < 1e18 for part in (*parts, *gradients)):
            raise
        return math.inf


@torch.no_grad()
def _judged(problem: Problem, trainer: Trainer, batch: Batch) -> float | None:
    """Return the batch's loss at the parameters to be judged, where they are others than those that are trained."""
    with trainer.averaged() as others:
        return problem.loss(trainer.model, *batch).item() if others else None


def _short(loss: float, problem: Problem) -> float:
    """Return a loss to as many digits as are told apart: what is near a known minimum needs more."""
    return float(f"{loss:.{10 if problem.minimum else 5}g}") if math.isfinite(loss) else math.inf


def places(steps: int, count: int) -> list[int]:
    """Return some steps, evenly spaced from the first to the last; all, where there are no more."""
    if steps <= count or count < 2:
        return list(range(1, steps + 1))
    return [1 + round(k * (steps - 1) / (count - 1)) for k in range(count)]


def thinned(losses: list[float]) -> list[float]:
    """Return at `places` the mean of the 5% of the steps before."""
    width = max(1, round(TAIL * len(losses)))
    return [float(np.mean(losses[max(0, t - width) : t])) for t in places(len(losses), POINTS)]


def versions(optimizer: str) -> dict[str, str]:
    """Return the versions of what a run depends on."""
    package = PEERS[optimizer].package if optimizer in PEERS else None
    names = ["torch", "numpy", *([package] if package else [])]
    own = {} if optimizer in PEERS else {"qnewton_mpi": qnewton_mpi.__version__}
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names} | own
