"""Studies: the plan, running it, being cut off, and the report."""

import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from qnewton_mpi.errors import UserError
from qnewton_mpi.studies.plan import at_edge, best_rate, next_rate, read_study
from qnewton_mpi.studies.report import draw, markdown, reached_at, read_results
from qnewton_mpi.studies.store import read_runs
from qnewton_mpi.training.runfile import EPOCH_FIGURES

SMALL = """
seeds = [0, 1]
tuning_seed = 7
extensions = 1
[common]
steps = 3
[[row]]
name = "SGD"
baseline = true
method = "sgd"
lr = [0.001, 0.002]
[[row]]
name = "diverges"
method = "sgd"
activation = "relu"
lr = 1e15
[[row]]
name = "fisher"
method = "fisher"
replicas = [2, 4]
"""


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [", "cannot be read as TOML"),
        ("seeds = [0]", r"no \[\[row\]\]"),
        ("rows = 3\n[[row]]\nname = 'a'", "unknown rows"),
        ("[[row]]\nmethod = 'sgd'", "needs a name"),
        ("[[row]]\nname = 'a'\nmethod = 'newton'", "row 'a': method = newton"),
        ("[[row]]\nname = 'a'\nmethod = 'sgd'\nlr = [0.1, -1.0]", "lr = -1.0: must be greater"),
        ("[[row]]\nname = 'a'\n[[row]]\nname = 'a'", "two rows are called 'a'"),
        ("seeds = [1]\ntuning_seed = 1\n[[row]]\nname = 'a'", "judged on fresh ones"),
        ("tune_by = 'speed'\n[[row]]\nname = 'a'", "no figure of a run"),
    ],
)
def test_bad_plans(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_study(write(tmp_path / "study.toml", text))


def test_the_rate_auto_is_not_tuned(tmp_path):
    study = read_study(write(tmp_path / "study.toml", "[[row]]\nname = 'a'\nmethod = 'sgd'\nlr = 'auto'"))
    assert (study.rows[0].rates, study.rows[0].options) == ((), {"method": "sgd", "lr": "auto"})


def test_lists_make_rows_but_for_the_rate(tmp_path):
    study = read_study(write(tmp_path / "study.toml", SMALL))
    assert [row.name for row in study.rows] == ["SGD", "diverges", "fisher replicas=2", "fisher replicas=4"]
    assert [row.rates for row in study.rows] == [(0.001, 0.002), (1e15,), (), ()]
    assert study.rows[3].options == {"steps": 3, "method": "fisher", "replicas": 4}


def test_grids_grow_until_the_best_is_inside():
    scores = {0.1: 3.0, 0.2: 2.0}
    assert next_rate(scores) == pytest.approx(0.4)
    assert next_rate({**scores, 0.4: 1.0}) == pytest.approx(0.8)
    assert next_rate({**scores, 0.4: np.nan}) is None
    assert next_rate({0.1: 1.0, 0.2: 2.0}) == pytest.approx(0.05)
    assert next_rate({0.1: 1.0}) is None
    assert best_rate({0.1: np.nan, 0.2: np.inf, 0.4: 3.0}) == 0.4
    assert at_edge(0.4, [0.1, 0.4])
    assert not at_edge(0.2, [0.1, 0.2, 0.4])
    assert not at_edge(0.1, [])


def contents(path):
    """Return what a study's file says, but for times, which no two runs share."""
    return {
        (run.attributes["row"], run.attributes["stage"], float(run.attributes["lr"]), int(run.attributes["seed"])): (
            run.attributes["status"],
            *(tuple(v) for k, v in sorted(run.epochs.items()) if "seconds" not in k),
        )
        for run in read_runs(path)
    }


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key][0] == b[key][0]
        np.testing.assert_array_equal(a[key][1:], b[key][1:])


