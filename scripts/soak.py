"""Kill, stop and double jobs at random, damage checkpoints at random, and see that every run comes to the same result.

Usage: python scripts/soak.py jobs COUNT FILE.md          at a random step and phase of a job of 1, 2, 3, 5 or 7 ranks
       python scripts/soak.py mutations COUNT FILE.md     a file of the newest checkpoint is damaged

What happens to a job, by turns:

kill       a rank gets SIGKILL: the job ends, and the newest checkpoint is sound
stop       a rank gets SIGTERM, SIGINT, SIGUSR1 or SIGUSR2: exit code 75, and a checkpoint of the step that is told
second     the same job is started once more meanwhile: it is refused with exit code 2, and the first one goes on
twice      a rank gets SIGKILL, then two jobs go on at once: one does, the other is refused or finds nothing to do

Whatever happened, the run that is gone on with must equal the one that was left alone, bit for bit, every row once.
Each mutation: a line says what is wrong, the older checkpoint is taken, and the run ends as
the undamaged one did (on the same ranks bit for bit, on others to rounding). The exit code is 1 where one did
otherwise. What FILE.md has already is not repeated.

In one module, of more than 300 lines: jobs and mutations share how a run is started, awaited and compared.
"""

from __future__ import annotations

import argparse
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
RANKS = (1, 2, 3, 5, 7)
OPTIONS = ["train", "--replicas", "7", "--batch", "35", "--steps", str(STEPS), "--evaluate-every", "8"]
OPTIONS += ["--progress", "off", "--checkpoint-every", str(SAVES)]
PHASES = ("gradient", "after a step", "evaluation", "save: begun", "save: rank's file", "save: sums", "save: renamed")
EVENTS = ("kill", "stop", "second", "twice")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE = 600  # seconds, far beyond what anything here takes


def victim(rank: int, step: int, phase: str, event: str, moment: Path) -> None:
    """Run the command line on this rank; where it is the one, the event happens when it gets there. Under mpiexec.

    Event: the number of a signal that it gets, or 0: it waits until the file `moment` is gone.
    """
    from mpi4py import MPI

    from qnewton_mpi import cli
    from qnewton_mpi.training import loop
    from qnewton_mpi.training.checkpoint import checkpoints, folder, writing
    from qnewton_mpi.training.replicas import ReplicaLoss

    here = {"step": 0}

    def happen(where: str) -> None:
        if MPI.COMM_WORLD.rank != rank or here["step"] < step or where != phase or "done" in here:
            return
        here["done"] = 1
        moment.touch()
        if int(event):
            os.kill(os.getpid(), int(event))
        else:
            wait_for(lambda: not moment.exists())

    def before(owner: object, name: str, where: str) -> None:
        """Have it happen before a function does anything."""
        action = getattr(owner, name)

        def wrapped(*arguments: object, **options: object) -> object:
            happen(where)
            return action(*arguments, **options)

        setattr(owner, name, wrapped)

    call, one_step = ReplicaLoss.at_once, loop.Trainer.step
    write = writing.replace_whole

    def gradient(self: ReplicaLoss, *arguments: object) -> object:
        here["step"] = self.step + 1
        happen("gradient")
        return call(self, *arguments)  # type: ignore[arg-type]

    def whole_step(self: loop.Trainer) -> int:
        done = one_step(self)
        happen("after a step")
        return done

    def written(path: Path, *parts: bytes | memoryview) -> None:
        if path.name == writing.SUMS:
            happen("save: sums")
        write(path, *parts)

    ReplicaLoss.at_once = gradient  # type: ignore[assignment,method-assign]
    loop.Trainer.step = whole_step  # type: ignore[method-assign]
    writing.replace_whole = written
    before(folder, "sync_folder", "save: renamed")
    before(loop.Trainer, "evaluate", "evaluation")
    before(loop.Trainer, "save", "save: begun")
    before(checkpoints, "write_rank", "save: rank's file")
    sys.exit(cli.run(sys.argv[7:]))


