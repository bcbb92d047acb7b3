"""What the records say: tables in Markdown. The same records give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.batches.running import APART, JUDGED, Record
from benchmarks.batches.study import (
    BATCHES,
    FEWEST,
    LONGER,
    MOST,
    MOST_REPLICAS,
    Records,
    Series,
    Workload,
    chosen,
    repeated,
    series,
)
from benchmarks.figures import NONE, markdown, mean, number, spread, versions
from benchmarks.grid import GRID, MORE
from benchmarks.workloads.optimizers import PEERS

WITHIN = 1.3  # samples to the target, of those at the smallest batch
COMPARED = "nesterov", "soap"  # whose largest batch the default's is told in


@dataclass(frozen=True)
class Cell:
    """All seeds of a series at a batch, at its rate.

    Attributes
    ----------
    records : list of Record
    runs : int
        All that were done to get here.
    """

    records: list[Record]
    runs: int

    @property
    def steps(self) -> float:
        """Steps to the target, mean over the seeds; ∞ where one did not get there."""
        return mean([record.steps for record in self.records])

    @property
    def samples(self) -> float:
        """Samples to the target."""
        return self.steps * self.records[0].key.batch


class Results:
    """The cells that are complete.

    Parameters
    ----------
    workloads : sequence of Workload
    records : mapping
        By the name of the workload.
    optimizers : sequence of str
    """

    def __init__(
        self, workloads: Sequence[Workload], records: Mapping[str, Records], optimizers: Sequence[str]
    ) -> None:
        self.workloads = [workload for workload in workloads if records[workload.name]]
        self.series = [one for optimizer in optimizers for one in series(optimizer)]
        self.cells = {
            (workload.name, of.title, batch): cell
            for workload in workloads
            for of in self.series
            for batch in BATCHES
            if (cell := _cell(records[workload.name], workload, of, batch)) is not None
        }
        self.seeds = max((len(cell.records) for cell in self.cells.values()), default=0)
        self.cells = {key: cell for key, cell in self.cells.items() if len(cell.records) == self.seeds}

    def cell(self, workload: Workload, of: Series, batch: int) -> Cell | None:
        """Return a cell, or None where runs are missing."""
        return self.cells.get((workload.name, of.title, batch))

    def along(self, workload: Workload, of: Series) -> list[Cell]:
        """Return the cells of a series from the smallest batch to the first that is missing."""
        found: list[Cell] = []
        for batch in BATCHES:
            if (cell := self.cell(workload, of, batch)) is None:
                break
            found.append(cell)
        return found

    def largest(self, workload: Workload, of: Series) -> Largest | None:
        """Return the largest batch of a series; None, where one is missing or the target not reached at the first."""
        cells = self.along(workload, of)
        return largest([cell.samples for cell in cells]) if len(cells) == len(BATCHES) else None


def _cell(records: Records, workload: Workload, of: Series, batch: int) -> Cell | None:
    _, best = chosen(records, workload, of, batch)
    if best is None:
        return None
    found = [records[key] for key in repeated(best, 1 + max(key.seed for key in records)) if key in records]
    same = [key for key in records if (key.optimizer, key.batch, key.replicas) == (of.optimizer, batch, best.replicas)]
    return Cell(found, sum((key.target, key.most) == (best.target, best.most) for key in same))


@dataclass(frozen=True)
class Largest:
    """A batch; `beyond`, where the largest there is was within the limit: it is at least that."""

    batch: float
    beyond: bool = False

    def __str__(self) -> str:
        return f"{'≥ ' if self.beyond else ''}{self.batch:,.0f}"


def largest(samples: Sequence[float]) -> Largest | None:
    """Return the largest batch at which the samples to the target are within 1.3 times those at the smallest.

    From the last one within to the next the samples are taken to follow a power of the batch. Where the target was not
    reached at the next, it is the last one within.

    Parameters
    ----------
    samples : sequence of float
        At each batch; ∞ where the target was not reached: at the smallest, and no batch is within any limit.
    """
    if samples[0] == math.inf:
        return None
    ratios = [value / samples[0] for value in samples]
    k = max(k for k, ratio in enumerate(ratios) if ratio <= WITHIN)
    if k == len(BATCHES) - 1:
        return Largest(BATCHES[k], beyond=True)
    share = 0.0 if ratios[k + 1] == math.inf else math.log(WITHIN / ratios[k]) / math.log(ratios[k + 1] / ratios[k])
    return Largest(BATCHES[k] * (BATCHES[k + 1] / BATCHES[k]) ** share)


def page(results: Results, picture: str | None) -> str:
    """Return the whole page."""
    peers = ", ".join(PEERS[of.optimizer].about for of in results.series if of.optimizer in PEERS)
    parts = [
        "# Larger batches",
        "Steps and samples to a fixed training loss for batches of "
        f"{BATCHES[0]:,} to {BATCHES[-1]:,}: the default method (`QuasiNewton`, nothing set but the samples of a "
        f"replica) beside peers tuned at each batch ({peers}), in the layout of [Shallue et al. (2018)]"
        f"(https://arxiv.org/abs/1811.03600). One rank, one thread, {results.seeds} seeds.",
        "    make bench-batches\n    python -m benchmarks.batches table --output docs/explanation/batches.md",
        f"The loss is that of {JUDGED:,} samples of the training set, the same at all batches, for all methods and "
        "seeds: the loss of a batch would favour large ones, which are less noisy. It is evaluated after every step up "
        f"to {APART}, then {100 // APART}% of the steps apart. A run ends when it is down to the target; between two "
        "evaluations it is taken to go down evenly.",
        f"A peer is run with seed 0 at constant rate, {GRID} rates half a decade apart; as long as the best is at an "
        f"edge, one more beyond it, up to {MORE} more. The best takes the fewest steps or, where none gets to the "
        f"target, has the least loss at the end. At {BATCHES[0]} the rates are where the peer is commonly used and a "
        f"run has at most {MOST:,} steps; at each larger batch they are around the best of half of it, and a run has "
        f"{LONGER:g} times the steps that this took. The other seeds repeat the best: seed 0 is in the mean, which "
        "favours the peers. No schedule, which would need a number of steps to be tuned for, and no weight decay. The "
        f"default has batch / 32 replicas, {FEWEST} to {MOST_REPLICAS}, or {FEWEST} at all batches. ± is the standard "
        "deviation over the seeds.",
        f"## The largest batch within {WITHIN} times the samples",
        f"At which the samples to the target are within {WITHIN} times those that the same method takes at "
        f"{BATCHES[0]}. Between two batches the samples are taken to follow a power of the batch. The last within "
        "counts, not the first beyond: where the best rate lies between two that were run, a tuned method takes more "
        "samples at one batch than at the next. A method that is slow at the smallest batch has the more to gain: read "
        "this beside the steps below. In samples:",
        bounds(results),
        fastest(results),
    ]
    if picture:
        parts += [
            "Steps to the target against the batch. Dashed: half the steps with twice the batch, from "
            f"{BATCHES[0]} on. Circles: the largest batch.",
            f"![Steps to the target against the batch]({picture})",
        ]
    for workload in results.workloads:
        parts += [
            f"## `{workload.name}`",
            f"{workload.problem.about}; to {workload.target:g} nats.",
            "Steps:",
            table(results, workload, steps),
            f"Samples in thousands, and of those at {BATCHES[0]}:",
            table(results, workload, lambda cell, first: f"{cell.samples / 1e3:,.0f} ({_ratio(cell, first)})"),
            "Rate, and runs with those of all seeds:",
            table(results, workload, lambda cell, _: f"{cell.records[0].key.lr:g} ({cell.runs})", peers=True),
        ]
    parts += ["## Versions", versions(record for cell in results.cells.values() for record in cell.records)]
    return "\n\n".join(parts) + "\n"


def table(results: Results, workload: Workload, text: Callable[[Cell, Cell], str], peers: bool = False) -> str:
    """Return a table of a row a batch and a column a series; a text is of a cell and that of the smallest batch."""
    columns = [of for of in results.series if of.optimizer in PEERS or not peers]
    rows = []
    for batch in BATCHES:
        row = [f"{batch:,}"]
        for of in columns:
            cell, first = results.cell(workload, of, batch), results.cell(workload, of, BATCHES[0])
            row.append(NONE if cell is None or first is None else text(cell, first))
        rows.append(row)
    return markdown(["batch", *(of.title for of in columns)], rows)


def steps(cell: Cell, _: Cell) -> str:
    """Return the steps of a cell, or how many seeds got to the target."""
    values = [record.steps for record in cell.records]
    if cell.steps == math.inf:
        return f"not reached ({sum(map(math.isfinite, values))} of {len(values)} seeds)"
    return number(cell.steps) + (f" ± {float(f'{spread(values):.1g}'):g}" if len(values) > 1 else "")


def bounds(results: Results) -> str:
    """Return the table of the largest batches, and the default's as multiples of two peers'."""
    rows, found = [], {}
    for of in results.series:
        for workload in results.workloads:
            found[of.title, workload.name] = results.largest(workload, of)
        rows.append([of.title, *(str(found[of.title, workload.name] or NONE) for workload in results.workloads)])
    own = [of for of in results.series if of.optimizer not in PEERS]
    for of in own:
        for peer in COMPARED:
            pairs = [(found[of.title, w.name], found.get((peer, w.name))) for w in results.workloads]
            rows.append([f"*{of.title}, over {peer}'s*", *(_times(*pair) for pair in pairs)])
    return markdown(["method", *(workload.name for workload in results.workloads)], rows)


def fastest(results: Results) -> str:
    """Return the sentence on where the default takes fewer steps than every peer."""
    found = []
    for workload in results.workloads:

        def least(batch: int, peers: bool, workload: Workload = workload) -> float:
            cells = [results.cell(workload, of, batch) for of in results.series if (of.optimizer in PEERS) == peers]
            return min((cell.steps for cell in cells if cell), default=math.inf)

        ahead = sum(least(batch, peers=False) < least(batch, peers=True) for batch in BATCHES)
        found.append(f"on `{workload.name}` at {ahead} of {len(BATCHES)} batches")
    return f"The default takes fewer steps than every peer {', '.join(found)}."


def _times(own: Largest | None, other: Largest | None) -> str:
    """Return the ratio of two batches, where there is one, and whether it is known to be more or less."""
    if own is None or other is None or (own.beyond and other.beyond):
        return NONE
    mark = "≥ " if own.beyond else "≤ " if other.beyond else ""
    return f"{mark}{own.batch / other.batch:.2g}"


def _ratio(cell: Cell, first: Cell) -> str:
    return NONE if math.inf in (cell.samples, first.samples) else f"{cell.samples / first.samples:.2f}"
