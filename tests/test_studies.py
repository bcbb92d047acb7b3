"""Studies: the plan, running it, being cut off, and the report."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from test_data import write_mnist

from qnewton_mpi.cli import INTERRUPTED, check, parse
from qnewton_mpi.config import resolve, run_config
from qnewton_mpi.errors import UserError
from qnewton_mpi.files.locks import lock_of, locked
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.results.layout import EPOCH_FIGURES
from qnewton_mpi.results.run import Run
from qnewton_mpi.studies.compare import compare
from qnewton_mpi.studies.plan import OF_THE_STUDY, at_edge, best_rate, line_of, next_rate, read_study
from qnewton_mpi.studies.report import draw, markdown, reached_at, read_results
from qnewton_mpi.studies.store import Store, read_runs, run_name, runs_in
from qnewton_mpi.training.loop import train

SMALL = """
seeds = [0, 1]
tuning_seed = 7
extensions = 1
[common]
data = "mnist"
data_dir = "data"
batch = 32
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
DONE = re.compile(", (tuning|final): ")
SHORT, ENDLESS = "[[row]]\nname = 'short'\nsteps = 2\n", "[[row]]\nname = 'endless'\nsteps = 10000000\n"


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


ROW = "[[row]]\nname = 'a'\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("seeds = [0]\nrows = 3\n" + ROW, 2, "unknown rows"),
        ("seeds = 3\n" + ROW, 1, "seeds must be a list of integers, one at least"),
        ("seeds = []\n" + ROW, 1, "seeds must be a list of integers, one at least"),
        ("seeds = [0, true]\n" + ROW, 1, "seed must be an integer"),
        ("seeds = [0, 0.5]\n" + ROW, 1, "seed must be an integer"),
        ("\nseeds = [0, -1]\n" + ROW, 2, "seed = -1: must be at least 0"),
        ("seeds = [3, 3]\n" + ROW, 1, "twice"),
        ("tuning_seed = '7'\n" + ROW, 1, "seed must be an integer"),
        ("# first\ntuning_seed = 3\n" + ROW, 2, "judged on fresh ones"),
        ("tune_by = ['train_nll']\n" + ROW, 1, "no figure of a run"),
        ("extensions = -1\n" + ROW, 1, "extensions must be an integer, 0 to 100"),
        ("extensions = '3'\n" + ROW, 1, "extensions must be an integer"),
        ("extensions = true\n" + ROW, 1, "extensions must be an integer"),
        ("common = 3\n" + ROW, 1, "common must be a table"),
        ("row = 3", 1, r"no \[\[row\]\]"),
        ("row = []", 1, r"no \[\[row\]\]"),
        ("row = [1]", 1, "row must be tables"),
        (ROW + "[[row]]\nname = ''", 4, "needs a name"),
        (ROW + "[[row]]\nname = 3", 4, "needs a name"),
        (ROW + "[[row]]\nsteps = 3", 3, "needs a name"),
        ("[[row]]\nname = 'x'\nbaseline = 'yes'", 3, "baseline must be true or false"),
        ('[[row]]\nname = "a\\nb"', 2, "needs a name"),
        ('[[row]]\nname = "a\\u0000b"', 2, "needs a name"),
        (f"[[row]]\nname = '{'n' * 5000}'", 2, "needs a name"),
        (ROW + ROW, 4, "two rows are called 'a'"),
        (ROW + "lr = []", 3, r"lr = \[\]: a list needs one value"),
        (ROW + "replicas = []", 3, r"replicas = \[\]: a list needs one value"),
        (ROW + "lr = [0.1, 'auto']", 3, "auto is no rate of a grid"),
        (ROW + "lr = [0.1, 'fast']", 3, "lr = fast: must be a finite number"),
        (ROW + "lr = [0.1, true]", 3, "lr = True: must be a finite number"),
        (ROW + "lr = [0.1, nan]", 3, "lr = nan: must be a finite number"),
        (ROW + "lr = -inf", 3, "lr = -inf: must be a finite number"),
        (ROW + "lr = [0.1, 0]", 3, "lr = 0: must be greater than 0"),
        (ROW + "lr = 0", 3, "lr = 0: must be greater than 0"),
        (ROW + "lr = [[0.1]]", 3, "lr = .*: must be a finite number"),
        (ROW + "replicas = [2, 'two']", 3, "replicas = two: must be an integer"),
        (ROW + "replicas = [[2]]", 3, "replicas = .*: must be an integer"),
        (ROW + "steps = {a = 1}", 3, "steps = .*: must be an integer"),
        (ROW + "steps = 1979-05-27", 3, "steps = .*: must be an integer"),
        (ROW + f"steps = {list(range(1, 200))}\nbatch = {list(range(200))}", 1, "more than 10000 rows"),
        (ROW + "evaluate-every = 0", 3, "evaluate_every = 0: must be greater than 0"),
        (ROW + "evaluate-every = 1\nevaluate_every = 2", 1, "twice, with a dash and with an underscore"),
        (ROW + "learning_rate = 1", 3, "unknown option 'learning_rate'"),
        (ROW + "method = 'sgd'\nrank = 3", 4, "rank is an option of fisher, not of sgd"),
        ("[common]\nsteps = 3\nbatch = 0\n" + ROW, 3, "batch = 0: must be greater than 0"),
        ("[common]\nbatch = 0\n" + ROW + "batch = -1", 5, "batch = -1: must be greater than 0"),
        (ROW + "replicas = 6", 3, "a batch of 256 cannot be shared by 6 replicas"),
        (ROW + "on_nonfinite = 'rollback'", 1, "rollback needs something to go back to"),
        *((ROW + f"{name} = 1", 3, f"{name} is not for the runs of a study") for name in sorted(OF_THE_STUDY)),
    ],
)
def test_what_is_wrong_with_a_plan_and_where(tmp_path, text, line, message):
    path = write(tmp_path / "study.toml", text)
    with pytest.raises(UserError, match=rf"^{re.escape(path)}, line {line}: .*{message}") as caught:
        read_study(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"\xff", b"\0", b"row = " + b"[" * 5000, b"seeds = [" + b"1" * 5000 + b"]", b"[[row]]\nname = 'a", None]
)
def test_plans_that_are_no_toml(tmp_path, content):
    path = tmp_path / "study.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"study\.toml") as caught:
        read_study(str(path))
    assert "\n" not in str(caught.value)


