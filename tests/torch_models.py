"""A perceptron, its data, its optimizer and closure, for the tests of the PyTorch adapter."""

import pytest
import torch

from qnewton_mpi.errors import UserError
from qnewton_mpi.torch import QuasiNewton

METHODS = ["kronecker", "fisher", "deflated", "multisecant", "sgd", "momentum", "adam"]
X = torch.randn(128, 5, generator=torch.Generator().manual_seed(1))
Y = (X[:, :1] > 0).float() * X[:, 1:2]


def perceptron(*middle):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), *middle, torch.nn.Tanh(), torch.nn.Linear(8, 1))


def prepared(model, **options):
    """Return the optimizer of a model and the closure of its squares, by shares."""
    options = {"samples": 16, "replicas_per_rank": 4, "module": model} | options
    optimizer = QuasiNewton(model.parameters(), **options)

    def closure():
        x, y = optimizer.share(X[:64], Y[:64])
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        return loss

    return optimizer, closure


def fails(match, call):
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def squares(model, rows=slice(64)):
    return ((model(X[rows]) - Y[rows]) ** 2).mean()


def once(optimizer, loss):
    """Do a step of either kind of optimizer with the gradients that are there."""
    optimizer.step((lambda: loss) if isinstance(optimizer, QuasiNewton) else None)


def not_cleared_in_the_closure(model, optimizer):
    def closure():
        if not isinstance(optimizer, QuasiNewton):
            optimizer.zero_grad()
        loss = squares(model)
        loss.backward()
        return loss

    optimizer.step(closure)
