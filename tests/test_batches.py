"""Larger batches: a run to a target, the tuning at each batch, the largest batch, the page."""

import itertools
import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from benchmarks.batches import __main__ as program  # noqa: E402
from benchmarks.batches import figure, running, study, tables  # noqa: E402
from benchmarks.batches.running import Key, Record  # noqa: E402
from benchmarks.batches.study import BATCHES  # noqa: E402
from benchmarks.store import Store  # noqa: E402
from benchmarks.workloads import problems  # noqa: E402
from benchmarks.workloads.optimizers import DEFAULT  # noqa: E402

pytestmark = pytest.mark.slow

LINEAR = study.Workload(problems.load("linear"), 0.5)
SGD = Key("linear", "sgd", 0.1, 256, 1, 0, 0.5, 100)


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setitem(study.WORKLOADS, "linear", lambda folder: LINEAR)


def test_places_are_every_step_then_2_percent_apart():
    places = list(running.places(1000))
    assert places[:52] == list(range(52))
    assert places[-1] == 1000
    assert all(1 <= after - before <= max(1, before / 50) for before, after in itertools.pairwise(places))
    assert list(running.places(2)) == [0, 1, 2]


def test_run_ends_at_the_target():
    found = running.run(LINEAR.problem, SGD)
    assert found.losses[-1] <= 0.5 < found.losses[-2]
    assert len(found.losses) - 2 < found.steps <= len(found.losses) - 1
    assert found == running.run(LINEAR.problem, SGD)


def test_all_are_judged_by_the_same_samples():
    """Before any step, whatever the batch and the optimizer, the loss is the same."""
    keys = [replace(SGD, batch=batch, most=1) for batch in BATCHES[:3]]
    keys.append(replace(keys[0], optimizer=DEFAULT, lr=None, replicas=8))
    assert len({running.run(LINEAR.problem, key).losses[0] for key in keys}) == 1


def test_batch_and_replicas_are_the_keys(monkeypatch):
    seen = []

    def step(trainer, batch):
        seen.append((len(batch[0]), trainer.optimizer.param_groups[0].get("samples"), trainer.problem.samples))
        return 1.0

    monkeypatch.setattr(running, "do_step", step)
    running.run(LINEAR.problem, replace(SGD, batch=512, most=1))
    assert seen == [(512, None, 512)]


def test_target_that_is_not_reached(tmp_path):
    slow, wild = replace(SGD, lr=1e-6, most=30), replace(SGD, lr=1e20)
    store = Store(tmp_path, Record)
    for key in (slow, wild):
        store.add(running.run(LINEAR.problem, key))
    found = store.read("linear")
    assert found[slow].steps == found[wild].steps == math.inf
    assert len(found[slow].losses) == 31
    assert found[wild].losses[-1] == math.inf
    assert len(found[wild].losses) < 10
    assert found[slow].outcome.startswith("not reached, ")
    assert study.cost(found[slow]) < study.cost(found[wild])


def ideal(key):
    """Return the steps of a key: fewest at a rate that goes up with the batch, by half up to 1,024 samples."""
    doublings = math.log2(key.batch / 256)
    steps = 200 / 2 ** min(doublings, 2)
    far = 0 if key.lr is None else abs(round(2 * math.log10(key.lr)) + 4 - doublings)
    return (1 + far) * steps + key.seed


def made_up(key, steps):
    steps = steps if steps <= key.most else math.inf
    return Record(key, steps, [2.0, 1.0, key.target if steps < math.inf else 0.7], {"torch": "2"})


def fill(records, optimizers=study.OPTIMIZERS, seeds=3, steps=ideal):
    """Do as `suite` would; return the keys."""
    done = []
    while key := next(study.wanted(records, LINEAR, optimizers, seeds), None):
        records[key] = made_up(key, steps(key))
        done.append(key)
    return done


def test_tuning_goes_on_from_half_the_batch():
    records = {}
    keys = fill(records, ["nesterov"])
    at = {batch: [key for key in keys if key.batch == batch] for batch in BATCHES}
    rates = {batch: [round(2 * math.log10(key.lr)) for key in at[batch] if not key.seed] for batch in BATCHES}
    assert rates[256] == [-5, -4, -3, -2]
    assert rates[512] == [-5, -4, -3, -2]
    assert rates[1024] == [-4, -3, -2, -1]
    assert {key.most for key in at[256]} == {study.MOST}
    assert {key.most for key in at[512]} == {400}
    assert {key.most for key in at[1024]} == {200}
    assert {(key.lr, key.seed) for key in at[1024] if key.seed} == {(0.1, 1), (0.1, 2)}
    assert fill(records, ["nesterov"]) == []


def test_tuning_goes_on_at_an_edge():
    def steps(key):
        return 100 + 10 * abs(2 * math.log10(key.lr) - (0 if key.batch > 256 else -3))

    keys = fill({}, ["nesterov"], 1, steps)
    assert [round(2 * math.log10(key.lr)) for key in keys if key.batch == 512] == [-4, -3, -2, -1, 0, 1]


