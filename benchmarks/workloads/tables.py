"""What the records say: tables in Markdown. The same records give the same bytes.

All tables are here, in more than 300 lines: they share their columns, and the page is read as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.figures import NONE, geometric, markdown, mean, number, spread, steps_to, versions
from benchmarks.grid import GRID, MORE
from benchmarks.workloads import tuning
from benchmarks.workloads.optimizers import CONSTANT, COSINE, FIRST_ORDER, PEERS, PRECONDITIONED
from benchmarks.workloads.problems import REPLICAS, Problem
from benchmarks.workloads.running import Key, Record

Records = Mapping[Key, Record]
OF_RESNET = (
    "In the default the batch norm of `resnet` normalises over a replica's share, 16 images, in the peers over the "
    "batch. "
)


@dataclass(frozen=True)
class Column:
    """An optimizer with its schedule: of a peer the better one."""

    title: str
    optimizer: str
    schedule: str | None = None


@dataclass(frozen=True)
class Summary:
    """All seeds of an optimizer on a workload at its rate and schedule.

    Attributes
    ----------
    problem : Problem
    records : list of Record
    runs : int
        All that were done to get here.
    timings : list of float
        CPU milliseconds a step: of these, or, where they were on a GPU, of others.
    """

    problem: Problem
    records: list[Record]
    runs: int
    timings: list[float]

    @property
    def key(self) -> Key:
        return self.records[0].key

    @property
    def losses(self) -> list[float]:
        """Final training losses, as they are compared."""
        return [compared(self.problem, record.loss) for record in self.records]

    @property
    def loss(self) -> float:
        return mean(self.losses)

    @property
    def cpu_ms(self) -> float:
        return mean(self.timings) if self.timings else math.inf

    def steps_to(self, target: float) -> float:
        """Return the steps until the training loss, mean over the last 5% and the seeds, is down to a target, or ∞."""
        losses = [[compared(self.problem, loss) for loss in record.losses] for record in self.records]
        return steps_to(target, self.records[0].at, [mean(some) for some in zip(*losses, strict=True)])


def compared(problem: Problem, loss: float) -> float:
    """Return a loss above the known minimum, and not below what is rounding."""
    return loss if problem.signed else max(loss - problem.minimum, problem.floor)


class Results:
    """The summaries of all workloads and columns that are complete.

    Parameters
    ----------
    problems : sequence of Problem
    records : mapping
        By the name of the workload.
    optimizers : sequence of str
    """

    def __init__(self, problems: Sequence[Problem], records: Mapping[str, Records], optimizers: Sequence[str]) -> None:
        self.problems = [problem for problem in problems if records.get(problem.name)]
        self.columns = []
        for name in optimizers:
            self.columns += [Column(name, name)] if name in PEERS else []
            self.columns += (
                [] if name in PEERS else [Column(name, name, CONSTANT), Column(f"{name}, cosine", name, COSINE)]
            )
        self.cells = {
            (problem.name, column.title): summary
            for problem in self.problems
            for column in self.columns
            if (summary := summarize(problem, column, records[problem.name])) is not None
        }
        most: dict[str, int] = {}  # seeds, of a workload's columns: those with fewer are not done
        for (name, _), cell in self.cells.items():
            most[name] = max(most.get(name, 0), len(cell.records))
        self.cells = {key: cell for key, cell in self.cells.items() if len(cell.records) == most[key[0]]}

    def cell(self, problem: Problem, title: str) -> Summary | None:
        """Return a summary, or None where runs are missing."""
        return self.cells.get((problem.name, title))

    def best(self, problem: Problem, group: str) -> Summary | None:
        """Return the peer of a group with the lowest training loss at the end."""
        names = [
            column.title for column in self.columns if column.title in PEERS and PEERS[column.title].group == group
        ]
        found = [cell for name in names if (cell := self.cell(problem, name)) and cell.loss < math.inf]
        return min(found, key=lambda cell: cell.loss, default=None)


def summarize(problem: Problem, column: Column, records: Records) -> Summary | None:
    """Return the summary of a column on a workload; None, where runs are missing."""
    _, best = tuning.chosen(records, problem.name, column.optimizer, problem.steps)
    if best is None:
        return None
    schedule = column.schedule or best.schedule
    found = [
        record
        for key, record in sorted(records.items(), key=lambda item: item[0].seed)
        if (key.optimizer, key.lr, key.schedule, key.steps) == (best.optimizer, best.lr, schedule, best.steps)
    ]
    runs = sum(key.optimizer == best.optimizer and key.steps == best.steps for key in records)
    timed = [record.cpu_ms for record in found if record.cpu_ms is not None]
    return Summary(problem, found, runs, timed or tuning.timings(records, best.optimizer)) if found else None


def page(results: Results, seeds: int, picture: str | None) -> str:
    """Return the whole page."""
    names = [problem.name for problem in results.problems]
    parts = [
        "# Workloads",
        "The default method (`QuasiNewton`, nothing set but the samples of a replica) beside peers that were tuned, on "
        f"workloads of many kinds: equal samples, {REPLICAS} replicas on one rank, one thread, {seeds} seeds.",
        "    make bench-workloads\n    python -m benchmarks.workloads table --output docs/explanation/workloads.md",
        "A peer is run with seed 0 at constant rate and along a cosine after a warm-up of 5% (Schedule-Free: constant, "
        f"its own warm-up of 5%), each at {GRID} rates half a decade apart around where it is commonly used; as "
        f"long as the best is at an edge, one more beyond it, up to {MORE} more. The better schedule at its "
        "best rate then has the other seeds: seed 0 is in the mean, which favours the peers. No weight decay anywhere. "
        "Training loss: the mean of the last 5% of the steps; of Schedule-Free at its average, which is what it hands "
        "out. ± is the standard deviation over the seeds; bold is the lowest of a row, as far as it is done: – "
        "is a peer that has not been run.",
        "The CIFAR-10 images of these records went through JPEG. SOAP, Muon and PSGD are heavyball's, not "
        "compiled, Muon's iteration in float32. "
        + (OF_RESNET if "resnet" in names else "")
        + "The default's constants were chosen on networks of these kinds, with these seeds among others: it is not "
        "tuned on a workload, but the workloads are not new to it. The CPU milliseconds of these records of the "
        "default were measured beside the peers, before the last change of its rules, which costs none.",
        "## Training loss at the end",
        losses(results, lambda cell: cell.losses),
        notes(results),
        "## The default beside the best",
        "The default's training loss over that of the best peer of each kind: first order ("
        f"{_names(FIRST_ORDER)}), preconditioned ({_names(PRECONDITIONED)}).",
        ratios(results),
        "## Held-out loss at the end",
        losses(results, lambda cell: [record.held_out for record in cell.records]),
        "## Samples and CPU seconds to a target",
        "The target is the final training loss of the best tuned first-order peer, or SOAP's. Steps to it, of all; "
        "samples and CPU seconds as multiples of that peer's. What the default's probes cost is in its CPU seconds, "
        "but for the first step's: that one, which sets up, is timed for nobody. Runs on a GPU are timed on the CPU "
        "by a trial of 40 steps.",
        targets(results),
    ]
    if picture:
        parts += [
            "Performance profiles: on what fraction of the workloads a method is at the target within τ times what the "
            "fastest of all needs. The workloads are those where all are complete.",
            f"![Performance profiles]({picture})",
        ]
    parts += [
        "## Rates",
        "The rate and the schedule that tuning chose, and the runs that it took with those of all seeds.",
        rates(results),
        "## CPU milliseconds a step",
        table(results, lambda cell: f"{cell.cpu_ms:.3g}" if cell.timings else NONE),
        "## Versions",
        versions(record for cell in results.cells.values() for record in cell.records),
    ]
    return "\n\n".join(parts) + "\n"


def table(results: Results, text: Callable[[Summary], str]) -> str:
    """Return a table of a row a workload and a column an optimizer."""
    rows = []
    for problem in results.problems:
        cells = [results.cell(problem, column.title) for column in results.columns]
        rows.append([problem.name, *(NONE if cell is None else text(cell) for cell in cells)])
    return markdown(["workload", *(column.title for column in results.columns)], rows)


def losses(results: Results, of: Callable[[Summary], list[float]]) -> str:
    """Return a table of losses over seeds, the lowest of a row in bold."""
    lowest = {
        problem.name: min(
            (mean(of(cell)) for (name, _), cell in results.cells.items() if name == problem.name), default=0
        )
        for problem in results.problems
    }

    most = max((len(cell.records) for cell in results.cells.values()), default=0)

    def text(cell: Summary) -> str:
        values = of(cell)
        middle = number(mean(values))
        bold = f"**{middle}**" if mean(values) == lowest[cell.problem.name] < math.inf else middle
        if len(values) < most:
            return f"{bold} ({len(values)} of {most} seeds)"
        # To the digits that are kept, runs that do not depend on the seed are equal.
        error = spread(values) if most > 1 and mean(values) < math.inf else 0.0
        return f"{bold} ± {error if error > 1e-9 * abs(mean(values)) else 0:.1g}" if most > 1 else bold

    return table(results, text)


def notes(results: Results) -> str:
    """Return what each workload is, and how its losses are compared."""
    lines = []
    for problem in results.problems:
        line = f"- `{problem.name}`: {problem.about}; {problem.steps} steps of {problem.samples:,} samples"
        line += f"; above the known minimum, {problem.minimum:.12g}" if problem.minimum else ""
        line += f"; below {problem.floor:g} all is equal" if problem.floor else ""
        line += "; may be negative: differences instead of ratios" if problem.signed else ""
        lines.append(line + ".")
    return "\n".join(lines)


def ratios(results: Results) -> str:
    """Return the default's losses over the best peers'."""
    titles = [column.title for column in results.columns if column.optimizer not in PEERS]
    groups = [FIRST_ORDER, PRECONDITIONED]
    found: dict[tuple[str, str], list[float]] = {(title, group): [] for title in titles for group in groups}
    rows = []
    for problem in results.problems:
        bests = [results.best(problem, group) for group in groups]
        row = [problem.name, *(NONE if best is None else best.key.optimizer for best in bests)]
        for title in titles:
            for group, best in zip(groups, bests, strict=True):
                cell = results.cell(problem, title)
                if cell is None or best is None:
                    row.append(NONE)
                elif problem.signed:
                    row.append(f"{cell.loss - best.loss:+.3f} nats" if cell.loss < math.inf else "∞")
                    found[title, group].append(math.exp(min(cell.loss - best.loss, 700.0)))
                else:
                    ratio = cell.loss / best.loss
                    row.append(number(ratio))
                    found[title, group].append(ratio)
        rows.append(row)
    pairs = [(title, group) for title in titles for group in groups]
    for name, summary in (
        ("geometric mean", lambda v: number(geometric(v)) if max(v) < math.inf else "∞"),
        ("at most 0.90", lambda v: f"{sum(x <= 0.9 for x in v)} of {len(v)}"),
        ("at most 1.00", lambda v: f"{sum(x <= 1.0 for x in v)} of {len(v)}"),
        ("at most 1.10", lambda v: f"{sum(x <= 1.1 for x in v)} of {len(v)}"),
    ):
        rows.append([f"*{name}*", "", "", *(summary(found[pair]) if found[pair] else NONE for pair in pairs)])
    heads = ["workload", *(f"best {group}" for group in groups), *(f"{title} / {group}" for title, group in pairs)]
    after = "A difference in nats counts as the ratio of the densities, e to its power."
    return markdown(heads, rows) + "\n\n" + after


def goals(results: Results, problem: Problem) -> dict[str, Summary | None]:
    """Return the peers whose final losses are the targets."""
    return {"first order": results.best(problem, FIRST_ORDER), "SOAP": results.cell(problem, "soap")}


def targets(results: Results) -> str:
    """Return the table of what the package's columns need to the targets."""
    titles = [column.title for column in results.columns if column.optimizer not in PEERS]
    names = ["first order", "SOAP"]
    found: dict[tuple[str, str, str], list[float]] = {}
    rows = []
    for problem in results.problems:
        row = [problem.name]
        for name in names:
            goal = goals(results, problem)[name]
            row.append(NONE if goal is None else f"{goal.key.optimizer}: {number(goal.loss)}")
            for title in titles:
                cell = results.cell(problem, title)
                if cell is None or goal is None or goal.loss == math.inf:
                    row += [NONE] * 3
                    continue
                steps, others = cell.steps_to(goal.loss), goal.steps_to(goal.loss)
                samples = steps / others
                seconds = samples * cell.cpu_ms / goal.cpu_ms if cell.timings and goal.timings else None
                row += [
                    f"{steps:.0f} of {problem.steps}",
                    number(samples),
                    NONE if seconds is None else number(seconds),
                ]
                if steps == math.inf:
                    row[-3:] = ["not reached", "∞", "∞"]
                found.setdefault((name, title, "samples"), []).append(samples)
                if seconds is not None:
                    found.setdefault((name, title, "seconds"), []).append(seconds)
        rows.append(row)
    last = ["*geometric mean of those reached*"]
    for name in names:
        last.append("")
        for title in titles:
            for what in ("samples", "seconds"):
                values = [value for value in found.get((name, title, what), []) if value < math.inf]
                if what == "samples":
                    last.append(f"{len(values)} of {len(found.get((name, title, what), []))}")
                last.append(number(geometric(values)) if values else NONE)
    heads = ["workload"]
    for name in names:
        heads.append(f"target: {name}")
        for title in titles:
            heads += [f"{title}: steps", "samples", "CPU s"]
    return markdown(heads, [*rows, last])


def rates(results: Results) -> str:
    """Return the table of rates, schedules and runs."""

    def text(cell: Summary) -> str:
        schedule = "" if cell.key.optimizer not in PEERS else f" {cell.key.schedule}"
        rate = "" if cell.key.lr is None else f"{cell.key.lr:g}"
        return f"{rate}{schedule} ({cell.runs})".strip()

    return table(results, text)


def _names(group: str) -> str:
    return ", ".join(kind.about for kind in PEERS.values() if kind.group == group)
