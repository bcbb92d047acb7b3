"""Runs that are made longer, end early, keep their best, begin with others' parameters, or see moved images."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from qnewton_mpi import cli, load, predictions, train
from qnewton_mpi.data import datasets
from qnewton_mpi.data.augmentation import Augmentation
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.errors import UserError
from qnewton_mpi.models.description import Description
from qnewton_mpi.models.mlp import Mlp
from qnewton_mpi.results.layout import EPOCH_FIGURES, ITERATES
from qnewton_mpi.results.run import Run
from qnewton_mpi.training import loop
from qnewton_mpi.training.averages import Averages
from qnewton_mpi.training.beginning import initial_for
from qnewton_mpi.training.replicas import ReplicaLoss
from qnewton_mpi.training.saved import read

pytestmark = pytest.mark.slow

SHORT = {"model": "mlp", "hidden": "8", "replicas": 2, "batch": 16, "evaluate_every": 2, "progress": "off"}
HELD_OUT = SHORT | {"validation": 0.1}
SGD = {"method": "sgd", "lr": 0.1}
PASSING = {name for name in EPOCH_FIGURES if "seconds" in name or name.startswith(ITERATES[1:])}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def same(one, other, which=("", "ema_", "tail_", "best_")):
    """Hold one file to another, bit for bit."""
    for iterate in which:
        first, second = (Run(Path(path), iterate) for path in (one, other))
        assert first.parameters.keys() == second.parameters.keys()
        for name, array in first.parameters.items():
            np.testing.assert_array_equal(second.parameters[name], array)
    for name, values in first.steps.items():
        if not name.startswith("seconds"):
            np.testing.assert_array_equal(second.steps[name], values)
    for name, values in first.epochs.items():
        if name not in PASSING:
            np.testing.assert_array_equal(second.epochs[name], values)
        elif "seconds" not in name:
            assert second.epochs[name][-1] == values[-1] or name.removesuffix("train_nll") not in which
    assert [second.attributes.get(name) for name in BEST] == [first.attributes.get(name) for name in BEST]


BEST = ("best_step", "best_iterate", "best_validation_nll")


@pytest.mark.parametrize("options", [{}, SGD | {"warmup": 3, "augment": "crop,flip", "label_smoothing": 0.1}])
def test_a_longer_run_is_the_one_that_was_long_from_the_start(options):
    train(**HELD_OUT, **options, steps=12, output="whole.h5")
    for steps in (4, 6, 12):
        train(**HELD_OUT, **options, steps=steps, output="run.h5", checkpoint="saved", resume=True)
        assert Run(Path("run.h5")).finished
    same("whole.h5", "run.h5")
    assert Run(Path("run.h5")).attributes["steps"] == 12


def test_where_the_last_quarter_had_begun_its_mean_is_of_what_follows():
    train(**SHORT, **SGD, steps=20, output="whole.h5")
    for steps in (18, 20):
        train(**SHORT, **SGD, steps=steps, output="run.h5", checkpoint="saved", resume=True)
    same("whole.h5", "run.h5", ("", "ema_"))
    averages = Averages(np.zeros(1), 18, 0.5)
    for step in range(1, 21):
        if step == 19:
            averages.lengthen(20, 18)
        averages.add(np.array([float(step)]), step)
    assert averages.tail == [19.5]


@pytest.mark.parametrize("steps", [{"steps": 8}, {"epochs": 1}])
def test_a_cosine_cannot_be_longer(steps):
    train(**SHORT, **SGD, steps=4, schedule="cosine", output="run.h5", checkpoint="saved")
    with pytest.raises(
        UserError, match=r"steps was 4 and is .*rates of a cosine schedule depend on the length of a run"
    ):
        train(**SHORT, **SGD, **steps, schedule="cosine", output="run.h5", checkpoint="saved", resume=True)


def test_a_run_cannot_be_shorter_than_it_is():
    saved = {"checkpoint": "saved", "checkpoint_every": 2, "resume": True}
    train(**SHORT, **SGD, steps=4, output="run.h5", **saved | {"resume": False})
    before = Path("run.h5").read_bytes()
    with pytest.raises(UserError, match="saved is at step 4 already, of 2: ask for more --steps or --epochs"):
        train(**SHORT, **SGD, steps=2, output="run.h5", **saved)
    shutil.copytree("saved", "early")
    shutil.rmtree(next(Path("early").glob("step-*4")))
    with pytest.raises(UserError, match="early is at step 2 already, of 2"):  # it has no evaluation of an end
        train(**SHORT, **SGD, steps=2, output="other.h5", **saved | {"checkpoint": "early"})
    train(**SHORT, **SGD, steps=4, output="run.h5", **saved)
    assert Path("run.h5").read_bytes() == before


@pytest.fixture
def scripted(monkeypatch):
    """Have the validation NLL of the last iterate be what a list says, in turn; the averages' 10 less if told so."""
    real = loop.evaluate

    def script(nlls, better_averages=False):
        left, told = list(nlls), set()

        def evaluate(network, weights, dataset, communicator):
            found = real(network, weights, dataset, communicator)
            if run[0].position.step not in told:
                told.add(run[0].position.step)
                found["validation_nll"] = last_said[0] = float(left.pop(0))
            else:
                found["validation_nll"] = last_said[0] + (-10 if better_averages else 10)
            return found

        monkeypatch.setattr(loop, "evaluate", evaluate)

    run, last_said = [], [0.0]
    go = loop.Trainer.go
    monkeypatch.setattr(loop.Trainer, "go", lambda self: (run.clear(), run.append(self), go(self)))
    return script


