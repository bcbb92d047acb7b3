"""All replicas of a rank in one pass: the run of one after the other, or one after the other and told."""

import contextlib
import copy
import gc
import subprocess
import sys

import pytest
import torch

from qnewton_mpi.adapter import together
from qnewton_mpi.errors import NonFiniteGradientError, UserError
from qnewton_mpi.torch import QuasiNewton

X = torch.randn(96, 5, generator=torch.Generator().manual_seed(1))
Y = (X[:, :1] > 0).float() * X[:, 1:2]
TOLD = "evaluated one after the other, which takes longer: "


class Recurrent(torch.nn.Module):
    """Keeps its parameters in a list beside their names."""

    def __init__(self):
        super().__init__()
        self.cell = torch.nn.LSTM(1, 4, batch_first=True)
        self.last = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.cell(x[:, :, None])[0][:, -1])


class Tied(torch.nn.Module):
    """Has one matrix in two places, one that it does not use, and a buffer that stays."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(5, 5)
        self.second = torch.nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.unused = torch.nn.Linear(5, 5)
        self.last = torch.nn.Linear(5, 1)
        self.register_buffer("scale", torch.full((5,), 0.5))

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x) * self.scale))))


def perceptron(*middle):
    return torch.nn.Sequential(torch.nn.Linear(5, 8), *middle, torch.nn.Tanh(), torch.nn.Linear(8, 1))


def squares(model):
    return lambda x, y: ((model(x) - y) ** 2).mean()


def smooth(model):
    def loss(x, y):
        x = x.detach().clone().requires_grad_()
        out = model(x)
        slope = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
        return ((out - y) ** 2).mean() + 0.01 * slope.square().mean()

    return loss


def run(model, loss, steps, rows, change=None, **options):
    """Return the losses and the parameters, by the batch or by closures, and how often the loss was called."""
    options = {"samples": 24, "replicas_per_rank": 4} | options
    optimizer, calls = QuasiNewton(model.parameters(), **options), []

    def counted(*mine):
        calls.append(len(mine[0]))
        return loss(*mine)

    def closure():
        value = counted(*optimizer.share(X, Y))
        value.backward()
        return value

    losses = []
    for step in range(steps):
        if change and step == steps // 2:
            change(model)
        losses.append(optimizer.step(counted, X, Y) if rows else optimizer.step(closure))
    return torch.tensor(losses), torch.cat([p.detach().reshape(-1) for p in model.parameters()]), len(calls), optimizer


def both(make, loss, steps=12, **options):
    torch.manual_seed(0)
    model = make()
    other = copy.deepcopy(model)
    if options.get("module"):
        return (
            run(model, loss(model), steps, True, **options | {"module": model}),
            run(other, loss(other), steps, False, **options | {"module": other}),
        )
    return run(model, loss(model), steps, True, **options), run(other, loss(other), steps, False, **options)


@pytest.mark.parametrize("method", ["kronecker", "fisher", "deflated", "multisecant", "momentum", "adam"])
def test_at_once_is_one_after_the_other(method):
    options = {"module": True} if method in ("deflated", "multisecant") else {}
    (losses, w, calls, optimizer), (expected, v, _, _) = both(perceptron, squares, method=method, **options)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(w, v, rtol=1e-3, atol=1e-4)
    if method in ("fisher", "kronecker"):
        passes = optimizer.core.evaluations + optimizer.core.trials
        assert calls == passes // 4 + 4  # the first step's one after the other too


@pytest.mark.parametrize("make", [Tied, Recurrent, lambda: perceptron(torch.nn.BatchNorm1d(8)).eval()])
def test_parameters_in_two_places_or_in_none_and_steady_buffers(make):
    (losses, w, calls, _), (expected, v, others, _) = both(make, squares)
    assert calls < others
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(w, v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("middle", [torch.nn.Tanh, lambda: torch.nn.BatchNorm1d(8), lambda: torch.nn.Dropout(0.5)])
@pytest.mark.filterwarnings("ignore:the replicas of a rank are evaluated one after the other")
def test_a_look_with_other_roundings_is_not_what_counts(middle, given, monkeypatch):
    """As on a GPU, where that look is without TF32, and the evaluation after it with it."""

    @contextlib.contextmanager
    def otherwise(device):
        yield True

    def one():
        torch.manual_seed(0)
        model = perceptron(middle())
        losses, w, calls, _ = run(model, squares(model), 6, True, module=model if given else None)
        return losses, w, [buffer.clone() for buffer in model.buffers()], calls

    losses, w, buffers, calls = one()
    monkeypatch.setattr(together, "in_float32", otherwise)
    again, v, others, more = one()
    assert more > calls
    assert torch.equal(losses, again)
    assert torch.equal(w, v)
    assert all(torch.equal(a, b) for a, b in zip(buffers, others, strict=True))


LOOK = """
import torch
from qnewton_mpi.adapter.surroundings import in_float32