def started(ranks: int, *program: object) -> subprocess.Popen[str]:
    """Start a program on ranks."""
    launcher = os.environ.get("MPIEXEC", str(Path(sys.executable).with_name("mpiexec")))
    command = [launcher, "-n", str(ranks), sys.executable, *map(str, program)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(job: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a job."""
    try:
        out, err = job.communicate(timeout=PATIENCE)
    finally:
        job.kill()
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def mpiexec(ranks: int, *program: object) -> subprocess.CompletedProcess[str]:
    """Run a program on ranks."""
    return ended(started(ranks, *program))


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("waited too long")
        time.sleep(0.01)


def content(path: Path) -> dict[str, np.ndarray]:
    """Return all of a run's file that does not depend on time."""
    with h5py.File(path) as file:
        found = {}
        for group in ("parameters", "steps", "epochs"):
            found |= {f"{group}/{name}": file[group][name][()] for name in file[group] if "seconds" not in name}
    return found


def happen(number: int, folder: Path, references: dict[int, dict[str, np.ndarray]]) -> tuple[list[object], bool]:
    """Have something happen to a job, and go on; return the table's row and whether all went as it should."""
    choice = random.Random(number)
    event, phase, ranks = EVENTS[number % len(EVENTS)], choice.choice(PHASES), choice.choice(RANKS)
    # Only rank 0 comes there; and what stops a run after its last step stops nothing.
    rank = 0 if phase in ("save: sums", "save: renamed") else choice.randrange(ranks)
    step = choice.randint(1, STEPS - SAVES - 1 if event == "stop" else STEPS - 1)
    number_of = {"kill": signal.SIGKILL, "twice": signal.SIGKILL, "stop": choice.choice(SIGNALS), "second": 0}
    what = signal.Signals(number_of[event]).name if number_of[event] else "a second job"
    path, moment = folder / "run.h5", folder / "moment"
    arguments = [*OPTIONS, "--output", path, "--checkpoint", folder / "checkpoints"]
    train = ["-m", "qnewton_mpi", *arguments]
    if ranks not in references:
        finished = mpiexec(ranks, *train)
        assert finished.returncode == 0, finished.stderr
        references[ranks] = content(path)
        shutil.rmtree(folder)
        folder.mkdir()
    job = started(ranks, Path(__file__), "victim", rank, step, phase, int(number_of[event]), moment, *arguments)
    if event == "second":
        wait_for(lambda: moment.exists() or job.poll() is not None)
        refused = mpiexec(choice.choice(RANKS), *train, "--resume")
        moment.unlink()
        good = refused.returncode == 2 and "is being written by" in refused.stderr
    first = ended(job)
    if event == "second":
        good = good and first.returncode == 0
    elif event == "stop":
        found = re.search(r"stopped after step (\d+)", first.stderr)
        good = first.returncode == 75 and found is not None and newest(folder) == int(found[1])
    else:
        good = first.returncode not in (0, 2, 75)
    jobs = [started(ranks, *train, "--resume") for _ in range(2 if event == "twice" else 1)]
    ends = [ended(job) for job in jobs]
    codes = sorted(end.returncode for end in ends)
    good = good and codes[0] == 0 and codes[-1] in (0, 2) and not any("passed over" in end.stderr for end in ends)
    good = good and not any("Traceback" in end.stderr for end in (*ends, first))
    after, before = content(path), references[ranks]
    equal = all(np.array_equal(value, before[name], equal_nan=True) for name, value in after.items())
    row = [number, event, what, ranks, rank, step, phase, "yes" if good else "NO", "yes" if equal else "NO"]
    if not (good and equal):
        print(*row, *(end.stderr[-500:] for end in (first, *ends)), sep="\n", file=sys.stderr)
    return row, good and equal


def newest(folder: Path) -> int:
    """Return the step of the newest checkpoint."""
    return max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["jobs", "mutations"])
    parser.add_argument("count", type=int)
    parser.add_argument("table", type=Path, metavar="FILE.md")
    arguments = parser.parse_args()
    what, count, table = arguments.what, arguments.count, arguments.table
    trial: Callable[..., tuple[list[object], bool]]
    header: tuple[str, ...]
    if what == "jobs":
        trial, title = happen, "Jobs killed, stopped and doubled at random"
        header = ("trial", "event", "by", "ranks", "rank", "step from", "phase", "as it should", "bitwise equal")
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
    if sys.argv[1:2] == ["victim"]:
        victim(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5], Path(sys.argv[6]))
    sys.exit(main())
