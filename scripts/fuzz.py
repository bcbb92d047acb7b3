"""Damage files of every kind at random and see that every command says so in a line, or does what it did before.

Usage: python scripts/fuzz.py COUNT FILE.md [SEED]

Each trial damages one file (a run's, a study's, one of a checkpoint, a configuration, a study's TOML, images or labels
in IDX or CIFAR-10's layout, plain or gzip) and gives it to one command. That is right which ends within 5 s more than
with the whole file (one that does not is tried once more, and the whole file timed anew: a machine may be busy, a hang
repeats itself), and

- with exit code 2 and one line, or
- with a line that an older checkpoint is taken, and the result of the whole one, or
- with exit code 0 and, where the file has a sum (runs, studies, checkpoints), with the very output of the whole file.
  A configuration that was changed is another one; of changed pixels, which have no sum, the run's file must say so by
  another digest of the data.

FILE.md gets a table of counts, and the trials that went otherwise, each with its number: trial k depends on SEED + k
alone. It is written as the trials go; a second start goes on after the last one. The exit code is 1 where one went
otherwise.

In one module, of more than 300 lines: a kind of file is a few, and one that is added is read beside the others.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qnewton_mpi.parallel.environment import prepare

prepare()

import h5py  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

LIMIT = 5.0  # seconds beyond those of the whole file
TRAIN = ["train", "--replicas", "2", "--batch", "32", "--evaluate-every", "1000", "--progress", "off"]
SAVED = [*TRAIN, "--steps", "4", "--checkpoint", "checkpoints", "--checkpoint-every", "2", "--output", "run.h5"]
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR = (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin")
CONFIGURATION = """# a run
method = "kronecker"
replicas = 2
batch = 32
lr = 0.3
seed = 3
evaluate-every = 1000
warmup = 2
schedule = "cosine"
output = "configured.h5"
overwrite = true
progress = "off"
"""
STUDY = """seeds = [0, 1]
tuning_seed = 9
extensions = 0
tune_by = "train_nll"

[common]
replicas = 2
batch = 32
steps = 1

[[row]]
name = "Nesterov"
baseline = true
method = "momentum"
nesterov = true
lr = 0.1

