"""Replicas are not ranks: the same seed gives the same run on any number of ranks, by every method and exchange."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from problems import VARIANTS

from qnewton_mpi.core.exchange import EXCHANGES

HERE = Path(__file__).parent
RANKS = [2, 3, 4, 8]


@pytest.fixture(scope="module")
def trajectories(mpiexec, tmp_path_factory):
    folder, results = tmp_path_factory.mktemp("trajectories"), {}
    for ranks in (1, *RANKS):
        path = folder / f"{ranks}.npz"
        finished = mpiexec(ranks, HERE / "trajectories.py", path)
        assert finished.returncode == 0, finished.stderr
        results[ranks] = dict(np.load(path))
    return results


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_run_on_any_number_of_ranks(trajectories, variant, exchange, ranks):
    expected = trajectories[1][f"allgather/{variant}"]
    actual = trajectories[ranks][f"{exchange}/{variant}"]
    # Secants with σ down to 10⁻⁴ σ_max amplify rounding by up to the square of that.
    rtol = 1e-7 if VARIANTS[variant][0] == "multisecant" else 1e-10
    assert np.abs(actual - expected).max() < rtol * np.abs(expected).max()
    scales = (trajectories[n][f"{name}/{variant}/noise"] for n, name in ((ranks, exchange), (1, "allgather")))
    np.testing.assert_allclose(*scales, rtol=1e-8)


def test_sgd_curves_are_the_same_for_every_number_of_replicas(qnewton, tmp_path):
    curves = []
    for replicas, ranks in ((1, 1), (2, 1), (8, 2), (32, 4)):
        path = tmp_path / f"{replicas}.h5"
        finished = qnewton(ranks, "train", "--method", "sgd", "--replicas", replicas, "--steps", 8, "--output", path)
        assert finished.returncode == 0, finished.stderr
        with h5py.File(path) as file:
            curves.append(np.concatenate([file["steps/loss"][()], file["epochs/train_nll"][()]]))
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=2e-5)  # float32
