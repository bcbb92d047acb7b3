"""What programs do around an optimizer: accumulate, autocast, compile, average weights, add parameters, train two."""

import copy
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint

from qnewton_mpi.errors import UserError
from qnewton_mpi.torch import QuasiNewton

pytestmark = pytest.mark.slow

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
Y = (X[:, :1] > 0).float() * X[:, 1:2]
OPTIONS = {"samples": 16, "replicas_per_rank": 4}


def perceptron():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def squares(model):
    return lambda x, y: ((model(x) - y) ** 2).mean()


def losses_of(model, optimizer, steps=10):
    return [optimizer.step(squares(model), X, Y) for _ in range(steps)]


def test_parameters_added_before_the_first_step_are_as_from_the_start():
    whole = perceptron()
    expected = losses_of(whole, QuasiNewton(whole.parameters(), **OPTIONS))
    parts = perceptron()
    optimizer = QuasiNewton(parts[0].parameters(), **OPTIONS)
    optimizer.add_param_group({"params": parts[2].parameters()})
    assert losses_of(parts, optimizer) == expected
    with pytest.raises(UserError, match="after the first step: build another optimizer"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert np.isfinite(losses_of(parts, optimizer)).all()


@pytest.mark.parametrize("kind", ["there already", "no leaf", "float64", "with betas"])
def test_a_group_that_cannot_be_added_changes_nothing(kind):
    model, again = perceptron(), perceptron()
    optimizer = QuasiNewton(model.parameters(), **OPTIONS)
    new = torch.nn.Parameter(torch.ones(2))
    group = {
        "there already": {"params": [model[0].weight]},
        "no leaf": {"params": [new * 2]},
        "float64": {"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]},
        "with betas": {"params": [new], "betas": (0.9, 0.99)},
    }[kind]
    with pytest.raises(UserError) as error:
        optimizer.add_param_group(group)
    assert "\n" not in str(error.value)
    assert len(optimizer.param_groups) == 1
    assert losses_of(model, optimizer) == losses_of(again, QuasiNewton(again.parameters(), **OPTIONS))


def test_two_optimizers_in_one_program_leave_each_other_alone():
    """One after the other and in turn, as a generator's and a critic's: the same numbers."""

    def pair():
        return [(model, QuasiNewton(model.parameters(), **OPTIONS)) for model in (perceptron(), perceptron().double())]

    def loss(model, other):
        dtype = next(model.parameters()).dtype
        goal = other(X.to(next(other.parameters()).dtype)).detach().to(dtype)
        return lambda x, y, t: ((model(x.to(dtype)) - y - t) ** 2).mean(), (X, Y, goal)

    runs = []
    for together in (True, False):
        (first, one), (second, two) = pair()
        fixed = copy.deepcopy(first), copy.deepcopy(second)
        found = [], []
        turns = [(0, 1)] * 6 if together else [(0,)] * 6 + [(1,)] * 6
        for turn in turns:
            for which in turn:
                model, optimizer = ((first, one), (second, two))[which]
                value, batch = loss(model, fixed[1 - which])
                found[which].append(optimizer.step(value, *batch))
        runs.append(found)
    assert runs[0] == runs[1]


def test_a_closure_over_parts_of_the_batch_is_the_whole():
    """Gradients accumulated in the closure: the same steps, the curvature measured on all parts."""
    runs = []
    for parts in (1, 4):
        model = perceptron().double()
        optimizer = QuasiNewton(model.parameters(), **OPTIONS)

        def closure(model=model, optimizer=optimizer, parts=parts):
            total = 0.0
            x, y = optimizer.share(X.double(), Y.double())
            for piece, answers in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = squares(model)(piece, answers) / parts
                loss.backward()
                total += loss.item()
            return total

        runs.append([optimizer.step(closure) for _ in range(15)])
        assert optimizer.core.repeats
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-6)


@pytest.mark.parametrize("by", ["rows", "closure"])
def test_autocast_to_bfloat16(by):
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), **OPTIONS)

    def value(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(x)
        assert found.dtype == torch.bfloat16
        return ((found.float() - y) ** 2).mean()

    def closure():
        loss = value(*optimizer.share(X, Y))
        loss.backward()
        return loss

    losses = [optimizer.step(closure) if by == "closure" else optimizer.step(value, X, Y) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_gradient_scaler_is_told():
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=64, method="momentum")
    scaler = torch.amp.GradScaler("cpu")
    loss = squares(model)(X, Y)
    scaler.scale(loss).backward()
    for arguments in ([], [lambda: loss]):
        with pytest.raises(UserError, match=r"GradScaler has scaled the loss: leave it out.*bfloat16") as error:
            scaler.step(optimizer, *arguments)
        assert "\n" not in str(error.value)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    optimizer.zero_grad()
    loss = squares(model)(X, Y)
    disabled.scale(loss).backward()
    assert disabled.step(optimizer, lambda: loss) == pytest.approx(loss.item())


def test_averages_of_weights():
    """AveragedModel, by a mean (SWA, with SWALR) and a running mean: of the parameters after each step, in copies."""
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), **OPTIONS)
    swa = torch.optim.swa_utils.AveragedModel(model)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.5, anneal_epochs=4)
    seen, running = [], None
    for _ in range(6):
        optimizer.step(squares(model), X, Y)
        seen.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        running = seen[-1] if running is None else 0.5 * (running + seen[-1])
        for average in (swa, ema):
            average.update_parameters(model)
        schedule.step()
    for average, expected in ((swa, torch.stack(seen).mean(0)), (ema, running)):
        torch.testing.assert_close(torch.nn.utils.parameters_to_vector(average.module.parameters()).detach(), expected)
    assert optimizer.core.rate_factor == pytest.approx(0.5)


@pytest.mark.filterwarnings("ignore:Using `torch.compile", "ignore:.*torch.jit.script", "ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_models(backend):
    """The steps of the model that is not; the function of rows and the closure alike."""
    if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        pytest.skip("inductor needs a C++ compiler")
    runs = []
    for compiled in (False, True):
        model = perceptron()
        called = torch.compile(model, backend=backend) if compiled else model
        optimizer = QuasiNewton(model.parameters(), **OPTIONS)

        def closure(called=called, optimizer=optimizer):
            loss = squares(called)(*optimizer.share(X, Y))
            loss.backward()
            return loss

        runs.append([optimizer.step(closure) for _ in range(5)] + losses_of(called, optimizer, 5))
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-4)


def test_a_distributed_checkpoint_holds_the_gathered_state(tmp_path):
    """By one rank for all, without a process group; the new optimizer's own state is what is loaded into."""

    def state_of(model, optimizer):
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(gather=True)}

    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), **OPTIONS)
    losses_of(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        torch.distributed.checkpoint.save(state_of(model, optimizer), checkpoint_id=tmp_path / "state")
        expected = losses_of(model, optimizer)
        again = perceptron()
        other = QuasiNewton(again.parameters(), **OPTIONS)
        state = state_of(again, other)
        torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path / "state")
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    assert losses_of(again, other) == expected
