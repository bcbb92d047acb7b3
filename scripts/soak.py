"""Kill ranks at random and damage checkpoints at random, and see that every run goes on to the same result.

Usage: python scripts/soak.py kills COUNT FILE.md [SECONDS]   a rank gets SIGKILL at a random step and phase
       python scripts/soak.py mutations COUNT FILE.md         a file of the newest checkpoint is damaged

Each kill, on 2 or 4 ranks: the job must end within 5 s (or SECONDS, on a busy machine), the newest checkpoint be sound,
and the run, gone on with, equal the one that was not killed bit for bit. Each mutation: a line says what is wrong, the
older checkpoint is taken, and the run ends as the undamaged one did (on the same ranks bit for bit, on others to
rounding). The exit code is 1 where one did otherwise. What FILE.md has already is not repeated.
"""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from qnewton_mpi.parallel.environment import prepare

prepare()

import h5py  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

STEPS, SAVES = 24, 5
OPTIONS = ["train", "--replicas", "4", "--batch", "32", "--steps", str(STEPS), "--evaluate-every", "8"]
OPTIONS += ["--progress", "off", "--checkpoint-every", str(SAVES)]
PHASES = ("gradient", "after a step", "evaluation", "save: begun", "save: rank's file", "save: sums", "save: renamed")
LIMIT = 5.0  # seconds


def victim(rank: int, step: int, phase: str, started: Path) -> None:
    """Run the command line on this rank; where it is the one, kill it when it gets there. Run under mpiexec."""
    from mpi4py import MPI

    from qnewton_mpi import cli
    from qnewton_mpi.training import checkpoint, loop

    here = {"step": 0}

    def die(where: str) -> None:
        if MPI.COMM_WORLD.rank == rank and here["step"] >= step and where == phase:
            started.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: object, name: str, where: str) -> None:
        """Have a function die before it does anything."""
        action = getattr(owner, name)

        def wrapped(*arguments: object, **options: object) -> object:
            die(where)
            return action(*arguments, **options)

        setattr(owner, name, wrapped)

    call, one_step = loop.ReplicaLoss.at_once, loop.Run.step
    write, sync = checkpoint.replace_whole, checkpoint.sync_folder

    def gradient(self: loop.ReplicaLoss, *arguments: object) -> object:
        here["step"] = self.step + 1
        die("gradient")
        return call(self, *arguments)  # type: ignore[arg-type]

    def whole_step(self: loop.Run) -> int:
        done = one_step(self)
        die("after a step")
        return done

    def writing(path: Path, *parts: bytes | memoryview) -> None:
        if path.name == checkpoint.SUMS:
            die("save: sums")
        write(path, *parts)

    def syncing(folder: Path) -> None:
        die("save: renamed")
        sync(folder)

    loop.ReplicaLoss.at_once = gradient  # type: ignore[assignment,method-assign]
    loop.Run.step = whole_step  # type: ignore[method-assign]
    checkpoint.replace_whole, checkpoint.sync_folder = writing, syncing
    before(loop.Run, "evaluate", "evaluation")
    before(loop.Run, "save", "save: begun")
    before(checkpoint.Checkpoints, "_write_rank", "save: rank's file")
    sys.exit(cli.run(sys.argv[6:]))


