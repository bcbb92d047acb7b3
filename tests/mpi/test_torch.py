"""The PyTorch adapter over the ranks: the built-in network's trajectory, and what only several ranks can get wrong."""

import warnings

import numpy as np
import pytest
import torch
from mpi4py import MPI

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import build
from qnewton_mpi.data import datasets
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.errors import UserError
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.models.reference import torch_layers
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.torch import QuasiNewton
from qnewton_mpi.training.replicas import ReplicaLoss

STEPS, BATCH = 50, 32


@pytest.fixture(scope="module")
def sample():
    return datasets.load(datasets.EMBEDDED, None, dtype=np.float64).train


@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
@pytest.mark.parametrize(("method", "by"), [("kronecker", "rows"), ("kronecker", "closure"), ("deflated", "closure")])
def test_same_trajectory_as_the_built_in_network(communicator, sample, method, by, exchange):
    """And in as many collectives. In float64: in float32 rounding differs, and 50 steps amplify it."""
    per_rank = 2 if communicator.size < 4 else 1
    replicas = per_rank * communicator.size
    network = Convnet((1, 28, 28), "tanh", dtype=np.float64)
    start = network.initial_parameters(0)
    order = BatchOrder(len(sample), BATCH * replicas, replicas, 0)
    loss = ReplicaLoss(network, sample, order)
    kind = OPTIMIZERS[method]
    built_in = kind(
        build(kind.settings_type, {}),
        start,
        EXCHANGES[exchange](communicator, replicas, network.size),
        order.share,
        0,
        network.parameter_shapes,
    )
    model = torch_layers(network, start)
    optimizer = QuasiNewton(
        model.parameters(),
        samples=order.share,
        method=method,
        replicas_per_rank=per_rank,
        module=model,
        exchange=exchange,
        communicator=communicator,
    )
    local = optimizer.core.exchange.local

    def value(x, y):
        return torch.nn.functional.cross_entropy(model(x), y)

    def closure():
        mean = value(*optimizer.share(*batch))
        mean.backward()
        return mean

    for step in range(STEPS):
        loss.step = step
        before = communicator.collectives.total()
        expected = built_in.step(loss)["loss"]
        between = communicator.collectives.total()
        parts = [sample.batch(order.indices(step, replica)) for replica in local]
        images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        batch = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
        found = optimizer.step(closure) if by == "closure" else optimizer.step(value, *batch)
        assert communicator.collectives.total() - between == between - before
        assert found == pytest.approx(expected, rel=1e-5)
    found = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    np.testing.assert_allclose(found, built_in.parameters, atol=1e-5)


def test_parameters_that_differ_are_told(communicator):
    torch.manual_seed(communicator.rank)
    model = torch.nn.Linear(3, 1)
    options = {"samples": 4, "replicas_per_rank": 2, "communicator": communicator}
    if communicator.size == 1:
        QuasiNewton(model.parameters(), **options)
        return
    others = ", ".join(map(str, range(1, communicator.size)))
    with pytest.raises(UserError, match=rf"rank\(s\) {others} differ from those of rank 0: .*torch.manual_seed"):
        QuasiNewton(model.parameters(), **options)


def test_every_rank_loads_its_own_state(communicator):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = QuasiNewton(model.parameters(), samples=4, replicas_per_rank=2, communicator=communicator)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    swapped = communicator.mpi.bcast(state)
    if communicator.size == 1:
        return
    with pytest.raises(UserError, match="every rank saves and loads its own"):
        optimizer.load_state_dict(swapped)


