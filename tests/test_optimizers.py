"""What every method does: steps, figures, counts, errors that leave all as it was."""

import numpy as np
import pytest
from problems import LIBRARIES, REPLICAS, SIZE, VARIANTS, Listing, Quadratic, Together, make_optimizer, trajectory

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS, BlockBFGS
from qnewton_mpi.core.state import objects
from qnewton_mpi.errors import NonFiniteGradientError


@pytest.mark.parametrize("variant", VARIANTS)
def test_minimises_a_quadratic(communicator, variant):
    problem = Quadratic(SIZE, REPLICAS)
    if VARIANTS[variant][0] == "multisecant":
        # Different minima are noise in G, which the formula takes for curvature: it may well diverge then.
        problem._centres[:] = problem._centres[0]
    optimum = problem._centres.mean(axis=0)
    own = {} if VARIANTS[variant][0] in ("kronecker", "fisher") else {"lr": 0.05}
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS, **own)
    trajectory(optimizer, problem, 400)
    start, end = (np.linalg.norm(w - optimum) for w in (problem.start, optimizer.parameters))
    assert end < 0.5 * start


@pytest.mark.parametrize("variant", VARIANTS)
def test_figures_are_those_announced(communicator, variant):
    problem = Quadratic(SIZE, REPLICAS)
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS)
    before = np.array(optimizer.parameters)
    figures = optimizer.step(problem)
    assert set(figures) == set(optimizer.figure_names)
    step = np.array(optimizer.parameters) - before
    losses, gradients = zip(*(problem(before, i) for i in range(REPLICAS)), strict=True)
    mean = np.mean(gradients, axis=0)
    if variant in ("independent", "random"):  # the replicas are spread from the start
        return
    assert figures["loss"] == pytest.approx(np.mean(losses))
    assert figures["gradient_norm"] == pytest.approx(np.linalg.norm(mean))
    assert figures["step_norm"] == pytest.approx(np.linalg.norm(step))
    assert figures["cosine"] == pytest.approx(-step @ mean / np.linalg.norm(step) / np.linalg.norm(mean))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [Quadratic, Listing, Together])
def test_core_needs_no_more_than_the_array_api(communicator, kind, variant, dtype, library):
    points = []
    for xp, device in ((np, None), LIBRARIES[library]):
        problem = kind(SIZE, REPLICAS, dtype=getattr(xp, dtype), xp=xp, device=device)
        optimizer = make_optimizer(variant, problem, communicator, REPLICAS)
        assert type(optimizer.parameters) is type(problem.start)
        points.append(trajectory(optimizer, problem, 5))
        assert device in (None, optimizer.parameters.device)
        assert optimizer.parameters.dtype == problem.start.dtype
    np.testing.assert_allclose(*points, rtol=1e-12 if dtype == "float64" else 1e-4)


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("variant", ["kronecker", "fisher", "sgd-auto", "nesterov-auto", "deflated-auto"])
def test_a_schedule_scales_the_step_whatever_bounds_it(communicator, variant, share):
    problem = Quadratic(SIZE, REPLICAS)
    first, second = (make_optimizer(variant, problem, communicator, REPLICAS) for _ in range(2))
    for _ in range(5):
        first.step(problem), second.step(problem)
    before, second.rate_factor = np.array(first.parameters), share
    first.step(problem), second.step(problem)
    whole, part = (np.array(optimizer.parameters) - before for optimizer in (first, second))
    np.testing.assert_allclose(part, share * whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offset", [-1e3, 0.0])
@pytest.mark.parametrize("variant", ["sgd-auto", "nesterov-auto", "deflated-auto", "fisher-auto", "kronecker"])
def test_auto_rate_of_a_loss_that_is_negative_or_zero_is_not_negative(communicator, variant, offset):
    """A loss that climbs from below zero, or is zero all along, must not turn the steps round, nor divide by zero."""
    problem, calls = Quadratic(SIZE, REPLICAS), []
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS)

    def climbing(w, replica):
        calls.append(replica)
        return offset * (1 - 1e-6 * len(calls)), problem(w, replica)[1]

    for _ in range(5):
        figures = optimizer.step(climbing)
        assert figures["rate"] >= 0
        assert offset == 0 or figures["rate"] > 0
    assert np.isfinite(optimizer.parameters).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_counted(communicator, variant):
    problem, calls = Quadratic(SIZE, REPLICAS), []
    optimizer = make_optimizer(variant, problem, communicator, REPLICAS)
    trajectory(optimizer, lambda w, i: (calls.append(i), problem(w, i))[1], 5)
    probes = {"deflated": 3, "deflated-auto": 8, "nesterov-auto": 8, "sgd-auto": 6}.get(variant, 0)
    if VARIANTS[variant][0] in ("kronecker", "fisher"):
        probes = len(calls) // REPLICAS - 5
        assert 6 <= probes <= 5 + 13  # the same point again and at least one more at first, then one a step
    assert optimizer.evaluations == len(calls) == REPLICAS * (5 + probes)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_names_step_and_replica_and_changes_nothing(communicator, value, where):
    problem = Quadratic(SIZE, REPLICAS)
    optimizer = make_optimizer("fisher", problem, communicator, REPLICAS)
    optimizer.step(problem)
    before = np.array(optimizer.parameters)

    def poisoned(w, replica):
        loss, gradient = problem(w, replica)
        if replica == 4:
            if where == "loss":
                return value, gradient
            gradient[3] = value
        return loss, gradient

    with pytest.raises(NonFiniteGradientError, match="step 2: replica 4") as caught:
        optimizer.step(poisoned)
    assert (caught.value.step, caught.value.replica) == (2, 4)
    np.testing.assert_array_equal(optimizer.parameters, before)


def everything(optimizer):
    """All numbers and arrays that an optimizer, its parts and its exchange have, but for those to be written to."""
    found = {}
    for k, thing in enumerate([*objects(optimizer), optimizer.exchange]):
        for name, value in vars(thing).items():
            if isinstance(value, (bool, int, float)):
                found[k, name] = value
            elif isinstance(value, np.ndarray) and name not in ("gradients", "spare"):
                found[k, name] = value.copy()
    return found


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("variant", [*VARIANTS, "block BFGS"])
def test_a_step_that_raises_changes_nothing(communicator, variant, step):
    """Whichever of its evaluations does, those of probes included; and the run goes on as if nothing had been."""

    def new():
        if variant == "block BFGS":
            return BlockBFGS(BlockBFGS.settings_type(), problem.start, exchange(communicator, REPLICAS, SIZE))
        return make_optimizer(variant, problem, communicator, REPLICAS)

    problem, exchange = Quadratic(SIZE, REPLICAS), EXCHANGES["allgather"]
    if variant == "block BFGS":
        problem._centres[:] = problem._centres[0]
    optimizer, undisturbed = new(), new()
    trajectory(optimizer, problem, step - 1)
    before, calls = everything(optimizer), []
    expected = trajectory(undisturbed, lambda w, i: (calls.append(undisturbed.steps), problem(w, i))[1], step + 3)
    for last in range(calls.count(step)):
        made = []

        def fails(w, replica, made=made, last=last):
            made.append(replica)
            if len(made) > last:
                raise KeyError(replica)
            return problem(w, replica)

        with pytest.raises(KeyError):
            optimizer.step(fails)
        after = everything(optimizer)
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=str(name))
    np.testing.assert_array_equal(trajectory(optimizer, problem, 4), expected[step - 1 :])


def test_every_method_is_covered():
    assert {method for method, _ in VARIANTS.values()} == set(OPTIMIZERS)