def test_a_study_cut_off_goes_on_to_the_same_content(mpiexec, tmp_path):
    plan = write(tmp_path / "study.toml", SMALL)

    def command(output):
        return ["-m", "qnewton_mpi", "compare", plan, "--output", tmp_path / output]

    whole = mpiexec(2, *command("whole.h5"))
    assert whole.returncode == 0, whole.stderr
    assert not (tmp_path / "whole.runs").exists()

    arguments = [mpiexec.launcher, "-n", "2", sys.executable, *map(str, command("cut.h5"))]
    process = subprocess.Popen(arguments, env=mpiexec.environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    for _ in range(3):
        assert process.stderr.readline(), "the study ended by itself"
    process.terminate()
    process.communicate()
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-f", str(tmp_path / "cut.h5")], check=False, capture_output=True).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (tmp_path / "cut.h5").exists()
    again = mpiexec(2, *command("cut.h5"))
    assert again.returncode == 0, again.stderr
    assert len(again.stderr.splitlines()) <= len(whole.stderr.splitlines()) - 3
    same(contents(tmp_path / "whole.h5"), contents(tmp_path / "cut.h5"))

    # Groups of two ranks do the same runs to rounding; a changed row alone is repeated.
    write(tmp_path / "study.toml", SMALL.replace("replicas = [2, 4]", "replicas = [2, 8]"))
    third = mpiexec(2, *command("cut.h5"), "--ranks-per-run", "2")
    assert third.returncode == 0, third.stderr
    told = third.stderr.splitlines()
    assert len(told) == 2
    assert all("fisher replicas=8" in line for line in told)

    before = contents(tmp_path / "cut.h5")
    once_more = mpiexec(2, *command("cut.h5"), "--again", "fisher*=8")
    assert once_more.returncode == 0, once_more.stderr
    assert len(once_more.stderr.splitlines()) == 2
    assert "fisher replicas=8" in once_more.stderr.splitlines()[0]
    assert before.keys() == contents(tmp_path / "cut.h5").keys()

    results = {result.name: result for result in read_results(tmp_path / "cut.h5")}
    assert set(results) == {"SGD", "diverges", "fisher replicas=2", "fisher replicas=8"}
    assert results["diverges"].diverged == 2
    assert results["SGD"].tried == pytest.approx([0.001, 0.002, 0.004])


def make_study(path):
    """Two baselines and a method whose curves are known: NLL = start · factorᵏ at evaluation k."""
    with h5py.File(path, "w") as file:
        for name, baseline, last, seconds in (
            ("A", True, 0.5, 10.0),
            ("B", True, 0.4, 20.0),
            ("new", False, 0.2, 40.0),
        ):
            for seed in (0, 1):
                group = file.create_group(f"{name}-{seed}")
                group.attrs.update({"row": name, "stage": "final", "baseline": baseline, "lr": 0.1, "seed": seed})
                group.attrs["status"] = "finished"
                nll = np.array([1.0, np.sqrt(last), last]) * (1 + (0.01 if seed else -0.01))
                for figure in EPOCH_FIGURES:
                    group[f"epochs/{figure}"] = nll if "nll" in figure else np.array([0.0, 0.5, 1.0]) * seconds
        group = file.copy("A-0", "A-tune") or file["A-tune"]
        group.attrs["stage"] = "tuning"
        file.copy("new-1", "new-2")
        file["new-2"].attrs["status"] = "failed: step 3"


def test_report_on_a_made_study(tmp_path):
    make_study(tmp_path / "study.h5")
    table = markdown(read_results(tmp_path / "study.h5")).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in table[2:]}
    assert cells["B (baseline)"][2:7] == ["2", "0.4000 ± 0.0057", "1.00", "0.4000 ± 0.0057", "1.00"]
    assert cells["A (baseline)"][4] == "1.25"
    assert cells["A (baseline)"][0] == "0.1"
    assert cells["new"][2] == "2 + 1 diverged"
    assert cells["new"][4] == "0.50"
    assert cells["new"][-1] == "–"  # one run diverged: no cost is claimed
    assert cells["A (baseline)"][-1] == "–"  # never gets there
    assert cells["B (baseline)"][-1] == "1.00"


