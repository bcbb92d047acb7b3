"""The suite of workloads: what it runs, what it keeps, what it writes."""

import importlib.util
import json
import math
import re
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from benchmarks import grid, suite  # noqa: E402
from benchmarks.store import Store  # noqa: E402
from benchmarks.workloads import optimizers, problems, profiles, running, tables, tuning  # noqa: E402
from benchmarks.workloads.__main__ import main  # noqa: E402
from benchmarks.workloads.optimizers import CONSTANT, COSINE, DEFAULT, PEERS  # noqa: E402
from benchmarks.workloads.running import Key, Record  # noqa: E402

pytestmark = pytest.mark.slow

WITHOUT_DATA = ["linear", "gaussian", "pde", "softmax", "characters", "convnet-fashion", "text"]


def record(key, loss, curve=None):
    losses = curve or [8.0, 4.0, loss]
    return Record(key, loss, loss, losses, [loss], 2.0, not math.isfinite(loss), {"torch": "2"})


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_workload_has_a_loss_and_gradients(name):
    problem = problems.load(name)
    model, batch = problem.model(0), next(problem.batches(0))
    loss = problem.loss(model, *batch)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(len(part) % problems.REPLICAS == 0 for part in batch)
    assert problem.samples % problems.REPLICAS == 0
    again = next(problem.batches(0))
    assert all(torch.equal(one, other) for one, other in zip(batch, again, strict=True))


@pytest.mark.parametrize("name", ["linear", "pde", "characters"])
def test_mean_of_the_replicas_losses_is_the_batchs(name):
    problem = problems.load(name)
    model, batch = problem.model(0), next(problem.batches(0))
    shares = zip(*(part.chunk(problems.REPLICAS) for part in batch), strict=True)
    mean = sum(problem.loss(model, *share).item() for share in shares) / problems.REPLICAS
    assert mean == pytest.approx(problem.loss(model, *batch).item(), rel=1e-5)


def test_networks_that_need_data():
    assert problems.networks.resnet8()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    layers = list(problems.networks.autoencoder(784, (250, 100, 50, 12)))
    assert [layer.out_features for layer in layers[::2] if hasattr(layer, "out_features")][:3] == [250, 100, 50]
    assert sum(isinstance(layer, torch.nn.Linear) for layer in layers) == 8
    assert sum(isinstance(layer, torch.nn.Tanh) for layer in layers) == 6


def test_known_minimum_of_the_differential_equation():
    problem = problems.load("pde")
    model = problem.model(0)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=80, line_search_fn="strong_wolfe", history_size=40)

    def closure():
        optimizer.zero_grad()
        loss = problem.loss(model, *problem.observed)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert 0 <= problem.loss(model, *problem.observed).item() - problem.minimum + 1e-10 < 1e-5


@pytest.mark.filterwarnings("ignore:Learning rate changed between steps")  # heavyball, of schedules; they act
@pytest.mark.parametrize("name", [DEFAULT, "sgd:lr=0.1", "adamw", *PEERS])
def test_optimizer_does_steps(name):
    if name in PEERS and PEERS[name].package and not importlib.util.find_spec(PEERS[name].package.replace("-", "_")):
        pytest.skip("needs the extra `peers`")
    found = running.run(problems.load("linear"), Key("linear", name, 0.1 if name in PEERS else None, COSINE, 0, 20))
    assert len(found.losses) == len(found.at) == 20
    assert len(found.held_out_losses) == 10
    assert not found.diverged
    assert found.held_out_losses[-1] < found.held_out_losses[0]


