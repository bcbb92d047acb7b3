"""How many things each of several holders gets: replicas over ranks, coordinates over ranks, samples over ranks."""

from __future__ import annotations


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
