"""All runs of a study that are missing, some at a time, each a process of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from benchmarks.store import Key, Store
from qnewton_mpi.errors import printable

ROOT = Path(__file__).parents[1]


def suite(
    store: Store[Any],
    wanted: Callable[[], Iterable[Key]],
    command: Callable[[Key], list[str]],
    jobs: int,
    tell: Callable[[str], None] = print,
) -> list[Key]:
    """Do all runs that are missing; return those that failed, without which others could not begin.

    Parameters
    ----------
    store : Store
    wanted : callable
        The runs that can be done now and were not, in their order.
    command : callable
        Of a run: the command line that leaves its record.
    jobs : int
    tell : callable
        Takes a line of what goes on.
    """
    running: dict[Key, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    failed: list[Key] = []
    done = 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def first() -> Key | None:
        return next((key for key in wanted() if key not in running and key not in failed), None)

    try:
        while True:
            while len(running) < jobs and (key := first()) is not None:
                words = tempfile.TemporaryFile()  # no pipe: nobody reads it meanwhile  # noqa: SIM115
                process = subprocess.Popen(
                    command(key), env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=words
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
                    tell(f"{done}: {key}: {store.read(key.workload)[key].outcome}")
                else:
                    failed.append(key)
                    words.seek(0)
                    last = words.read().decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
                    tell(f"{done}: {key}: failed: {printable(last[0])}")
                words.close()
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
