"""What the package offers by name, loaded when it is asked for, and `train` from Python."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qnewton_mpi
from qnewton_mpi import origin, train
from qnewton_mpi.errors import UserError
from qnewton_mpi.results.run import Run

SHORT = {"method": "sgd", "replicas": 2, "batch": 32, "steps": 2, "evaluate_every": 100, "progress": "off"}


def python(program, **environ):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environ, timeout=600, check=False)


def test_the_import_loads_nothing():
    program = (
        "import qnewton_mpi, sys; dir(qnewton_mpi); assert not {'numpy', 'mpi4py', 'torch', 'h5py'} & {*sys.modules}"
    )
    assert python(program).stderr == ""


@pytest.mark.parametrize("name", ["Communicator", "Model", "create", "load", "train"])
def test_each_name_by_itself_and_without_torch(name):
    finished = python(
        f"import sys; sys.modules['torch'] = None; from qnewton_mpi import {name} as it; print(it.__name__)"
    )
    assert finished.stdout == f"{name}\n", finished.stderr


def test_names():
    assert {*qnewton_mpi.__all__} <= {*dir(qnewton_mpi)}
    assert {*qnewton_mpi._MODULES} == {*qnewton_mpi.__all__} - {"__version__"}
    with pytest.raises(AttributeError, match="module 'qnewton_mpi' has no attribute 'tarin'"):
        qnewton_mpi.tarin  # noqa: B018


def test_torch_is_asked_for_in_a_line():
    finished = python("import sys; sys.modules['torch'] = None; from qnewton_mpi import QuasiNewton")
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("qnewton_mpi.errors.MissingPackageError: QuasiNewton needs PyTorch: pip install ")
    optional = "try: from qnewton_mpi import QuasiNewton\nexcept ImportError: print('none')"
    finished = python(f"import sys; sys.modules['torch'] = None\n{optional}")
    assert finished.stdout == "none\n", finished.stderr


def test_a_model_is_loaded_without_mpi(tmp_path):
    train(**SHORT, output=tmp_path / "run.h5")
    program = f"from qnewton_mpi import load; import sys; load({str(tmp_path / 'run.h5')!r})"
    assert python(f"{program}; assert 'mpi4py.MPI' not in sys.modules", MPI4PY_LIBMPI="/nowhere/libmpi.so").stderr == ""


@pytest.mark.parametrize(
    ("root", "source", "command"),
    [
        ("here", {}, "pip install '.[plot]'"),
        ("there", {}, "pip install '{there}[plot]'"),
        ("nowhere", {"url": "file://{there}"}, "pip install '{there}[plot]'"),
        ("nowhere", {"url": "file://{gone}"}, "pip install 'qnewton-mpi[plot]'"),
        ("nowhere", {}, "pip install 'qnewton-mpi[plot]'"),
        (
            "nowhere",
            {"url": "https://host/repository", "vcs_info": {"vcs": "git"}},
            "pip install 'qnewton-mpi[plot] @ git+https://host/repository'",
        ),
    ],
)
def test_hints_fit_the_installation(tmp_path, monkeypatch, root, source, command):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").touch()
    places = {name: str(tmp_path / name) for name in ("there", "gone")}
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(origin, "ROOT", tmp_path / root)
    monkeypatch.setattr(
        origin, "_source", lambda: source | {k: v.format(**places) for k, v in source.items() if k == "url"}
    )
    assert origin.pip_install("plot") == command.format(**places)


def test_the_hint_of_this_installation_is_one_of_a_checkout(monkeypatch):
    root = Path(qnewton_mpi.__file__).parents[1]
    monkeypatch.chdir(root)
    assert origin.pip_install("cuda12", "cuda13") == "pip install '.[cuda12]' or pip install '.[cuda13]'"


def test_train_takes_a_file_a_table_and_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('method = "sgd"\nlr = 0.25\nsteps = 2\nreplicas = 2\nbatch = 32\nprogress = "off"\n')
    models = [
        train("run.toml", evaluate_every=100, output="a.h5"),
        train({**SHORT, "lr": 7}, lr=0.25, output=Path("b.h5")),
        train(**SHORT, lr=0.25, output="c.h5", checkpoint=None),
    ]
    for model in models[1:]:
        for name, array in models[0].parameters.items():
            np.testing.assert_array_equal(model.parameters[name], array)
    assert [str(model.path) for model in models] == ["a.h5", "b.h5", "c.h5"]
    assert Run(Path("a.h5")).finished
    assert list(models[0].history["step"]) == [0, 2]


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [
        (None, {"epoch": 1}, "unknown option 'epoch'"),
        ("missing.toml", {}, "missing.toml: no such file"),
        (None, {"epochs": 1, "steps": 1}, "contradict"),
        (None, {**SHORT, "output": "there.h5"}, "there.h5 exists"),
    ],
)
def test_train_refuses_in_a_line(tmp_path, monkeypatch, config, options, told):
    monkeypatch.chdir(tmp_path)
    Path("there.h5").touch()
    with pytest.raises(UserError, match=told):
        train(config, **options)


def test_train_on_two_ranks(mpiexec, tmp_path):
    """The ranks have the same model; a mistake is told once."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from qnewton_mpi import Communicator, train\n"
        f"model = train({SHORT!r}, output=sys.argv[1])\n"
        "import numpy as np\n"
        "sums = Communicator().mpi.allgather(sum(a.sum(dtype=float) for a in model.parameters.values()))\n"
        "assert sums[0] == sums[1] != 0 and model.options['ranks'] == 2\n"
    )
    assert mpiexec(2, program, tmp_path / "run.h5").stderr == ""
    again = mpiexec(2, program, tmp_path / "run.h5")
    assert again.returncode != 0
    assert again.stderr.count("run.h5 exists: name another --output") == 1
    assert "Traceback" not in again.stderr