def state():
    found = [torch.get_float32_matmul_precision()]
    if hasattr(torch.backends.cudnn, "conv"):
        return found + [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]
    return found + [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]

{program}
before = state()
with in_float32(torch.device("cuda")) as otherwise:
    inside = state()
assert otherwise
assert inside[0] == "highest" and inside[1] in ("ieee", False), inside
assert state() == before, (before, state())
with in_float32(torch.device("cpu")) as otherwise:
    assert not otherwise and state() == before
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["", *(f"torch.set_float32_matmul_precision({p!r})" for p in ("high", "medium"))])
def test_what_a_gpu_rounds_to_is_the_programs_again_after_the_look(program):
    done = subprocess.run([sys.executable, "-c", LOOK.format(program=program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def freeze(model):
    model[0].requires_grad_(False)


def test_what_is_frozen_later_rests():
    (losses, w, _, _), (expected, v, _, _) = both(perceptron, squares, change=freeze)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(w, v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "loss", "why"),
    [
        (lambda: perceptron(torch.nn.BatchNorm1d(8)), squares, "there are running statistics"),
        (lambda: perceptron(torch.nn.Dropout(0.5)), squares, "RuntimeError"),
        (perceptron, smooth, "RuntimeError"),
        (perceptron, lambda model: lambda x, y: squares(model)(x, y) * len(str(y.sum().item())), "RuntimeError"),
    ],
)
def test_what_cannot_be_had_at_once_is_told_and_the_same_to_the_bit(make, loss, why):
    def one(rows):
        torch.manual_seed(0)
        model = make()
        torch.manual_seed(1)
        return run(model, loss(model), 12, rows), [buffer.clone() for buffer in model.buffers()]

    with pytest.warns(UserWarning, match=TOLD + why) as told:
        (losses, w, _, _), buffers = one(True)
    assert len(told) == 1
    (expected, v, _, _), others = one(False)
    assert torch.equal(losses, expected)
    assert torch.equal(w, v)
    assert all(torch.equal(a, b) for a, b in zip(buffers, others, strict=True))


def test_what_cannot_be_had_at_once_any_more():
    def change(model):
        model.train()

    def make():
        return perceptron(torch.nn.BatchNorm1d(8)).eval()

    with pytest.warns(UserWarning, match=TOLD):
        (losses, w, _, _), (expected, v, _, _) = both(make, squares, change=change)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(w, v, rtol=1e-3, atol=1e-4)


def test_parameters_that_a_later_loss_uses():
    """Two heads by turns: the second is in no module of the first step."""
    runs = []
    for rows in (True, False):
        torch.manual_seed(0)
        body, *heads = torch.nn.Linear(5, 4), torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        every = torch.nn.ModuleList([body, *heads])

        optimizer = QuasiNewton(every.parameters(), samples=24, replicas_per_rank=4)

        def loss(x, y, body=body, heads=heads, core=optimizer.core):
            return ((heads[core.steps % 2](torch.tanh(body(x))) - y) ** 2).mean()

        def closure(optimizer=optimizer, loss=loss):
            value = loss(*optimizer.share(X, Y))
            value.backward()
            return value

        losses = []
        for _ in range(10):
            losses.append(optimizer.step(loss, X, Y) if rows else optimizer.step(closure))
        runs.append((torch.tensor(losses), torch.cat([p.detach().reshape(-1) for p in every.parameters()])))
    torch.testing.assert_close(*(losses for losses, _ in runs), rtol=1e-4, atol=0)
    torch.testing.assert_close(*(w for _, w in runs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_a_parameter_outside_the_modules_is_seen_however_small_its_gradient(scale):
    torch.manual_seed(0)
    model, raw = perceptron(), torch.nn.Parameter(torch.ones(3))
    optimizer = QuasiNewton([*model.parameters(), raw], samples=24, replicas_per_rank=4)

    def loss(x, y):
        return squares(model)(x, y) + scale * (raw - 3).square().sum()

    with pytest.warns(UserWarning, match=TOLD + "it depends on parameters that are in no module"):
        optimizer.step(loss, X, Y)
    for _ in range(10):
        optimizer.step(loss, X, Y)
    assert bool((raw != 1).all())


def test_a_layer_that_is_replaced_is_told():
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=4)
    optimizer.step(squares(model), X, Y)
    optimizer.step(squares(model), X, Y)
    model[2] = torch.nn.Linear(8, 1)
    gc.collect()
    with pytest.raises(UserError, match="has been replaced in the model"):
        optimizer.step(squares(model), X, Y)


class Keeping(torch.nn.Module):
    """Keeps what it computes, as an attribute or a buffer."""

    def __init__(self, buffer):
        super().__init__()
        self.layer = torch.nn.Linear(5, 1)
        if buffer:
            self.register_buffer("kept", torch.zeros(1))

    def forward(self, x):
        out = self.layer(x)
        self.kept = 0.5 * out.mean(0).detach()
        return out


@pytest.mark.parametrize("buffer", [False, True])
def test_what_a_module_keeps_is_left_whole(buffer):
    model = Keeping(buffer)
    optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=4, module=model if buffer else None)
    with pytest.warns(UserWarning, match=TOLD + "a module changes its attribute kept"):
        optimizer.step(squares(model), X, Y)
    optimizer.step(squares(model), X, Y)
    assert copy.deepcopy(model).kept.item() == model.kept.item()


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_compiled_modules_and_autocast():
    torch.manual_seed(0)
    model = perceptron()
    whole = torch.compile(model, backend="eager")
    optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=4)
    losses = [optimizer.step(squares(whole), X, Y) for _ in range(20)]
    assert losses[-1] < losses[0]

    def loss(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return squares(model)(x, y)

    optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=4)
    losses = [optimizer.step(loss, X, Y) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_a_step_that_fails_decides_nothing():
    model, calls = perceptron(), []

    def loss(x, y):
        calls.append(1)
        return squares(model)(x, y)

    optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=4)
    with pytest.raises(NonFiniteGradientError):
        optimizer.step(loss, X, torch.full_like(Y, torch.nan))
    optimizer.step(loss, X, Y)
    with pytest.raises(UserError, match="cannot be shared evenly"):
        optimizer.step(loss, X[:95], Y[:95])
    calls.clear()
    for _ in range(20):
        optimizer.step(loss, X, Y)
    assert len(calls) < 60  # 80 one after the other


def test_gradients_are_none_before_and_after_a_step():
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=4, method="deflated", module=model)
    model(X).sum().backward()
    for _ in range(3):
        optimizer.step(squares(model), X, Y)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "batch", "told"),
    [
        (lambda model: lambda x: model(x).mean(), ([1.0],), "part 1 of this one is"),
        (lambda model: lambda x: model(x).mean().item(), (X,), "must be a tensor that depends on the parameters"),
        (lambda model: lambda x: model(x), (X,), "one number"),
        (lambda model: lambda x: backward(model(x).mean()), (X,), r"leave out its backward\(\)"),
    ],
)
@pytest.mark.parametrize("replicas", [1, 4])
def test_what_is_no_loss_of_a_batch_is_told(loss, batch, told, replicas):
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=replicas, method="adam")
    with pytest.raises(UserError, match=told):
        optimizer.step(loss(model), *batch)
    assert optimizer.core.steps == 0