def test_rate_with_the_least_loss_where_none_gets_there():
    records = {}
    while (key := next(study.wanted(records, LINEAR, ["adamw"], 1))).batch <= 512:
        far = abs(2 * math.log10(key.lr) + 5)
        records[key] = Record(key, math.inf, [2.0, 1.0 + far], {"torch": "2"})
    assert key.lr == 0.001  # half a decade below the best
    assert key.most == study.MOST
    results = tables.Results([LINEAR], {"linear": records}, ["adamw"])
    assert "not reached (0 of 1 seeds)" in tables.page(results, None)
    assert results.largest(LINEAR, results.series[0]) is None


def test_default_is_run_with_more_replicas_and_without():
    keys = fill({}, [DEFAULT])
    assert len(keys) == len(set(keys)) == 3 * (7 + 6)  # at the smallest batch the two are one
    assert {(key.batch, key.replicas) for key in keys if key.replicas > 8} == {
        *zip(BATCHES[1:], [16, 32, 64, 64, 64, 64], strict=True)
    }


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1, 1.1, 1.2, 1.25, 1.3, 1.3, 1.3], "≥ 16,384"),
        ([1, 1, 1, 1.69, 3, 5, 9], "1,448"),  # half way between 1,024 and 2,048 in the logarithm
        ([1, 1.4, 1.1, 1.2, 1.3, 5, 9], "4,096"),  # the last within, though one before is not
        ([1, 0.9, math.inf, math.inf, math.inf, math.inf, math.inf], "512"),
    ],
)
def test_largest_batch(ratios, expected):
    assert str(tables.largest([50_000.0 * ratio for ratio in ratios])) == expected


def test_largest_batch_of_what_never_gets_there():
    assert tables.largest([math.inf] * 7) is None


def test_multiples_of_a_peers_largest_batch():
    known, beyond = tables.Largest(1000.0), tables.Largest(16384, beyond=True)
    assert tables._times(tables.Largest(4000.0), known) == "4"
    assert tables._times(beyond, known) == "≥ 16"
    assert tables._times(known, beyond) == "≤ 0.061"
    assert tables._times(beyond, beyond) == tables._times(None, known) == tables.NONE


def test_page_and_figure_are_the_same_again(tmp_path):
    pytest.importorskip("matplotlib")
    store, other = Store(tmp_path / "a", Record), Store(tmp_path / "b", Record)
    records = {}
    fill(records)
    for found, back in zip(records.values(), reversed(records.values()), strict=True):
        store.add(found)
        other.add(back)
    pages = []
    for place in (store, other):
        results = tables.Results([LINEAR], {"linear": place.read("linear")}, study.OPTIMIZERS)
        picture = place.folder / "page.png"
        assert figure.draw(results, picture)
        pages.append((tables.page(results, picture.name), picture.read_bytes()))
    assert pages[0] == pages[1]
    text = pages[0][0]
    assert "| 256 | 201 ± 1 | 201 ± 1 |" in text
    assert "| 1,024 | 52 (1.01) | 52 (1.01) |" in text
    assert "| 1,024 | 0.1 (6) |" in text


def test_page_of_what_there_is():
    """A series that is not through has no largest batch yet; nothing at all is no page."""
    records = {}
    for batch in BATCHES[:-1]:
        key = next(study.wanted(records, LINEAR, [DEFAULT], 1))
        assert key.batch == batch
        records[key] = made_up(key, 50.0)
    results = tables.Results([LINEAR], {"linear": records}, study.OPTIMIZERS)
    assert {batch for _, title, batch in results.cells if "to" in title} == {*BATCHES[:-1]}
    assert f"| {DEFAULT}, M = 8 to 64 | – |" in tables.page(results, None)
    key = next(study.wanted(records, LINEAR, [DEFAULT], 1))
    records[key] = made_up(key, 50.0)
    results = tables.Results([LINEAR], {"linear": records}, study.OPTIMIZERS)
    assert f"| {DEFAULT}, M = 8 to 64 | 333 |" in tables.page(results, None)  # 256 · 1.3
    assert not tables.Results([LINEAR], {"linear": {}}, study.OPTIMIZERS).cells


def test_command_of_a_run_leaves_its_record(linear, capsys, tmp_path):
    options = program.commands().top.parse_args(["suite", "--results", str(tmp_path)])
    own = Key("linear", DEFAULT, None, 512, 16, 1, 0.5, 40)
    for key in (SGD, own):
        words = program.command(key, options)
        for _ in range(2):
            assert program.main(words[words.index("run") :]) == 0
    records = Store(tmp_path, Record).read("linear")
    assert list(records) == [SGD, own]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1] == f"{records[SGD].steps:.1f} steps"
    assert len((tmp_path / "linear.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "linaer", "default"], "no workload is called 'linaer'"),
        (["run", "linear", "adamm"], "no optimizer is called 'adamm'"),
        (["run", "linear", "sgd"], "sgd needs a rate"),
        (["run", "linear", "default", "--replicas", "3"], "--batch 256: not in 3 equal shares"),
        (["run", "linear", "default", "--most", "0"], "--most 0: at least 1"),
        (["run", "mlp-64", "sgd", "--lr", "1", "--data-dir", "/nowhere"], "no mnist files"),
        (["suite", "--seeds", "0"], "--seeds 0"),
        (["table", "--results", "/nowhere"], "do `suite` first"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(linear, words, message, capsys, tmp_path):
    if words[0] == "run":
        words = [*words, "--results", str(tmp_path)]
    assert program.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
