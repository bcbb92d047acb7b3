"""Who writes here: one program at a time for each output, folder of checkpoints and study."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qnewton_mpi.errors import UserError
from qnewton_mpi.files.whole import reason
from qnewton_mpi.parallel.log import LOG

TAKEOVER = 0.2  # seconds
TAKEN = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}


@dataclass(frozen=True)
class Holder:
    """A process that writes somewhere.

    Attributes
    ----------
    host, boot : str
        The machine, and the identifier of its present boot.
    pid, started : int
        The process, and when it began, in ticks since the boot: a number that was given again is not taken for it.
    since : str
        Local time.
    """

    host: str
    boot: str
    pid: int
    started: int
    since: str = field(compare=False)

    @classmethod
    def here(cls) -> Holder:
        """Return this process."""
        return cls(
            socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S")
        )

    def dead(self) -> bool | None:
        """Tell whether the process is gone; None where that cannot be seen from here."""
        if self.host != socket.gethostname():
            return None
        return self.boot != _boot() or _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the context lasts. Local, on one rank.

    The system's lock on the file ends with the process that holds it, however it ends. Where the file system has no
    locks, the file itself is the lock, and is taken over where its holder is seen to be dead.

    Parameters
    ----------
    path : Path
    what : str
        What is written under the lock, for messages: "--output run.h5".

    Raises
    ------
    UserError
        Where another program holds it, or it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(path, what)
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: the lock {path} cannot be made ({reason(error)})") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: who waits for this very file sees that it is not the path's any more
        os.close(descriptor)


def _taken(path: Path, what: str) -> int:
    """Return an open descriptor of the lock file, held."""
    while True:
        with contextlib.ExitStack() as stack:
            descriptor, new = _opened(path)
            stack.callback(os.close, descriptor)
            system = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                system = error.errno in TAKEN
                if system and not _is_at(descriptor, path):
                    continue  # let go of this very moment
                holder = _read(descriptor)
                if system or not new:
                    gone = not system and holder is not None and holder.dead()
                    if not gone:
                        otherwise = "" if system else f", or remove {path} if that process is gone"
                        raise UserError(
                            f"{what}: is being written by {holder or 'another program'}: wait for its end{otherwise}, "
                            "or name another"
                        ) from None
                LOG.warning(
                    "%s: this file system has no locks (%s): the file %s alone is the lock", what, reason(error), path
                )
            if not _is_at(descriptor, path):
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(Holder.here())).encode(), 0)
            if not (system or new):
                time.sleep(TAKEOVER)  # in which another that saw the same dead holder writes its name, too
                if _read(descriptor) != Holder.here():
                    continue
            stack.pop_all()
            return descriptor


def _opened(path: Path) -> tuple[int, bool]:
    """Return a descriptor of the lock file, and whether it is a new one."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # removed in between
                return os.open(path, flags), False


def _is_at(descriptor: int, path: Path) -> bool:
    """Tell whether an open file is the one that a path leads to: its holder may have removed it before we had it."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _read(descriptor: int) -> Holder | None:
    """Return who a lock file names; None where it says nothing that can be read."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> int:
    """Return when a process began; -1 where there is none of that number, or it has ended and is not yet reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
