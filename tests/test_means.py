"""Running means against the weighted means that they are."""

import numpy as np
import pytest

from qnewton_mpi.core.means import Mean, at_least, constant, lasting, unbiased

VALUES = np.random.default_rng(0).standard_normal(12)
T = np.arange(1, 13.0)


def mean(weight, value=0.0, values=VALUES):
    found = Mean(weight, value)
    for x in values:
        found.add(x)
    return found


@pytest.mark.parametrize(
    ("weight", "weights"),
    [
        (unbiased(0.7), 0.7**-T),
        (unbiased(0.0), T == 12),
        (at_least(0.0), T**0),
        (lasting(0.0), T == 12),
        (lasting(1), T**0),
        (lasting(1 / 2), T),
        (lasting(1 / 4), T * (T + 1) * (T + 2)),
    ],
)
def test_weights(weight, weights):
    """Whatever the mean was before the first value."""
    for before in (0.0, 5.0):
        assert mean(weight, before).value == pytest.approx(np.average(VALUES, weights=weights))
    assert mean(weight).unbiased == pytest.approx(mean(weight).value)


def test_a_constant_weight_starts_from_what_is_known():
    slow = mean(constant(0.1), 3.0)
    weights = 0.9**-T
    assert slow.value == pytest.approx(0.9**12 * 3 + 0.1 * (0.9 ** (12 - T) * VALUES).sum())
    assert slow.seen == pytest.approx(1 - 0.9**12)
    assert mean(constant(0.1)).unbiased == pytest.approx(np.average(VALUES, weights=weights))


def test_least_weight_takes_over():
    first, second = mean(at_least(0.2), values=VALUES[:5]), VALUES[5]
    assert first.value == pytest.approx(VALUES[:5].mean())
    first.add(second)
    assert first.value == pytest.approx(0.8 * VALUES[:5].mean() + 0.2 * second)


def test_what_is_known_and_forgotten():
    found = Mean(at_least(0.0))
    found.know(4.0, 3)
    found.add(0.0)
    assert (found.value, found.count) == (3, 4)
    found.forget()
    found.add(7.0)
    assert (found.value, found.count) == (7, 1)
    found.add(0.0, 7)  # the seventh, of which others were left out
    assert (found.value, found.count) == (pytest.approx(6), 7)
