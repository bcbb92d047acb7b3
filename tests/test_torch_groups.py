"""Groups of parameters with rates and weight decay of their own, in the PyTorch adapter and below it."""

import itertools
import warnings

import numpy as np
import pytest
import torch

from qnewton_mpi.core.create import create
from qnewton_mpi.errors import UserError
from qnewton_mpi.torch import QuasiNewton

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
Y = (X[:, :1] > 0).float() * X[:, 1:2]


def perceptron():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def squares(model):
    return lambda x, y: ((model(x) - y) ** 2).mean()


def vector(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def weights_and_biases(model, weights, biases):
    """Return the groups of an AdamW user."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name.endswith("weight")], **weights},
        {"params": [p for name, p in named if name.endswith("bias")], **biases},
    ]


def stepped(optimizer, model):
    """Do a step of either kind of optimizer on the whole batch."""
    optimizer.zero_grad()
    loss = squares(model)(X, Y)
    loss.backward()
    optimizer.step(lambda: loss) if isinstance(optimizer, QuasiNewton) else optimizer.step()


@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
@pytest.mark.parametrize("method", ["adam", "sgd"])
def test_groups_and_schedulers_are_pytorchs(method, exchange):
    """With a rate that is a number: AdamW's steps, and those of SGD, whose decay is as good as decoupled."""
    peer_type = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}[method]
    models = perceptron(), perceptron()
    groups = [weights_and_biases(m, {"weight_decay": 0.5, "lr": 0.002}, {"weight_decay": 0.0}) for m in models]
    optimizers = (
        QuasiNewton(groups[0], samples=64, method=method, lr=0.02, weight_decay=0.3, exchange=exchange),
        peer_type(groups[1], lr=0.02, weight_decay=0.3),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, [lambda k: 0.9**k, lambda k: 0.8**k]) for o in optimizers]
    for step in range(12):
        for model, optimizer, schedule in zip(models, optimizers, schedules, strict=True):
            model[0].weight.requires_grad_(step < 8)
            stepped(optimizer, model)
            schedule.step()
    torch.testing.assert_close(vector(models[0]), vector(models[1]))


def first_step(weights, biases, schedule=1.0, **options):
    """Return the parameters before and after the default's first step."""
    model = perceptron()
    groups = weights_and_biases(model, weights, biases)
    optimizer = QuasiNewton(groups, samples=16, replicas_per_rank=4, **options)
    for group in optimizer.param_groups:
        group["lr"] *= schedule
    optimizer.step(squares(model), X, Y)
    return [[p.detach().clone() for p in m.parameters()] for m in (perceptron(), model)]


def test_at_the_rate_auto_the_decay_is_in_units_of_the_step():
    """λ times the root mean square of the step; nothing else of the step changes."""
    start, plain = first_step({}, {}, 0.5)
    _, decayed = first_step({"weight_decay": 0.1}, {}, 0.5)
    _, of_all = first_step({}, {}, 0.5, weight_decay=0.1)
    steps = torch.cat([(w - v).reshape(-1) for w, v in zip(plain, start, strict=True)])
    taken_off = 0.1 * float(steps.square().mean().sqrt())
    assert taken_off > 1e-4
    for before, without, groups, everywhere in zip(start, plain, decayed, of_all, strict=True):
        taken = taken_off * before
        torch.testing.assert_close(without - everywhere, taken, rtol=1e-2, atol=1e-7)
        torch.testing.assert_close(without - groups, taken if before.ndim > 1 else 0 * taken, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_at_the_rate_auto_the_decay_is_the_same_in_any_unit_of_the_loss(factor):
    def run(unit):
        optimizer = create("kronecker", np.full(4, 2.0), replicas=4, samples=8, weight_decay=0.5)
        noise = np.random.default_rng(0)
        for _ in range(5):
            shift = noise.standard_normal((4, 4))
            optimizer.step(
                lambda w, i, shift=shift: (unit * float(((w - shift[i]) ** 2).sum()), unit * 2 * (w - shift[i]))
            )
        return optimizer.parameters

    np.testing.assert_allclose(run(factor), run(1.0), rtol=1e-6)


def test_at_the_rate_auto_a_groups_rate_is_its_part_of_the_step():
    start, plain = first_step({}, {})
    _, shared = first_step({"lr": 0.1}, {})
    for before, whole, found in zip(start, plain, shared, strict=True):
        torch.testing.assert_close(found - before, (0.1 if before.ndim > 1 else 1) * (whole - before))


def test_at_the_rate_auto_groups_of_another_script_keep_their_ratio():
    """AdamW's rates: the larger is the whole step, whatever it is."""
    _, parts = first_step({"lr": 0.1}, {"lr": 1.0})
    _, rates = first_step({"lr": 3e-4}, {"lr": 3e-3})
    for one, other in zip(parts, rates, strict=True):
        torch.testing.assert_close(one, other)


def test_at_the_rate_auto_one_cycle_ends_at_the_whole_step():
    """Whatever its largest rate; it is saved with the groups."""

    def rates(largest):
        model = perceptron()
        optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, largest, total_steps=10, cycle_momentum=False)
        factors = []
        for _ in range(10):
            optimizer.step(squares(model), X, Y)
            factors.append(optimizer.core.rate_factor)
            schedule.step()
        return factors

    np.testing.assert_allclose(rates(3e-3), rates(1.0))
    assert max(rates(3e-3)) == pytest.approx(1.0)
    assert rates(3e-3)[0] == pytest.approx(1 / 25)


