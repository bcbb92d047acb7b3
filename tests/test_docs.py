"""What the README and the documents show runs."""

import importlib.util
import math
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from qnewton_mpi import cli
from qnewton_mpi.cli.options import METHODS, purposes
from qnewton_mpi.config import run_config

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks_of(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


BLOCKS = blocks_of(README)
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
DOCUMENTS = [(str(path.relative_to(ROOT / "docs")), k) for path in PAGES for k in range(len(blocks_of(path)))]


@pytest.mark.parametrize(("name", "number"), DOCUMENTS)
def test_blocks_of_documents_run_on_two_ranks(mpiexec, qnewton, tmp_path, name, number):
    block, program = blocks_of(ROOT / "docs" / name)[number], tmp_path / "block.py"
    program.write_text(block)
    for library in ("jax", "pandas", "xarray"):
        if f"import {library}" in block and importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    if "runs/kronecker.h5" in block or "runs.csv" in block:  # of `make run`, and exported from it
        qnewton(1, "train", "--steps", "2", "--output", "runs/kronecker.h5", cwd=tmp_path)
        qnewton(1, "export", "runs/kronecker.h5", "--output", "runs.csv", cwd=tmp_path)
    finished = mpiexec(2, program, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr


def test_example_of_a_torch_script(mpiexec):
    finished = mpiexec(2, ROOT / "examples" / "mnist.py", "--epochs", "1")
    assert finished.returncode == 0, finished.stderr
    assert float(re.findall(r"test accuracy ([\d.]+)%", finished.stdout)[-1]) > 80


def test_example_with_a_transformer(mpiexec):
    finished = mpiexec(2, ROOT / "examples" / "characters.py", "--steps", "50")
    assert finished.returncode == 0, finished.stderr
    assert float(re.search(r"step 50: ([\d.]+) nats", finished.stdout)[1]) < 4.0  # of equal probabilities: 4.6


@pytest.mark.parametrize("ranks", [1, 2])
def test_example_with_gradients_in_numpy(mpiexec, ranks):
    finished = mpiexec(ranks, ROOT / "examples" / "logistic_regression.py", "100", "kronecker")
    assert finished.returncode == 0, finished.stderr
    first, last = map(float, re.findall(r"\d\.\d+", finished.stdout))
    assert last < 0.25 * first


@pytest.mark.parametrize("ranks", [1, 2])
def test_example_with_a_differential_equation(mpiexec, ranks):
    finished = mpiexec(ranks, ROOT / "examples" / "pde_fit.py")
    assert finished.returncode == 0, finished.stderr
    first, last, error = map(float, re.findall(r"\d+\.\d+", finished.stdout))
    assert first > 2
    assert abs(last - 0.497025) < 1e-6  # the minimum
    assert error < 2.5  # %


@pytest.mark.parametrize("ranks", [1, 2])
def test_example_of_an_autoencoder(mpiexec, ranks):
    arguments = "--method", "adam", "--lr", "0.01", "--widths", "32", "8", "--steps", "50"
    finished = mpiexec(ranks, ROOT / "examples" / "autoencoder.py", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert float(re.search(r"test ([\d.]+)", finished.stdout)[1]) < 0.65 * 784 * math.log(2)  # of grey pixels


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run_on_two_ranks(mpiexec, tmp_path, number):
    program = tmp_path / "block.py"
    # Told by one rank: what two print at once may come out in each other's lines.
    tells = {"mean =": ("mean", 0.3), "import train": ('model.history["test_nll"][-1]', 0.8)}
    last, most = next(told for sign, told in tells.items() if sign in BLOCKS[number])
    told = f"\nfrom mpi4py import MPI\nlosses = MPI.COMM_WORLD.gather({last})\nif losses:\n    print(*losses)\n"
    program.write_text(re.sub(r"^print\(.*\n", "", BLOCKS[number], flags=re.MULTILINE) + told)
    finished = mpiexec(2, program, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    losses = [float(line) for line in finished.stdout.split()]
    assert losses[0] == losses[1] < most


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_print_on_one_process(mpiexec, tmp_path, number):
    program = tmp_path / "block.py"
    program.write_text(BLOCKS[number])
    finished = mpiexec(1, program, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1].startswith(("loss 0.", "["))


def commands_of(path):
    """Return the lines of its shell blocks without what a comment says."""
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL)
    return [line.partition("  #")[0].strip() for line in "".join(blocks).splitlines()]


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("notebook/*.md")], ids=lambda path: path.name)
def test_links_of_what_is_not_in_the_site_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def arguments_of(line):
    """Return what a line says to `qnewton-mpi`, or by a batch script to its `train`; none where it is a pattern."""
    sbatch = re.match(r"sbatch (?:--\S+ )*\S+\.sbatch(.*)", line)
    words = shlex.split(f"qnewton-mpi train{sbatch[1]}" if sbatch else re.split(" [|>] ", line)[0])
    if "qnewton-mpi" not in words or line.startswith("export") or re.search("[…*)]", line):
        return []
    return words[words.index("qnewton-mpi") + 1 :]


def test_the_commands_of_the_first_run(mpiexec, tmp_path):
    for line in commands_of(ROOT / "docs" / "tutorials" / "first-run.md"):
        if words := arguments_of(line):
            ranks = 2 if line.startswith("mpiexec") else 1
            finished = mpiexec(ranks, "-m", "qnewton_mpi", *words, cwd=tmp_path)
            assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "first.png").stat().st_size > 0
    assert " 3 " in finished.stdout  # epochs, in the table of the last command


def test_the_example_of_own_images(mpiexec, tmp_path, monkeypatch):
    page = ROOT / "docs" / "howto" / "data.md"
    monkeypatch.chdir(tmp_path)
    exec(blocks_of(page)[0])
    for line in re.search(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)[1].splitlines():
        finished = mpiexec(2 if line.startswith("mpiexec") else 1, "-m", "qnewton_mpi", *arguments_of(line))
        assert finished.returncode == 0, finished.stderr
    rows = (tmp_path / "leaves.csv").read_text().splitlines()
    assert len(rows) == 1 + 30  # what was held out
    right = [row.split(",")[1] == row.split(",")[2] for row in rows[1:]]
    assert sum(right) > 20


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_documents_are_commands(path):
    """What documents show of the command line is taken by its parser, and options of `train` by its settings."""
    options = {item.name for items in purposes().values() for item in items}
    options |= {item.name for method in METHODS.values() for item in fields(method)}
    for words in filter(None, map(arguments_of, commands_of(path))):
        parsed = cli.parse(words, first=False)
        if parsed.command == "train":
            run_config({name: value for name, value in vars(parsed).items() if name in options})


def test_toml_example_is_accepted(qnewton, tmp_path):
    example = re.search(r"<<'END'\n(.*?)END", (ROOT / "docs/reference/options.md").read_text(), re.DOTALL)[1]
    (tmp_path / "run.toml").write_text(example)
    finished = qnewton(2, "train", "run.toml", "--steps", "2", "--output", "run.h5", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "kronecker M=16" in finished.stdout
