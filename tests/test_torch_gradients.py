"""The gradients of a step in PyTorch are those that PyTorch computes, however a program clears and changes them."""

import numpy as np
import pytest
import torch
from torch_models import X, Y, fails, not_cleared_in_the_closure, once, perceptron, prepared, squares

from qnewton_mpi.torch import QuasiNewton


def cleared_before(model, optimizer):
    optimizer.zero_grad()
    loss = squares(model)
    loss.backward()
    once(optimizer, loss)


def cleared_to_zeros(model, optimizer):
    optimizer.zero_grad(set_to_none=False)
    loss = squares(model)
    loss.backward()
    once(optimizer, loss)


def never_cleared(model, optimizer):
    loss = squares(model)
    loss.backward()
    once(optimizer, loss)


def cleared_in_the_closure(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = squares(model)
        loss.backward()
        return loss

    optimizer.step(closure)


def accumulated(model, optimizer):
    optimizer.zero_grad()
    for k in range(4):
        loss = squares(model, slice(16 * k, 16 * k + 16)) / 4
        loss.backward()
    once(optimizer, loss)


def accumulated_up_to_the_closure(model, optimizer):
    optimizer.zero_grad()
    for k in range(3):
        (squares(model, slice(16 * k, 16 * k + 16)) / 4).backward()

    def closure():
        loss = squares(model, slice(48, 64)) / 4
        loss.backward()
        return loss

    optimizer.step(closure)


def clipped(model, optimizer):
    optimizer.zero_grad()
    loss = squares(model)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    once(optimizer, loss)


def scaled(model, optimizer):
    optimizer.zero_grad()
    loss = squares(model)
    (1024 * loss).backward()
    for p in model.parameters():
        p.grad.mul_(1 / 1024)
    once(optimizer, loss)


FLOWS = [
    cleared_before,
    cleared_to_zeros,
    never_cleared,
    cleared_in_the_closure,
    not_cleared_in_the_closure,
    accumulated,
    accumulated_up_to_the_closure,
    clipped,
    scaled,
]


@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
@pytest.mark.parametrize("flow", FLOWS)
def test_the_gradients_of_a_step_are_pytorchs(flow, exchange):
    models = perceptron(), perceptron()
    optimizers = (
        QuasiNewton(models[0].parameters(), samples=64, method="sgd", lr=0.1, exchange=exchange),
        torch.optim.SGD(models[1].parameters(), lr=0.1),
    )
    for _ in range(10):
        for model, optimizer in zip(models, optimizers, strict=True):
            flow(model, optimizer)
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))


class Renormed(torch.nn.Linear):
    """Bounds the norms of its rows at each call, in place or by other memory."""

    in_place = False

    def forward(self, x):
        bounded = torch.renorm(self.weight.data, 2, 0, 0.3)
        if self.in_place:
            self.weight.data.copy_(bounded)
        else:
            self.weight.data = bounded
        return super().forward(x)


@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
@pytest.mark.parametrize("in_place", [True, False])
def test_layers_may_change_their_weights_when_called(in_place, exchange):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(torch.nn.Sequential(Renormed(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)))
        models[-1][0].in_place = in_place
    optimizer = QuasiNewton(models[0].parameters(), samples=64, method="sgd", lr=0.1, exchange=exchange)
    peer = torch.optim.SGD(models[1].parameters(), lr=0.1)
    for _ in range(10):
        not_cleared_in_the_closure(models[0], optimizer)
        not_cleared_in_the_closure(models[1], peer)
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))


def test_gradients_that_no_replica_owns_are_told():
    """They cannot be added to those of several replicas, nor to those at other parameters."""
    for options in (
        {"method": "sgd"},
        {"method": "sgd", "lr": "auto"},
        {"method": "deflated"},
        {"method": "multisecant"},
    ):
        model = perceptron()
        optimizer, closure = prepared(model, **options)
        optimizer.step(closure)
        optimizer.step(closure)  # those of a step before do not count
        squares(model).backward()
        fails("gradients from before the step", lambda: optimizer.step(closure))  # noqa: B023
        optimizer.zero_grad(set_to_none=False)
        optimizer.step(closure)


def test_a_closure_without_backward_is_told():
    for options in ({"samples": 64, "method": "sgd"}, {"samples": 16, "method": "sgd", "replicas_per_rank": 4}):
        model = perceptron()
        optimizer = QuasiNewton(model.parameters(), **options)
        rows = len(optimizer.core.exchange.local)

        def closure(backward=True, model=model, optimizer=optimizer, rows=rows):
            x, y = optimizer.share(X[: 16 * rows], Y[: 16 * rows])
            loss = ((model(x) - y) ** 2).mean()
            if backward:
                loss.backward()
            return loss

        optimizer.step(closure)
        before = [p.detach().clone() for p in model.parameters()]
        fails("no parameter has a gradient", lambda: optimizer.step(lambda: closure(backward=False)))  # noqa: B023
        torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
        optimizer.step(closure)
        assert optimizer.core.steps == 2


@pytest.mark.parametrize("value", [None, "much", torch.ones(2), torch.tensor(1j), [1.0, 2.0]])
def test_a_loss_that_is_no_number_is_told(value):
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=64, method="sgd")
    squares(model).backward()
    fails("one number", lambda: optimizer.step(lambda: value))
    fails("no parameter has a gradient", lambda: optimizer.step(lambda: 1.0))  # they went with the step that failed
    squares(model).backward()
    fails("loss nan", lambda: optimizer.step(lambda: torch.tensor(float("nan"))))


def test_a_closure_that_does_not_repeat_itself_is_told():
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4, method="deflated", module=model)
    random = np.random.default_rng(0)

    def closure():
        rows = random.choice(128, 64)
        x, y = optimizer.share(X[rows], Y[rows])
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        return loss

    fails("the same batch at each call", lambda: optimizer.step(closure))


def test_sparse_gradients_are_told():
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4, sparse=True), torch.nn.Flatten(), torch.nn.Linear(4, 1))
    optimizer = QuasiNewton(model.parameters(), samples=4, replicas_per_rank=2)

    def closure():
        loss = model(optimizer.share(torch.arange(8)).reshape(-1, 1)).mean()
        loss.backward()
        return loss

    fails("sparse=False", lambda: optimizer.step(closure))
