"""Schedules and averages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnewton_mpi.core.schedules import factor
from qnewton_mpi.results.run import Run
from qnewton_mpi.training.averages import Averages


@given(warmup=st.integers(0, 5), steps=st.integers(6, 30))
def test_schedules(warmup, steps):
    for schedule in ("constant", "cosine"):
        factors = [factor(schedule, warmup, step, steps) for step in range(steps)]
        assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
        assert factors[warmup] == 1
        assert all(0 < f <= 1 for f in factors)
    assert all(b < a for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))
    assert {factor("constant", warmup, step, steps) for step in range(warmup, steps)} == {1.0}


@pytest.mark.parametrize("steps", [1, 3, 8, 100])
def test_averages_are_their_definitions(steps):
    random = np.random.default_rng(0)
    iterates = random.standard_normal((steps + 1, 4))
    averages = Averages(iterates[0], steps, decay=0.9)
    for step in range(1, steps + 1):
        averages.add(iterates[step], step)
    quarter = max(1, round(0.25 * steps))
    np.testing.assert_allclose(averages.tail, iterates[-quarter:].mean(axis=0))
    weights = 0.9 ** np.arange(steps)[::-1]
    np.testing.assert_allclose(averages.exponential, weights @ iterates[1:] / weights.sum())


def test_schedules_and_averages_reach_the_run(qnewton, tmp_path):
    runs = {}
    for schedule in ("constant", "cosine"):
        path = tmp_path / f"{schedule}.h5"
        options = (
            "--method",
            "sgd",
            "--steps",
            "20",
            "--warmup",
            "4",
            "--evaluate-every",
            "10",
            "--schedule",
            schedule,
        )
        finished = qnewton(1, "train", *options, "--output", path)
        assert finished.returncode == 0, finished.stderr
        runs[schedule] = Run(path)
    for run in runs.values():
        np.testing.assert_array_equal(run.epochs["step"], [0, 10, 20])
        assert np.isnan(run.epochs["tail_train_nll"][:-1]).all()
        assert run.epochs["tail_train_nll"][-1] == pytest.approx(run.epochs["train_nll"][-1], rel=0.3)
        assert run.epochs["ema_test_nll"][-1] > 0
    rates = runs["cosine"].steps["step_norm"] / runs["cosine"].steps["gradient_norm"]
    np.testing.assert_allclose(rates, [0.3 * factor("cosine", 4, step, 20) for step in range(20)], rtol=1e-5)
