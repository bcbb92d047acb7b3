"""Exchanges on 1, 2, 3 and 4 ranks: what is held, what is moved, what every rank agrees on."""

import hashlib

import numpy as np
import pytest
from mpi4py import MPI
from problems import LIBRARIES, VARIANTS, Quadratic, make_optimizer

from qnewton_mpi.arrays import to_host
from qnewton_mpi.core.create import create
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.exchange.cost import Network
from qnewton_mpi.core.optimizers import OPTIMIZERS, BlockBFGS
from qnewton_mpi.core.optimizers.block_bfgs import BlockBFGSSettings
from qnewton_mpi.core.settings import build
from qnewton_mpi.errors import NonFiniteGradientError, UserError
from qnewton_mpi.parallel import partition
from qnewton_mpi.parallel.communicator import Communicator

SIZE = 23  # divisible by no number of ranks
REPLICAS = [4, 5, 8]


def global_rows(replicas, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((replicas, SIZE)).astype(dtype)


@pytest.fixture(params=EXCHANGES)
def name(request):
    return request.param


@pytest.mark.parametrize("replicas", REPLICAS)
def test_rows_become_columns_and_come_back(communicator, name, replicas):
    exchange = EXCHANGES[name](communicator, replicas, SIZE)
    everyone = global_rows(replicas)
    mine = everyone[exchange.local.start : exchange.local.stop]
    columns = exchange.columns(mine)
    held = exchange.hold(np.arange(SIZE)).astype(int)
    np.testing.assert_array_equal(columns, everyone[:, held])
    np.testing.assert_array_equal(exchange.rows(columns), mine)
    np.testing.assert_allclose(exchange.mean(mine), everyone.mean(axis=0)[held], atol=1e-14)
    mean, centred = exchange.centred(mine)
    np.testing.assert_allclose(centred, (everyone - everyone.mean(axis=0))[:, held], atol=1e-14)
    np.testing.assert_allclose(exchange.collect(mean), everyone.mean(axis=0), atol=1e-14)
    np.testing.assert_array_equal(exchange.collect(exchange.hold(everyone[0])), everyone[0])


def test_pieces_are_held_whole(communicator, name):
    """Also on more ranks than pieces, where some hold nothing."""
    exchange, everyone = EXCHANGES[name](communicator, 5, SIZE), global_rows(5)
    exchange.divide([4, 17, 2])
    held = np.arange(SIZE)[exchange.held]
    assert {len(np.intersect1d(held, piece)) for piece in (np.arange(4), np.arange(4, 21))} <= {0, 4, 17}
    mine = everyone[exchange.local.start : exchange.local.stop]
    columns = exchange.columns(mine)
    np.testing.assert_array_equal(columns, everyone[:, held])
    np.testing.assert_array_equal(exchange.rows(columns), mine)
    np.testing.assert_allclose(exchange.mean(mine), everyone.mean(axis=0)[held], atol=1e-14)
    np.testing.assert_array_equal(exchange.collect(exchange.hold(everyone[0])), everyone[0])
    for number in (1, 4):  # as sums, and as columns
        coefficients = np.random.default_rng(1).standard_normal((number, 5))
        coefficients -= coefficients.mean(axis=1, keepdims=True)
        mean, combined = exchange.combined(mine, coefficients)
        np.testing.assert_allclose(mean, everyone.mean(axis=0)[held], atol=1e-14)
        np.testing.assert_allclose(combined, (coefficients @ everyone)[:, held], atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gram_is_float64_and_bitwise_equal_on_all_ranks(communicator, name, dtype):
    exchange = EXCHANGES[name](communicator, 4, SIZE)
    a, b = global_rows(3, 1, dtype), global_rows(5, 2, dtype)
    held_a, held_b = (np.stack([exchange.hold(row) for row in rows]) for rows in (a, b))
    gram = exchange.gram(held_a, held_b)
    assert gram.dtype == np.float64
    np.testing.assert_allclose(gram, a.astype("f8") @ b.astype("f8").T, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(exchange.gram(held_a, held_a), a.astype("f8") @ a.astype("f8").T, atol=1e-13)
    assert len(set(communicator.mpi.allgather(gram.tobytes()))) == 1


def test_gram_keeps_small_singular_values(communicator, name):
    """float32 columns at condition 10⁴: a float32 Gram matrix would lose σ_min² below σ_max² · 10⁻⁷."""
    exchange = EXCHANGES[name](communicator, 4, SIZE)
    rows = np.zeros((2, SIZE), np.float32)
    rows[0, :], rows[1, :] = 1, 1
    rows[1, 0] += 1e-4
    gram = exchange.gram(*[np.stack([exchange.hold(row) for row in rows])] * 2)
    assert np.linalg.eigvalsh(gram)[0] == pytest.approx(0.5e-8 * (1 - 1 / SIZE), rel=0.01)


def test_dots(communicator, name):
    exchange = EXCHANGES[name](communicator, 4, SIZE)
    x, y = global_rows(2, 3)
    columns = np.stack([exchange.hold(x), exchange.hold(y)])
    xy, total = exchange.dots((exchange.hold(x), exchange.hold(y)), (columns, columns))
    assert xy == pytest.approx(x @ y)
    assert total == pytest.approx(x @ x + y @ y)


# What all ranks together send, in vectors of N words, for k ranks, M replicas, K combinations. An exchange is a line.
SENT = {
    "allgather": lambda k, M, K: {
        "mean": 2 * (k - 1),
        "columns": M * (k - 1),
        "collect": 0,
        "combined": min(M, 2 * (K + 1)) * (k - 1),
    },
    "sliced": lambda k, M, K: {
        "mean": k - 1,
        "columns": M * (k - 1) / k,
        "collect": k - 1,
        "combined": min(M, (K + 1) * k) * (k - 1) / k,
    },
}
SENT["server"] = SENT["sliced"]


@pytest.mark.parametrize("replicas_per_rank", [1, 2])
def test_counted_traffic_is_the_formula(communicator, name, replicas_per_rank):
    replicas = replicas_per_rank * communicator.size
    exchange = EXCHANGES[name](communicator, replicas, SIZE)
    rows, counts = np.ones((len(exchange.local), SIZE)), (communicator.size, replicas)
    held = exchange.hold(np.ones(SIZE))

    def sent(action):
        before = exchange.bytes_sent, exchange.bytes_sent_by_replicas
        action()
        return exchange.bytes_sent - before[0], exchange.bytes_sent_by_replicas - before[1]

    for number in (1, replicas):
        actions = {
            "mean": lambda: exchange.mean(rows),
            "columns": lambda: exchange.columns(rows),
            "collect": lambda: exchange.collect(held),
            "combined": lambda number=number: exchange.combined(rows, np.zeros((number, replicas))),
        }
        for what, action in actions.items():
            expected = tuple(8 * SIZE * SENT[name](k, replicas, number)[what] for k in counts)
            assert sent(action) == pytest.approx(expected, abs=0.5), what
    products = tuple(8 * k * (k - 1) for k in counts)
    assert sent(lambda: exchange.dots((held, held))) == products


class Noisy:
    """½ |w|² + c·w, c of the step and the replica."""

    def __init__(self, size):
        self.size, self.step = size, 0
        self.numbers = np.random.default_rng(0).standard_normal(size + 4096, np.float32)

    def __call__(self, w, replica):
        first = (1021 * self.step + 101 * replica) % 4096
        noise = self.numbers[first : first + self.size]
        return float(w @ w) / 2 + float(noise @ w), w + noise

    def losses(self, w, replicas):
        return np.array([self(w, replica)[0] for replica in replicas])


@pytest.mark.parametrize("replicas_per_rank", [1, 5])
@pytest.mark.parametrize("variant", ["sgd", "nesterov-auto", "adam", "multisecant", "deflated", "fisher", "kronecker"])
def test_counted_traffic_of_a_step_is_that_of_the_model(communicator, variant, name, replicas_per_rank):
    """Which `--exchange auto` goes by; with as many bytes a second as words crossed, and messages for free.

    All ranks together send by `server` what they do by `sliced`.
    """
    size, replicas, first, last = 40_000, max(2, replicas_per_rank * communicator.size), 12, 32
    method, options = VARIANTS[variant]
    kind = OPTIMIZERS[method]
    settings = build(kind.settings_type, options | ({"rank": 3} if method == "fisher" else {}))
    exchange, problem = EXCHANGES[name](communicator, replicas, size), Noisy(size)
    optimizer = kind(settings, np.ones(size, np.float32), exchange)
    for problem.step in range(last):
        if problem.step == first:
            before = exchange.bytes_sent
        optimizer.step(problem)
    per_rank = (exchange.bytes_sent - before) / (last - first) / communicator.size
    only_bytes = Network(0.0, 1.0)
    model = EXCHANGES[name].seconds(only_bytes, kind.traffic(settings), communicator.size, replicas, size)
    assert per_rank == pytest.approx(model, rel=0.05, abs=1e-9)  # the model leaves out the small ones


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("replicas", REPLICAS)
def test_exchanges_agree_and_ranks_hold_bitwise_the_same(communicator, variant, replicas):
    parameters, figures = {}, {}
    for name in EXCHANGES:
        problem = Quadratic(SIZE, replicas)
        optimizer = make_optimizer(variant, problem, communicator, replicas, exchange=name)
        for _ in range(4):
            figures[name] = optimizer.step(problem)
        digest = hashlib.sha256(np.ascontiguousarray(optimizer.parameters).tobytes()).hexdigest()
        assert len(set(communicator.mpi.allgather(digest))) == 1
        assert len(set(communicator.mpi.allgather(repr(figures[name])))) == 1
        parameters[name] = np.array(optimizer.parameters)
    for name in EXCHANGES:
        # Of a size of 1: one that is passing zero has the rounding of the others.
        np.testing.assert_allclose(parameters[name], parameters["allgather"], rtol=1e-9, atol=1e-12)
        for key, value in figures["allgather"].items():
            assert figures[name][key] == pytest.approx(value, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_arrays_outside_host_memory_cross_the_network(communicator, variant, name):
    """Staged through host memory, as a GPU's are; the library refuses any mixture of the two."""
    points, replicas = [], communicator.size + 1
    for xp, device in ((np, None), LIBRARIES["strict, not in host memory"]):
        problem = Quadratic(SIZE, replicas, dtype=xp.float64, xp=xp, device=device)
        optimizer = make_optimizer(variant, problem, communicator, replicas, exchange=name)
        for _ in range(4):
            optimizer.step(problem)
        points.append(to_host(optimizer.parameters))
    np.testing.assert_allclose(*points, rtol=1e-9)


class BuffersOnly:
    """Refuses mpi4py's lower-case methods, which pickle."""

    def __init__(self, mpi):
        self.mpi = mpi

    def __getattr__(self, name):
        assert name[0].isupper(), f"{name} pickles"
        return getattr(self.mpi, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_pickles_nothing(communicator, variant, name, monkeypatch):
    problem = Quadratic(SIZE, 4)
    optimizer = make_optimizer(variant, problem, communicator, 4, exchange=name)
    monkeypatch.setattr(communicator, "mpi", BuffersOnly(communicator.mpi))
    with pytest.raises(AssertionError, match="allgather pickles"):
        communicator.mpi.allgather(0)
    for _ in range(4):
        optimizer.step(problem)


class Repeated(Quadratic):
    """One whose losses can be had without gradients, as those of the default's networks."""

    def losses(self, w, replicas):
        return np.array([self(w, replica)[0] for replica in replicas])


@pytest.mark.parametrize("replicas_per_rank", [1, 4])
def test_a_step_of_the_default_is_five_collectives_at_most(communicator, name, replicas_per_rank):
    replicas, first, last = max(2, replicas_per_rank * communicator.size), 20, 120
    problem = Repeated(SIZE, replicas)
    optimizer = create("kronecker", problem.start, replicas, exchange=name, communicator=communicator)
    for step in range(last):
        if step == first:
            before, trials = communicator.collectives.total(), optimizer.trials
        optimizer.step(problem)
    assert optimizer.trials >= trials + 10 * replicas  # χ is measured in these steps
    assert (communicator.collectives.total() - before) / (last - first) <= 5


def test_one_bad_replica_is_told_on_every_rank(communicator):
    replicas = 2 * communicator.size
    problem = Quadratic(SIZE, replicas)
    optimizer = make_optimizer("sgd", problem, communicator, replicas)

    def poisoned(w, replica):
        loss, gradient = problem(w, replica)
        return loss, gradient * (np.nan if replica == replicas - 1 else 1)

    with pytest.raises(NonFiniteGradientError, match=f"step 1: replica {replicas - 1}"):
        optimizer.step(poisoned)


def test_errors_of_one_rank_are_raised_on_all(communicator):
    last = communicator.size - 1

    def fail_on_the_last():
        if communicator.rank == last:
            raise UserError(f"rank {last} has no disk")
        return communicator.rank

    with pytest.raises(UserError, match=f"rank {last} has no disk"):
        communicator.together(fail_on_the_last)
    assert communicator.together(lambda: communicator.rank) == communicator.rank
    assert communicator.from_root(lambda: communicator.rank) == 0
    with pytest.raises(UserError, match="root"):
        communicator.from_root(lambda: (_ for _ in ()).throw(UserError("root")))


def test_local_replicas_cover_all(communicator):
    for replicas in REPLICAS:
        exchange = EXCHANGES["allgather"](communicator, replicas, SIZE)
        assert [i for local in communicator.mpi.allgather(exchange.local) for i in local] == list(range(replicas))
        assert exchange.counts == list(np.diff(partition.bounds(replicas, communicator.size)))


def test_block_bfgs_is_the_same_on_any_number_of_ranks(communicator, name):
    problem = Quadratic(SIZE, 1)
    points = []
    for chosen in (
        EXCHANGES[name](communicator, 5, SIZE),
        EXCHANGES["allgather"](Communicator(MPI.COMM_SELF), 5, SIZE),
    ):
        optimizer = BlockBFGS(BlockBFGSSettings(), problem.start, chosen)
        for _ in range(4):
            optimizer.step(lambda w, replica: problem(w, 0))
        points.append(np.array(optimizer.parameters))
    np.testing.assert_allclose(*points, rtol=1e-8)
