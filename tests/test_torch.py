"""The PyTorch adapter on one rank, several replicas; under mpiexec it is in tests/mpi/test_torch.py."""

import copy
import io
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch

from qnewton_mpi.adapter.surroundings import without_traces
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


def test_schedulers_scale_the_rate():
    optimizer, closure = prepared(perceptron())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    rates = []
    for _ in range(9):
        optimizer.step(closure)
        scheduler.step()
        rates.append(optimizer.core.rate_factor)
    assert rates == [1] * 3 + [0.5] * 3 + [0.25] * 3


@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_state_goes_on_bitwise(tmp_path, method, exchange, model_first):
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
    loads = [lambda: optimizer.load_state_dict(states[1]), lambda: again.load_state_dict(states[0])]
    for load in reversed(loads) if model_first else loads:
        load()
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


def squares(model, rows=slice(64)):
    return ((model(X[rows]) - Y[rows]) ** 2).mean()


def once(optimizer, loss):
    """Do a step of either kind of optimizer with the gradients that are there."""
    optimizer.step((lambda: loss) if isinstance(optimizer, QuasiNewton) else None)


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


def not_cleared_in_the_closure(model, optimizer):
    def closure():
        if not isinstance(optimizer, QuasiNewton):
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


def saved_size(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.tell()


def test_a_model_is_saved_and_copied_as_with_any_optimizer(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))
    model.tied = model[0].weight
    peer = copy.deepcopy(model)
    optimizer = QuasiNewton(model.parameters(), samples=64, method="sgd")
    for one, other in ((model, peer), (model.state_dict(), peer.state_dict()), (model[2], peer[2])):
        assert saved_size(one) == saved_size(other)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    before = model[0].weight.detach().clone()
    model[2](model[0](torch.ones(1, 50))).sum().backward()
    once(optimizer, torch.tensor(1.0))
    assert (model[0].weight != before).any()
    assert (average.module[0].weight == before).all()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, tmp_path / "model")
    safetensors.load_model(peer, tmp_path / "model")
    assert (peer[0].weight == model[0].weight).all()


def test_an_optimizer_is_not_copied():
    optimizer, _ = prepared(perceptron())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps, saved_size):
        fails(r"state_dict\(\)", lambda: copied(optimizer))  # noqa: B023


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


def garbage(state):
    """Yield what is no state of the optimizer that the state is of."""
    yield from (None, 5, "state", [], {}, {**state, "core": None}, {**state, "digest": 5}, {**state, "state": []})
    yield torch.optim.Adam(perceptron().parameters()).state_dict()
    for key in state:
        yield {k: v for k, v in state.items() if k != key}
    for path, tensor in state["core"].items():
        for other in (tensor.double() if tensor.dtype != torch.float64 else tensor.float(), tensor[None], None, "x"):
            yield {**state, "core": {**state["core"], path: other}}
        if tensor.is_floating_point():
            yield {**state, "core": {**state["core"], path: tensor * float("nan")}}
        yield {**state, "core": {p: t for p, t in state["core"].items() if p != path}}
    yield {**state, "core": {**state["core"], "more": torch.ones(1)}}
    for key in state["origin"]:
        yield {**state, "origin": {**state["origin"], key: 7}}
    group = state["param_groups"][0]
    for groups in ([], [group, group], [None], [5], [{}], [{**group, "params": [0]}], [{**group, "params": 5}]):
        yield {**state, "param_groups": groups}
    for change in ({"lr": "x"}, {"lr": float("nan")}, {"betas": 1}):
        yield {**state, "param_groups": [{**group, **change}]}


@pytest.mark.parametrize("method", ["kronecker", "fisher", "deflated", "adam"])
def test_what_is_no_state_is_told_and_changes_nothing(method):
    """Nor does half of one change anything."""
    pair = [prepared(perceptron(), method=method) for _ in range(2)]
    for _ in range(3):
        for optimizer, closure in pair:
            optimizer.step(closure)
    optimizer, closure = pair[0]
    for bad in garbage(optimizer.state_dict()):
        fails(".", lambda: optimizer.load_state_dict(bad))  # noqa: B023
    assert [optimizer.step(closure) for _ in range(5)] == [pair[1][0].step(pair[1][1]) for _ in range(5)]