def test_steps_whose_losses_cannot_be_had_again_are_followed_as_they_are():
    """The curvature by successive gradients is of the step that the groups take."""
    model, random = perceptron(), np.random.default_rng(0)
    groups = weights_and_biases(model, {"lr": 0.1}, {"lr": 1.0})
    optimizer = QuasiNewton(groups, samples=16, replicas_per_rank=4)

    def closure():
        x, y = optimizer.share(X[random.integers(0, 64, 64)], Y)
        loss = squares(model)(x, y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            before = optimizer.core.parameters.copy()
            optimizer.step(closure)
            change = optimizer.core.parameters - before
            np.testing.assert_allclose(optimizer.core.successive.change, change, rtol=1e-2, atol=1e-6)
    assert not optimizer.core.repeats


def test_biases_stay_with_their_layers_whichever_groups_they_are_in():
    runs = []
    for split in (False, True):
        model = perceptron()
        params = weights_and_biases(model, {}, {}) if split else model.parameters()
        optimizer = QuasiNewton(params, samples=16, replicas_per_rank=4, module=model)
        runs.append([optimizer.step(squares(model), X, Y) for _ in range(8)])
    assert runs[0] == runs[1]


def test_groups_are_saved_and_gone_on_with():
    pair = []
    for _ in range(2):
        model = perceptron()
        groups = weights_and_biases(model, {"weight_decay": 0.01, "lr": 0.5}, {})
        pair.append((QuasiNewton(groups, samples=16, replicas_per_rank=4), model))
    (optimizer, model), (other, again) = pair
    for _ in range(3):
        optimizer.step(squares(model), X, Y)
    for group in other.param_groups:
        group.update(lr=0.3, weight_decay=0.2)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert [(g["lr"], g["weight_decay"]) for g in other.param_groups] == [(0.5, 0.01), (1.0, 0.0)]
    expected = [optimizer.step(squares(model), X, Y) for _ in range(5)]
    assert [other.step(squares(again), X, Y) for _ in range(5)] == expected


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf"), None, "much", torch.ones(2)])
def test_decays_that_are_none_are_told(decay):
    model = perceptron()
    groups = weights_and_biases(model, {"weight_decay": decay}, {})
    with pytest.raises(UserError, match="a group has weight_decay=") as error:
        QuasiNewton(groups, samples=64, method="sgd")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"lr=0\.5 and weight_decay=3: their product"):
        QuasiNewton(perceptron().parameters(), samples=64, method="sgd", lr=0.5, weight_decay=3)


def test_the_decay_without_pytorch():
    """A gradient of zeros leaves the decay alone, times a schedule's factor."""
    optimizer = create("momentum", np.full(3, 2.0), replicas=2, lr=0.2, weight_decay=0.1)
    sign = itertools.cycle([1.0, -1.0])
    optimizer.rate_factor = 0.5
    optimizer.step(lambda w, _: (1.0, next(sign) * np.ones(3)))
    np.testing.assert_allclose(optimizer.parameters, 2 * (1 - 0.5 * 0.02))
