"""Options: types, ranges, contradictions, and how they fit the ranks."""

import datetime
import os

import numpy as np
import pytest
from mpi4py import MPI

from qnewton_mpi.arrays import open_device
from qnewton_mpi.config import read_toml, resolve, run_config
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel import partition
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.environment import THREAD_VARIABLES, check_launcher, launched_tasks, prepare


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "newton"}, "must be one of kronecker"),
        ({"data": "a\u00a0b"}, "of characters that can be printed"),
        ({"validation": 1}, "less than 1"),
        ({"image_size": "32"}, "must be HEIGHTxWIDTH"),
        ({"image_size": "0x32"}, "must be HEIGHTxWIDTH"),
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
        ({"seed": 2**63}, "seed = an integer of 64 bits: must be an integer of at most 64 bits"),
        ({"seed": 1 << 20000}, "seed = an integer of 20001 bits: must be an integer"),
        ({"seed": "9" * 5000}, "must be an integer"),
        ({"seed": "\u00b2"}, "must be an integer"),
        ({"lr": 10**400}, "must be a finite number"),
        ({"lr": "1e400"}, "must be a finite number"),
        ({"lr": [0.1]}, "lr = a list: must be a finite number"),
        ({"lr": {"a": {"b": 1}}}, "lr = a table: must be a finite number"),
        ({"lr": datetime.date(1979, 5, 27)}, "lr = a date: must be a finite number"),
        ({"lr": np.ones(2)}, "lr = a ndarray: must be a finite number"),
        ({"method": ["sgd"]}, "method = a list: must be a string"),
        ({"method": "a\nb"}, r"method = a\\nb: must be a string"),
        ({"method": "a" * 5000}, "must be one of"),
        ({"output": ""}, "must be a string, not empty"),
        ({"output": "a\0b"}, r"output = a\\x00b: must be .* without control characters"),
        ({"checkpoint": "\udcff"}, r"checkpoint = \\xff: must be .* without control characters"),
        ({"a\nb": 1}, r"unknown option 'a\\nb'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message) as caught:
        run_config(options)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lr = ", "cannot be read as TOML"),
        (b"\xff\xfe", "cannot be read as TOML"),
        (b"a = " + b"[" * 20000 + b"]" * 20000, "cannot be read as TOML"),
        (b"a = " + b"{a=" * 5000 + b"1" + b"}" * 5000, "cannot be read as TOML"),
        (b"seed = " + b"9" * 5000, "cannot be read as TOML"),
        (b"a = 1\0", "cannot be read as TOML"),
        (b"lr = 1\nlr = 2", "cannot be read as TOML"),
        (b"lr = 1\n" + b"a." * 40_000 + b"a = 1", "cannot be read as TOML: line 2 has more than 100 dots"),
        (b"data-dir = 'x'\ndata_dir = 'y'", "data_dir is there twice"),
        (b"a-b-c = 1\na_b-c = 2", "a_b_c is there twice"),
        (b"#" * 200_000, "has 200,000 bytes, and 100,000 at most"),
    ],
)
def test_bad_toml(tmp_path, content, message):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_toml(str(path))
    assert str(caught.value).isprintable()


def test_what_is_no_toml_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "fifo", "/dev/zero", tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match=r"cannot be read|no such file|is no regular file"):
            read_toml(str(path))


def test_toml_with_a_byte_order_mark(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbflr = 0.5")
    assert read_toml(str(tmp_path / "run.toml")) == {"lr": 0.5}


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
        {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"},
        {"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"},
        {"HOROVOD_SIZE": "2", "HOROVOD_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_SIZE": "2", "CROSS_SIZE": "1"},
        {"PMIX_RANK": "1", "PMIX_NAMESPACE": "prte"},
        {"PALS_RANKID": "3"},
    ],
)
def test_mismatched_launchers_are_noticed(environ):
    with pytest.raises(UserError, match="use the mpiexec that belongs"):
        check_launcher(1, environ)
    check_launcher(2, environ)


def test_a_launcher_that_says_nonsense_is_none():
    assert launched_tasks({"PMI_SIZE": "²", "PMI_RANK": "x", "OMPI_COMM_WORLD_SIZE": ""}) == (1, 0)
    assert launched_tasks({"PMI_SIZE": "4", "PMI_RANK": "3"}) == (4, 3)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # of a batch script
        {"WORLD_SIZE": "8", "RANK": "3"},  # set by hand
        {"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RUN_ID": "none"},
        {"PMIX_RANK": "0"},
        {"PMI_SIZE": "unknown", "PMI_RANK": "²"},
    ],
)
def test_one_rank_may_be_meant(environ):
    check_launcher(1, environ)


def test_programs_see_through_launchers_too(monkeypatch):
    monkeypatch.setattr(
        "qnewton_mpi.parallel.communicator.check_launcher", lambda _: check_launcher(1, {"PMI_SIZE": "2"})
    )
    for parent in (None, MPI.COMM_WORLD):
        with pytest.raises(UserError, match="the launcher started 2 tasks"):
            Communicator(parent)
    Communicator(MPI.COMM_SELF)  # alone on purpose


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
