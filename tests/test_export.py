"""Runs as a table that other programs read."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest

from qnewton_mpi import cli, train
from qnewton_mpi.results.run import Run
from qnewton_mpi.studies.export import labelled, text_of
from qnewton_mpi.studies.store import read_runs

pytestmark = pytest.mark.slow

SHORT = {"replicas": 2, "batch": 32, "steps": 4, "evaluate_every": 2, "progress": "off"}
STUDY = Path(__file__).parents[1] / "tests" / "data" / "study-of-an-earlier-version.h5"  # of an earlier version


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    for name, options in {"sgd": {"method": "sgd"}, "kronecker": {}}.items():
        train(**SHORT, **options, output=folder / f"{name}.h5")
    return [folder / "sgd.h5", folder / "kronecker.h5"]


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("what", ["epochs", "steps"])
def test_all_figures_come_back(files, what):
    lines = table(text_of(labelled(files), what))
    for path in files:
        run = Run(path)
        mine = [line for line in lines if line["run"] == str(path)]
        columns = run.epochs if what == "epochs" else run.steps
        assert (
            [int(line["step"]) for line in mine]
            == columns["step"].tolist()
            == ([0, 2, 4], [1, 2, 3, 4])[what == "steps"]
        )
        np.testing.assert_allclose([float(line["epoch"]) for line in mine], columns["step"] / (10_000 // 32))
        for name, values in columns.items():
            told = [float(line[name]) if line[name] else math.nan for line in mine]
            np.testing.assert_array_equal(told, values, name)
        assert {(line["method"], line["lr"], line["seed"]) for line in mine} == {
            (path.stem, "auto" if path.stem == "kronecker" else "0.3", "0")
        }
    assert len({line["row"] for line in lines}) == 2
    if what == "steps":  # what only one of them has is empty in the other's lines
        assert {line["curvature"] for line in lines if line["method"] == "sgd"} == {""}


def test_a_study_of_an_earlier_version():
    lines, runs = table(text_of(labelled([STUDY]), "epochs")), read_runs(STUDY)
    assert len(lines) == sum(len(run.epochs["step"]) for run in runs)
    assert {line["row"] for line in lines} == {run.attributes["row"] for run in runs}
    assert {line["stage"] for line in lines} == {"final"}
    assert len({line["run"] for line in lines}) == len(runs)


def test_a_running_run_without_an_evaluation(files, tmp_path):
    run = Run(files[0])
    run.epochs = {name: values[:1] for name, values in run.epochs.items()}
    from qnewton_mpi.studies.export import epochs_of

    np.testing.assert_allclose(epochs_of(run, run.steps["step"]), run.steps["step"] / (10_000 // 32))
    del run.attributes["train_samples"]
    assert np.isnan(epochs_of(run, run.steps["step"])).all()


def test_on_the_command_line(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["export", str(files[0]), str(files[0]), "--what", "steps", "--output", "-"]) == 0
    printed = capsys.readouterr().out
    assert len(table(printed)) == 4  # a run once
    assert not Path("-").exists()
    write = ["export", str(files[0]), "--what", "steps", "--output", "new/table.csv"]
    assert cli.run(write) == 0
    assert Path("new/table.csv").read_text() == printed
    assert "4 lines written to new/table.csv" in capsys.readouterr().out
    assert cli.run(write) == cli.USAGE_ERROR
    assert "new/table.csv exists" in capsys.readouterr().err
    assert cli.run([*write, "--overwrite"]) == 0
    Path("notes.csv").write_text("mine\n")
    capsys.readouterr()
    for wrong, told in (
        (["export", str(files[0]), "--output", "notes.csv", "--overwrite"], "notes.csv: is not a table of runs"),
        (["export", str(STUDY), "--what", "steps", "--output", "-"], "a study keeps no steps of its runs"),
        (["export", "missing.h5", "--output", "-"], "missing.h5: no such file"),
        (["export", str(files[0])], "required: --output"),
    ):
        assert cli.run(wrong) == cli.USAGE_ERROR
        said = capsys.readouterr()
        assert told in said.err
        assert (said.out, said.err.count("\n")) == ("", 1)
    assert Path("notes.csv").read_text() == "mine\n"


def test_by_pandas(files, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(io.StringIO(text_of(labelled(files), "epochs")))
    assert frame.groupby("row")["train_nll"].last().notna().all()
    assert frame["step"].dtype == np.int64
    np.testing.assert_array_equal(frame["train_nll"][:3], Run(files[0]).epochs["train_nll"])
