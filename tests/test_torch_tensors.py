"""The parameters of a PyTorch model: frozen, unused, changed, replaced, there twice, empty."""

import numpy as np
import pytest
import torch
from torch_models import METHODS, Y, fails, not_cleared_in_the_closure, perceptron, prepared

from qnewton_mpi.torch import QuasiNewton


@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
def test_parameters_may_be_changed_in_between(exchange):
    model = perceptron()
    optimizer, closure = prepared(model, exchange=exchange)
    optimizer.step(closure)
    for change in (lambda p: p.data.zero_(), lambda p: setattr(p, "data", torch.zeros_like(p))):
        for p in model.parameters():
            change(p)
        loss = optimizer.step(closure)
        assert loss == pytest.approx(float((Y[:64] ** 2).mean()), rel=1e-5)


def test_frozen_and_unused_parameters_stay():
    model = perceptron()
    model[0].bias.requires_grad_(False)
    model.unused = torch.nn.Parameter(torch.ones(3))
    before = [model[0].bias.clone(), model.unused.detach().clone()]
    optimizer, closure = prepared(model)
    model.forward = lambda x: torch.nn.Sequential(*list(model.children()))(x)
    for _ in range(5):
        optimizer.step(closure)
    torch.testing.assert_close([model[0].bias, model.unused.detach()], before, rtol=0, atol=0)


@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_later_rests_until_it_is_not(method, exchange):
    model = perceptron()
    optimizer, closure = prepared(model, method=method, exchange=exchange)
    for _ in range(12):
        optimizer.step(closure)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    frozen, free = [model[0].weight, model[2].bias], [model[0].bias, model[2].weight]
    before = [[p.detach().clone() for p in group] for group in (frozen, free)]
    losses = [optimizer.step(closure) for _ in range(12)]
    torch.testing.assert_close([p.detach() for p in frozen], before[0], rtol=0, atol=0)
    assert losses[-1] < 1.05 * losses[0]
    assert all((p != value).all() for p, value in zip(free, before[1], strict=True))
    model.requires_grad_(True)
    losses = [optimizer.step(closure) for _ in range(12)]
    assert losses[-1] < 1.05 * losses[0]
    assert all((p != value).any() for p, value in zip(frozen, before[0], strict=True))


def test_the_figures_of_a_step_are_of_what_moves():
    model = perceptron()
    optimizer, closure = prepared(model)
    for _ in range(5):
        optimizer.step(closure)
    model[0].requires_grad_(False)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer.step(closure)
    step = torch.nn.utils.parameters_to_vector(model.parameters()) - before
    assert optimizer.figures["step_norm"] == pytest.approx(float(step.detach().norm()), rel=1e-3)


def test_what_is_not_used_in_a_step_rests():
    """As for PyTorch, momentum notwithstanding."""
    model = torch.nn.ModuleList([torch.nn.Linear(5, 1), torch.nn.Linear(5, 1)])
    optimizer = QuasiNewton(model.parameters(), samples=64, method="momentum", lr=0.1)
    for step in range(6):
        used, other = model[step % 2], model[1 - step % 2]
        before = other.weight.detach().clone(), used.weight.detach().clone()
        not_cleared_in_the_closure(used, optimizer)
        assert (other.weight == before[0]).all()
        assert (used.weight != before[1]).all()


def test_what_is_unfrozen_replaced_or_reshaped_is_told():
    def after(change, **options):
        model = perceptron()
        model.unused = torch.nn.Parameter(torch.ones(3))
        model[0].bias.requires_grad_(False)
        model.forward = lambda x: torch.nn.Sequential(*list(model.children()))(x)
        optimizer, closure = prepared(model, **options)
        optimizer.step(closure)
        change(model)
        optimizer.step(closure)

    def replace(model):
        model[2] = torch.nn.Linear(8, 1)

    def assign(model):
        model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)

    def resize(model):
        model[2].bias.data = torch.zeros(8)
        model[2].weight.grad = model[2].bias.grad = None

    def resize_to_what_broadcasts(model):
        model[0].weight.data = torch.zeros(1, 5)

    fails("0.bias was frozen or empty when", lambda: after(lambda model: model.requires_grad_(True)))
    fails("2.weight has been replaced in the model", lambda: after(replace))
    fails(r"parameter \(1, 8\) has been replaced", lambda: after(replace, module=None))
    fails("0.weight has been replaced", lambda: after(assign))
    fails(r"was \(1,\), torch.float32, cpu and is \(8,\)", lambda: after(resize))
    fails(r"was \(8, 5\), torch.float32, cpu and is \(1, 5\)", lambda: after(resize_to_what_broadcasts))
    fails("is .*torch.float64", lambda: after(lambda model: model.double()))
    fails("is .*torch.float16", lambda: after(lambda model: model.half()))
    fails("all parameters are frozen", lambda: after(lambda model: model.requires_grad_(False)))


class Odd(torch.nn.Module):
    """Has parameters without elements and without axes."""

    def __init__(self, *names):
        super().__init__()
        values = {"none": torch.zeros(0), "scale": torch.tensor(0.5), "shift": torch.tensor(0.1)}
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(values[name]))

    def forward(self, x):
        none = self.none.sum() if hasattr(self, "none") else 0
        return self.scale * x[:, :1] + self.shift + none


@pytest.mark.parametrize("names", [("none", "scale", "shift"), ("scale", "none", "shift"), ("scale", "shift")])
@pytest.mark.parametrize("method", METHODS)
def test_parameters_without_elements_or_axes(method, names):
    model = Odd(*names)
    optimizer, closure = prepared(model, method=method)
    losses = [optimizer.step(closure) for _ in range(5)]
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 5
    fails("all parameters are frozen: none that has elements", lambda: prepared(Odd("none")))


def test_a_parameter_that_is_there_twice_is_one():
    models = perceptron(), perceptron()
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = QuasiNewton([*models[0].parameters()] * 2, samples=64, method="sgd", lr=0.1)
    assert optimizer.core.exchange.size == sum(p.numel() for p in models[0].parameters())
    peer = torch.optim.SGD(models[1].parameters(), lr=0.1)
    for _ in range(3):
        not_cleared_in_the_closure(models[0], optimizer)
        not_cleared_in_the_closure(models[1], peer)
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))


def test_parameters_that_cannot_be_used_are_told():
    model = perceptron()
    options = {"samples": 64, "method": "sgd"}
    fails("iterable of Tensors", lambda: QuasiNewton(model[0].weight, **options))
    fails("not iterable", lambda: QuasiNewton(None, **options))
    fails("str", lambda: QuasiNewton(model.state_dict(), **options))
    twice = [{"params": [model[0].weight]}, {"params": [model[0].weight]}]
    fails("more than one parameter group", lambda: QuasiNewton(twice, **options))
    fails("non-leaf", lambda: QuasiNewton([model[0].weight * 2], **options))
    fails("lazy", lambda: QuasiNewton(torch.nn.LazyLinear(3).parameters(), **options))
    whole = torch.zeros(6)
    parts = [torch.nn.Parameter(whole[:4]), torch.nn.Parameter(whole[2:])]
    fails(r"\(4,\) and parameter \(4,\) share memory", lambda: QuasiNewton(parts, **options))
