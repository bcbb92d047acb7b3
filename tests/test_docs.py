"""What the README shows runs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run_on_two_ranks(mpiexec, tmp_path, number):
    program = tmp_path / "block.py"
    # Told by one rank: what two print at once may come out in each other's lines.
    told = '\nlosses = communicator.mpi.gather(figures["loss"])\nif losses:\n    print(*losses)\n'
    program.write_text(BLOCKS[number] + told)
    finished = mpiexec(2, program)
    assert finished.returncode == 0, finished.stderr
    losses = [float(line) for line in finished.stdout.split()]
    assert losses[0] == losses[1] < 0.3


def test_toml_example_is_accepted(qnewton, tmp_path):
    example = re.search(r"<<'END'\n(.*?)END", README.read_text(), re.DOTALL)[1]
    (tmp_path / "run.toml").write_text(example)
    finished = qnewton(2, "train", "run.toml", "--steps", "2", "--output", "run.h5", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "kronecker M=16" in finished.stdout
