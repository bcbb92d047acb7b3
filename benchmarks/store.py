"""The records of a study: a file of JSON lines for each workload, a line a run, whoever writes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, get_type_hints

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.whole import read_whole, reason, replace_whole


@dataclass(frozen=True)
class Key:
    """What makes a run: there is one record for each. A study's own says more."""

    workload: str
    optimizer: str


@dataclass(frozen=True)
class Record:
    """What became of a run; a study's own says what. A number that is not finite is ∞."""

    key: Key

    @property
    def outcome(self) -> str:
        """In a word or two."""
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` takes; ∞ is null, which all readers of JSON know."""
        return {**asdict(self.key), **{name: _plain(value) for name, value in asdict(self).items() if name != "key"}}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """Return the record of a dictionary.

        Raises
        ------
        KeyError, TypeError
            For another one.
        """
        types = get_type_hints(cls)
        kind = types.pop("key")
        key = kind(**{part.name: found[part.name] for part in fields(kind)})
        rest = {
            name: _infinite(found[name]) if kind in (float, list[float]) else found[name]
            for name, kind in types.items()
        }
        return cls(key, **rest)


R = TypeVar("R", bound=Record)


class Store(Generic[R]):
    """A folder of records.

    A program that is killed while it writes leaves a line without an end: nobody reads it, and the next one to write
    takes it away.

    Parameters
    ----------
    folder : Path
    kind : type
        Of the records.
    """

    def __init__(self, folder: Path, kind: type[R]) -> None:
        self.folder, self.kind = folder, kind

    def path(self, workload: str) -> Path:
        """Return a workload's file."""
        return self.folder / f"{workload}.jsonl"

    def read(self, workload: str) -> dict[Any, R]:
        """Return a workload's records by their keys; of two with one key, the later.

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
                record = self.kind.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{printable(path)}: line {number} is no record of a run: remove it") from error
            records[record.key] = record
        return records

    def add(self, record: R) -> None:
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


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _infinite(value: Any) -> Any:
    if isinstance(value, list):
        return [_infinite(part) for part in value]
    return math.inf if value is None else float(value)


def _whole_lines(text: bytes) -> list[bytes]:
    """Return the lines that have an end."""
    return [line for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