def branched(communicator, **options):
    """Return a model of two branches, its optimizer, and a closure for this rank's rows of one of them or both."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)])
    x = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(1))[communicator.rank]
    options = {"samples": 4, "method": "momentum", "lr": 0.1, "communicator": communicator} | options
    optimizer = QuasiNewton(model.parameters(), **options)

    def closure(*branches):
        loss = sum(((model[k](x) - 1) ** 2).mean() for k in branches)
        loss.backward()
        return loss

    return model, optimizer, closure


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("exchange", list(EXCHANGES))
def test_what_has_a_gradient_on_no_rank_rests(communicator, exchange):
    model, optimizer, closure = branched(communicator, exchange=exchange)
    for _ in range(3):
        optimizer.step(lambda: closure(0, 1))
    before = [weights(branch) for branch in model]
    for _ in range(3):
        optimizer.step(lambda: closure(1))
    assert (weights(model[0]) == before[0]).all()
    assert (weights(model[1]) != before[1]).all()
    everyone = communicator.mpi.allgather(weights(model).numpy())
    assert all((other == everyone[0]).all() for other in everyone)


@pytest.mark.parametrize("exchange", list(EXCHANGES))
def test_a_gradient_that_is_missing_on_a_rank_is_zero(communicator, exchange):
    model, optimizer, closure = branched(communicator, exchange=exchange, method="sgd")
    peer = branched(communicator, exchange=exchange, method="sgd")
    used = (0, 1) if communicator.rank == 0 else (1,)

    def closure_with_zeros():
        loss = peer[2](*used)
        for p in peer[0].parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return loss

    before = weights(model[0])
    for _ in range(3):
        assert optimizer.step(lambda: closure(*used)) == peer[1].step(closure_with_zeros)
    assert (weights(model) == weights(peer[0])).all()
    assert (weights(model[0]) != before).all()


def test_what_only_one_rank_sees_is_told_on_all(communicator):
    """And no state has changed: the run can go on."""
    model, optimizer, closure = branched(communicator)
    last = communicator.size - 1
    here = communicator.rank == last

    def halved():
        return closure(0, 1).reshape(1).repeat(2 if here else 1)

    optimizer.step(lambda: closure(0, 1))
    before, steps = weights(model), optimizer.core.steps
    with pytest.raises(UserError, match="no parameter has a gradient"):
        optimizer.step(lambda: torch.tensor(1.0) if here else closure(0, 1))
    with pytest.raises(UserError, match=r"has returned a tensor of shape \(2,\)"):
        optimizer.step(halved)
    optimizer.param_groups[0]["lr"] = -1.0 if here else 0.1
    with pytest.raises(UserError, match=r"a group has lr=-1\.0"):
        optimizer.step(lambda: closure(0, 1))
    optimizer.param_groups[0]["lr"] = 0.1
    if communicator.size > 1:
        model[0].bias.requires_grad_(not here)
        with pytest.raises(UserError, match=rf"parameter \(2,\) is frozen on rank\(s\) {last} alone"):
            optimizer.step(lambda: closure(0, 1))
        model[0].bias.requires_grad_(True)
    assert (weights(model) == before).all()
    assert optimizer.core.steps == steps
    optimizer.step(lambda: closure(0, 1))
    assert (weights(model) != before).all()


def test_states_that_only_one_rank_cannot_take_are_told_on_all(communicator):
    """And no rank has taken its own."""
    model, optimizer, closure = branched(communicator)
    optimizer.step(lambda: closure(0, 1))
    early = optimizer.state_dict()
    optimizer.step(lambda: closure(0, 1))
    late, velocity = optimizer.state_dict(), optimizer.core.velocity.copy()
    last = communicator.rank == communicator.size - 1
    bad = {**early, "core": {**early["core"], "velocity": early["core"]["velocity"] * float("nan")}}
    with pytest.raises(UserError, match="not as it was saved"):
        optimizer.load_state_dict(bad if last else early)
    if communicator.size > 1:
        with pytest.raises(UserError, match=r"states are of steps 1, .*2: load those of one step"):
            optimizer.load_state_dict(late if last else early)
    assert optimizer.core.steps == 2
    np.testing.assert_array_equal(optimizer.core.velocity, velocity)
    optimizer.load_state_dict(early)
    assert optimizer.core.steps == 1
    assert len(weights(model)) == optimizer.core.exchange.size


def trained(communicator, model, steps, optimizer=None, **options):
    """Train on samples of each rank's own; return the optimizer."""
    optimizer = optimizer or QuasiNewton(model.parameters(), samples=16, communicator=communicator, **options)
    random = torch.Generator().manual_seed(communicator.rank)
    for _ in range(steps):
        x = torch.randn(16, 3, generator=random) + communicator.rank
        optimizer.zero_grad()
        loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        loss.backward()
        optimizer.step(lambda: loss)  # noqa: B023
    return optimizer


def fails_on_all(communicator, match, call):
    if communicator.size == 1:
        return
    with pytest.raises(UserError, match=match) as error:
        call()
    assert len(set(communicator.mpi.allgather(str(error.value)))) == 1


def seeded():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("method", "adam", "has method=adam, rank 0 has method=momentum"),
        ("samples", 5, "has samples=5, rank 0 has samples=4"),
        ("replicas_per_rank", 2, "has replicas_per_rank=2, rank 0 has replicas_per_rank=1"),
        ("replicas_per_rank", 0, r"rank \d: replicas_per_rank=0: must be an integer, at least 1"),
        ("module", torch.nn.Linear(1, 1), "has module=Linear, rank 0 has module=None"),
        ("exchange", "sliced", "has exchange=sliced, rank 0 has exchange=auto"),
        ("seed", 1, "has seed=1, rank 0 has seed=0"),
        ("lr", 0.2, "has lr=0.2, rank 0 has lr=0.1"),
    ],
)
def test_settings_of_one_rank_are_told(communicator, name, value, told):
    options = {"samples": 4, "method": "momentum", "lr": 0.1}
    options |= {name: value} if communicator.rank == communicator.size - 1 else {}
    fails_on_all(
        communicator, told, lambda: QuasiNewton(seeded().parameters(), **options, communicator=communicator.mpi)
    )


