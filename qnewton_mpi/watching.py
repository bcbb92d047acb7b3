"""`qnewton-mpi watch`: the live curve of a run, from its file, in the terminal."""

from __future__ import annotations

import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from qnewton_mpi.errors import UserError
from qnewton_mpi.training.runfile import RUNNING, Run

BLOCKS = "▁▂▃▄▅▆▇█"


def watch(path: Path, every: float, once: bool) -> None:
    """Show a run until it ends: in place on a terminal, else a line for each evaluation. Local.

    Raises
    ------
    UserError
        Where the file is missing or not of a run.
    """
    shown = -1
    while True:
        run = Run(path)
        rows = len(run.epochs["step"])
        if sys.stdout.isatty():
            clear = "\x1b[1A\x1b[2K" * 3 if shown >= 0 else ""
            print(clear + summary(run, shutil.get_terminal_size().columns), flush=True)
        elif rows > shown:
            print(summary(run, 80).replace("\n", "  "), flush=True)
        shown = rows
        if once or run.attributes["status"] != RUNNING:
            return
        time.sleep(every)


def summary(run: Run, width: int) -> str:
    """Return three lines: what and how far, the last figures, the training NLL of all evaluations as a curve."""
    if not len(run.epochs["step"]):
        raise UserError(f"{run.path}: no evaluation yet")
    a, steps = run.attributes, run.steps.get("step", np.zeros(0))
    done = int(steps[-1]) if len(steps) else 0
    seconds = run.steps["seconds_gradient"] + run.steps["seconds_communication"] + run.steps["seconds_algebra"]
    recent = seconds[-50:]
    rate = a["batch"] * len(recent) / recent.sum() if len(recent) else math.nan
    head = f"{run.label}: {a['status']}, step {done}, {rate:,.0f} samples/s"
    figures = f"train NLL {run.last('train_nll'):.4f}, test NLL {run.last('test_nll'):.4f}"
    last = f"epoch {run.last('epoch'):.4g}: {figures}, accuracy {run.last('test_accuracy'):.2%}"
    return "\n".join((head[:width], last[:width], curve(list(run.epochs["train_nll"]), width)))


def curve(values: list[float], width: int) -> str:
    """Return values as bars on a logarithmic scale, the last `width` of them.

    Examples
    --------
    >>> curve([8.0, 4.0, 2.0, 1.0], 10)
    '█▆▃▁'
    """
    logs = [math.log(value) if value > 0 else math.nan for value in values[-width:]]
    finite = [value for value in logs if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite) or 1.0
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round(top * (v - low) / span)] if math.isfinite(v) else "?" for v in logs)
