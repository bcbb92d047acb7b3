"""Steps to the target against the batch, as Shallue et al. (2018, arXiv 1811.03600) draw it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from benchmarks.batches.study import BATCHES
from benchmarks.batches.tables import Results
from benchmarks.workloads.optimizers import PEERS
from qnewton_mpi.results.plotting import COLOURS, label_decades, label_ends, pyplot, save


def draw(results: Results, target: Path) -> bool:
    """Draw a panel for each workload; return False, where there is no line on one.

    Raises
    ------
    UserError
        Without matplotlib, or where the picture cannot be written.
    """
    lines = {
        (workload.name, of.title): [
            (batch, cell.steps)
            for batch, cell in zip(BATCHES, results.along(workload, of), strict=False)
            if cell.steps < math.inf
        ]
        for workload in results.workloads
        for of in results.series
    }
    shown = [workload for workload in results.workloads if any(lines[workload.name, of.title] for of in results.series)]
    if not shown:
        return False
    plt = pyplot("table")
    figure, axes = plt.subplots(1, len(shown), figsize=(6.5 * len(shown), 5), layout="constrained", squeeze=False)
    for place, workload in zip(axes.flat, shown, strict=True):
        every = [steps for of in results.series for _, steps in lines[workload.name, of.title]]
        ends = []
        for of, colour in zip(results.series, COLOURS * len(results.series), strict=False):
            points = lines[workload.name, of.title]
            if not points:
                continue
            batches, steps = zip(*points, strict=True)
            place.plot(
                batches, steps, "o-", color=colour, linewidth=1.3 if of.optimizer in PEERS else 2.5, markersize=3
            )
            perfect = [steps[0] * batches[0] / batch for batch in BATCHES]
            place.plot(BATCHES, perfect, "--", color=colour, linewidth=0.8, alpha=0.6)
            bound = results.largest(workload, of)
            if bound is not None and not bound.beyond:
                height = _between(bound.batch, points)
                place.plot(bound.batch, height, "o", color=colour, markersize=9, markerfacecolor="none")
            ends.append((steps[-1], of.title, colour))
        place.set(xscale="log", yscale="log", xlim=(BATCHES[0] / 1.1, BATCHES[-1] * 1.1))
        place.set(ylim=(min(every) / 1.3, max(every) * 1.2), title=f"{workload.name}: to {workload.target:g} nats")
        place.set(xlabel="batch, samples", ylabel="steps to the target")
        place.set_xticks(BATCHES, [f"{batch:,}" for batch in BATCHES])
        place.set_xticks([], minor=True)
        label_decades(place)
        place.grid(alpha=0.3, which="both")
        label_ends(place, ends)
    save(plt, figure, target, dpi=100)
    return True


def _between(batch: float, points: list[tuple[int, float]]) -> float:
    """Return the steps at a batch between two points, a power of the batch."""
    for (left, before), (right, after) in itertools.pairwise(points):
        if left <= batch <= right:
            return before * (after / before) ** (math.log(batch / left) / math.log(right / left))
    return points[-1][1]
