"""The report on a study: a table against the best baseline, and its curves over three kinds of cost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.data.parts import TEST, VALIDATION
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.results.plotting import (
    COLOURS,
    MANY,
    draw_row,
    in_panels,
    label_decades,
    label_ends,
    plain,
    pyplot,
    save,
)
from qnewton_mpi.results.rows import title
from qnewton_mpi.results.run import Run
from qnewton_mpi.results.words import rate_text
from qnewton_mpi.studies.plan import at_edge
from qnewton_mpi.studies.store import read_runs

COSTS = {
    "sample_gradients": "sample gradients",
    "wall_seconds": "seconds, without evaluations",
    "bytes_sent_by_replicas": "bytes sent, a rank for each replica",
}
ROW_COLOURS = [colour for colour in COLOURS if colour != "#000000"]  # black is the best baseline


@dataclass(frozen=True)
class Result:
    """What a row of a study reached.

    Attributes
    ----------
    runs : list of Run
        On the seeds that count; those that diverged are not in it, but in `diverged`.
    tried : list of float
        The rates tuned over; empty without tuning.
    """

    name: str
    baseline: bool
    rate: float | str
    tried: list[float]
    runs: list[Run]
    diverged: int

    def mean(self, figure: str) -> float:
        """Return the mean of a figure of the last evaluation; NaN where every run diverged."""
        return float(np.mean([run.last(figure) for run in self.runs])) if self.runs else math.nan

    def cell(self, figure: str, layout: str = ".4f") -> str:
        """Return mean ± standard deviation over the runs."""
        if not self.runs:
            return "diverged"
        values = [run.last(figure) for run in self.runs]
        spread = f" ± {np.std(values, ddof=1):{layout}}" if len(values) > 1 else ""
        return f"{np.mean(values):{layout}}{spread}"

    def curve(self, figure: str) -> NDArray[np.float64]:
        """Return a figure of each evaluation, mean over the runs.

        Of seconds it is the median: a machine that is busy or suspended lengthens a run, nothing shortens one.
        """
        over_runs = np.median if figure == "wall_seconds" else np.mean
        return np.asarray(over_runs([run.epochs[figure] for run in self.runs], axis=0))

    def cost_to(self, target: float, cost: str) -> float:
        """Return the cost at which the mean training NLL reaches a target; NaN if it does not, or a run diverged."""
        if not self.runs or self.diverged:
            return math.nan
        return reached_at(self.curve(cost), self.curve("train_nll"), target)


def reached_at(cost: NDArray[np.float64], nll: NDArray[np.float64], target: float) -> float:
    """Return the cost at which a curve first falls to a target, log-linear between evaluations; NaN if it never does.

    Examples
    --------
    >>> reached_at(np.array([0.0, 10.0, 20.0]), np.array([1.0, 0.1, 0.01]), 0.1**1.5)
    15.0
    """
    below = np.flatnonzero(nll <= target)
    if not len(below):
        return math.nan
    k = below[0]
    if k == 0:
        return float(cost[0])
    before, after, at = np.log([nll[k - 1], nll[k], target])
    return round(float(cost[k - 1] + (before - at) / (before - after) * (cost[k] - cost[k - 1])), 9)


def read_results(path: Path) -> list[Result]:
    """Return the rows of a study's file: baselines first, then by name.

    Raises
    ------
    UserError
        For a file that is missing, is no study's, or has a row whose runs cannot be compared.
    """
    runs: dict[str, list[Run]] = {}
    for run in read_runs(path):
        runs.setdefault(str(run.attributes["row"]), []).append(run)
    results = []
    for name, members in runs.items():
        final = [run for run in members if run.attributes["stage"] == "final"]
        whole = [run for run in final if run.finished]
        rates = {run.attributes["lr"] for run in members if run.attributes["stage"] == "tuning"}
        tried = sorted(float(rate) for rate in rates if rate != "auto")
        if not final:
            raise UserError(f"{printable(path)}: row {name!r} has no run that counts, only such as tuned it")
        lengths = {len(run.epochs["epoch"]) for run in whole}
        if len(lengths) > 1 or 0 in lengths:
            raise UserError(f"{printable(path)}: the runs of row {name!r} have not as many evaluations each")
        first = final[0].attributes
        results.append(Result(name, bool(first["baseline"]), first["lr"], tried, whole, len(final) - len(whole)))
    return sorted(results, key=lambda r: (not r.baseline, natural(r.name)))


def best_baseline(results: Iterable[Result], figure: str) -> Result | None:
    """Return the baseline with the lowest mean of a figure, or None without baselines."""
    candidates = [r for r in results if r.baseline and r.runs]
    return min(candidates, key=lambda r: r.mean(figure), default=None)


def natural(name: str) -> list[tuple[int, str]]:
    """Return the key by which names sort as people do: numbers by their value.

    Examples
    --------
    >>> sorted(["M=16", "M=2", "Adam"], key=natural)
    ['Adam', 'M=2', 'M=16']
    """
    parts = [part.lstrip("0") if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    return [(len(part), part) if part.isdecimal() else (0, part) for part in parts]


@np.errstate(all="ignore")  # what is not finite stands in the table as such
def markdown(results: list[Result]) -> str:
    """Return the table: mean ± standard deviation over the seeds, and ratios to the best baseline in each figure.

    "to its NLL" is the cost until the best baseline's final training NLL is reached, over the baseline's whole cost.
    """
    last, tail = (best_baseline(results, figure) for figure in ("train_nll", "tail_train_nll"))

    parts = [part for part in (VALIDATION, TEST) if all(part in run.held_out for r in results for run in r.runs)]

    def ratio(value: float, base: float | None) -> str:
        return "–" if not base or math.isnan(value) else f"{value / base:.2f}"

    def to_target(result: Result, cost: str) -> str:
        if last is None:
            return "–"
        return ratio(result.cost_to(last.mean("train_nll"), cost), float(last.curve(cost)[-1]))

    columns: dict[str, Callable[[Result], str]] = {
        "row": lambda r: r.name.replace("|", "\\|") + (" (baseline)" if r.baseline else ""),
        "rate": lambda r: rate_text(r.rate) + (" (edge)" if at_edge(r.rate, r.tried) else ""),
        "tuned over": lambda r: str(len(r.tried)),
        "seeds": lambda r: str(len(r.runs)) + (f" + {r.diverged} diverged" if r.diverged else ""),
        "train NLL": lambda r: r.cell("train_nll"),
        "ratio": lambda r: ratio(r.mean("train_nll"), last.mean("train_nll") if last else None),
        "train NLL, tail mean": lambda r: r.cell("tail_train_nll"),
        "ratio, tail": lambda r: ratio(r.mean("tail_train_nll"), tail.mean("tail_train_nll") if tail else None),
        **{f"{part} NLL, tail mean": lambda r, part=part: r.cell(f"tail_{part}_nll") for part in parts},  # type: ignore[misc]
        "samples to its NLL": lambda r: to_target(r, "sample_gradients"),
        "seconds to its NLL": lambda r: to_target(r, "wall_seconds"),
    }
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell(result) for cell in columns.values())} |" for result in results]
    return "\n".join(lines) + "\n"


@np.errstate(all="ignore")
def draw(results: list[Result], target: Path) -> None:
    """Draw the mean training NLL of each row against the three kinds of cost, with the band that its seeds fill. Local.

    The rows are spread over panels, the best baseline in each of them.

    Raises
    ------
    UserError
        Without matplotlib, or where the picture cannot be written.
    """
    plt = pyplot("report")
    from matplotlib.ticker import EngFormatter

    best = best_baseline(results, "train_nll")
    shared = [] if best is None else [best]
    others = [result for result in results if result.runs and result is not best]
    panels = in_panels(others, MANY - len(shared)) or [[]]
    figure, grid = plt.subplots(
        len(panels), len(COSTS), figsize=(15, 4.2 * len(panels)), sharey=True, layout="constrained", squeeze=False
    )
    for places, panel in zip(grid, panels, strict=True):
        lines = [*zip(shared, ["#000000"], strict=False), *zip(panel, ROW_COLOURS, strict=False)]
        for axes, (cost, label) in zip(places, COSTS.items(), strict=True):
            for result, colour in lines:
                curves = [(result.curve(cost), run.epochs["train_nll"]) for run in result.runs]
                draw_row(axes, curves, colour, "--" if result.baseline else "-")
            axes.set(xlabel=label, yscale="log")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 300k, not 300000: labels must not touch
            axes.grid(True, which="both", alpha=0.3)
        label_decades(places[0])
        places[0].set_ylabel("training NLL (nats)")
        label_ends(
            places[-1],
            [(result.mean("train_nll"), f"{result.name}, {rate_text(result.rate)}", c) for result, c in lines],
        )
    runs = [run for result in results for run in result.runs]
    figure.suptitle(plain(f"{title(runs)}; baselines dashed") if runs else "every run diverged")
    save(plt, figure, target, dpi=120)
