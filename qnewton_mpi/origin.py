"""Where this code is from, a checkout or an address: to say how to install more of it, and which commit it is."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

NAME = "qnewton-mpi"
ROOT = Path(__file__).parents[1]
PATIENCE = 10  # seconds for git, on a file system that is slow


def pip_install(*extras: str) -> str:
    """Return the command that installs an extra, or one of several, from where this package was installed. Local.

    Examples
    --------
    >>> pip_install("plot").startswith("pip install ")
    True
    """
    source = _source()
    folder = _folder(source)
    if folder is not None:
        first, last = "." if folder == Path.cwd() else str(folder), ""
    elif "vcs_info" in source:
        first, last = NAME, f" @ {source['vcs_info']['vcs']}+{source['url']}"
    else:
        first, last = NAME, ""
    commands = [f"pip install {shlex.quote(f'{first}[{extra}]{last}')}" for extra in extras]
    return " or ".join(commands)


@functools.cache
def commit() -> str | None:
    """Return the commit of the code, "-dirty" after it where files were changed since; None where it has none. Local.

    Of a checkout as git tells, of an installation from a repository as pip noted.
    """
    if not (ROOT / ".git").exists():
        noted = _source().get("vcs_info", {}).get("commit_id")
        return str(noted) if noted else None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.decode("ascii", "replace").strip() or None


def _folder(source: dict[str, Any]) -> Path | None:
    """Return the checkout that the package is in or was installed from, where it is still there."""
    noted = urlparse(source.get("url", ""))
    places = [ROOT, *([Path(unquote(noted.path))] if noted.scheme == "file" else [])]
    return next((place for place in places if (place / "pyproject.toml").is_file()), None)


def _source() -> dict[str, Any]:
    """Return what pip noted of the origin (PEP 610); nothing where it was an index."""
    try:
        noted = metadata.distribution("qnewton_mpi").read_text("direct_url.json")
        found = json.loads(noted or "{}")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
