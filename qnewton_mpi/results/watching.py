"""`qnewton-mpi watch`: the live curve of a run, from its file, in the terminal."""

from __future__ import annotations

import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from qnewton_mpi.results.layout import RUNNING
from qnewton_mpi.results.run import PERHAPS_DEAD, Run
from qnewton_mpi.results.words import qualities_text, two_digits

BLOCKS = "▁▂▃▄▅▆▇█"


def watch(path: Path, every: float, once: bool) -> None:
    """Show a run until it ends or is seen to be dead: in place on a terminal, else a line for each evaluation. Local.

    Ctrl-C ends it, too.

    Raises
    ------
    UserError
        Where the file is missing, not of a run, or damaged.
    """
    shown: tuple[int, str] | None = None
    while True:
        run = Run(path)
        word = run.state.partition(":")[0]
        news = len(run.epochs["step"]), word
        if sys.stdout.isatty():
            width = max(1, shutil.get_terminal_size().columns)
            lines = summary(run, width)
            clear = "\x1b[1A\x1b[2K" * len(lines) if shown else ""
            print(clear + "\n".join(line[:width] for line in lines), flush=True)
        elif news != shown:
            print("  ".join(filter(None, summary(run, 80))), flush=True)
        shown = news
        if once or word not in (RUNNING, PERHAPS_DEAD):
            return
        time.sleep(every)


def summary(run: Run, width: int) -> tuple[str, str, str, str]:
    """Return four lines: what and how far, the last figures, what batch is worth while, the training NLL as a curve."""
    steps = run.steps["step"]
    phases = [values[-50:] for name, values in run.steps.items() if name.startswith("seconds_")]
    seconds = float(np.sum(phases))
    rate = f", {run.attributes['batch'] * len(steps[-50:]) / seconds:,.0f} samples/s" if seconds > 0 else ""
    head = f"{run.label}: {run.state}, step {int(steps[-1]) if len(steps) else 0}{rate}"
    if not len(run.epochs["step"]):
        return head, "no evaluation yet", "", ""
    last = f"epoch {run.last('epoch'):.4g}: {qualities_text(run.last, run.held_out)}"
    advice = worth_while(run.noise_scale, run.attributes["batch"])
    return head, last, advice, curve(list(run.epochs["train_nll"]), width)


def worth_while(noise_scale: float, batch: int) -> str:
    """Say up to which size a larger batch would take fewer steps; nothing where that is not known.

    Examples
    --------
    >>> worth_while(4321.0, 256)
    'a larger batch would help up to about 4,300 samples'
    >>> worth_while(60.3, 256)
    'a larger batch would hardly help: about 60 samples would do'
    """
    if math.isnan(noise_scale):
        return ""
    if math.isinf(noise_scale):
        return "a larger batch would help: no signal is seen above the noise"
    if noise_scale > batch:
        return f"a larger batch would help up to about {two_digits(noise_scale)} samples"
    return f"a larger batch would hardly help: about {two_digits(noise_scale)} samples would do"


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
