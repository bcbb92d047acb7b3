"""Block BFGS against its equations, SciPy's L-BFGS, and what it does when a step is too long."""

import numpy as np
import pytest
from problems import LIBRARIES, Quadratic
from scipy.optimize import minimize

from qnewton_mpi.arrays import to_host
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import BlockBFGS
from qnewton_mpi.core.optimizers.block_bfgs import BlockBFGSSettings
from qnewton_mpi.core.state import entries, restore, value
from qnewton_mpi.errors import NonFiniteGradientError, UserError
from qnewton_mpi.parallel.communicator import Communicator


class SoftmaxRegression:
    """Ill-conditioned and smooth: inputs of scales from 1 to 30, 3 classes."""

    def __init__(self, features=20, samples=200):
        random = np.random.default_rng(0)
        self.inputs = random.standard_normal((samples, features)) * np.geomspace(1, 30, features)
        self.hot = np.eye(3)[random.integers(0, 3, samples)]
        self.start = np.zeros(3 * features)

    def __call__(self, w, replica=0):
        logits = self.inputs @ w.reshape(-1, 3)
        logits -= logits.max(axis=1, keepdims=True)
        norms = np.log(np.exp(logits).sum(axis=1))
        residuals = np.exp(logits - norms[:, None]) - self.hot
        loss = np.mean(norms - (logits * self.hot).sum(axis=1)) + 5e-4 * (w @ w)
        return float(loss), (self.inputs.T @ residuals / len(norms)).ravel() + 1e-3 * w


def optimizer_of(start, replicas, exchange="allgather", **settings):
    chosen = EXCHANGES[exchange](Communicator(), replicas, start.shape[0])
    return BlockBFGS(BlockBFGSSettings(**settings), start, chosen)


def test_newest_block_fulfils_all_its_secants():
    problem = SoftmaxRegression()
    optimizer = optimizer_of(problem.start, 6, probe_scale=1e-6)
    for _ in range(4):
        optimizer.step(problem)
    newest = optimizer.from_probes.blocks[-1]
    assert len(newest.curvatures) == 5
    for d, y in zip(newest.directions, newest.products, strict=True):
        np.testing.assert_allclose(optimizer.apply_inverse(y), d, atol=1e-6)
    inverse = np.array([optimizer.apply_inverse(e) for e in np.eye(len(problem.start))])
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-9)
    assert np.linalg.eigvalsh(inverse).min() > 0


def test_probes_of_all_directions_make_it_newtons_method():
    problem = Quadratic(6, 1)
    same = lambda w, replica: problem(w, 0)  # noqa: E731
    optimizer = optimizer_of(problem.start, 7)
    optimizer.step(same)
    np.testing.assert_allclose(optimizer.parameters, problem.centres[0], atol=1e-9)
    assert optimizer.evaluations == 2 * 7


def test_takes_fewer_rounds_than_lbfgs():
    problem, losses = SoftmaxRegression(), []
    best = minimize(problem, problem.start, jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-10}).fun
    goal = best + 1e-4 * (problem(problem.start)[0] - best)

    def counted(w):
        losses.append(problem(w)[0])
        return problem(w)

    minimize(counted, problem.start, jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-10, "maxcor": 50})
    theirs = np.argmax(np.array(losses) <= goal) + 1
    optimizer = optimizer_of(problem.start, 8)
    while optimizer.step(problem)["loss"] > goal:
        assert optimizer.steps < 100
    assert optimizer.evaluations / 8 <= theirs / 2


def test_a_step_too_long_is_shortened():
    problem = SoftmaxRegression()
    optimizer = optimizer_of(problem.start, 4, lr=300.0)
    losses, lengths = [], []
    for _ in range(12):
        figures = optimizer.step(problem)
        losses.append(figures["loss"])
        lengths.append(figures["length"])
    assert min(lengths) < 1
    assert (np.diff(losses) <= 0).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_step_out_of_the_domain_is_shortened(wrong):
    """A barrier that is not finite beyond 1, an optimum next to it, and a step that would lead far beyond."""
    start, calls = np.zeros(6), []

    def barrier(w, replica):
        inside = bool((np.abs(w) < 1).all())
        calls.append(inside)
        if not inside:
            return wrong, np.full(6, wrong)
        return float(-np.log1p(-w).sum() - 40 * w.sum()), 1 / (1 - w) - 40

    optimizer = optimizer_of(start, 4, lr=300.0)
    losses = [optimizer.step(barrier)["loss"] for _ in range(40)]
    assert not all(calls)
    assert np.isfinite(losses).all()
    assert (np.diff(losses) <= 0).all()
    np.testing.assert_allclose(optimizer.parameters, 1 - 1 / 40, atol=1e-4)


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteGradientError):
        optimizer_of(np.ones(3), 3).step(lambda w, replica: (np.nan, w))


def test_goes_back_where_no_length_helps():
    """The gradient's sign is wrong: every step climbs."""
    optimizer = optimizer_of(np.ones(3), 3)
    for _ in range(3):
        figures = optimizer.step(lambda w, replica: (float(w @ w) / 2, -w))
        assert figures["loss"] == pytest.approx(1.5)


def test_refuses_replicas_with_different_data():
    problem = Quadratic(12, 6)
    with pytest.raises(UserError, match="all need the same data"):
        optimizer_of(problem.start, 6).step(problem)


@pytest.mark.parametrize("done", [1, 4, 9])
@pytest.mark.parametrize("rate", [1.0, 300.0])
def test_a_restored_run_goes_on_as_it_would_have(done, rate):
    """With fewer blocks kept than there have been, in steps too long as well."""
    problem, settings = SoftmaxRegression(), {"lr": rate, "steps_kept": 3, "probes_kept": 2}
    optimizer, again = (optimizer_of(problem.start, 4, **settings) for _ in range(2))
    for _ in range(done):
        optimizer.step(problem)
    saved = {path: np.array(value(owner, name)) for path, _, owner, name in entries(optimizer)}
    restore(again, lambda path, kind: saved[path])
    again.parameters = again.exchange.collect(again.held)
    for _ in range(5):
        assert optimizer.step(problem) == pytest.approx(again.step(problem), rel=1e-9, nan_ok=True)
        np.testing.assert_allclose(again.parameters, optimizer.parameters, rtol=1e-9)


@pytest.mark.parametrize("library", LIBRARIES)
def test_runs_on_any_array_library(library):
    points = []
    for xp, device in ((np, None), LIBRARIES[library]):
        problem = Quadratic(12, 1, dtype=xp.float64, xp=xp, device=device)
        optimizer = optimizer_of(problem.start, 4)
        for _ in range(4):
            optimizer.step(lambda w, replica, problem=problem: problem(w, 0))
        points.append(to_host(optimizer.parameters))
    np.testing.assert_allclose(*points, rtol=1e-9)
