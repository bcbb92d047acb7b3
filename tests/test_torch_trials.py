"""Losses that the PyTorch adapter evaluates along a step: whose they are, and what they leave behind."""

import threading
import warnings

import numpy as np
import pytest
import torch
from torch_models import X, Y, perceptron, prepared

from qnewton_mpi.adapter.surroundings import without_traces
from qnewton_mpi.torch import QuasiNewton


def test_a_trial_is_a_loss_alone_and_leaves_no_trace():
    """χ is measured by losses, without a backward pass; gradients, random numbers and buffers are what they were."""
    torch.manual_seed(3)
    seen, passes = [], []

    def run(method):
        model = perceptron(torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
        optimizer, closure = prepared(model, method=method)
        torch.manual_seed(7)

        def watched():
            loss = closure()
            passes.append(loss.requires_grad)
            return loss

        optimizer.step(watched)
        buffers = [b.clone() for b in model.buffers()]
        return [p.grad.clone() for p in model.parameters()], torch.rand(3), buffers, optimizer.core

    *seen, core = run("kronecker")
    assert core.repeats
    assert core.trials >= 2 * 4
    assert passes.count(True) == core.evaluations == 4
    assert passes.count(False) == core.trials
    passes.clear()
    *expected, _ = run("adam")  # which evaluates once
    for ours, theirs in zip(seen, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_a_closure_that_draws_anew_is_not_asked_again():
    """What has no second value: the curvature is then of successive gradients."""
    model, random, calls = perceptron(), np.random.default_rng(0), []
    optimizer = QuasiNewton(model.parameters(), samples=32, replicas_per_rank=4)

    def closure():
        rows = torch.from_numpy(random.integers(0, len(X), 128))
        x, y = optimizer.share(X[rows], Y[rows])
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        calls.append(optimizer.core.steps)
        return loss

    losses = [optimizer.step(closure) for _ in range(60)]
    assert not optimizer.core.repeats
    assert [calls.count(step) for step in (1, 2, 60)] == [4 + 4, 4, 4]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])


def clip(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def scale(model):
    for p in model.parameters():
        p.grad *= 3


def decay(model):
    for p in model.parameters():
        p.grad += 0.1 * p.detach()


@pytest.mark.parametrize("change", [clip, scale, decay])
def test_gradients_that_are_not_of_the_loss(change):
    """They are told once at most, and the loss falls all the same."""
    model = perceptron()
    optimizer, closure = prepared(model)

    def changed():
        loss = closure()
        if loss.requires_grad:
            change(model)
        return loss

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        losses = [optimizer.step(changed) for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.7 * losses[0]
    messages = [str(warning.message) for warning in told]
    assert sum("as its gradient says" in message for message in messages) == (0 if optimizer.core.repeats else 1)


def test_a_trial_leaves_what_is_not_its_own_alone():
    """The gradients of another model in the closure; running statistics, without `module` too."""
    model, other = perceptron(torch.nn.BatchNorm1d(8)), torch.nn.Linear(5, 1)
    optimizer, closure = prepared(model, module=None)
    second = torch.optim.SGD(other.parameters(), lr=0.1)

    def both():
        second.zero_grad()
        other(X[:64]).square().mean().backward()
        return closure()

    for step in range(1, 13):
        optimizer.step(both)
        assert model[1].num_batches_tracked == 4 * step
        assert all(p.grad.abs().sum() > 0 for p in other.parameters())
    assert optimizer.core.trials > 12


def test_batches_drawn_anew_at_a_head_of_zeros():
    """Any batch has the same loss at the first step; later measurements tell."""
    model, random = perceptron(), np.random.default_rng(0)
    torch.nn.init.zeros_(model[-1].weight)
    torch.nn.init.zeros_(model[-1].bias)
    optimizer = QuasiNewton(model.parameters(), samples=32, replicas_per_rank=4)

    def closure():
        rows = torch.from_numpy(random.integers(0, len(X), 128))
        x, y = optimizer.share(X[rows], (X[rows, :1] > 0).float())
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x), y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = [optimizer.step(closure) for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.5 * losses[0]


@pytest.mark.parametrize("warm_up", [lambda step: min(1.0, step / 5), lambda step: min(1.0, 1e-9 * 100**step)])
def test_a_warm_up_from_next_to_zero(warm_up):
    """A step of no length measures nothing, and does not end the measuring."""
    optimizer, closure = prepared(perceptron())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    losses = []
    for _ in range(60):
        losses.append(optimizer.step(closure))
        scheduler.step()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.core.repeats


@pytest.mark.parametrize("factor", [1e-6, 1e10])
def test_units_of_the_loss(factor):
    """However short or long the first trial is then, the losses are found to repeat."""
    model = perceptron()
    optimizer, _ = prepared(model)
    other, plain = prepared(perceptron())

    def in_other_units():
        x, y = optimizer.share(X[:64], Y[:64])
        loss = factor * ((model(x) - y) ** 2).mean()
        loss.backward()
        return loss

    ours = [optimizer.step(in_other_units) / factor for _ in range(20)]
    assert optimizer.core.repeats
    np.testing.assert_allclose(ours, [other.step(plain) for _ in range(20)], rtol=1e-2)


@pytest.mark.parametrize("kind", ["absolute", "hinge"])
def test_losses_with_kinks(kind):
    """They are of their gradients, quadratic nowhere: nothing is told."""
    model = torch.nn.Linear(5, 1)
    optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4)

    def closure():
        x, y = optimizer.share(X[:64], Y[:64])
        signs = 2 * (y > 0).float() - 1
        loss = ((model(x) - y).abs() if kind == "absolute" else torch.relu(1 - model(x) * signs)).mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(60)]
    assert optimizer.core.repeats
    assert losses[-1] < losses[0]


