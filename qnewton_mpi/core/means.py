"""Running means: m ← m + γ_t (x − m) of the values x that come one by one. They differ in γ_t and in how they start.

The weights γ_t of the t-th value, t = 1, 2, …:

===================  ===================  ============================================================================
`constant(γ)`        γ                    starts from what m is before any value, as if that had been seen for ever
`unbiased(β)`        (1 − β)/(1 − βᵗ)     weights βᵏ of the value k before, normalised (Adam's correction)
`at_least(γ)`        max(1/t, γ)          the plain mean at first, then as `constant`
`lasting(s)`         1/(1 + s (t − 1))    the mean of about the last s of all values: weights grow as t^(1/s − 1)
                                          (Shamir and Zhang 2013, arXiv 1212.1824); of one alone, s = 0
===================  ===================  ============================================================================

γ_1 is 1 but for the first: the first value is then the mean, whatever m was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from qnewton_mpi.core.state import Kind

Weight = Callable[[int], float]


def constant(weight: float) -> Weight:
    """Return γ_t = γ."""
    return lambda t: weight


def unbiased(decay: float) -> Weight:
    """Return γ_t = (1 − β)/(1 − βᵗ)."""
    return lambda t: (1 - decay) / (1 - decay**t)


def at_least(weight: float) -> Weight:
    """Return γ_t = max(1/t, γ)."""
    return lambda t: max(1 / t, weight)


def lasting(share: float) -> Weight:
    """Return γ_t = 1/(1 + s (t − 1))."""
    return lambda t: 1 / (1 + share * (t - 1))


class Mean:
    """A running mean of numbers. Local.

    Means of arrays are kept by those who have them, with the same weights: `m + γ (x − m)`.

    Parameters
    ----------
    weight : callable
        γ_t.
    value : float
        m before any value.

    Attributes
    ----------
    value : float
        m.
    count : int
        t of the last value.
    seen : float
        By what weight m is of values that have been seen, and not of what it was before any: 1 − Π (1 − γ_t).

    Examples
    --------
    >>> plain, slow = Mean(at_least(0.0)), Mean(constant(0.1))
    >>> for x in (1.0, 2.0, 6.0):
    ...     plain.add(x)
    ...     slow.add(x)
    >>> round(plain.value, 12), round(slow.value, 12), round(slow.unbiased, 12)
    (3.0, 0.861, 3.177121771218)
    """

    state: ClassVar = dict.fromkeys(("value", "count", "seen"), Kind.SHARED)

    def __init__(self, weight: Weight, value: float = 0.0) -> None:
        self.weight, self.value = weight, value
        self.count, self.seen = 0, 0.0

    def add(self, x: float, t: int | None = None) -> None:
        """Take in the next value; as the t-th, where others have been left out."""
        self.count = self.count + 1 if t is None else t
        weight = self.weight(self.count)
        self.value += weight * (x - self.value)
        self.seen += weight * (1 - self.seen)

    def know(self, value: float, count: int) -> None:
        """Go on from a mean that is known, as if from so many values."""
        self.value, self.count, self.seen = value, count, 1.0

    def forget(self) -> None:
        """Have the next value count as the first."""
        self.count = 0

    @property
    def unbiased(self) -> float:
        """The mean of what has been seen alone; 0 before."""
        return self.value / self.seen if self.seen > 0 else 0.0
