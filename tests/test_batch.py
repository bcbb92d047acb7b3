"""The batch scripts: those of a checkout, of the wheel, and what `qnewton-mpi slurm` writes are the same."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from qnewton_mpi import cli
from qnewton_mpi.cli.slurm import pmi, texts
from qnewton_mpi.config import resolve, run_config

ROOT = Path(__file__).parents[1]
SCRIPTS = {"array.sbatch", "gpus-4x4.sbatch", "gpus.sbatch", "nodes.sbatch", "resumable.sh", "train.sbatch"}


def test_a_checkout_has_what_the_command_writes():
    assert {path.name: path.read_text() for path in (ROOT / "slurm").iterdir()} == texts({}), "run `make reference`"
    assert {*texts({})} == SCRIPTS


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["slurm", "jobs", "--partition", "gpu", "--account", "a.b-c"]) == 0
    for path in Path("jobs").iterdir():
        assert path.stat().st_mode & 0o111
        batch = path.suffix == ".sbatch"
        assert ("#SBATCH --partition=gpu\n#SBATCH --account=a.b-c\n" in path.read_text()) == batch
    assert {path.name for path in Path("jobs").iterdir()} == SCRIPTS
    before = {path: path.read_text() for path in Path("jobs").iterdir()}
    Path("notes").mkdir()
    Path("notes/train.sbatch").write_text("mine\n")
    capsys.readouterr()
    for wrong, told in (
        (["slurm", "jobs"], "array.sbatch exists"),
        (["slurm", "notes", "--overwrite"], "train.sbatch: is not a batch script"),
        (["slurm"], "slurm needs a FOLDER to write to, or --pmi"),
        (["slurm", "new", "--partition", "a b"], "--partition a b: must be a name"),
        (["slurm", "new", "--account", "a\n#SBATCH --uid=0"], "must be a name"),
    ):
        assert cli.run(wrong) == cli.USAGE_ERROR
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert told in said.err
    assert before == {path: path.read_text() for path in Path("jobs").iterdir()}
    assert Path("notes/train.sbatch").read_text() == "mine\n"
    assert not Path("new").exists()
    assert cli.run(["slurm", "jobs", "--overwrite"]) == 0
    assert {path.name: path.read_text() for path in Path("jobs").iterdir()} == texts({})


def test_what_srun_speaks(capsys):
    from mpi4py import MPI

    assert pmi() == ("pmix" if MPI.get_vendor()[0] == "Open MPI" else "pmi2")
    assert cli.run(["slurm", "--pmi"]) == 0
    assert capsys.readouterr().out == f"{pmi()}\n"


def test_the_library_is_not_started_for_that():
    program = "from qnewton_mpi.cli.slurm import pmi; pmi(); from mpi4py import MPI; assert not MPI.Is_initialized()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("name", sorted(SCRIPTS - {"resumable.sh"}))
def test_every_script_starts_a_run_that_fits(name):
    """The options of the script are those of a run, on as many ranks as it asks for."""
    text = texts({})[name]
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    ranks = int(asked.get("ntasks") or int(asked["nodes"]) * int(asked["ntasks-per-node"]))
    words = shlex.split(re.search(r"resumable.sh\" (train .*)$", text.replace("\\\n", " "), re.MULTILINE)[1])
    options = vars(cli.parse([word for word in words if "[@]" not in word and word != "$@"], first=False))
    options = {key: value for key, value in options.items() if key not in cli_only()}
    config = resolve(run_config(options), ranks)
    assert config.training.resume
    assert config.training.batch % config.replicas == 0
    if name == "gpus-4x4.sbatch":
        assert (ranks, asked["gpus-per-node"], asked["ntasks-per-node"]) == (16, "4", "4")
        assert (config.replicas, config.training.batch, config.training.device) == (16, 16 * 256, "cuda")


def cli_only():
    return {"command", "check", "alone", "process", "toml", "line"}


@pytest.mark.parametrize("text", texts({}).values(), ids=texts({}))
def test_examples_in_the_scripts_fit(text):
    for nodes, tasks, batch in re.findall(r"--nodes=(\d+) --ntasks-per-node=(\d+) \S+ --batch (\d+)", text):
        resolve(run_config({"batch": batch}), int(nodes) * int(tasks))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return a wheel of this tree, built from a copy."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "qnewton_mpi", source / "qnewton_mpi", ignore=leave)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder)
    subprocess.run([sys.executable, "-m", "pip", "wheel", source, *options], check=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_the_scripts_come_with_the_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); from qnewton_mpi import cli; "
    command = [sys.executable, "-c", f"{program}sys.exit(cli.run(['slurm', 'jobs']))"]
    subprocess.run(command, check=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, timeout=120)
    assert {path.name: path.read_text() for path in (tmp_path / "jobs").iterdir()} == texts({})


def requirements():
    """Return the lower bounds of the package's dependencies, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+).*", line).groups() for line in project["dependencies"]), project


def test_the_recipe_of_spack_has_the_dependencies():
    text = (ROOT / "recipes/spack_repo/qnewton/packages/py_qnewton_mpi/package.py").read_text()
    compile(text, "package.py", "exec")
    told = dict(re.findall(r'depends_on\("py-([\w-]+)@([\d.]+):"', text))
    needed, project = requirements()
    assert {name: told[name] for name in needed} == needed
    assert re.search(r'depends_on\("python@([\d.]+):"', text)[1] == project["requires-python"].removeprefix(">=")
    assert 'depends_on("mpi"' in text


@pytest.mark.parametrize("name", ["Containerfile", "qnewton.def"])
def test_containers_install_extras_that_there_are(name):
    text = (ROOT / "recipes" / name).read_text()
    extras = requirements()[1]["optional-dependencies"]
    named = re.findall(r"(?:\[|EXTRAS=)([\w,]+)", text)
    assert named
    assert {extra for group in named for extra in group.split(",")} <= {*extras}
    copied = re.findall(r"^(?:COPY |    )([\w. ]+) /src", text, re.MULTILINE)
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "qnewton_mpi"} == {*" ".join(copied).split()}
