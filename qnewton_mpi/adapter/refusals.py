"""What a program may not do with the optimizer, told in a line. Local."""

from __future__ import annotations

from typing import Any

import torch

from qnewton_mpi.errors import UserError


def check_module(module: Any) -> None:
    """Raise `UserError` for what is no module, nor None."""
    if module is not None and not isinstance(module, torch.nn.Module):
        raise UserError(f"module={module!r:.60}: must be the model, a torch.nn.Module")


def check_probing(method: str, module: torch.nn.Module | None) -> None:
    """Raise `UserError` where a method probes and there is no module whose statistics it could leave alone."""
    if module is None:
        raise UserError(
            f"{method} evaluates gradients more than once a step: pass module=model, so that running statistics are "
            "left alone"
        )


def check_step(closure: Any, scaled: bool) -> None:
    """Raise `UserError` for a step without a closure, or of a loss that a GradScaler has scaled."""
    if scaled:
        raise UserError(
            "a GradScaler has scaled the loss: leave it out, and take torch.autocast(…, dtype=torch.bfloat16), "
            "which needs none"
        )
    if closure is None:
        raise UserError(
            "step() needs the loss: say optimizer.step(lambda: loss) after loss.backward(), or give a closure that "
            "computes both"
        )


def check_addition(steps: int) -> None:
    """Raise `UserError` for parameters that come after some steps: the method's state covers all from the start."""
    if steps:
        raise UserError(
            "parameters cannot be added after the first step: build another optimizer with all of them, or have them "
            "in this one from the start, frozen as soon as it is built"
        )
