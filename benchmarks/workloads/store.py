"""The records: a file of JSON lines for each workload, a line a run, whoever writes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.workloads.running import Key, Record
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.whole import read_whole, reason, replace_whole

RESULTS = Path(__file__).parent / "results"


class Store:
    """A folder of records.

    A program that is killed while it writes leaves a line without an end: nobody reads it, and the next one to write
    takes it away.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder

    def path(self, workload: str) -> Path:
        """Return a workload's file."""
        return self.folder / f"{workload}.jsonl"

    def read(self, workload: str) -> dict[Key, Record]:
        """Return a workload's records; of two with one key, the later.

        Raises
        ------
        UserError
            For a line that is no record.
        """
        path = self.path(workload)
        if not path.exists():
            return {}
        records = {}
        for number, line in enumerate(_whole_lines(read_whole(path)), start=1):
            try:
                record = Record.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{printable(path)}: line {number} is no record of a run: remove it") from error
            records[record.key] = record
        return records

    def add(self, record: Record) -> None:
        """Write a record behind the others."""
        line = json.dumps(record.as_json(), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._alone(), open(self.path(record.key.workload), "a+b") as file:  # noqa: PTH123
            file.seek(0)
            file.truncate(sum(map(len, _whole_lines(file.read()))))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def drop(self, workload: str, optimizer: str) -> int:
        """Take away all records of an optimizer on a workload; return how many there were."""
        with self._alone():
            records = self.read(workload)
            kept = [record for key, record in records.items() if key.optimizer != optimizer]
            if len(kept) < len(records):
                lines = [json.dumps(record.as_json(), separators=(",", ":")) + "\n" for record in kept]
                replace_whole(self.path(workload), "".join(lines).encode())
            return len(records) - len(kept)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ".lock", "wb") as lock:  # noqa: PTH123
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise UserError(f"{printable(self.folder)}: cannot be written ({reason(error)})") from error


def _whole_lines(text: bytes) -> list[bytes]:
    """Return the lines that have an end."""
    return [line for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
