"""How many things each of several holders gets: replicas over ranks, coordinates over ranks, samples over ranks."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence


def bounds(total: int, parts: int) -> list[int]:
    """Return the parts + 1 bounds of contiguous shares that differ by at most one, larger ones first.

    Examples
    --------
    >>> bounds(8, 3)
    [0, 3, 6, 8]
    """
    share, extra = divmod(total, parts)
    return [i * share + min(i, extra) for i in range(parts + 1)]


def share(total: int, parts: int, index: int) -> slice:
    """Return share `index` of `bounds(total, parts)` as a slice."""
    limits = bounds(total, parts)
    return slice(limits[index], limits[index + 1])


def bounds_of_pieces(pieces: Sequence[int], parts: int) -> list[int]:
    """Return the parts + 1 bounds of contiguous shares of whole pieces, the longest share as short as can be.

    Where pieces are fewer than parts, or one is longer than several others, some shares are empty.

    Examples
    --------
    >>> bounds_of_pieces([2, 3, 9, 1, 1], 3)
    [0, 5, 14, 16]
    """
    ends = list(itertools.accumulate(pieces, initial=0))

    def shares(longest: int) -> list[int]:
        """Return the bounds of shares filled one after the other up to a length."""
        bounds = [0]
        while bounds[-1] < ends[-1]:
            bounds.append(ends[bisect.bisect_right(ends, bounds[-1] + longest) - 1])
        return bounds

    low, high = max(pieces), ends[-1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(shares(middle)) <= parts + 1 else (middle + 1, high)
    found = shares(low)
    return found + [ends[-1]] * (parts + 1 - len(found))
