"""The optimizer's `param_groups`: what they may have, and what their rates and decays make of a step. Local."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qnewton_mpi.core.optimizers.groups import Group
from qnewton_mpi.errors import UserError

KEYS = {"params", "lr", "weight_decay", "name", "param_names"}
SCHEDULERS_KEYS = {"initial_lr", "max_lr", "min_lr", "swa_lr"}


def check(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise `UserError` for what a group of parameters may not have."""
    for group in groups:
        unknown = group.keys() - KEYS - SCHEDULERS_KEYS
        if unknown:
            raise UserError(
                f"unknown key {min(map(str, unknown))!r} in a group of parameters: only lr and weight_decay may be a "
                "group's own, other settings are those of all groups, as arguments of QuasiNewton"
            )
        if not 0 <= _number(group, "lr") < math.inf:
            raise UserError(f"a group has lr={group.get('lr')!r:.60}: it must be a finite number, not negative")
        decay = _number(group, "weight_decay")
        if not 0 <= decay < math.inf:
            shown = f"{group['weight_decay']!r:.60}"
            raise UserError(f"a group has weight_decay={shown}: it must be a finite number, not negative")
        if _number(group, "lr") * decay > 1:
            raise UserError(
                f"a group has lr={float(group['lr']):g} and weight_decay={decay:g}: their product is the part of the "
                "parameters that a step takes off, and cannot be more than 1"
            )


def size(group: Any) -> int:
    """Return how many parameters a group has; -1 if it is none."""
    parameters = group.get("params") if isinstance(group, dict) else None
    return len(parameters) if isinstance(parameters, list) else -1


@dataclass(frozen=True)
class Rates:
    """What the groups' rates make of the optimizer's.

    Attributes
    ----------
    lr : float
        The optimizer's; 1 for "auto".
    peak : float or None
        At the rate "auto" the largest of the groups' before any scheduler, that of the whole step; else None.
    """

    lr: float
    peak: float | None

    @classmethod
    def of(cls, lr: float | str, groups: Sequence[Mapping[str, Any]]) -> Rates:
        """Return those of an lr of the settings, for groups that have not been scheduled yet: 1 where all have 0."""
        if isinstance(lr, str):
            return cls(1.0, max(float(group["lr"]) for group in groups) or 1.0)
        return cls(float(lr), None)

    def factor(self, groups: Sequence[Mapping[str, Any]]) -> float:
        """Return the largest of the groups' rates as a multiple of the optimizer's.

        At the rate "auto" a scheduler that goes up to a `max_lr`, as OneCycleLR, means the whole step there.
        """
        largest = max(float(group["lr"]) for group in groups)
        if self.peak is None:
            return largest / self.lr
        peaks = [float(group["max_lr"]) for group in groups if "max_lr" in group]
        return largest / (max(peaks, default=0.0) or self.peak)

    def parts(
        self, groups: Sequence[Mapping[str, Any]], moved: Sequence[torch.Tensor], spans: Sequence[slice]
    ) -> list[Group]:
        """Return each tensor's share of a step of the largest rate, and its decay: of all steps lr·λ of its group.

        Parameters
        ----------
        groups : sequence of mapping
            That `check` has passed.
        moved, spans : sequence
            The tensors, and where each is among the parameters.
        """
        largest = max(float(group["lr"]) for group in groups)
        of: dict[torch.Tensor, tuple[float, float]] = {}
        for group in groups:
            share = float(group["lr"]) / largest if largest else 1.0
            of |= dict.fromkeys(group["params"], (share, share * self.lr * _number(group, "weight_decay")))
        return [Group(span, *of[p]) for p, span in zip(moved, spans, strict=True)]


def digest(parts: Sequence[Group]) -> int:
    """Return a number by which the ranks compare their groups."""
    return zlib.crc32(np.array([[part.share, part.decay] for part in parts]).tobytes())


def _number(group: Mapping[str, Any], key: str) -> float:
    """Return a group's number; not a number for what is none. States of earlier versions have no weight_decay."""
    try:
        return float(group.get(key, 0.0 if key == "weight_decay" else math.nan))
    except (TypeError, ValueError, RuntimeError):
        return math.nan
