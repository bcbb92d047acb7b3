"""Who writes here: one program at a time for each output, folder of checkpoints and study."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.whole import reason

LOG = logging.getLogger("qnewton_mpi")  # that of `parallel.log`, which needs this room
TAKEN = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
MOUNTS = Path("/proc/self/mountinfo")
ALONE = {"localflock", "local_lock=flock", "local_lock=all"}  # options of a mount whose locks end at the host
MOST_BYTES = 4096  # of a lock file
UNKNOWN, ENDED = -1, -2
_TOLD: set[int] = set()  # file systems


@dataclass(frozen=True)
class Holder:
    """A process that writes somewhere.

    Attributes
    ----------
    host, space, boot : str
        The machine, the space of its process numbers (a container has its own), and the identifier of its present boot.
    pid, started : int
        The process, and when it began, in ticks since the boot: a number that was given again is not taken for it.
        `started` is UNKNOWN where the system does not say.
    job, restart : str, int
        SLURM's job, if it is part of one, and how often that job went back to the queue before.
    alone : bool
        Whether the file was the lock, without one of the system.
    since : str
        Local time.
    """

    host: str
    space: str
    boot: str
    pid: int
    started: int
    job: str
    restart: int
    alone: bool
    since: str

    @classmethod
    def here(cls, alone: bool = False) -> Holder:
        """Return this process."""
        job = " ".join(os.environ.get(f"SLURM_{name}", "") for name in ("CLUSTER_NAME", "JOB_ID")).strip()
        restart = os.environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            socket.gethostname(),
            _space(),
            _boot(),
            os.getpid(),
            _started(os.getpid()),
            job,
            int(restart) if restart.isdecimal() else 0,
            alone,
            time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def dead(self) -> bool | None:
        """Tell whether the process is gone; None where that cannot be seen from here."""
        here = Holder.here()
        if self.job and self.job == here.job and self.restart < here.restart:
            return True  # SLURM starts a job again when its earlier start is over, on whatever hosts
        if (self.host, self.space) != (here.host, here.space):
            return None
        return self.boot != here.boot or not _runs(self.pid, self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def lock_of(path: Path) -> Path:
    """Return the lock file of a file: beside it, hidden."""
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the context lasts. Local, on one rank.

    The system's lock on the file ends with the process that holds it, however it ends. Where the file system has no
    locks, or only such as other hosts do not see, the file itself is the lock, and is taken over where its holder is
    provably dead.

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
        lock = f"its lock {printable(path)} cannot be made"
        raise UserError(f"{what}: cannot be written: {lock} ({reason(error)})") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_at(descriptor, path):
                path.unlink()  # while it is held: who waits for this very file sees that it is not the path's any more
        os.close(descriptor)


def _taken(path: Path, what: str) -> int:
    """Return an open descriptor of the lock file, held."""
    while True:
        with contextlib.ExitStack() as stack:
            descriptor, new = _opened(path)
            stack.callback(os.close, descriptor)
            taken, without = _system_lock(descriptor)
            if not _is_at(descriptor, path):
                continue  # its holder let go of it this very moment
            before = None if new else _read(descriptor)
            if taken or (not new and _may_live(before, without)):
                otherwise = "" if taken else f", or remove {path} if that process is gone"
                raise UserError(
                    f"{what}: is being written by {before or 'another program'}: wait for its end{otherwise}, "
                    "or name another"
                )
            if without is not None:
                _tell(os.fstat(descriptor).st_dev, path, without)
            if without is None or new:
                _write(descriptor, Holder.here(alone=without is not None))
            else:  # one at a time takes over
                with locked(path.with_name(f"{path.name}.taken-over"), what):
                    if not _is_at(descriptor, path) or _read(descriptor) != before:
                        continue
                    _write(descriptor, Holder.here(alone=True))
            stack.pop_all()
            return descriptor


def _system_lock(descriptor: int) -> tuple[bool, str | None]:
    """Try the system's lock; return whether another has it, and why it is of no use where it is of none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in TAKEN, None if error.errno in TAKEN else f"has no locks ({reason(error)})"
    return False, "has locks that other hosts do not see" if _ends_at_host(os.fstat(descriptor).st_dev) else None


def _may_live(holder: Holder | None, without: str | None) -> bool:
    """Tell whether the holder that a file names may live, though the system's lock was not in the way."""
    if without is None and (holder is None or not holder.alone):
        return False  # it had the system's lock, which is free
    return holder is None or holder.dead() is not True


def _tell(device: int, path: Path, without: str) -> None:
    """Warn that the files alone are the locks, once for a file system."""
    if device not in _TOLD:
        _TOLD.add(device)
        LOG.warning("%s: this file system %s: the lock files alone are the locks", path.parent, without)


def _ends_at_host(device: int) -> bool:
    """Tell whether a file system's locks are those of one host though others may write there."""
    try:
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:  # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - nfs4 server:/x rw,local_lock=none
        ours, _, theirs = line.partition(" - ")
        if ours.split()[2:3] == [number]:
            kind, *_, options = theirs.split()
            return kind == "beegfs" or bool(ALONE & set(options.split(",")))
    return False


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


def _write(descriptor: int, holder: Holder) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)


def _read(descriptor: int) -> Holder | None:
    """Return who a lock file names; None where it says nothing that can be read."""
    try:
        found = Holder(**json.loads(os.pread(descriptor, MOST_BYTES, 0)))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = get_type_hints(Holder)
    right = all(type(value) is kinds[name] for name, value in vars(found).items())
    return found if right and 0 < found.pid < 1 << 31 and str(found).isprintable() else None


def _space() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _runs(pid: int, started: int) -> bool:
    """Tell whether the process of that number that began then may still run."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's, of which /proc may show nothing
        pass
    found = _started(pid)
    return found != ENDED and (found == started or UNKNOWN in (found, started))


def _started(pid: int) -> int:
    """Return when a process began, UNKNOWN where the system does not say, or ENDED for one that is not yet reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return UNKNOWN
    return ENDED if fields[0] in "ZX" else int(fields[19])
