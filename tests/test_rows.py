"""Runs side by side: what is one row, what it is called, and how rows are drawn."""

import shutil

import numpy as np
import pytest

from qnewton_mpi.core.optimizers.natural.kronecker import KroneckerSettings
from qnewton_mpi.results.layout import EPOCH_FIGURES
from qnewton_mpi.results.plotting import MANY, apart, in_panels, plot_runs
from qnewton_mpi.results.rows import distinct, rows, table, title
from qnewton_mpi.results.run import Run
from qnewton_mpi.results.runfile import RunFile
from qnewton_mpi.training.progress import Progress

pytestmark = pytest.mark.slow

ATTRIBUTES = {
    "method": "kronecker",
    "data": "mnist",
    "data_digest": "12ab34cd56",
    "activation": "tanh",
    "replicas": 4,
    "batch": 256,
    "lr": "auto",
    "damping": KroneckerSettings().damping,
    "seed": 0,
    "ranks": 2,
}


def run(tmp_path, name, nll=(2.0, 1.0), **attributes):
    """Return a run with other attributes; None takes one away."""
    path = tmp_path / f"{name}.h5"
    with RunFile(path, {**ATTRIBUTES, "run": name, **attributes}, ["step"], {"": {"w": np.zeros(2)}}) as file:
        for step, value in enumerate(nll):
            row = dict.fromkeys(EPOCH_FIGURES, 1.0) | {"step": step, "epoch": step, "train_nll": value}
            file.add_epoch(row, {"": {"w": np.zeros(2)}})
    return Run(path)


@pytest.mark.parametrize(
    ("other", "called"),
    [
        ({"batch": 32}, "batch=32"),
        ({"activation": "relu"}, ", convnet (relu)"),
        ({"model": "mlp", "hidden": "64"}, ", mlp 64 (tanh)"),
        ({"data": "cifar10", "data_digest": "9"}, "data=cifar10"),
        ({"data_digest": "98fe76dc54"}, "data_digest=98fe76"),
        ({"damping": 0.1}, "damping=0.1"),
        ({"schedule": "cosine"}, "schedule=cosine"),
        ({"epochs": 5}, "epochs=5"),
        ({"ranks": 4}, "ranks=4"),
        ({"exchange": "sliced"}, "exchange=sliced"),
        ({"version_qnewton_mpi": "9.9"}, "qnewton_mpi=9.9"),
        ({"lr": 0.1}, "lr=0.1"),
        ({"replicas": 8}, "M=8"),
    ],
)
def test_what_differs_in_more_than_the_seed_is_a_row_of_its_own(tmp_path, other, called):
    runs = [run(tmp_path, "a"), run(tmp_path, "b", seed=1, output="elsewhere"), run(tmp_path, "c", **other)]
    if "version_qnewton_mpi" in other:  # the file says what writes it
        runs[2].attributes |= other
    (first, two), (second, one) = rows(runs).items()
    assert (two, one) == (runs[:2], runs[2:])
    assert called in second
    assert called not in first
    assert table(runs).count("kronecker M=") == 2


def test_options_later_than_a_file_had_their_defaults(tmp_path):
    old = run(tmp_path, "old", damping=None)
    assert len(rows([old, run(tmp_path, "new")])) == 1
    assert len(rows([old, run(tmp_path, "other", damping=0.1)])) == 2


def test_options_of_one_method_are_no_difference_from_another(tmp_path):
    names = list(rows([run(tmp_path, "a"), run(tmp_path, "b", method="sgd", lr=0.1, damping=None)]))
    assert names == ["kronecker M=4 lr=auto", "sgd M=4 lr=0.1"]


def test_a_run_counts_once(tmp_path):
    early = run(tmp_path, "a")
    shutil.copy(early.path, tmp_path / "copy.h5")
    shutil.move(early.path, tmp_path / "early.h5")
    late = run(tmp_path, "a", nll=(2.0, 1.0, 0.5))
    files = [Run(tmp_path / name) for name in ("early.h5", "a.h5", "copy.h5", "a.h5")]
    assert [kept.last("step") for kept in distinct(files)] == [late.last("step")]
    again = run(tmp_path, "b")  # of the same options, but a run of its own
    assert len(distinct([*files, again])) == 2


def test_without_an_identifier_a_file_counts_once(tmp_path):
    old = run(tmp_path, "a", run=None)
    assert distinct([old, Run(tmp_path / "." / "a.h5")]) == [old]


def test_the_title_says_what_all_have_in_common(tmp_path):
    runs = [run(tmp_path, "a"), run(tmp_path, "b", seed=1)]
    assert title(runs) == "convnet (tanh), mnist, batch 256"
    assert title([*runs, run(tmp_path, "c", batch=32)]) == "convnet (tanh), mnist"


def test_a_picture_has_a_panel_for_few_lines_and_says_each_name_once(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr("qnewton_mpi.results.plotting.save", lambda _, figure, *more, **others: drawn.append(figure))
    runs = [run(tmp_path, f"{k}-{seed}", replicas=k, seed=seed) for k in range(1, 10) for seed in (0, 1)]
    plot_runs(runs, tmp_path / "p.png")
    (figure,) = drawn
    assert len(figure.axes) == 4  # nine rows: two panels, each for training and test
    for axes in figure.axes:
        assert len(axes.lines) == len(axes.collections) <= MANY  # a mean and a band each
        assert len({line.get_color() for line in axes.lines}) == len(axes.lines)
    texts = sorted(text.get_text() for axes in figure.axes for text in axes.texts)
    assert texts == [f"kronecker M={k} lr=auto" for k in range(1, 10)]
    pyplot.close(figure)


def test_runs_evaluated_at_other_steps_are_lines_of_their_own(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("qnewton_mpi.results.plotting.save", lambda _, figure, *more, **others: drawn.append(figure))
    plot_runs([run(tmp_path, "a"), run(tmp_path, "b", seed=1, nll=(2.0, 1.0, 0.5))], tmp_path / "p.png")
    assert [len(axes.lines) for axes in drawn[0].axes] == [2, 2]


@pytest.mark.parametrize("count", [0, 1, 8, 9, 16, 17])
def test_panels_hold_all_lines_and_few_each(count):
    panels = in_panels(range(count))
    assert [line for panel in panels for line in panel] == list(range(count))
    assert len(panels) == -(-count // MANY)
    assert not panels or max(map(len, panels)) - min(map(len, panels)) <= len(panels) - 1


def test_labels_do_not_meet():
    placed = apart([0.0, 0.0, 0.5, 1.0, 1.0, 1.0], least=0.1)
    assert np.diff(placed).min() >= 0.1 - 1e-12
    assert max(placed) <= 1


def test_samples_a_second_of_a_run_that_goes_on_count_from_there(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("qnewton_mpi.training.progress.time.monotonic", lambda: now[0])
    progress = Progress("lines", 20, 1.0, 32, "sgd", done=10, evaluating=50.0)
    for _ in range(5):
        progress.step(1.0)
    now[0] += 10.0  # of which two in an evaluation
    figures = {"evaluation_seconds": 52.0, "epoch": 1, "train_nll": 1.0}
    progress.evaluated(figures, ())
    assert "20 samples/s" in capsys.readouterr().err  # 5 steps of 32 samples in 8 s