def backward(loss):
    loss.backward(retain_graph=True)
    return loss


def test_goes_on_bit_for_bit():
    torch.manual_seed(0)
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=4)
    for _ in range(6):
        optimizer.step(squares(model), X, Y)
    state, parameters = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    expected = [optimizer.step(squares(model), X, Y) for _ in range(6)]
    model = perceptron()
    model.load_state_dict(parameters)
    optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=4)
    optimizer.load_state_dict(state)
    assert [optimizer.step(squares(model), X, Y) for _ in range(6)] == expected


def test_gradients_from_before_do_not_count():
    runs = []
    for before in (False, True):
        torch.manual_seed(0)
        model = perceptron()
        optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=4)
        for _ in range(4):
            if before:
                model(X).sum().backward()
            runs.append(optimizer.step(squares(model), X, Y))
    assert runs[:4] == runs[4:]


def test_one_replica_takes_a_batch_too():
    torch.manual_seed(0)
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=96, method="momentum")
    losses = [optimizer.step(squares(model), X, Y) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_rows_that_cannot_be_shared_are_told():
    model = perceptron()
    optimizer = QuasiNewton(model.parameters(), samples=24, replicas_per_rank=4)
    with pytest.raises(UserError, match="a batch of 95 rows cannot be shared evenly by 4 replicas"):
        optimizer.step(squares(model), X[:95], Y[:95])
    with pytest.raises(UserError, match="must be a tensor that depends on the parameters"):
        optimizer.step(lambda x, y: (x.sum() - y.sum()).mean(), X, Y)
    assert optimizer.core.steps == 0
    optimizer.step(squares(model), X, Y)
