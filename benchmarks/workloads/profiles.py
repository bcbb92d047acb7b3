"""Performance profiles (Dolan and Moré 2002), by which AlgoPerf scores: who is at the target, and how soon."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from benchmarks.workloads.optimizers import PEERS
from benchmarks.workloads.tables import Results, Summary, goals
from qnewton_mpi.results.plotting import COLOURS, label_ends, pyplot, save

WIDEST = 16.0  # τ
Cost = Callable[[Summary, float], float]


def samples(cell: Summary, target: float) -> float:
    """Return the steps to a target: on one workload all have batches of as many samples."""
    return cell.steps_to(target)


def seconds(cell: Summary, target: float) -> float:
    """Return the CPU milliseconds to a target."""
    return cell.steps_to(target) * cell.cpu_ms


def profile(results: Results, goal: str, cost: Cost) -> dict[str, list[float]]:
    """Return for each column its cost over the least of all on each workload, sorted; ∞ where it did not get there.

    A workload counts where all columns are complete.
    """
    titles = [column.title for column in results.columns]
    found: dict[str, list[float]] = {title: [] for title in titles}
    for problem in results.problems:
        peer, cells = goals(results, problem).get(goal), [results.cell(problem, title) for title in titles]
        complete = [cell for cell in cells if cell is not None]
        if peer is None or peer.loss == math.inf or len(complete) < len(titles):
            continue
        costs = [cost(cell, peer.loss) for cell in complete]
        for title, value in zip(titles, costs, strict=True):
            found[title].append(value / min(costs) if value < math.inf else math.inf)
    return {title: sorted(values) for title, values in found.items()}


def draw(results: Results, target: Path) -> bool:
    """Draw the profiles; return False, where no workload is complete.

    Raises
    ------
    UserError
        Without matplotlib, or where the picture cannot be written.
    """
    panels = [(goal, what, cost) for goal in ("first order", "SOAP") for what, cost in COSTS.items()]
    found = [profile(results, goal, cost) for goal, _, cost in panels]
    if not any(values for lines in found for values in lines.values()):
        return False
    plt = pyplot("table")
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", sharey=True)
    own = {column.title for column in results.columns if column.optimizer not in PEERS}
    for place, (goal, what, _), lines in zip(axes.flat, panels, found, strict=True):
        ends = []
        for title, colour in zip(lines, COLOURS * len(lines), strict=False):
            ratios, n = lines[title], max(1, len(lines[title]))
            steps = [(1.0, 0.0)]
            for k, ratio in enumerate(ratios, start=1):
                steps += [(min(ratio, WIDEST), k / n)] if ratio <= WIDEST else []
            steps.append((WIDEST, steps[-1][1]))
            x, y = zip(*steps, strict=True)
            width = 2.5 if title in own else 1.3
            place.step(x, y, where="post", color=colour, linewidth=width, linestyle="--" if "cosine" in title else "-")
            ends.append((y[-1], title, colour))
        whose = "the best tuned first-order method's" if goal == "first order" else "tuned SOAP's"
        place.set(xscale="log", xlim=(1, WIDEST), ylim=(0, 1.02), title=f"{what} to {whose} final loss")
        place.set(xlabel="τ, times the fastest", ylabel="fraction of the workloads")
        ticks = [1, 2, 4, 8, 16]
        place.set_xticks(ticks, [str(tick) for tick in ticks])
        place.set_xticks([], minor=True)
        place.grid(alpha=0.3)
        label_ends(place, ends)
    save(plt, figure, target, dpi=100)
    return True


COSTS: dict[str, Cost] = {"samples": samples, "CPU seconds": seconds}
