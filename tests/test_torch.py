"""The PyTorch adapter on one rank, several replicas; under mpiexec it is in tests/mpi/test_torch.py."""

import pytest
import torch
from torch_models import METHODS, X, Y, fails, perceptron, prepared

from qnewton_mpi.torch import QuasiNewton


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls(method):
    optimizer, closure = prepared(perceptron(), method=method)
    losses = [optimizer.step(closure) for _ in range(30)]
    assert losses[-1] < 0.95 * losses[0]


def test_schedulers_scale_the_rate():
    optimizer, closure = prepared(perceptron())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    rates = []
    for _ in range(9):
        optimizer.step(closure)
        scheduler.step()
        rates.append(optimizer.core.rate_factor)
    assert rates == [1] * 3 + [0.5] * 3 + [0.25] * 3


def test_bad_use_is_told():
    model = perceptron()
    several = {"samples": 16, "replicas_per_rank": 4}
    fails("empty parameter list", lambda: QuasiNewton([], **several))
    fails("start more ranks", lambda: QuasiNewton(model.parameters(), samples=16))
    alone = {"samples": 16, "method": "sgd", "lr": "auto", "module": model}
    fails("lr=auto, needs 2 replicas", lambda: QuasiNewton(model.parameters(), **alone))
    fails("must be one of", lambda: QuasiNewton(model.parameters(), method="newton", **several))
    fails("for arrays on GPUs", lambda: QuasiNewton(model.parameters(), transport="nccl", **several))
    fails("unknown option 'dampening'", lambda: QuasiNewton(model.parameters(), dampening=1, **several))
    fails("pass module=model", lambda: QuasiNewton(model.parameters(), method="deflated", **several))
    fails("float16", lambda: QuasiNewton(perceptron().half().parameters(), **several))
    mixed = torch.nn.ModuleList([perceptron(), perceptron().double()])
    fails("dtypes torch.float32, torch.float64", lambda: QuasiNewton(mixed.parameters(), **several))
    fails("frozen", lambda: QuasiNewton(perceptron().requires_grad_(False).parameters(), **several))

    optimizer, _ = prepared(model)
    fails("needs the loss", optimizer.step)
    loss = ((model(X) - Y) ** 2).mean()
    fails("no parameter has a gradient", lambda: optimizer.step(lambda: loss))
    loss.backward()
    fails("gradients from before the step", lambda: optimizer.step(lambda: loss))
    optimizer.zero_grad()

    def whole():
        value = ((model(X) - Y) ** 2).mean()
        value.backward()
        return value

    fails(r"optimizer\.share", lambda: optimizer.step(whole))
    fails("drop_last", lambda: optimizer.share(X[:63]))
    state = optimizer.state_dict()
    fails("of method 'Kronecker', this is 'Fisher'", lambda: prepared(model, method="fisher")[0].load_state_dict(state))
    other = torch.nn.Linear(5, 1)
    fails("does not fit this model", lambda: prepared(other)[0].load_state_dict(state))


@pytest.mark.parametrize(("key", "value"), [("betas", (0.9, 0.99)), ("momentum", 0.9), ("damping", 0.1), (3, 4)])
def test_unknown_keys_of_groups_are_told(key, value):
    model = perceptron()
    fails("unknown key", lambda: QuasiNewton([{"params": model.parameters(), key: value}], samples=64, method="sgd"))
    optimizer, closure = prepared(model)
    optimizer.step(closure)
    optimizer.param_groups[0][key] = value
    fails(f"unknown key '{key}'", lambda: optimizer.step(closure))
    del optimizer.param_groups[0][key]
    optimizer.step(closure)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), None, "auto", torch.ones(2)])
def test_rates_of_groups_that_are_none_are_told(rate):
    optimizer, closure = prepared(perceptron())
    optimizer.param_groups[0]["lr"] = rate
    fails("a group has lr=", lambda: optimizer.step(closure))


def test_a_rate_of_zero_or_in_a_tensor():
    for method in METHODS:
        model = perceptron()
        optimizer, closure = prepared(model, method=method)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
        first = optimizer.step(closure)
        assert optimizer.step(closure) == pytest.approx(first)
        torch.testing.assert_close(list(model.parameters()), list(perceptron().parameters()), rtol=0, atol=0)
        optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
        optimizer.step(closure)
        assert optimizer.step(closure) != first


def test_every_scheduler_steps():
    schedulers = torch.optim.lr_scheduler
    for schedule in (
        lambda o: schedulers.LambdaLR(o, lambda k: 0.9**k),
        lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.9),
        lambda o: schedulers.MultiStepLR(o, [1, 2]),
        lambda o: schedulers.ConstantLR(o),
        lambda o: schedulers.LinearLR(o),
        lambda o: schedulers.ExponentialLR(o, 0.9),
        lambda o: schedulers.PolynomialLR(o, 3),
        lambda o: schedulers.CosineAnnealingLR(o, 3),
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
        lambda o: schedulers.CyclicLR(o, 0.1, 1.0, cycle_momentum=False),
        lambda o: schedulers.OneCycleLR(o, 1.0, 9, cycle_momentum=False),
        lambda o: schedulers.SequentialLR(o, [schedulers.LinearLR(o), schedulers.ExponentialLR(o, 0.9)], [2]),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.1),
    ):
        optimizer, closure = prepared(perceptron())
        scheduler = schedule(optimizer)
        for _ in range(3):
            optimizer.step(closure)
            scheduler.step()