def test_patience_ends_a_run_and_is_kept(scripted):
    nlls = [5, 4, 4.5, np.nan, 3, 3.1, 3.2, 3.3, 2, 1]
    scripted(nlls)
    train(**HELD_OUT, **SGD, steps=18, patience=3, output="whole.h5")
    whole = Run(Path("whole.h5"), "tail_")
    assert whole.finished
    assert whole.epochs["step"][-1] == 14  # the eighth evaluation, the third after the best
    assert [whole.attributes[name] for name in BEST] == [8, "last", 3]
    assert not np.isnan(whole.last("ema_test_nll"))
    assert not whole.parameters  # the last quarter had begun only at step 14, which is none of the mean
    scripted(nlls[:6])  # stopped while it waits, and gone on with
    saved = {"output": "run.h5", "checkpoint": "saved"}
    train(**HELD_OUT, **SGD, steps=10, patience=3, **saved)
    scripted(nlls[6:])
    train(**HELD_OUT, **SGD, steps=18, patience=3, **saved, resume=True)
    same("whole.h5", "run.h5", ("", "ema_", "best_"))
    before = Path("run.h5").read_bytes()
    train(**HELD_OUT, **SGD, steps=18, patience=3, **saved, resume=True)  # nothing is left to do
    assert Path("run.h5").read_bytes() == before
    scripted([3.3])
    train(**HELD_OUT, **SGD, steps=18, patience=3, **saved | {"output": "again.h5"}, resume=True)  # counts once
    scripted(nlls[8:])
    train(**HELD_OUT, **SGD, steps=18, patience=4, **saved, resume=True)
    assert [Run(Path("run.h5")).attributes[name] for name in BEST] == [18, "last", 1]
    scripted(nlls)
    train(**HELD_OUT, **SGD, steps=18, output="never.h5")
    same("never.h5", "run.h5", ("", "ema_", "best_"))


def test_the_best_is_kept(scripted):
    scripted([5, 3, 4], better_averages=False)
    train(**HELD_OUT, **SGD, steps=4, output="run.h5", checkpoint="saved")
    scripted([5, 3])
    train(**HELD_OUT, **SGD, steps=2, output="short.h5")
    for path in ("run.h5", "saved"):
        for name, array in load("short.h5").parameters.items():
            np.testing.assert_array_equal(load(path, "best").parameters[name], array)
    assert [load("run.h5").options[name] for name in BEST] == [2, "last", 3]
    scripted([5, 3, 4], better_averages=True)
    train(**HELD_OUT, **SGD, steps=4, output="averaged.h5")
    assert load("averaged.h5").options["best_step"] == 4
    which = load("averaged.h5").options["best_iterate"]
    assert which in ("ema", "tail")
    for name, array in load("averaged.h5", which).parameters.items():
        np.testing.assert_array_equal(load("averaged.h5", "best").parameters[name], array)