[[row]]
name = "kronecker"
method = "kronecker"
"""
TOKENS = (
    *("\0", "\ud800", "[", "[[", "{", '"', "'''", "=", "\n", "-", "9" * 30, "9" * 5000, "1e999", "nan", "inf", "true"),
    *("[" * 3000, "\ufeff", "1979-05-27", "[1, 2]", "{a = 1}", "-1", "0", "../..", "%", "x" * 5000, "é", "\x1b[2J"),
)
Damage = Callable[[bytes, random.Random], bytes]


def cut(data: bytes, choice: random.Random) -> bytes:
    """Cut off at a random byte."""
    return data[: choice.randrange(len(data))]


def flip(data: bytes, choice: random.Random) -> bytes:
    """Flip one bit."""
    changed = bytearray(data)
    changed[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    return bytes(changed)


def flip_early(data: bytes, choice: random.Random) -> bytes:
    """Flip a bit of the first 600 bytes, where headers are."""
    return flip(data[:600], choice) + data[600:]


def noise(data: bytes, choice: random.Random) -> bytes:
    """Replace 20 bytes in random places."""
    changed = bytearray(data)
    for _ in range(20):
        changed[choice.randrange(len(data))] = choice.randrange(256)
    return bytes(changed)


def page(data: bytes, choice: random.Random) -> bytes:
    """Put zeros in place of up to 4,096 bytes, as of a page that never came to the disk."""
    first = choice.randrange(len(data))
    return data[:first] + bytes(len(data[first : first + 4096])) + data[first + 4096 :]


def insert(data: bytes, choice: random.Random) -> bytes:
    """Insert up to 100 random bytes."""
    first = choice.randrange(len(data))
    return data[:first] + choice.randbytes(choice.randint(1, 100)) + data[first:]


def delete(data: bytes, choice: random.Random) -> bytes:
    """Take out up to 1,000 bytes."""
    first = choice.randrange(len(data))
    return data[:first] + data[first + choice.randint(1, 1000) :]


def append(data: bytes, choice: random.Random) -> bytes:
    """Append random bytes."""
    return data + choice.randbytes(choice.randint(1, 2000))


def garbage(data: bytes, choice: random.Random) -> bytes:
    """Put random bytes in place of everything."""
    return choice.randbytes(choice.randint(0, 5000))


def token(data: bytes, choice: random.Random) -> bytes:
    """Insert something that parsers stumble over, or put it in place of a word."""
    words = [*re.finditer(rb"[\w.]+", data)] or [re.match(b"", data)]
    at = choice.choice(words)
    assert at is not None
    first = at.start() if choice.random() < 0.7 else at.end()
    return data[:first] + choice.choice(TOKENS).encode("utf-8", "surrogatepass") + data[at.end() :]


BINARY: tuple[Damage, ...] = (cut, flip, flip_early, noise, page, insert, delete, append, garbage)
TEXT: tuple[Damage, ...] = (cut, flip, noise, insert, delete, garbage, token, token, token)


@dataclass(frozen=True)
class Target:
    """A kind of file, and what reads it.

    Attributes
    ----------
    kind : str
        As the table calls it.
    files : str
        A pattern in the folder of whole files, from which one is taken at random.
    damages : tuple
    commands : tuple of list of str
        Arguments of `qnewton-mpi`.
    summed : bool
        Whether a change must be seen.
    result : str
        The run's file whose parameters count as output, if any, instead of what is printed.
    without : str
        A file that is taken away first: of a finished run, so that it has to be written anew from the checkpoint.
    """

    kind: str
    files: str
    damages: tuple[Damage, ...]
    commands: tuple[list[str], ...]
    summed: bool = True
    result: str = ""
    without: str = ""


DATA = ["--steps", "1", "--output", "data.h5", "--overwrite"]
TARGETS = (
    Target("run", "run.h5", BINARY, (["watch", "run.h5", "--once"], ["plot", "run.h5", "--output", "p.png"])),
    Target("run", "run.h5", BINARY, (["spectrum", "run.h5", "--top", "1", "--samples", "8", "--output", "s.h5"],)),
    Target("run", "run.h5", BINARY, ([*SAVED, "--resume"],), result="run.h5"),
    Target("checkpoint", "checkpoints/step-*4/*", BINARY, ([*SAVED, "--resume"],), True, "run.h5", "run.h5"),
    Target(
        "checkpoint",
        "checkpoints/step-*/*",
        BINARY,
        (["spectrum", "checkpoints", "--top", "1", "--samples", "8", "--output", "s.h5"],),
    ),
    Target("study", "study.h5", BINARY, (["report", "study.h5", "--overwrite"],)),
    Target("study", "study.h5", BINARY, (["compare", "study.toml", "--output", "study.h5"],)),
    Target("study's TOML", "study.toml", TEXT, (["compare", "study.toml", "--output", "study.h5"],), summed=False),
    Target("configuration", "run.toml", TEXT, (["train", "run.toml", "--steps", "1"],), summed=False),
    Target("IDX", "idx/*", BINARY, ([*TRAIN, "--data", "mnist", "--data-dir", "idx", *DATA],), False, "data.h5"),
    Target("IDX, gzip", "gz/*", BINARY, ([*TRAIN, "--data", "mnist", "--data-dir", "gz", *DATA],), False, "data.h5"),
    Target(
        "CIFAR", "cifar/*", BINARY, ([*TRAIN, "--data", "cifar10", "--data-dir", "cifar", *DATA],), False, "data.h5"
    ),
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code (None: it did not), what it said, its figures, seconds."""

    code: int | None
    out: str
    err: str
    figures: bytes
    digest: str
    seconds: float


def run(folder: Path, arguments: list[str], result: str, limit: float) -> Outcome:
    """Run a command in a folder."""
    command = [sys.executable, "-m", "qnewton_mpi", *arguments]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, cwd=folder, timeout=limit, env=environ, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(None, "", "", b"", "", time.monotonic() - started)
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    figures, digest = b"", ""
    if result and done.returncode == 0:
        with h5py.File(folder / result) as file:
            figures = b"".join(part[()].tobytes() for part in file["parameters"].values())
            digest = str(file.attrs.get("data_digest", ""))
    return Outcome(done.returncode, out, err, figures, digest, time.monotonic() - started)


def told(text: str) -> str:
    """Return an output without what depends on time."""
    return re.sub(r"\d+(\.\d+)?( [smh]\b|,\d+ samples/s| s ago)|[\d.,]+$", "", text, flags=re.MULTILINE)