def test_a_parameter_frozen_on_one_rank_is_told(communicator):
    model = seeded()
    model.bias.requires_grad_(communicator.rank < communicator.size - 1)
    fails_on_all(communicator, r"the shapes of rank\(s\) \d differ", lambda: trained(communicator, model, 1))


@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
def test_what_one_rank_does_to_its_model_is_told(communicator, exchange):
    model = seeded()
    optimizer = trained(communicator, model, 3, method="momentum", lr=0.01, exchange=exchange)
    if communicator.rank == communicator.size - 1:
        model.bias.data.mul_(0.5)
    told = r"step 4: the parameters of rank \d differ from those of rank 0"
    fails_on_all(communicator, told, lambda: trained(communicator, model, 1, optimizer))


def test_a_scheduler_that_sees_the_loss_of_its_rank_is_told(communicator):
    model = seeded()
    optimizer = trained(communicator, model, 1, method="momentum", lr=0.01)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for loss in (1.0, 0.5 + communicator.rank):
        scheduler.step(loss)
    told = r"step 2: rank 1 has 0.5 times the learning rate, rank 0 1 times: let a schedule see the same on all ranks"
    fails_on_all(communicator, told, lambda: trained(communicator, model, 1, optimizer))


@pytest.mark.parametrize(("key", "value"), [("lr", 0.001), ("weight_decay", 0.1)])
def test_groups_of_one_rank_are_told(communicator, key, value):
    """Though the largest rate is the same."""
    model = seeded()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.2}]
    optimizer = QuasiNewton(groups, samples=16, communicator=communicator, method="momentum", lr=0.01)
    trained(communicator, model, 1, optimizer)
    if communicator.rank == communicator.size - 1:
        optimizer.param_groups[1][key] = value
    told = rf"the groups of rank\(s\) {communicator.size - 1} have other lr or weight_decay"
    fails_on_all(communicator, told, lambda: trained(communicator, model, 1, optimizer))


def test_running_statistics_are_those_of_rank_0(communicator):
    """Buffers of all kinds; what rank 0 has is what it would have alone."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    model.register_buffer("table", torch.full((2, 2), torch.inf))
    alone = torch.nn.BatchNorm1d(3)
    trained(communicator, model, 4, method="momentum", lr=0.01, module=model)
    random = torch.Generator().manual_seed(0)
    for _ in range(4):
        alone(torch.randn(16, 3, generator=random))
    torch.testing.assert_close(model[0].running_mean, alone.running_mean)
    torch.testing.assert_close(model[0].running_var, alone.running_var)
    assert model[0].num_batches_tracked == 4
    assert bool((model.table == torch.inf).all())
    everyone = communicator.mpi.allgather([buffer.numpy().tobytes() for buffer in model.buffers()])
    assert all(theirs == everyone[0] for theirs in everyone)


def test_running_statistics_may_be_the_means_of_the_ranks(communicator):
    """Those of real numbers; what counts is rank 0's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    trained(communicator, model, 1, method="momentum", lr=0.01, module=model, average_buffers=True)
    alone = []
    for rank in range(communicator.size):
        alone.append(torch.nn.BatchNorm1d(3))
        alone[-1](torch.randn(16, 3, generator=torch.Generator().manual_seed(rank)) + rank)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model[0], name), torch.stack([getattr(b, name) for b in alone]).mean(0))
    assert model[0].num_batches_tracked == 1
    everyone = communicator.mpi.allgather([buffer.numpy().tobytes() for buffer in model.buffers()])
    assert all(theirs == everyone[0] for theirs in everyone)