def test_the_best_of_a_real_run_is_as_right_as_is_said():
    train(**HELD_OUT, **SGD, steps=6, output="run.h5", checkpoint="saved")
    model = load("run.h5", "best")
    assert predictions.predict(model, part="validation").nll == pytest.approx(
        model.options["best_validation_nll"], rel=1e-5
    )
    code = cli.run(["evaluate", "run.h5", "--which", "best"])
    assert code == 0


def test_without_a_part_to_choose_by():
    with pytest.raises(UserError, match=r"--patience needs a part of fashion-mnist-sample to judge by: --validation"):
        train(**SHORT, **SGD, steps=2, patience=1, output="run.h5")
    train(**SHORT, **SGD, steps=2, output="run.h5", checkpoint="saved")
    for path in ("run.h5", "saved"):
        with pytest.raises(UserError, match="validation"):
            load(path, "best")


def test_early_ends_are_the_same_on_all_ranks(qnewton):
    words = ["--method", "sgd", "--lr", "30", "--validation", "0.1", "--evaluate-every", "1", "--patience", "2"]
    words += [
        "--model",
        "mlp",
        "--hidden",
        "8",
        "--replicas",
        "2",
        "--batch",
        "16",
        "--steps",
        "50",
        "--progress",
        "off",
    ]
    for ranks in (1, 2):
        finished = qnewton(ranks, "train", *words, "--output", f"{ranks}.h5")
        assert finished.returncode in (0, 2), finished.stderr  # it may be worse than at the start
    one, two = (Run(Path(f"{ranks}.h5")) for ranks in (1, 2))
    assert len(one.steps["step"]) == len(two.steps["step"]) < 50
    assert one.attributes["best_step"] == two.attributes["best_step"]


@pytest.mark.parametrize("which", ["last", "ema", "best"])
@pytest.mark.parametrize("source", ["run.h5", "saved"])
def test_a_run_begins_with_the_parameters_of_another(source, which):
    train(**HELD_OUT, **SGD, steps=6, output="run.h5", checkpoint="saved")
    # Others' losses are so low that a run cannot but be worse at first, which is no divergence.
    begun = {"init_from": source, "init_which": which, "output": "next.h5", "checkpoint": "more"}
    model = train(**HELD_OUT | {"seed": 7}, method="kronecker", steps=2, **begun)
    first = load(source, which)
    before = predictions.predict(first, part="validation").nll
    assert model.history["validation_nll"][0] == pytest.approx(before, rel=1e-5)
    assert model.options["init_from"] == str(Path(source).absolute())
    for path in ("run.h5", "saved"):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
    train(**HELD_OUT | {"seed": 7}, method="kronecker", steps=4, **begun, resume=True)  # needs it no more


def test_classes_in_another_order_are_told(caplog):
    train(**SHORT, **SGD, steps=1, output="run.h5")
    description = Description.read(read(Path("run.h5")).network)
    for classes in (description.classes, description.classes[::-1]):
        initial_for(description.build(), classes, Path("run.h5"), "last")
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "class 0 was" in told
    assert "outputs go by the place of a class" in told


def test_statistics_come_along():
    own = SHORT | {"model": "own_networks:Net"}
    del own["hidden"]
    train(**own, **SGD, steps=4, output="run.h5")
    with pytest.raises(UserError, match="frozen, which no step changes, is another than in the run: give --seed"):
        train(**own, **SGD, steps=1, init_from="run.h5", seed=5, output="next.h5")
    model = train(**own | {"batch": 32}, **SGD, steps=1, init_from="run.h5", output="next.h5")
    assert model.history["test_nll"][0] == pytest.approx(load("run.h5").history["test_nll"][-1], rel=1e-5)
    assert model.parameters["norm.num_batches_tracked"] == [5]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hidden": "9"}, r"--init-from .*run.h5: is of another network: hidden was \[8\] and is \[9\]"),
        ({"activation": "relu"}, "is of another network: activation was tanh and is relu"),
        ({"model": "convnet", "hidden": None}, "is of another network: kind was mlp and is convnet"),
        ({"init_from": "missing.h5"}, "missing.h5: no such file"),
        ({"init_which": "best"}, "has no best parameters"),
        ({"init_which": "first"}, "init_which = first: must be one of last, ema, tail, best"),
        ({"init_from": None, "init_which": "ema"}, "--init-which needs a run to begin from: --init-from"),
    ],
)
def test_parameters_that_do_not_fit(options, told):
    train(**SHORT, **SGD, steps=1, output="run.h5")
    with pytest.raises(UserError, match=told):
        train(**SHORT | SGD | {"steps": 1, "init_from": "run.h5", "output": "next.h5"} | options)