def test_derivatives_in_the_loss():
    """A trial has a graph where it is needed, and then measures as any other."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4)
    points = torch.linspace(0, 1, 64)[:, None]

    def closure():
        x = optimizer.share(points).clone().requires_grad_()
        slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        loss = ((slope - torch.cos(3 * x)) ** 2).mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(60)]
    assert optimizer.core.repeats
    assert losses[-1] < 0.1 * losses[0]


def test_a_closure_that_fails_without_its_gradients_is_told():
    model = perceptron()
    optimizer, closure = prepared(model)

    def picky():
        loss = closure()
        assert model[0].weight.grad is not None, "no gradient"
        return loss

    with pytest.warns(UserWarning, match=r"cannot be called again for its loss alone \(AssertionError: no gradient"):
        optimizer.step(picky)
    assert not optimizer.core.repeats


def test_backward_in_another_thread_goes_on_during_a_trial():
    other = torch.nn.Linear(3, 1)
    with without_traces(False, None):
        worker = threading.Thread(target=lambda: other(torch.ones(1, 3)).sum().backward())
        worker.start()
        worker.join()
    assert other.weight.grad is not None


def test_one_replica_a_step_without_a_second_evaluation():
    """SGD's steps are PyTorch's."""
    models = perceptron(), perceptron()
    optimizer = QuasiNewton(models[0].parameters(), samples=64, method="sgd", lr=0.1)
    peer = torch.optim.SGD(models[1].parameters(), lr=0.1)
    for _ in range(20):
        for model, stepper in zip(models, (optimizer, peer), strict=True):
            stepper.zero_grad()
            loss = ((model(X[:64]) - Y[:64]) ** 2).mean()
            loss.backward()
            stepper.step(lambda: loss)  # noqa: B023

    def closure():  # without zero_grad
        loss = ((models[0](X[:64]) - Y[:64]) ** 2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    peer.zero_grad()
    ((models[1](X[:64]) - Y[:64]) ** 2).mean().backward()
    peer.step()
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))


def test_probes_repeat_random_numbers_and_leave_statistics():
    """With the rate 0, to rounding, `deflated` leaves the same statistics behind as as many plain evaluations."""
    models = [perceptron(torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3)) for _ in range(2)]
    optimizer, closure = prepared(models[0], method="deflated", lr=1e-30, newton_rate=1e-30, probe_every=1)
    torch.manual_seed(7)
    losses = [optimizer.step(closure) for _ in range(3)]
    torch.manual_seed(7)
    expected = []
    with torch.no_grad():
        for _ in range(3):
            parts = [((models[1](X[k : k + 16]) - Y[k : k + 16]) ** 2).mean() for k in range(0, 64, 16)]
            expected.append(float(torch.stack(parts).double().mean()))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    torch.testing.assert_close(models[0][1].state_dict()["running_var"], models[1][1].state_dict()["running_var"])
    assert models[0][1].num_batches_tracked == 12
