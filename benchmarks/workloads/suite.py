"""All runs that are missing, some at a time, each a process of its own: cheap workloads first."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from benchmarks.workloads import tuning
from benchmarks.workloads.running import Key
from benchmarks.workloads.store import Store
from qnewton_mpi.errors import printable

ROOT = Path(__file__).parents[2]


def command(key: Key, store: Store, data_dir: str | None, device: str) -> list[str]:
    """Return the command line of a run."""
    words = [sys.executable, "-m", "benchmarks.workloads", "run", key.workload, key.optimizer]
    words += ["--schedule", key.schedule, "--seed", str(key.seed), "--steps", str(key.steps)]
    words += ["--results", str(store.folder), "--device", device]
    if key.lr is not None:
        words += ["--lr", repr(key.lr)]
    return words + (["--data-dir", data_dir] if data_dir else [])


def suite(
    store: Store,
    steps: dict[str, int],
    optimizers: Sequence[str],
    seeds: int,
    jobs: int,
    data_dir: str | None,
    device: str = "cpu",
    tell: Callable[[str], None] = print,
) -> list[Key]:
    """Do all runs that are missing; return those that failed.

    Parameters
    ----------
    store : Store
    steps : dict
        Of each workload, in the order in which they are to be done.
    optimizers : sequence of str
    seeds, jobs : int
    data_dir : str, optional
    device : str
        Of PyTorch. What was run elsewhere is timed on the CPU, by a trial of some steps.
    tell : callable
        Takes a line of what goes on.
    """
    running: dict[Key, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    failed: list[Key] = []
    done = 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        while True:
            for key in _next(store, steps, optimizers, seeds, {*running, *failed}, jobs - len(running), device):
                words = tempfile.TemporaryFile()  # no pipe: nobody reads it meanwhile  # noqa: SIM115
                process = subprocess.Popen(
                    command(key, store, data_dir, device),
                    env=environment,
                    cwd=ROOT,
                    stdout=subprocess.DEVNULL,
                    stderr=words,
                )
                running[key] = process, words
            if not running:
                return failed
            while not (ended := [key for key, (process, _) in running.items() if process.poll() is not None]):
                time.sleep(0.05)
            for key in ended:
                process, words = running.pop(key)
                done += 1
                if process.returncode == 0:
                    tell(f"{done}: {_name(key)}: {store.read(key.workload)[key].loss:.6g}")
                else:
                    failed.append(key)
                    words.seek(0)
                    last = words.read().decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
                    tell(f"{done}: {_name(key)}: failed: {printable(last[0])}")
                words.close()
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def _next(
    store: Store, steps: dict[str, int], optimizers: Sequence[str], seeds: int, others: set[Key], most: int, device: str
) -> list[Key]:
    """Return up to so many runs that can begin now, other than some; where one failed, its tuning cannot go on."""
    found: list[Key] = []
    for workload in steps:
        records = store.read(workload)
        for optimizer in optimizers:
            keys = tuning.wanted(records, workload, optimizer, steps[workload], seeds)
            if device == "cpu" and not keys:
                keys = tuning.untimed(records, workload, optimizer, steps[workload])
            found += [key for key in keys if key not in others]
            if len(found) >= most:
                return found[:most]
    return found


def _name(key: Key) -> str:
    rate = "" if key.lr is None else f" {key.lr:g}"
    return f"{key.workload} {key.optimizer}{rate} {key.schedule} seed {key.seed}"