def test_a_plan_must_suit_the_ranks_of_a_run(tmp_path):
    path = write(tmp_path / "study.toml", ROW + "method = 'sgd'\nreplicas = [8, 2]")
    with pytest.raises(UserError, match="line 4: row 'a': 2 replicas on 4 ranks leave ranks idle"):
        read_study(path, 4)


@pytest.mark.parametrize(
    ("text", "row", "key", "line"),
    [
        ("a = 1\nb = 2", None, "b", 2),
        ('"a" = 1\n[ common ]\n  b-c=1', 0, "b_c", 3),
        ("[[row]]\nx = '''\n[[row]]\ny = 1\n'''\ny = 2\n[[ 'row' ]]\ny.z = 3", 0, "y", 6),
        ("[[row]]\nx = '''\n[[row]]\ny = 1\n'''\ny = 2\n[[ 'row' ]]\ny.z = 3", 1, "y", 8),
        ("[[row]]\n# y = 1\nx = ['y', # a\n 3]\ny = 1", 0, "y", 5),
        ("row = [{a = 1}]", 0, "a", None),
        ("[[row]]", None, "row", 1),
    ],
)
def test_lines(text, row, key, line):
    assert line_of(text, row, key) == line


def test_the_rate_auto_is_not_tuned(tmp_path):
    study = read_study(write(tmp_path / "study.toml", "[[row]]\nname = 'a'\nmethod = 'sgd'\nlr = 'auto'"))
    assert (study.rows[0].rates, study.rows[0].options) == ((), {"method": "sgd", "lr": "auto"})