def prepared(folder: Path) -> None:
    """Make the whole files."""
    (folder / "run.toml").write_text(CONFIGURATION)
    (folder / "study.toml").write_text(STUDY)
    random_numbers = np.random.default_rng(0)
    for name in ("idx", "gz", "cifar"):
        (folder / name).mkdir()
    for name in IDX:
        shape = (96, 28, 28) if "images" in name else (96,)
        values = random_numbers.integers(0, 256 if "images" in name else 10, shape, np.uint8)
        raw = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values.tobytes()
        (folder / "idx" / name).write_bytes(raw)
        (folder / "gz" / f"{name}.gz").write_bytes(gzip.compress(raw))
    for name in CIFAR:
        records = random_numbers.integers(0, 256, (32, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / "cifar" / name).write_bytes(records.tobytes())
    for arguments in (SAVED, ["compare", "study.toml", "--output", "study.h5"]):
        done = run(folder, arguments, "", 120)
        assert done.code == 0, done.err


def verdict(whole: Outcome, found: Outcome, target: Target, same: bool) -> str:
    """Return how a trial went: "told", "as before", "another input", or what is wrong."""
    if found.code is None:
        return "HANGS"
    if "Traceback" in found.out + found.err:
        return "TRACEBACK"
    if found.code == 2:
        lines = [line for line in found.err.splitlines() if "error:" in line]
        return "told" if len(lines) == 1 else "NO LINE"
    if found.code != 0:
        return f"EXIT CODE {found.code}"
    if "passed over" in found.err:  # an older checkpoint is taken, and a run must come to the same end from it
        return "told" if found.figures == whole.figures else "SILENT DIFFERENCE"
    if target.summed or same:
        equal = found.figures == whole.figures if target.result else told(found.out) == told(whole.out)
        return "as before" if equal else "SILENT DIFFERENCE"
    if target.result and found.digest == whole.digest:
        return "SILENT DIFFERENCE"
    return "another input"


def trial(number: int, whole: Path, folder: Path, references: dict[str, Outcome]) -> tuple[tuple[str, str, str], str]:
    """Do a trial; return its kind, command and damage, and how it went."""
    choice = random.Random(number)
    target = TARGETS[number % len(TARGETS)]
    arguments, damage = choice.choice(target.commands), choice.choice(target.damages)
    key = " ".join([*arguments, target.without])
    if key not in references:
        fresh = folder / "whole"
        copied(whole, fresh, target.without)
        references[key] = run(fresh, arguments, target.result, 120)
        assert references[key].code == 0, f"{key}: {references[key].err}"
    copied(whole, folder / "damaged", target.without)
    victim = choice.choice(sorted((folder / "damaged").glob(target.files)))
    before = victim.read_bytes()
    after = damage(before, choice)
    victim.write_bytes(after)
    shutil.copytree(folder / "damaged", folder / "again")
    reference = references[key]
    found = run(folder / "damaged", arguments, target.result, reference.seconds + LIMIT)
    if found.code is None:
        copied(whole, folder / "timed", target.without)
        now = run(folder / "timed", arguments, target.result, 120)
        found = run(folder / "again", arguments, target.result, now.seconds + LIMIT)
    return (target.kind, arguments[0], damage.__name__), verdict(reference, found, target, before == after)


def copied(whole: Path, folder: Path, without: str) -> None:
    """Make a folder of the whole files, without one of them perhaps."""
    shutil.copytree(whole, folder)
    if without:
        (folder / without).unlink()


def page_of(done: int, seed: int, counts: dict[tuple[str, str], dict[str, int]], wrong: list[str]) -> str:
    """Return the document."""
    verdicts = sorted({name for row in counts.values() for name in row}, key=lambda name: (name.isupper(), name))
    lines = [
        "# Files damaged at random",
        "",
        f"`python scripts/fuzz.py {done} docs/reference/fuzz.md {seed}`: {done} trials, "
        f"{len(wrong)} not as they should be.",
        "",
        f"| file | command | trials | {' | '.join(verdicts)} |",
        "|---" * (3 + len(verdicts)) + "|",
    ]
    for (kind, command), row in sorted(counts.items()):
        cells = [str(row.get(name, 0)) for name in verdicts]
        lines.append(f"| {kind} | {command} | {sum(row.values())} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in wrong)]).rstrip() + "\n"


def read_page(path: Path) -> tuple[int, dict[tuple[str, str], dict[str, int]], list[str]]:
    """Return what an earlier start has written: trials done, counts, and what was wrong."""
    if not path.exists():
        return 0, {}, []
    lines = path.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    names, counts = rows[0][3:], {}
    for kind, command, _, *cells in rows[2:]:
        counts[kind, command] = {name: int(cell) for name, cell in zip(names, cells, strict=True)}
    found = re.search(r"(\d+) trials", path.read_text())
    return int(found[1]) if found else 0, counts, [line[2:] for line in lines if line.startswith("- ")]


def main() -> int:
    """Do as many trials as are asked for and not in the document yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("path", type=Path, metavar="FILE.md")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    arguments = parser.parse_args()
    count, path, seed = arguments.count, arguments.path, arguments.seed
    print(f"seed {seed}")
    done, counts, wrong = read_page(path)
    references: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as base:
        whole = Path(base) / "whole"
        whole.mkdir()
        prepared(whole)
        for number in tqdm(range(done, count), disable=not sys.stderr.isatty()):
            folder = Path(base) / str(number)
            folder.mkdir()
            (kind, command, damage), how = trial(seed + number, whole, folder, references)
            row = counts.setdefault((kind, command), {})
            row[how] = row.get(how, 0) + 1
            if how.isupper() or how.startswith("EXIT"):
                wrong.append(f"trial {number}: {kind}, {command}, {damage}: {how}")
                print(wrong[-1], flush=True)
            path.write_text(page_of(number + 1, seed, counts, wrong))
            shutil.rmtree(folder)
    print(f"{count - done} trials done, {len(wrong)} in all not as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
