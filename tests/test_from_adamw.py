"""The scripts of `examples/from_adamw`: few lines change, and the training loss is not above AdamW's."""

import difflib
import functools
import importlib.util
import re
import socket
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "from_adamw"
PAIRS = ["convnet", "transformer", "accelerate", "lightning"]


def changed_lines(before, after):
    """Return how many lines change from one program to another, each once; empty ones do not count."""
    lines = [[line for line in text.splitlines() if line] for text in (before, after)]
    matcher = difflib.SequenceMatcher(None, *lines, autojunk=False)
    return sum(max(i1 - i0, j1 - j0) for tag, i0, i1, j0, j1 in matcher.get_opcodes() if tag != "equal")


@pytest.mark.parametrize("name", PAIRS)
def test_at_most_six_lines_change(name):
    adamw, ours = ((FOLDER / f"{name}_{kind}.py").read_text() for kind in ("adamw", "quasi_newton"))
    assert 0 < changed_lines(adamw, ours) <= 6


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def training_loss(mpiexec):
    @functools.cache
    def run(name, kind, ranks):
        if importlib.util.find_spec(name) is None and name in ("accelerate", "lightning"):
            pytest.skip(f"needs {name}")
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }  # Accelerate asks for them under mpiexec
        finished = mpiexec(ranks, FOLDER / f"{name}_{kind}.py", env={"OMP_NUM_THREADS": "1"} | address)
        assert finished.returncode == 0, finished.stderr
        losses = {float(loss) for loss in re.findall(r"training loss ([\d.]+)", finished.stdout)}
        assert len(losses) == 1  # all ranks have the same model
        return losses.pop()

    return run


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_the_loss_is_not_above_tuned_adamws(training_loss, name, ranks):
    assert training_loss(name, "quasi_newton", ranks) <= training_loss(name, "adamw", 1)


def test_lightnings_own_accumulation(mpiexec):
    """Each of four batches is a replica, whose loss is not had again."""
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("needs lightning")
    program = (FOLDER / "lightning_quasi_newton.py").read_text()
    for before, after in {
        "self.optimizers().share(*batch)": "batch",
        "samples=16, replicas=8": "samples=32, replicas_per_rank=4",
        "DataLoader(train, 128": "DataLoader(train, 32",
        "max_epochs=EPOCHS": "max_epochs=2, accumulate_grad_batches=4",
    }.items():
        assert before in program
        program = program.replace(before, after)
    finished = mpiexec(1, "-c", program, env={"OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr
    assert float(re.search(r"training loss ([\d.]+)", finished.stdout)[1]) < 1.5  # of equal probabilities: 2.3
