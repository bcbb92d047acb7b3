"""The rates at which a peer is run, half decades apart: some, and more as long as the best is at an edge."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

GRID, MORE = 4, 4


def rate(half_decades: int) -> float:
    """Return 10^(half_decades / 2), to three digits."""
    return float(f"{10 ** (half_decades / 2):.3g}")


def half_decades(rate: float) -> int:
    """Return where a rate is on the grid."""
    return round(2 * math.log10(rate))


def grid(lowest: int, cost: Callable[[float], Any]) -> tuple[list[float], float | None]:
    """Return the rates that are to be run now, and the best one where there are none.

    Parameters
    ----------
    lowest : int
        Of the first four, in half decades.
    cost : callable
        Of a rate: what it came to, less being better; None, where it was not run yet.
    """
    places = list(range(lowest, lowest + GRID))
    while True:
        costs = {place: cost(rate(place)) for place in places}
        missing = [rate(place) for place, found in costs.items() if found is None]
        if missing:
            return missing, None
        # All without an end: the lowest rate, so that lower ones are tried.
        best = min(places, key=lambda place: (costs[place], place))
        if best not in (places[0], places[-1]) or len(places) == GRID + MORE:
            return [], rate(best)
        places = [best - 1, *places] if best == places[0] else [*places, best + 1]
