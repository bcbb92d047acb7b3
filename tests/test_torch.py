"""The PyTorch adapter on one rank, several replicas; under mpiexec it is in tests/mpi/test_torch.py."""

import numpy as np
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


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls(method):
    optimizer, closure = prepared(perceptron(), method=method)
    losses = [optimizer.step(closure) for _ in range(30)]
    assert losses[-1] < 0.95 * losses[0]


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


def test_schedulers_scale_the_rate():
    optimizer, closure = prepared(perceptron())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    rates = []
    for _ in range(9):
        optimizer.step(closure)
        scheduler.step()
        rates.append(optimizer.core.rate_factor)
    assert rates == [1] * 3 + [0.5] * 3 + [0.25] * 3


@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_state_goes_on_bitwise(tmp_path, method, exchange):
    model = perceptron()
    optimizer, closure = prepared(model, method=method, exchange=exchange)
    for _ in range(12):
        optimizer.step(closure)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    expected = [optimizer.step(closure) for _ in range(8)]
    torch.manual_seed(5)
    again = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer, closure = prepared(again, method=method, exchange=exchange)
    states = torch.load(tmp_path / "state.pt")
    optimizer.load_state_dict(states[1])
    again.load_state_dict(states[0])  # in either order
    assert [optimizer.step(closure) for _ in range(8)] == expected


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


def fails(match, call):
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_bad_use_is_told():
    model = perceptron()
    several = {"samples": 16, "replicas_per_rank": 4}
    fails("no parameters", lambda: QuasiNewton([], **several))
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

    optimizer, closure = prepared(model)
    fails("needs the loss", optimizer.step)
    fails("built|build another", lambda: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}))
    loss = ((model(X) - Y) ** 2).mean()
    loss.backward()
    fails("no parameter has a gradient", lambda: optimizer.step(lambda: loss))

    def whole():
        value = ((model(X) - Y) ** 2).mean()
        value.backward()
        return value

    fails(r"optimizer\.share", lambda: optimizer.step(whole))
    fails("drop_last", lambda: optimizer.share(X[:63]))
    groups = [{"params": [model[0].weight], "lr": 1.0}, {"params": [model[0].bias], "lr": 0.1}]
    fails("all must have the same", lambda: QuasiNewton(groups, **several).step(closure))
    state = optimizer.state_dict()
    fails("every rank saves", lambda: prepared(model, method="fisher")[0].load_state_dict(state))
    other = torch.nn.Linear(5, 1)
    fails("does not fit this model", lambda: prepared(other)[0].load_state_dict(state))


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
