"""Figures in words, as the terminal, tables and legends have them. Local."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable


def duration(seconds: float) -> str:
    """Return a time in the largest unit of which it has two, or seconds.

    Examples
    --------
    >>> [duration(seconds) for seconds in (40.2, 119, 3 * 3600, 1e6)]
    ['40 s', '119 s', '3 h', '12 days']
    """
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def rate_text(rate: float | str) -> str:
    """Return a rate of the settings as tables and legends show it: a number's digits, or "auto"."""
    return rate if isinstance(rate, str) else f"{rate:g}"


def qualities_text(figure: Callable[[str], float], held_out: Iterable[str]) -> str:
    """Return the figures of an evaluation, by their names, as a line.

    Examples
    --------
    >>> qualities_text({"train_nll": 0.5, "test_nll": 1.0, "test_accuracy": 0.75}.__getitem__, ["test"])
    'train NLL 0.5000, test NLL 1.0000, accuracy 75.00%'
    """
    told = [f"{part} NLL {figure(f'{part}_nll'):.4f}, accuracy {figure(f'{part}_accuracy'):.2%}" for part in held_out]
    return ", ".join([f"train NLL {figure('train_nll'):.4f}", *told])


def two_digits(value: float) -> str:
    """Return a number of samples of which no more than two digits are known; a dash where nothing is.

    Examples
    --------
    >>> [two_digits(value) for value in (4321.0, 1.06e6, 7.36, math.inf, math.nan)]
    ['4,300', '1,100,000', '7.4', '∞', '–']
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    return f"{float(f'{value:.1e}'):,.15g}"
