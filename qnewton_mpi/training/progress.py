"""What one rank tells of a run while it goes: a bar on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping

from tqdm import tqdm

from qnewton_mpi.results.words import qualities_text

LINE_SECONDS = 30.0


class Progress:
    """Progress of a run on stderr. Local.

    Parameters
    ----------
    kind : {"auto", "bar", "lines", "off"}
    steps, epochs : int, float
        In the whole run.
    batch : int
        Samples a step.
    label : str
    done : int
        Steps done before, of a run that goes on.
    evaluating : float
        Seconds of evaluations before, of such a run.
    """

    def __init__(
        self, kind: str, steps: int, epochs: float, batch: int, label: str, done: int = 0, evaluating: float = 0.0
    ) -> None:
        if kind == "auto":
            kind = "bar" if sys.stderr.isatty() else "lines"
        self.kind, self.steps, self.epochs, self.batch, self.label = kind, steps, epochs, batch, label
        self._done = self._first = done
        self._told = self._started = time.monotonic()
        self._before, self._paused = evaluating, 0.0
        layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc=label,
            disable=kind != "bar",
            file=sys.stderr,
            bar_format=layout,
            mininterval=0.2,
            dynamic_ncols=True,
        )

    def step(self, loss: float) -> None:
        """Count a step."""
        self._done += 1
        if self.kind == "bar":
            self._bar.set_postfix_str(f"loss {loss:.4f}, {self._rate():,.0f} samples/s", refresh=False)
            self._bar.update()
        elif self.kind == "lines" and time.monotonic() - self._told > LINE_SECONDS:
            self._line(f"loss {loss:.4f}")

    def evaluated(self, figures: Mapping[str, float], held_out: Iterable[str]) -> None:
        """Tell of an evaluation, on some parts beside the training part; its time does not count as training."""
        self._paused = figures["evaluation_seconds"] - self._before
        qualities = qualities_text(figures.__getitem__, held_out)
        text = f"epoch {figures['epoch']:.4g}/{self.epochs:.4g}: {qualities}"
        if self.kind == "lines":
            self._line(text)
        elif self.kind == "bar":
            self._bar.write(f"{self.label} {text}", file=sys.stderr)

    def close(self) -> None:
        """Finish the bar's line."""
        self._bar.close()

    def _rate(self) -> float:
        training = time.monotonic() - self._started - self._paused
        return (self._done - self._first) * self.batch / training if training > 0 else 0.0

    def _line(self, text: str) -> None:
        now = time.monotonic()
        here = self._done - self._first
        remaining = (now - self._started) / here * (self.steps - self._done) if here else 0.0
        told = f", {self._rate():,.0f} samples/s, {remaining:.0f} s left" if here else ""
        print(f"{self.label} step {self._done}/{self.steps}, {text}{told}", file=sys.stderr, flush=True)
        self._told = now