def test_schedule():
    assert {running.factor(CONSTANT, step, 100) for step in range(100)} == {1.0}
    factors = [running.factor(COSINE, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == factors[4] == pytest.approx(1, abs=0.01)
    assert 0 < factors[-1] < 0.001


def test_run_that_diverges_is_a_record(tmp_path):
    key = Key("linear", "sgd", 1e20, CONSTANT, 0, 30)
    found = running.run(problems.load("linear"), key)
    assert found.diverged
    assert found.loss == found.held_out == math.inf
    store = Store(tmp_path, Record)
    store.add(found)
    assert store.read("linear") == {key: found}
    json.loads(store.path("linear").read_text(), parse_constant=pytest.fail)  # no words that other readers lack


def test_last_line_that_is_torn_is_none(tmp_path):
    store = Store(tmp_path, Record)
    keys = [Key("linear", "sgd", lr, CONSTANT, 0, 3) for lr in (0.1, 0.2, 0.3)]
    store.add(record(keys[0], 1.0))
    store.add(record(keys[1], 2.0))
    whole = store.path("linear").read_bytes()
    store.path("linear").write_bytes(whole[:-20])
    assert set(store.read("linear")) == {keys[0]}
    store.add(record(keys[2], 3.0))
    assert set(store.read("linear")) == {keys[0], keys[2]}
    store.add(record(keys[2], 4.0))
    assert store.read("linear")[keys[2]].loss == 4.0
    assert store.drop("linear", "sgd") == 2
    assert store.read("linear") == {}


def followed(loss, lowest=-4):
    """Return the rates that tuning runs, in half decades, and the best."""
    known, rounds = {}, 0
    while True:
        missing, best = grid.grid(lowest, known.get)
        if not missing:
            return sorted(round(2 * math.log10(rate)) for rate in known), round(2 * math.log10(best))
        known |= {rate: loss(2 * math.log10(rate)) for rate in missing}
        rounds += 1
        assert rounds < 10


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (-3, range(-4, 0)),  # inside: four
        (-4, range(-5, 0)),  # at the edge: one beyond
        (-6, range(-7, 0)),
        (1, range(-4, 3)),
        (9, range(-4, 4)),  # so far, and no farther
    ],
)
def test_tuning_goes_on_at_an_edge(best, rates):
    assert followed(lambda place: (place - best) ** 2) == (list(rates), min(best, max(rates)))


def test_tuning_goes_down_where_all_diverge():
    assert followed(lambda place: math.inf)[0] == list(range(-8, 0))


def fill(store, names, seeds=3):
    """Do as `suite` would, with made-up losses; return how many runs there were."""
    steps, done = 3, 0
    for name in names:
        while keys := tuning.wanted(store.read("linear"), "linear", name, steps, seeds):
            for key in keys:
                loss = 1.0 if key.lr is None else 0.1 + abs(math.log10(key.lr) + 1.5) + (key.schedule == CONSTANT)
                store.add(record(key, loss + key.seed / 100))
                done += 1
    return done


def test_seeds_repeat_the_better_schedule_at_its_best_rate(tmp_path):
    store = Store(tmp_path, Record)
    assert fill(store, ["nesterov"]) == 2 * 4 + 2  # −5 … −2; the best, −3, is inside
    repeated = [key for key in store.read("linear") if key.seed]
    assert {(key.lr, key.schedule) for key in repeated} == {(0.0316, COSINE)}
    assert fill(store, [DEFAULT]) == 6
    assert fill(store, [DEFAULT, "nesterov"]) == 0


def short(problem, steps):
    return problems.Linear(problem.name, problem.about, steps, problem.samples, floor=problem.floor)


def test_tables_and_picture_are_the_same_again(tmp_path):
    pytest.importorskip("matplotlib")
    store = Store(tmp_path / "a", Record)
    names = [DEFAULT, *PEERS]
    fill(store, names)
    other = Store(tmp_path / "b", Record)
    for found in reversed(store.read("linear").values()):
        other.add(found)
    pages = []
    for place in (store, other):
        results = tables.Results([short(problems.load("linear"), 3)], {"linear": place.read("linear")}, names)
        picture = place.folder / "page.png"
        assert profiles.draw(results, picture)
        pages.append((tables.page(results, 3, picture.name), picture.read_bytes()))
    assert pages[0] == pages[1]
    text = pages[0][0]
    assert "| linear | 1.01 ± 0.01 |" in text
    assert "**0.1103** ± 0.01" in text
    assert "0.0316 cosine (10)" in text


def test_steps_to_a_target_are_interpolated():
    key = Key("linear", DEFAULT, None, CONSTANT, 0, 3)
    cell = tables.Summary(short(problems.load("linear"), 3), [record(key, 1.0, [8.0, 4.0, 1.0])], 1, [])
    assert cell.steps_to(6.0) == 1.5
    assert cell.steps_to(1.0) == 3
    assert cell.steps_to(0.5) == math.inf
    assert cell.steps_to(9.0) == 1


def test_losses_are_compared_above_the_minimum_and_the_floor():
    pde, gaussian = problems.load("pde"), problems.load("gaussian")
    assert tables.compared(pde, pde.minimum + 1e-3) == pytest.approx(1e-3)
    assert tables.compared(pde, pde.minimum) == pde.floor
    assert tables.compared(gaussian, -2.0) == -2.0


