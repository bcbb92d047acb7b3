"""An own `nn.Module`: few lines from AdamW, saved in one file by two ranks, and gone on with on another number."""

import json
import shutil

import numpy as np
import pytest

from tests.test_from_adamw import changed_lines

pytestmark = pytest.mark.slow

ADAMW = """
import os
import torch


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(6, 12)
        self.scale = torch.nn.Parameter(torch.ones(12))
        self.outer = torch.nn.Linear(12, 2)

    def forward(self, x):
        return self.outer(self.scale * torch.tanh(self.inner(x)))


torch.manual_seed(0)
model = Own()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
if os.path.exists("state.pt"):
    state = torch.load("state.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
before = model(torch.linspace(-1, 1, 6)).tolist()
for step in range(20):
    x = torch.randn(48, 6)
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), x[:, :2] * x[:, 2:4])
    loss.backward()
    optimizer.step()
after = model(torch.linspace(-1, 1, 6)).tolist()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "state.pt")
"""
LINES = {
    "import torch\n": "import torch\nfrom qnewton_mpi.torch import QuasiNewton\n",
    "torch.optim.AdamW(model.parameters(), lr=0.01)": "QuasiNewton(model.parameters(), samples=8, replicas=6)",
    "    loss = ": "    optimizer.step(lambda x: ",
    "x[:, 2:4])\n    loss.backward()\n    optimizer.step()\n": "x[:, 2:4]), x)\n",
    "state_dict()}": "state_dict(gather=True)}",
}


def ours():
    """Return the program with QuasiNewton."""
    program = ADAMW
    for before, after in LINES.items():
        program = program.replace(before, after, 1)
    start, end = program.rsplit('"state.pt"', 1)
    return f'{start}"state.pt" if optimizer.communicator.rank == 0 else os.devnull{end}'


TOLD = """
import json
from mpi4py import MPI
everyone = MPI.COMM_WORLD.gather([before, after])
if everyone:
    print(json.dumps(everyone))
"""


def test_trained_on_two_ranks_and_gone_on_with_on_others(mpiexec, tmp_path):
    assert changed_lines(ADAMW, ours()) <= 6

    def run(ranks, folder):
        finished = mpiexec(ranks, "-c", ours() + TOLD, cwd=folder, env={"OMP_NUM_THREADS": "1"})
        assert finished.returncode == 0, finished.stderr
        everyone = json.loads(finished.stdout)
        assert everyone == [everyone[0]] * ranks
        return everyone[0]

    (tmp_path / "two").mkdir()
    _, trained = run(2, tmp_path / "two")
    ends = []
    for ranks in (1, 2, 3):
        shutil.copytree(tmp_path / "two", tmp_path / str(ranks))
        before, after = run(ranks, tmp_path / str(ranks))
        assert before == trained
        ends.append(after)
    assert ends[0] != trained
    np.testing.assert_allclose(ends[1:], [ends[0]] * 2, rtol=0.05, atol=1e-3)
