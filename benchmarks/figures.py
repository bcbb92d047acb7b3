"""Figures from the records of several seeds, and how they are written: in Markdown, to a few digits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

NONE = "–"


def mean(values: Sequence[float]) -> float:
    """Return the mean; ∞ where one is."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample."""
    middle = mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))


def geometric(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def steps_to(target: float, at: Sequence[int], losses: Sequence[float]) -> float:
    """Return the steps until the losses, at those given, are down to a target, or ∞."""
    before = (0, math.inf)
    for step, loss in zip(at, losses, strict=True):
        if loss <= target:
            # Between two of them the loss is taken to go down evenly.
            share = (before[1] - target) / (before[1] - loss) if before[1] < math.inf and before[1] > loss else 1.0
            return before[0] + share * (step - before[0])
        before = step, loss
    return math.inf


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Return a number to a few digits."""
    return "∞" if math.isinf(value) else f"{value:.4g}"


def versions(records: Iterable[Any]) -> str:
    """Return the versions of the packages that runs were done with."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.versions.items():
            found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(found[name]))}" for name in sorted(found)) + "."
