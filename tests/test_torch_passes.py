"""Gradients accumulated before a step, or clipped in the closure: whose they are, and the curvature beside them."""

import warnings

import numpy as np
import pytest
import torch

from qnewton_mpi.core.rate import LossTrend
from qnewton_mpi.errors import UserError
from qnewton_mpi.torch import QuasiNewton

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = (X[:, :1] > 0).double() * X[:, 1:2]


def perceptron():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()


def squares(model):
    return lambda x, y: ((model(x) - y) ** 2).mean()


def accumulated(model, optimizer, parts, then=lambda: None):
    """Do a step of either kind of optimizer, the gradients accumulated before it; return its closure's loss."""
    pieces = list(zip(X.chunk(parts), Y.chunk(parts), strict=True))
    for x, y in pieces:
        (squares(model)(x, y) / parts).backward()
    then()
    if isinstance(optimizer, QuasiNewton):
        optimizer.step(lambda: squares(model)(*pieces[-1]))
    else:
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("parts", [4, 8])
def test_passes_before_a_step_are_the_replicas(parts):
    """The steps and the noise of the function of rows; with 8 passes each replica has two."""
    figures = []
    for by in ("rows", "passes"):
        model = perceptron()
        optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4, method="momentum", lr=0.1)
        order = torch.arange(64).reshape(2, 4, 8).transpose(0, 1).reshape(64) if parts == 8 else torch.arange(64)
        for _ in range(5):
            if by == "rows":
                optimizer.step(squares(model), X[order], Y[order])
            else:
                accumulated(model, optimizer, parts)
        names = "gradient_norm", "step_norm", "noise_scale"
        figures.append([optimizer.figures[name] for name in names])
    np.testing.assert_allclose(*figures, rtol=1e-6)


@pytest.mark.parametrize("change", ["clipped", "decayed"])
def test_what_is_made_of_the_sum_counts(change):
    models = perceptron(), perceptron()
    options = {"samples": 16, "replicas_per_rank": 4, "method": "sgd", "lr": 0.1}
    optimizers = QuasiNewton(models[0].parameters(), **options), torch.optim.SGD(models[1].parameters(), lr=0.1)
    for _ in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):

            def then(model=model):
                if change == "clipped":
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                else:
                    for p in model.parameters():
                        p.grad += 0.1 * p.detach()

            accumulated(model, optimizer, 4, then)
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))
    if change == "clipped":
        assert optimizers[0].figures["gradient_norm"] == pytest.approx(0.1, rel=1e-4)


def test_the_curvature_of_accumulated_gradients_is_measured_by_the_last_loss():
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4)
    other = perceptron()
    peer = QuasiNewton(other.parameters(), samples=16, replicas_per_rank=4)
    for _ in range(60):
        accumulated(model, optimizer, 4)
        peer.step(squares(other), X, Y)
    assert optimizer.core.repeats
    assert optimizer.core.trials > 0
    assert squares(model)(X, Y) < 1.2 * squares(other)(X, Y)


def test_a_loss_that_is_not_computed_anew_is_not_taken_for_one():
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4)
    losses = []
    for _ in range(60):
        for x, y in zip(X.chunk(4), Y.chunk(4), strict=True):
            loss = squares(model)(x, y)
            (loss / 4).backward()
        optimizer.step(lambda loss=loss: loss)
        optimizer.zero_grad()
        losses.append(squares(model)(X, Y).item())
    assert not optimizer.core.repeats
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("per_rank", [1, 4])
def test_passes_with_parts_that_are_dropped(per_rank):
    """What was accumulated and cleared, by the optimizer or the model, is forgotten."""
    for clear in ("optimizer", "model"):
        models = perceptron(), perceptron()
        options = {"samples": 16, "replicas_per_rank": per_rank, "method": "sgd", "lr": 0.1}
        optimizers = [QuasiNewton(model.parameters(), **options) for model in models]
        for _ in range(per_rank):
            (7 * squares(models[0])(X, Y)).backward()
        (optimizers[0] if clear == "optimizer" else models[0]).zero_grad()
        for model, optimizer in zip(models, optimizers, strict=True):
            accumulated(model, optimizer, 4)
        torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))


@pytest.mark.parametrize("to_none", [True, False])
def test_a_pass_that_is_cleared_is_none(to_none):
    """As for an example that is to be hard: the closure computes all."""
    runs = []
    for more in (False, True):
        model = perceptron()
        optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4)

        def closure(model=model, optimizer=optimizer):
            loss = squares(model)(*optimizer.share(X, Y))
            loss.backward()
            return loss

        losses = []
        for _ in range(3):
            if more:
                squares(model)(X, Y).backward()
                model.zero_grad(to_none)
            losses.append(optimizer.step(closure))
        runs.append(losses)
    assert runs[0] == runs[1]


def test_passes_that_are_no_replicas_are_told():
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4)
    before = [p.detach().clone() for p in model.parameters()]
    for parts in (1, 3, 6):
        with pytest.raises(UserError, match=rf"of {parts} backward pass\(es\), and 4 replicas") as error:
            accumulated(model, optimizer, parts)
        assert "\n" not in str(error.value)
        optimizer.zero_grad()
    for k in range(4):
        (squares(model)(X, Y) if k else model[2].weight.sum()).backward()
    with pytest.raises(UserError, match=r"has had gradients from 3 of .* from 4") as error:
        optimizer.step(lambda: 1.0)
    optimizer.zero_grad()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    accumulated(model, optimizer, 4)


@pytest.mark.parametrize(("most", "steps"), [(0.01, 100), (1.0, 60), (100.0, 60)])  # the shortest are the slowest
def test_clipping_in_the_closure_leaves_the_curvature_of_the_loss(most, steps):
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4)

    def closure():
        optimizer.zero_grad()
        loss = squares(model)(*optimizer.share(X, Y))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [optimizer.step(closure) for _ in range(steps)]
    assert optimizer.core.repeats
    assert losses[-1] < 0.8 * losses[0]


def test_the_noise_of_a_loss_that_is_told_for_all_replicas():
    """From its distance to the recent ones: the standard error that as many losses of their own tell."""
    random, told, own = np.random.default_rng(0), LossTrend(), LossTrend()
    for _ in range(500):
        losses = 1 + 0.4 * random.standard_normal(4)
        own.add(losses)
        told.add(np.full(4, losses.mean()))
    assert told.error == pytest.approx(own.error, rel=0.3)
