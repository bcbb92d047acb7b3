"""Options: types, ranges, contradictions, and how they fit the ranks."""

import numpy as np
import pytest

from qnewton_mpi.config import read_toml, resolve, run_config
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel import partition
from qnewton_mpi.parallel.device import open_device
from qnewton_mpi.parallel.environment import THREAD_VARIABLES, check_launcher, prepare


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "newton"}, "must be one of kronecker"),
        ({"data": "imagenet"}, "must be one of fashion-mnist-sample"),
        ({"learning_rate": 1}, "unknown option 'learning_rate'"),
        ({"method": "sgd", "rank": 8}, "rank is an option of fisher, not of sgd"),
        ({"epochs": 2, "steps": 3}, "contradict"),
        ({"lr": 0}, "lr = 0: must be greater than 0"),
        ({"lr": "fast"}, "lr = fast: must be a finite number or auto"),
        ({"lr": "auto", "method": "adam"}, "lr = auto: must be a finite number$"),
        ({"lr": float("nan")}, "must be a finite number"),
        ({"lr": True}, "must be a finite number"),
        ({"epochs": "1.5"}, "must be an integer"),
        ({"epochs": 1.5}, "must be an integer"),
        ({"epochs": 0}, "must be greater than 0"),
        ({"seed": -1}, "must be at least 0"),
        ({"momentum": 1}, "less than 1"),
        ({"overwrite": "yes"}, "must be true or false"),
        ({"data_dir": 3}, "must be a string"),
        ({"exchange": "gossip"}, "allgather"),
        ({"device": "tpu"}, "cpu, cuda"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message) as caught:
        run_config(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"replicas": 2}, 3, "2 replicas on 3 ranks leave ranks idle"),
        ({"replicas": 6, "batch": 256}, 2, "use --batch 258"),
        ({"replicas": 1}, 1, "kronecker at the rate auto needs at least 2 replicas"),
        ({"replicas": 1, "method": "multisecant"}, 1, "multisecant needs at least 2 replicas"),
        ({"replicas": 1, "method": "sgd", "lr": "auto"}, 1, "sgd at the rate auto needs at least 2 replicas"),
        ({"batch": 4}, 1, "use --batch 8"),
    ],
)
def test_replicas_that_fit_nowhere(options, ranks, message):
    with pytest.raises(UserError, match=message):
        resolve(run_config(options), ranks)


def test_existing_output_is_refused_unless_overwritten(tmp_path):
    path = tmp_path / "run.h5"
    path.write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        resolve(run_config({"output": str(path)}), 1)
    assert resolve(run_config({"output": str(path), "overwrite": True}), 1).output == path
    assert path.read_text() == "precious"


def test_defaults():
    config = resolve(run_config({}), 3)
    assert (config.training.method, config.replicas, config.training.epochs) == ("kronecker", 8, 10)
    assert resolve(run_config({"batch": 240}), 12).replicas == 12
    assert resolve(run_config({"steps": 5}), 1).training.epochs is None


def test_strings_of_the_command_line_and_values_of_toml_are_one(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('method = "momentum"\nlr = 1\nnesterov = true\ndata-dir = "x"\nbatch = 64\n')
    strings = {"method": "momentum", "lr": "1.0", "nesterov": True, "data_dir": "x", "batch": "64"}
    assert run_config(read_toml(str(path))) == run_config(strings)


@pytest.mark.parametrize("content", [b"lr = ", b"\xff\xfe"])
def test_bad_toml(tmp_path, content):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as TOML") as caught:
        read_toml(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read as TOML"):
        read_toml(str(tmp_path / "missing.toml"))


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_the_defaults_of_every_method_pass_their_own_checks(method):
    config = run_config({"method": method})
    assert run_config(config.flat()) == config


def test_partition():
    assert partition.bounds(10, 4) == [0, 3, 6, 8, 10]
    assert partition.bounds(2, 4) == [0, 1, 2, 2, 2]
    assert [partition.share(10, 4, i) for i in (0, 3)] == [slice(0, 3), slice(8, 10)]


def test_threads_are_one_unless_the_user_says_otherwise():
    environ = {"OMP_NUM_THREADS": "4"}
    prepare(environ)
    assert environ == dict.fromkeys(THREAD_VARIABLES, "1") | {"OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize(
    "environ",
    [
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
        {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "3"},
    ],
)
def test_mismatched_launchers_are_noticed(environ):
    with pytest.raises(UserError, match="use the mpiexec that belongs"):
        check_launcher(1, environ)
    check_launcher(2, environ)


def test_a_batch_script_may_start_one_rank():
    check_launcher(1, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    check_launcher(1, {})


class FakeCupy:
    """CuPy as it is on a machine without a GPU."""

    @staticmethod
    def is_available():
        return False


def test_cuda_without_cupy_or_gpu(monkeypatch):
    import sys

    assert open_device("cpu", 0).xp is np
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UserError, match="cuda12"):
        open_device("cuda", 0)
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy)
    with pytest.raises(UserError, match="sees no GPU"):
        open_device("cuda", 0)