def test_pixels_are_moved_and_mirrored():
    order = BatchOrder(1000, 64, 4, seed=1)
    both, crops, flips = (Augmentation(kinds, (16, 24), order) for kinds in (("crop", "flip"), ("crop",), ("flip",)))
    rows, columns = both.pixels(5, range(4))
    assert (rows.shape, columns.shape) == ((4, 16, 16), (4, 16, 24))
    np.testing.assert_array_equal(crops.pixels(5, range(4))[0], rows)
    mirrored = flips.pixels(5, range(4))[1]
    ways = {tuple(row) for row in mirrored.reshape(-1, 24)}
    assert ways == {tuple(range(24)), tuple(range(23, -1, -1))}
    np.testing.assert_array_equal(flips.pixels(5, range(4))[0], np.broadcast_to(np.arange(16), (4, 16, 16)))
    moved = {int(row[8]) - 8 for row in rows.reshape(-1, 16)}
    assert moved == {-2, -1, 0, 1, 2}
    assert {int(row[12]) - 12 for row in crops.pixels(5, range(4))[1].reshape(-1, 24)} == set(range(-3, 4))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 15, 0, 23)
    assert (np.diff(rows, axis=-1) >= 0).all()  # the edge is repeated
    assert not np.array_equal(both.pixels(6, range(4))[0], rows)


def test_images_are_the_same_for_any_number_of_replicas():
    split = datasets.load(datasets.EMBEDDED).train
    network = Mlp((1, 28, 28), (8,), "tanh", 10)
    batches = []
    for replicas in (1, 2, 8):
        order = BatchOrder(len(split), 64, replicas, seed=1)
        loss = ReplicaLoss(network, split, order, Augmentation(("crop", "flip"), (28, 28), order), step=3)
        batches.append(loss._batches(range(replicas))[0].reshape(64, 1, 28, 28))
        one = np.concatenate([loss._batches([replica])[0] for replica in range(replicas)])
        np.testing.assert_array_equal(one.reshape(64, 1, 28, 28), batches[0])
    np.testing.assert_array_equal(batches[1], batches[0])
    np.testing.assert_array_equal(batches[2], batches[0])
    order = BatchOrder(len(split), 64, 1, seed=1)
    plain = ReplicaLoss(network, split, order, step=3)._batches([0])[0]
    rows, columns = Augmentation(("crop", "flip"), (28, 28), order).pixels(3, [0])
    for k in range(64):
        np.testing.assert_array_equal(batches[0][k], plain[0, k][:, rows[0, k]][:, :, columns[0, k]])


def test_moved_images_on_two_ranks(qnewton):
    words = [word for name, value in (SHORT | SGD).items() for word in (f"--{name.replace('_', '-')}", value)]
    for ranks in (1, 2):
        finished = qnewton(ranks, "train", *words, "--augment", "flip,crop", "--steps", "4", "--output", f"{ranks}.h5")
        assert finished.returncode == 0, finished.stderr
    one, two = (Run(Path(f"{ranks}.h5")) for ranks in (1, 2))
    assert one.attributes["augment"] == "crop,flip"
    np.testing.assert_allclose(two.steps["loss"], one.steps["loss"], rtol=1e-5)


@pytest.mark.parametrize("value", ["rotate", "crop,rotate", ",", "crop flip"])
def test_other_augmentations_are_refused(value, capsys):
    assert cli.run(["train", "--augment", value, "--output", "run.h5"]) == 2
    assert f"augment = {value}: must be crop, flip or crop,flip" in capsys.readouterr().err