@pytest.mark.parametrize("exchange", list(EXCHANGES))
@pytest.mark.parametrize("method", ["kronecker", "deflated", "adam"])
def test_the_state_of_all_ranks_goes_on_on_another_number(communicator, method, exchange):
    """From all ranks to one alone, and back."""
    replicas = 12
    x = torch.randn(8 * replicas, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def program(members, exchange):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
        own = replicas // members.size
        options = {"method": method, "replicas_per_rank": own, "module": model, "exchange": exchange}
        optimizer = QuasiNewton(model.parameters(), samples=8, communicator=members, **options)
        mine = x.chunk(members.size)[members.rank]

        def steps(number):
            def squares(x):
                return (model(x) - x.sum(1, keepdim=True).tanh()).square().mean()

            return [optimizer.step(squares, mine) for _ in range(number)]

        return model, optimizer, steps

    everyone = program(communicator, exchange)
    alone = program(Communicator(MPI.COMM_SELF), "allgather")
    everyone[2](6)
    for here, there in ((everyone, alone), (alone, everyone)):
        state = here[1].state_dict(gather=True)
        there[0].load_state_dict(here[0].state_dict())
        there[1].load_state_dict(state)
        assert there[1].core.steps == here[1].core.steps
        np.testing.assert_allclose(there[2](6), here[2](6), rtol=1e-5)


@pytest.mark.parametrize("closures", [0, 12])
def test_a_loss_that_cannot_be_had_again(communicator, closures):
    """`lambda: loss`, from the start or later: the gradients stay to be looked at, and the loss falls."""
    if communicator.size == 1:
        pytest.skip("one replica has no noise")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = QuasiNewton(model.parameters(), samples=32, communicator=communicator)
    random = torch.Generator().manual_seed(communicator.rank)
    losses = []
    for step in range(150):
        x = torch.randn(32, 5, generator=random)

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        if step < closures:
            losses.append(optimizer.step(closure))
            continue
        loss = closure()
        gradients = [p.grad.clone() for p in model.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses.append(optimizer.step(lambda loss=loss: loss))
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not optimizer.core.repeats
    assert optimizer.core.evaluations == 150 * communicator.size
    assert np.mean(losses[-10:]) < 0.2 * losses[0]


def test_all_ranks_do_as_one_has_to(communicator):
    """A loss that one rank cannot have at once: all go on one replica after the other, which rank 0 tells."""
    torch.manual_seed(0)
    model, last = torch.nn.Linear(3, 1), communicator.rank == communicator.size - 1
    random = torch.Generator().manual_seed(communicator.rank)
    optimizer = QuasiNewton(model.parameters(), samples=8, replicas_per_rank=2, communicator=communicator)

    def loss(x):
        value = (model(x) - x.sum(1, keepdim=True)).square().mean()
        return value * len(str(value.detach().sum().item())[:1]) if last else value

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        losses = [optimizer.step(loss, torch.randn(16, 3, generator=random)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert sum("one after the other" in str(warning.message) for warning in told) == (communicator.rank == 0)


def whole_batches(communicator, **options):
    """Return losses of steps on batches of all ranks, with dropout, by as many replicas on any number of ranks."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
    model.double()
    optimizer = QuasiNewton(
        model.parameters(), samples=8, replicas=6, module=model, communicator=communicator, **options
    )

    def squares(x):
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    def closure():
        loss = squares(optimizer.share(x))
        loss.backward()
        return loss

    losses = []
    for step in range(8):
        x = torch.randn(48, 5, dtype=torch.float64)  # drawn by all alike
        losses.append(optimizer.step(closure) if step % 2 else optimizer.step(squares, x))
    return losses


@pytest.mark.parametrize("method", ["kronecker", "deflated"])
def test_a_batch_of_all_ranks_is_the_same_run_on_any_number(communicator, method):
    """Each replica has its share of the rows, and random numbers of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = whole_batches(communicator, method=method)
        alone = whole_batches(Communicator(MPI.COMM_SELF), method=method)
    np.testing.assert_allclose(found, alone, rtol=1e-6)
    assert len(set(communicator.mpi.allgather(found[-1]))) == 1


def test_a_batch_of_all_ranks_has_to_be_shared(communicator):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    options = {"samples": 4, "method": "momentum", "communicator": communicator}
    optimizer = QuasiNewton(model.parameters(), replicas=4, **options)
    with pytest.raises(UserError, match=r"5 rows cannot be shared evenly by 4 replicas:"):
        optimizer.share(torch.ones(5, 3))
    optimizer = QuasiNewton(model.parameters(), replicas=communicator.size, **options)

    def closure():
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    with pytest.raises(UserError, match=r"with replicas=… the closure must take its samples by optimizer\.share"):
        optimizer.step(closure)
    with pytest.raises(UserError, match="not both"):
        QuasiNewton(model.parameters(), replicas=4, replicas_per_rank=1, **options)
    if communicator.size > 1:
        optimizer = QuasiNewton(model.parameters(), replicas=communicator.size, **options)
        mine = torch.full((4 * communicator.size, 3), 1.0 + communicator.rank)  # as by a DistributedSampler
        with pytest.raises(UserError, match=r"rank\(s\) 1.* have another than rank 0: leave out the Distributed"):
            optimizer.step(lambda x: model(x).square().mean(), mine)
        with pytest.raises(UserError, match=rf"replicas=1: there are {communicator.size} ranks, and each needs one"):
            QuasiNewton(model.parameters(), replicas=1, **options)