def test_profile_of_two():
    peer = Key("linear", "sgd", 0.1, CONSTANT, 0, 3)
    problem = short(problems.load("linear"), 3)
    records = {peer: record(peer, 1.0, [8.0, 4.0, 1.0])}
    own = Key("linear", DEFAULT, None, CONSTANT, 0, 3)
    records[own] = record(own, 0.5, [8.0, 1.0, 0.5])
    results = tables.Results([problem], {"linear": records}, [DEFAULT])
    results.columns = [tables.Column(DEFAULT, DEFAULT, CONSTANT), tables.Column("sgd", "sgd")]
    results.cells["linear", "sgd"] = tables.Summary(problem, [records[peer]], 1, [])
    assert profiles.profile(results, "first order", profiles.samples) == {DEFAULT: [1.0], "sgd": [1.5]}


def test_suite_does_what_is_missing(capsys, tmp_path):
    words = ["suite", "--workloads", "linear", "--optimizers", DEFAULT, "--seeds", "1", "--jobs", "2"]
    words += ["--results", str(tmp_path)]
    assert main(words) == 0
    store = Store(tmp_path, Record)
    assert {key.schedule for key in store.read("linear")} == {CONSTANT, COSINE}
    before = store.path("linear").read_bytes()
    assert main(words) == 0
    assert store.path("linear").read_bytes() == before
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_suite_tells_of_a_run_that_fails(tmp_path):
    lines = []
    wanted = tuning.wanted({}, "linear", DEFAULT, 3, 1)
    command = [sys.executable, "-c", "import sys; sys.exit('one\\nlast')"]
    failed = suite.suite(Store(tmp_path, Record), lambda: wanted, lambda _: command, 1, lines.append)
    assert len(failed) == len(lines) == 2
    assert lines[0] == "1: linear default constant seed 0: failed: last"


def test_suite_does_a_run_once_that_two_ask_for(tmp_path):
    store, [key] = Store(tmp_path, Record), tuning.wanted({}, "linear", "sgd", 3, 1)[:1]
    store.add(record(key, 1.0))
    lines = []
    nothing = [sys.executable, "-c", "pass"]
    assert suite.suite(store, lambda: [] if lines else [key, key], lambda _: nothing, 2, lines.append) == []
    assert lines == ["1: linear sgd 0.0316 constant seed 0: 1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "linaer", "default"], "no workload is called 'linaer'"),
        (["run", "linear", "adamm"], "no optimizer is called 'adamm'"),
        (["run", "linear", "sgd"], "sgd needs a rate"),
        (["run", "linear", "kronecker:nonsense=1"], "nonsense"),
        (["run", "mlp", "default", "--data-dir", "/nowhere"], "no mnist files"),
        (["suite", "--jobs", "0"], "--jobs 0"),
        (["table", "--results", "/nowhere"], "do `suite` first"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, tmp_path):
    if words[0] == "run":
        words = [*words, "--results", str(tmp_path)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_peer_without_its_package(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "heavyball", None)
    assert main(["run", "linear", "soap", "--lr", "0.1", "--results", str(tmp_path)]) == 2
    assert re.search(r"pip install '.*\[peers\]'", capsys.readouterr().err)


def test_command_line_skips_what_exists(capsys, tmp_path):
    for _ in range(2):
        assert main(["run", "linear", "sgd", "--lr", "0.1", "--steps", "5", "--results", str(tmp_path)]) == 0
    assert len((tmp_path / "linear.jsonl").read_text().splitlines()) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_method_with_settings_and_peers_have_their_names():
    assert optimizers.parse("kronecker:lr=0.1,damping=2") == ("kronecker", {"lr": "0.1", "damping": "2"})
    assert optimizers.parse(DEFAULT) == ("kronecker", {})


def test_runs_on_a_gpu_are_timed_by_a_trial():
    """Their CPU seconds say nothing; the suite on the CPU does some steps more of the chosen rate."""
    records = {}
    for key in tuning.wanted(records, "linear", "sgd", 200, 1):
        records[key] = replace(record(key, 1.0), cpu_ms=None)
    while keys := tuning.wanted(records, "linear", "sgd", 200, 1):
        records |= {key: replace(record(key, 1.0), cpu_ms=None) for key in keys}
    [trial] = tuning.untimed(records, "linear", "sgd", 200)
    assert trial.steps == tuning.TIMED
    records[trial] = replace(record(trial, 1.0), cpu_ms=7.0)
    assert tuning.untimed(records, "linear", "sgd", 200) == []
    assert tuning.wanted(records, "linear", "sgd", 200, 1) == []
    assert tuning.timings(records, "sgd") == [7.0]
