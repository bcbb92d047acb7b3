"""What `bench` times: steps that stay what they are, however many are done."""

import numpy as np
import pytest

from qnewton_mpi.bench.steps import METHODS, FreeGradients
from qnewton_mpi.core.create import create


@pytest.mark.parametrize("method", METHODS)
def test_steps_on_free_gradients_stay_small(communicator, method):
    """Losses that never change would tell no rate: then the default's steps grow a thousandfold every few."""
    gradients = FreeGradients(256, seed=0)
    optimizer = create(method, np.zeros(256, np.float32), 2, 128, shapes=[(16, 16)], communicator=communicator)
    for _ in range(100):
        optimizer.step(gradients)
    assert np.abs(optimizer.parameters).max() < 100