def test_lists_make_rows_but_for_the_rate(tmp_path):
    study = read_study(write(tmp_path / "study.toml", SMALL))
    assert [row.name for row in study.rows] == ["SGD", "diverges", "fisher replicas=2", "fisher replicas=4"]
    assert [row.rates for row in study.rows] == [(0.001, 0.002), (1e15,), (), ()]
    assert study.rows[3].options.items() >= {"steps": 3, "method": "fisher", "replicas": 4}.items()


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
    assert next_rate({1e-200: 1.0, 1.0: 2.0, 1e200: 3.0}) is None  # beyond is no number
    assert next_rate({1e-200: 3.0, 1.0: 2.0, 1e200: 1.0}) is None


def contents(path):
    """Return what a study's file says, but for times, which no two runs share."""
    return {
        (run.attributes["row"], run.attributes["stage"], run.attributes["lr"], int(run.attributes["seed"])): (
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
    write_mnist(tmp_path / "data", 32)
    plan = write(tmp_path / "study.toml", SMALL)

    def run(output, *options):
        finished = mpiexec(2, "-m", "qnewton_mpi", "compare", plan, "--output", output, *options, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        return [line for line in finished.stderr.splitlines() if DONE.search(line)]

    whole = run("whole.h5")
    assert not (tmp_path / "whole.runs").exists()

    endless, cut = write(tmp_path / "endless.toml", SMALL + ENDLESS), str(tmp_path / "cut.h5")
    program = [mpiexec.launcher, "-n", "2", sys.executable, "-m", "qnewton_mpi", "compare", endless, "--output", cut]
    process = subprocess.Popen(
        program, env=mpiexec.environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path
    )
    done = 0
    while done < 3:
        line = process.stderr.readline()
        assert line, "the study ended by itself"
        done += bool(DONE.search(line))
    process.kill()
    process.communicate()
    while subprocess.run(["pgrep", "-f", cut], check=False, capture_output=True).returncode == 0:
        time.sleep(0.1)  # until no rank is left
    assert not (tmp_path / "cut.h5").exists()
    assert len(run("cut.h5")) <= len(whole) - 3
    same(contents(tmp_path / "whole.h5"), contents(tmp_path / "cut.h5"))

    # Groups of two ranks do the same runs to rounding; a changed row alone is repeated.
    write(tmp_path / "study.toml", SMALL.replace("replicas = [2, 4]", "replicas = [2, 8]"))
    told = run("cut.h5", "--ranks-per-run", "2")
    assert len(told) == 2
    assert all("fisher replicas=8" in line for line in told)

    before = contents(tmp_path / "cut.h5")
    once_more = run("cut.h5", "--again", "fisher*=8")
    assert len(once_more) == 2
    assert "fisher replicas=8" in once_more[0]
    assert before.keys() == contents(tmp_path / "cut.h5").keys()

    results = {result.name: result for result in read_results(tmp_path / "cut.h5")}
    assert set(results) == {"SGD", "diverges", "fisher replicas=2", "fisher replicas=8"}
    assert results["diverges"].diverged == 2
    assert results["SGD"].tried == pytest.approx([0.001, 0.002, 0.004])


TINY = """
seeds = [0]
[common]
data = "mnist"
data_dir = "data"
method = "sgd"
lr = 0.01
replicas = 2
batch = 16
evaluate_every = 5
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Return plan(rows): the path of a study of rows on a few samples, in the present folder."""
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data", 32)
    return lambda rows: write(tmp_path / "s.toml", TINY + rows)


def kept(folder):
    return sorted(path.name.rpartition("-")[0] for path in folder.glob("*.h5"))


def test_a_row_that_is_stopped_ends_the_study_after_the_runs_under_way(tiny, qnewton, tmp_path):
    plan = tiny(ENDLESS + "time_limit = 0.01\n" + SHORT)
    finished = qnewton(2, "compare", plan, "--output", "s.h5", cwd=tmp_path)
    assert finished.returncode == INTERRUPTED, finished.stderr
    assert finished.stderr.count("stopped in row 'endless'; the same command goes on from the runs that are done") == 1
    assert kept(tmp_path / "s.runs") in ([], ["short"])  # it may not have begun
    plan = tiny(SHORT + ENDLESS.replace("10000000", "3"))
    assert qnewton(2, "compare", plan, "--output", "s.h5", cwd=tmp_path).returncode == 0
    assert sorted(run.attributes["row"] for run in read_runs(tmp_path / "s.h5")) == ["endless", "short"]
    assert not (tmp_path / "s.runs").exists()


def test_a_signal_to_one_rank_stops_all_groups(tiny, mpiexec, tmp_path):
    plan = tiny(ENDLESS + ENDLESS.replace("endless", "too"))
    program = [mpiexec.launcher, "-n", "3", sys.executable, "-m", "qnewton_mpi", "compare", plan, "--output", "s.h5"]
    process = subprocess.Popen(program, env=mpiexec.environ, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    def under_way():
        """Return the lock files of the runs that have done steps."""
        found = []
        for path in tmp_path.glob("s.runs/*.part"):
            with contextlib.suppress(UserError):
                found += [lock_of(path)] * bool(Run(path).last("step") > 0)
        return found

    while len(locks := under_way()) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(json.loads(locks[0].read_text())["pid"], signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == INTERRUPTED, err
    assert err.count("the same command goes on") == 1
    assert not list(tmp_path.glob("**/*.lock"))


def test_a_signal_to_a_group_that_has_nothing_left_to_do_stops_the_others(tiny, mpiexec, tmp_path):
    plan = tiny(SHORT + ENDLESS)
    program = [mpiexec.launcher, "-n", "2", sys.executable, "-m", "qnewton_mpi", "compare", plan, "--output", "s.h5"]
    process = subprocess.Popen(program, env=mpiexec.environ, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    def writers(pattern):
        found = []
        for path in tmp_path.glob(f"s.runs/{pattern}"):
            with contextlib.suppress(UserError):
                found += [Run(path).attributes["writer_pid"]] * bool(Run(path).last("step") > 0)
        return found

    while not (writers("short*.h5") and writers("endless*.part")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(writers("short*.h5")[0], signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == INTERRUPTED, err
    assert err.count("stopped in row 'endless'; the same command goes on") == 1
    assert kept(tmp_path / "s.runs") == ["short"]


def test_an_error_in_one_row_ends_the_study(tiny, qnewton, tmp_path):
    plan = tiny("[[row]]\nname = 'large'\nbatch = 64\n" + SHORT)
    finished = qnewton(2, "compare", plan, "--output", "s.h5", cwd=tmp_path)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("row 'large': a batch of 64 is more than the 32 training samples") == 1
    assert kept(tmp_path / "s.runs") in ([], ["short"])


def test_a_study_has_one_program(tiny, tmp_path):
    study, world = read_study(tiny(SHORT)), Communicator()
    for path in (tmp_path / "s.h5", tmp_path / "s.runs"):
        with (
            locked(lock_of(path), "--output s.h5"),
            pytest.raises(UserError, match=f"being written by process {os.getpid()} on "),
        ):
            compare(study, tmp_path / "s.h5", 1, world)
    (tmp_path / "s.runs").mkdir()
    (tmp_path / "s.runs" / f"{run_name('short', study.rows[0].options)}.claim").touch()  # of one that was killed
    (tmp_path / "s.runs" / "other-study.h5").touch()
    compare(study, tmp_path / "s.h5", 1, world)
    assert [run.attributes["row"] for run in read_runs(tmp_path / "s.h5")] == ["short"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "s.h5", "s.toml"]


def test_places_that_are_no_study(tiny, tmp_path):
    study, world = read_study(tiny(SHORT)), Communicator()
    (tmp_path / "a.runs").touch()
    (tmp_path / "b.runs").symlink_to("data")
    (tmp_path / "c.h5").mkdir()
    (tmp_path / "d.h5").write_text("text")
    (tmp_path / "e.h5").symlink_to("precious")
    (tmp_path / "f.runs").mkdir()
    (tmp_path / "f.runs" / "x.claim").mkdir()
    for name in ("a.h5", "b.h5", "c.h5", "d.h5", "e.h5", "f.h5", "g.runs"):
        with pytest.raises(UserError, match=name[0]) as caught:
            compare(study, tmp_path / name, 1, world)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "precious").exists()
    assert len(list((tmp_path / "data").iterdir())) == 4


def test_a_run_that_is_left_half_written_is_replaced(tiny, tmp_path):
    study, world = read_study(tiny(SHORT)), Communicator()
    store = Store(tmp_path / "s.h5")
    store.open()
    options = {**study.rows[0].options, "seed": 0, "progress": "off", "lr": 0.01}
    store.unfinished(run_name("short", options)).write_bytes(b"half")
    compare(study, tmp_path / "s.h5", 1, world)
    assert len(read_runs(tmp_path / "s.h5")) == 1


def test_runs_that_are_kept_are_those_of_the_study(tiny, tmp_path):
    """By what their files say, not by their names alone."""
    world = Communicator()
    compare(read_study(tiny(SHORT)), tmp_path / "s.h5", 1, world)
    (name,) = runs_in(tmp_path / "s.h5")
    store = Store(tmp_path / "t.h5")
    kept_one = store.folder / f"{name}.h5"
    kept_one.parent.mkdir()
    options = {**read_study(tiny(SHORT)).rows[0].options, "lr": 0.01, "seed": 9, "output": "other.h5"}
    other = train(resolve(run_config(options), 1), world)
    for content, told in (
        (other.read_bytes(), "has another run for short-.*: seed was 9 and is 0"),
        (other.read_bytes()[:3000], "is damaged"),
        (b"", "is empty"),
    ):
        kept_one.write_bytes(content)
        with pytest.raises(UserError, match=f"t.runs/short-.*{told}.*: remove it, and the run is done again"):
            compare(read_study(tiny(SHORT)), tmp_path / "t.h5", 1, world)
    kept_one.unlink()
    compare(read_study(tiny(SHORT)), tmp_path / "t.h5", 1, world)
    write_mnist(tmp_path / "data", 33)
    plan = read_study(tiny(SHORT))
    with pytest.raises(UserError, match=r"s.h5: has another run .*the data set differs: .*--again"):
        compare(plan, tmp_path / "s.h5", 1, world)
    compare(plan, tmp_path / "s.h5", 1, world, again="short")


def test_the_labels_of_runs_are_those_of_the_study_as_it_is(tiny, tmp_path):
    world = Communicator()
    compare(read_study(tiny(SHORT)), tmp_path / "s.h5", 1, world)
    (before,) = read_runs(tmp_path / "s.h5")
    compare(read_study(tiny(SHORT + "baseline = true\n")), tmp_path / "s.h5", 1, world)
    (now,) = read_runs(tmp_path / "s.h5")
    assert now.attributes == before.attributes | {"baseline": True}


def test_what_is_not_the_studys_stays_in_the_folder(tiny, tmp_path):
    (tmp_path / "s.runs").mkdir()
    (tmp_path / "s.runs" / "notes.txt").write_text("precious")
    compare(read_study(tiny(SHORT)), tmp_path / "s.h5", 1, Communicator())
    assert [path.name for path in (tmp_path / "s.runs").iterdir()] == ["notes.txt"]


def test_a_disk_without_room_for_a_claim(tiny, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    study = read_study(tiny(SHORT))
    monkeypatch.setattr("pathlib.Path.touch", full)
    with pytest.raises(UserError, match=r"row 'short': .*s.runs: cannot be written .No space left"):
        compare(study, tmp_path / "s.h5", 1, Communicator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--again", "kronecker*"), r"--again kronecker\*: no row is called so; there are short, endless"),
        (("--ranks-per-run", "2"), "--ranks-per-run 2 does not divide the 3 rank"),
        (("--ranks-per-run", "9"), "--ranks-per-run 9 does not divide the 3 rank"),
    ],
)
def test_options_of_compare(tiny, message, arguments):
    with pytest.raises(UserError, match=message):
        check(parse(["compare", tiny(SHORT + ENDLESS), "--output", "s.h5", *arguments], True), 3)


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
    finished = qnewton(1, "report", "study.h5", cwd=tmp_path, env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
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
    assert missing.stderr.count("nothing.h5: no such file") == 1


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


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("B", value) for value in (np.nan, np.inf, -1.0, 0.0, 1e308)), ("x_{$²$} | 007", 0.3), ("2" * 5000, 0.3)],
)
def test_whatever_a_study_says_is_reported(tmp_path, name, value):
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