def test_seconds_of_a_suspended_machine_do_not_count(tmp_path):
    make_study(tmp_path / "study.h5")
    with h5py.File(tmp_path / "study.h5", "a") as file:
        file.copy("B-0", "B-2")
        file["B-2/epochs/wall_seconds"][...] *= 100
    (result,) = (r for r in read_results(tmp_path / "study.h5") if r.name == "B")
    assert list(result.curve("wall_seconds")) == [0.0, 10.0, 20.0]


def test_reached_at():
    cost, nll = np.array([0.0, 10.0, 20.0]), np.array([1.0, 0.1, 0.01])
    assert reached_at(cost, nll, 0.1) == pytest.approx(10)
    assert reached_at(cost, nll, 2.0) == 0
    assert np.isnan(reached_at(cost, nll, 0.001))


def test_report_writes_beside_the_study(qnewton, tmp_path):
    pytest.importorskip("matplotlib")
    make_study(tmp_path / "study.h5")
    finished = qnewton(1, "report", "study.h5", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "study.md").read_text().strip() in finished.stdout
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    again = qnewton(1, "report", "study.h5", cwd=tmp_path)
    assert again.returncode == 2
    assert "study.md exists" in again.stderr
    assert qnewton(1, "report", "study.h5", "--overwrite", cwd=tmp_path).returncode == 0
    (tmp_path / "study.md").write_text("Notes of mine")
    kept = qnewton(1, "report", "study.h5", "--overwrite", cwd=tmp_path)
    assert kept.returncode == 2
    assert "study.md: is not a table" in kept.stderr
    assert (tmp_path / "study.md").read_text() == "Notes of mine"
    missing = qnewton(2, "report", "nothing.h5", cwd=tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.count("nothing.h5: cannot be read") == 1


def change(name, value):
    return lambda file: file["A-0"].attrs.__setitem__(name, value)


def replace_column(value):
    def damage(file):
        del file["B-1/epochs/train_nll"]
        file["B-1/epochs/train_nll"] = value

    return damage


def shorten(file):
    for figure in EPOCH_FIGURES:
        column = file[f"B-1/epochs/{figure}"][:-1]
        del file[f"B-1/epochs/{figure}"]
        file[f"B-1/epochs/{figure}"] = column


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda file: file.__setitem__("more", np.zeros(3)), "more is no group"),
        (lambda file: file.__setitem__("more", h5py.ExternalLink("/dev/zero", "/")), "more is a link"),
        (lambda file: file.create_group("more"), "status"),
        (change("row", 5), "row"),
        (change("baseline", "yes"), "baseline"),
        (change("status", "well"), "status well"),
        (change("lr", [0.1, 0.2]), "lr is no number or text"),
        (replace_column(1.0), "not a column"),
        (replace_column(np.zeros(2)), "differ in length"),
        (shorten, "the runs of row 'B' have not as many evaluations"),
        (lambda file: file["new-0"].attrs.update({"stage": "tuning", "row": "C"}), "row 'C' has no run that counts"),
    ],
)
def test_studies_that_are_not_as_they_should_be(tmp_path, damage, match):
    make_study(tmp_path / "study.h5")
    with h5py.File(tmp_path / "study.h5", "a") as file:
        damage(file)
    with pytest.raises(UserError, match=match):
        read_results(tmp_path / "study.h5")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0, 1e308])
@pytest.mark.parametrize("name", ["B", "x_{$²$} | 007", "2" * 5000])
def test_whatever_a_study_says_is_reported(tmp_path, value, name):
    pytest.importorskip("matplotlib")
    make_study(tmp_path / "study.h5")
    with h5py.File(tmp_path / "study.h5", "a") as file:
        for run in ("B-0", "B-1"):
            file[run].attrs.update({"row": name, "lr": "auto"})
            for figure in ("train_nll", "tail_train_nll", "wall_seconds"):
                file[f"{run}/epochs/{figure}"][1:] = value
    results = read_results(tmp_path / "study.h5")
    lines = markdown(results).splitlines()
    assert len(lines) == 5
    assert {line.replace("\\|", "").count("|") for line in lines} == {12}
    draw(results, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