def mpiexec(ranks: int, *program: object) -> subprocess.CompletedProcess[str]:
    """Run a program on ranks."""
    launcher = os.environ.get("MPIEXEC", str(Path(sys.executable).with_name("mpiexec")))
    command = [launcher, "-n", str(ranks), sys.executable, *map(str, program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def content(path: Path) -> dict[str, np.ndarray]:
    """Return all of a run's file that does not depend on time."""
    with h5py.File(path) as file:
        found = {"parameters": file["parameters"][()]}
        for group in ("steps", "epochs"):
            found |= {f"{group}/{name}": file[group][name][()] for name in file[group] if "seconds" not in name}
    return found


def kill(
    number: int, folder: Path, references: dict[int, dict[str, np.ndarray]], limit: float = LIMIT
) -> tuple[list[object], bool]:
    """Kill one rank and go on; return the table's row and whether all went as it should."""
    choice = random.Random(number)
    ranks = choice.choice((2, 4))
    phase = PHASES[number % len(PHASES)]
    root_only = phase in ("save: sums", "save: renamed")
    rank, step = 0 if root_only else choice.randrange(ranks), choice.randint(1, STEPS - 1)
    path, checkpoints, moment = folder / "run.h5", folder / "checkpoints", folder / "killed"
    arguments = [*OPTIONS, "--output", path, "--checkpoint", checkpoints]
    if ranks not in references:
        finished = mpiexec(ranks, "-m", "qnewton_mpi", *OPTIONS, "--output", path, "--checkpoint", folder / "whole")
        assert finished.returncode == 0, finished.stderr
        references[ranks] = content(path)
        path.unlink()
    finished = mpiexec(ranks, Path(__file__), "victim", rank, step, phase, moment, *arguments)
    seconds = time.time() - float(moment.read_text())
    ended = finished.returncode != 0 and seconds < limit
    again = mpiexec(ranks, "-m", "qnewton_mpi", *arguments, "--resume")
    sound = again.returncode == 0 and "passed over" not in again.stderr
    reference = references[ranks]
    equal = again.returncode == 0 and all(
        np.array_equal(value, reference[name], equal_nan=True) for name, value in content(path).items()
    )
    row = [number, ranks, rank, step, phase, f"{seconds:.1f}", "yes" if sound else "NO", "yes" if equal else "NO"]
    return row, ended and sound and equal


def truncate(path: Path, choice: random.Random) -> None:
    """Cut a file off at random."""
    data = path.read_bytes()
    path.write_bytes(data[: choice.randrange(len(data))])


def flip(path: Path, choice: random.Random) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    path.write_bytes(data)


def foreign(path: Path, choice: random.Random) -> None:
    """Put another HDF5 file in its place."""
    with h5py.File(path, "w") as file:
        file["something"] = np.arange(choice.randrange(1, 100))


def remove(path: Path, choice: random.Random) -> None:
    """Remove the file."""
    path.unlink()


def reshape(path: Path, choice: random.Random) -> None:
    """Give one data set another shape, with sums that are right."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name = choice.choice([name for name in names if name != "configuration"])
        del file[name]
        file[name] = np.zeros((3, 2, 1))
    sums = path.parent / "SHA256SUMS"
    lines = subprocess.run(
        ["sha256sum", *sorted(p.name for p in path.parent.glob("*.h5"))],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    sums.write_text(lines.stdout)


MUTATIONS = (truncate, flip, foreign, remove, reshape)


def mutate(number: int, folder: Path, references: dict[int, dict[str, np.ndarray]]) -> tuple[list[object], bool]:
    """Damage the newest of two checkpoints, of two ranks, and go on; return the table's row and whether all is well."""
    choice = random.Random(number)
    whole = folder.parent / "whole"
    if not references:
        arguments = [*OPTIONS, "--output", whole / "run.h5", "--checkpoint", whole / "checkpoints"]
        finished = mpiexec(2, "-m", "qnewton_mpi", *arguments)
        assert finished.returncode == 0, finished.stderr
        references[2] = content(whole / "run.h5")
    checkpoints, path = folder / "checkpoints", folder / "run.h5"
    shutil.copytree(whole / "checkpoints", checkpoints)
    shutil.copy(whole / "run.h5", path)
    damage = MUTATIONS[number % len(MUTATIONS)]
    newest = max(checkpoints.glob("step-*"))
    pattern = "*.h5" if damage is reshape else "*"
    target = choice.choice(sorted(newest.glob(pattern)))
    damage(target, choice)
    ranks = 2 if number % 10 == 0 else 1  # on one rank the mutations are many times faster, and rounding is another
    again = mpiexec(ranks, "-m", "qnewton_mpi", *OPTIONS, "--output", path, "--checkpoint", checkpoints, "--resume")
    told = re.search(r"passed over [^:]*: (.*)", again.stderr.replace(f"{newest}/", ""))
    clear = again.returncode == 0 and told is not None and "Traceback" not in again.stderr
    tolerance = 0.0 if ranks == 2 else 1e-3
    equal = again.returncode == 0 and all(
        np.allclose(value, references[2][name], rtol=tolerance, atol=0 if ranks == 2 else 1e-4, equal_nan=True)
        for name, value in content(path).items()
        if "bytes" not in name
    )
    row = [number, damage.__name__, target.name, ranks, told[1] if told else "nothing", "yes" if equal else "NO"]
    return row, clear and equal


def main() -> int:
    """Do as many trials as are asked for and not in the table yet."""
    what, count, table = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    trial: Callable[..., tuple[list[object], bool]]
    header: tuple[str, ...]
    if what == "kills":
        limit = float(sys.argv[4]) if len(sys.argv) > 4 else LIMIT
        trial, title = functools.partial(kill, limit=limit), "Ranks killed at random"
        header = ("kill", "ranks", "rank", "step from", "phase", "s to the end", "newest sound", "bitwise equal")
    else:
        trial, title = mutate, "Checkpoints damaged at random"
        header = ("mutation", "damage", "file", "ranks", "told", "goes on to the same result")
    if not table.exists():
        table.write_text(f"# {title}\n\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|\n")
    done = sum(line.startswith("| ") for line in table.read_text().splitlines()) - 1
    references: dict[int, dict[str, np.ndarray]] = {}
    bad = 0
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "whole").mkdir()
        for number in tqdm(range(done, count), desc=what, disable=not sys.stderr.isatty()):
            folder = Path(base) / str(number)
            folder.mkdir()
            row, good = trial(number, folder, references)
            with table.open("a") as file:
                file.write("| " + " | ".join(map(str, row)) + " |\n")
            bad += not good
            shutil.rmtree(folder)
    print(f"{what}: {count - done} done, {bad} not as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1] == "victim":
        victim(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
    sys.exit(main())
