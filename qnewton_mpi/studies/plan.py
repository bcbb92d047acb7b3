"""What a study consists of: rows to compare, the rates to tune over, the seeds. Read from TOML, checked whole.

seeds = [0, 1, 2, 3, 4]     # of the runs that count
tuning_seed = 1000          # rates are chosen on this one, which is not among `seeds`
tune_by = "train_nll"       # the figure of the last evaluation that decides
extensions = 3              # how often a grid is extended while its best rate lies at an edge

[common]                    # options of all runs, as of `qnewton-mpi train`
data = "fashion-mnist"
steps = 800

[[row]]
name = "Nesterov"
baseline = true             # the others are compared with the best of these
method = "momentum"
nesterov = true
lr = [0.02, 0.05, 0.1]      # the grid; a single rate, or none, is not tuned

[[row]]
name = "fisher"
method = "fisher"
replicas = [2, 4, 8]        # any other list makes a row of each value
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnewton_mpi.config import RunConfig, read_toml, resolve, run_config
from qnewton_mpi.errors import UserError, did_you_mean, printable
from qnewton_mpi.files.whole import read_whole
from qnewton_mpi.results.layout import EPOCH_FIGURES

# The keys of a study: what they may be, what they are without being given, what they mean; docs/reference/study-keys.md
TOP_LEVEL = {
    "seeds": ("integers, each once", "[0, 1, 2, 3, 4]", "of the runs that count"),
    "tuning_seed": ("an integer, none of the seeds", "1000", "rates are chosen on this one"),
    "tune_by": ("a figure of `/epochs`", "train_nll", "its last value decides which rate is best, the lowest"),
    "extensions": ("an integer, 0 to 100", "3", "how often a grid is extended while its best rate lies at an edge"),
    "common": ("a table", "–", "options of all rows, as of `train`; a row's own win"),
    "row": ("tables, `[[row]]`", "–", "what is compared; each has the keys below"),
}
IN_A_ROW = {
    "name": ("text of at most 100 characters", "–", "what the row is called; needed, and each once"),
    "baseline": ("`true` or `false`", "false", "the other rows are compared with the best of these"),
    "lr": ("a number, `auto`, or a list of numbers", "the method's", "a list is the grid to choose from"),
    "any other option of `train`": ("as of `train`, or a list", "its default", "a list makes a row of each value"),
}
# Options of `train` that the runs of a study do not have: they begin anew, where and as the study says.
OF_THE_STUDY = {
    "seed",
    "output",
    "overwrite",
    "checkpoint",
    "checkpoint_every",
    "resume",
    "progress",
    "log_dir",
    "log",
}
LONGEST_NAME, MOST_ROWS, MOST_EXTENSIONS = 100, 10_000, 100
HEADER = re.compile(r"""\s*(\[\[?)\s*["']?([\w-]+)["']?\s*\]""")
ASSIGNMENT = re.compile(r"""\s*["']?([\w-]+)["']?\s*[.=]""")


@dataclass(frozen=True)
class Row:
    """One line of the comparison: options without rate and seed, and the rates to choose from."""

    name: str
    options: Mapping[str, Any]
    rates: tuple[float, ...]
    baseline: bool = False


@dataclass(frozen=True)
class Study:
    """A whole study."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    tune_by: str
    extensions: int


def read_study(path: str, ranks_per_run: int = 1) -> Study:
    """Return the study of a TOML file, every run's options checked as those of `train` are.

    Raises
    ------
    UserError
        For a file that cannot be read, an unknown key, options that no run accepts, or two rows of one name; with the
        line, where a key or a row is at fault.
    """
    table = read_toml(path)
    try:
        return _study(table, ranks_per_run)
    except PlanError as fault:
        line = line_of(read_whole(Path(path)).decode("utf-8-sig"), fault.row, fault.key)
        where = f"{printable(path)}, line {line}" if line else printable(path)
        raise UserError(f"{where}: {fault}") from fault


class PlanError(Exception):
    """What is wrong with a study, in which [[row]], if in one, and with which key, if with one."""

    def __init__(self, text: str, row: int | None = None, key: str | None = None) -> None:
        super().__init__(text)
        self.row, self.key = row, key


def _study(table: Mapping[str, Any], ranks: int) -> Study:
    """Return the study of a table; raise `PlanError` where it is none."""
    for key in table:
        if key not in TOP_LEVEL:
            raise PlanError(
                f"unknown {printable(key)}{did_you_mean(key, TOP_LEVEL)}; a study has {', '.join(sorted(TOP_LEVEL))}",
                key=key,
            )
    entries, common = table.get("row"), table.get("common", {})
    if not isinstance(entries, list) or not entries:
        raise PlanError(f"there is no [[row]]; a study has {', '.join(sorted(TOP_LEVEL))}", key="row")
    if not isinstance(common, dict):
        raise PlanError("common must be a table, [common]", key="common")
    seeds, tuning_seed = table.get("seeds", [0, 1, 2, 3, 4]), table.get("tuning_seed", 1000)
    if not isinstance(seeds, list) or not seeds:
        raise PlanError("seeds must be a list of integers, one at least", key="seeds")
    for key, seed in (*(("seeds", seed) for seed in seeds), ("tuning_seed", tuning_seed)):
        _check_seed(key, seed)
    if len(set(seeds)) < len(seeds):
        raise PlanError("a seed is twice among the seeds", key="seeds")
    if tuning_seed in seeds:
        raise PlanError(
            f"tuning_seed {tuning_seed} is among the seeds: rates must be judged on fresh ones", key="tuning_seed"
        )
    tune_by, extensions = table.get("tune_by", "train_nll"), table.get("extensions", 3)
    if tune_by not in EPOCH_FIGURES:
        raise PlanError(f"tune_by is no figure of a run; known are {', '.join(EPOCH_FIGURES)}", key="tune_by")
    if type(extensions) is not int or not 0 <= extensions <= MOST_EXTENSIONS:
        raise PlanError(f"extensions must be an integer, 0 to {MOST_EXTENSIONS}", key="extensions")
    rows: dict[str, Row] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise PlanError("row must be tables, [[row]]", key="row")
        for row in expand(entry, common, index, ranks):
            if row.name in rows:
                raise PlanError(f"two rows are called {row.name!r}: give each a name of its own", index, "name")
            rows[row.name] = row
        if len(rows) > MOST_ROWS:
            raise PlanError(f"more than {MOST_ROWS} rows", index)
    return Study(tuple(rows.values()), tuple(seeds), tuning_seed, tune_by, extensions)


def _check_seed(key: str, seed: Any) -> None:
    """Raise `PlanError` where a seed is none that `train` would take."""
    try:
        if type(seed) is not int:
            raise UserError(f"{key}: a seed must be an integer")
        run_config({"seed": seed})
    except UserError as error:
        raise PlanError(str(error), key=key) from error


def expand(entry: Mapping[str, Any], common: Mapping[str, Any], index: int, ranks: int) -> list[Row]:
    """Return the rows of an entry: one for each combination of its lists, but for `lr`, whose list is the grid.

    Parameters
    ----------
    entry, common : mapping
        A [[row]], and what it takes over where it does not say otherwise.
    index, ranks : int
        Of the entry; of each run.
    """
    options: dict[str, Any] = {}
    for table in (common, entry):
        underscored = {key.replace("-", "_"): value for key, value in table.items()}
        if len(underscored) < len(table):
            raise PlanError("an option is there twice, with a dash and with an underscore", index)
        options |= underscored
    name, baseline, rates = options.pop("name", None), options.pop("baseline", False), options.pop("lr", None)
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
        wanted = f"letters that can be printed, {LONGEST_NAME} at most"
        raise PlanError(f"every [[row]] needs a name of {wanted}", index, "name")
    if type(baseline) is not bool:
        raise PlanError(f"row {name!r}: baseline must be true or false", index, "baseline")
    for key in options.keys() & OF_THE_STUDY:
        raise PlanError(f"row {name!r}: {key} is not for the runs of a study, which settles it itself", index, key)
    grid = rates if isinstance(rates, list) else [] if rates is None or rates == "auto" else [rates]
    if rates == "auto":  # nothing to tune
        options["lr"] = rates
    lists = {key: value for key, value in options.items() if isinstance(value, list)}
    if isinstance(rates, list) and "auto" in rates:
        raise PlanError(f"row {name!r}: lr: auto is no rate of a grid", index, "lr")
    for key, choices in {**lists, "lr": rates}.items():
        if choices == []:
            raise PlanError(f"row {name!r}: {key} = []: a list needs one value at least", index, key)
    if math.prod(map(len, lists.values())) > MOST_ROWS:
        raise PlanError(f"row {name!r}: its lists make more than {MOST_ROWS} rows", index)
    rows, tries = [], [{"lr": rate} for rate in grid] or [{}]
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        configs = [_config({**options, **chosen, **rate}, name, index, ranks) for rate in tries]
        own = " ".join([name, *(f"{key}={value}" for key, value in chosen.items())])
        tried = tuple(float(config.optimizer.lr) for config in configs) if grid else ()
        rows.append(Row(own, {**options, **chosen}, tried, baseline))
    return rows


def _config(options: Mapping[str, Any], name: str, index: int, ranks: int) -> RunConfig:
    """Return the configuration of a run, as it would be started; raise `PlanError` where there is none."""
    try:
        return resolve(run_config(options), ranks)
    except UserError as error:
        named = {key: found.start() for key in options if (found := re.search(rf"\b{re.escape(key)}\b", str(error)))}
        key = min(named, key=lambda key: named[key], default=None)  # the message begins with the option at fault
        raise PlanError(f"row {name!r}: {error}", index, key) from error


def line_of(text: str, row: int | None, key: str | None) -> int | None:
    r"""Return the line where a study has a key, from 1, or else its [[row]]; None where neither is found.

    `tomllib` does not tell lines: they are looked for as people write them.

    Parameters
    ----------
    text : str
        TOML.
    row : int, optional
        The index of a [[row]], from 0, in which the key is, or else in [common]. None: the top of the file.
    key : str, optional
        With underscores for dashes.

    Examples
    --------
    >>> text = "seeds = [0]\n[common]\nsteps = 3\n[[row]]\nname = 'a'\n[[row]]\nname = 'b'\nuse-it = 1"
    >>> [line_of(text, None, "seeds"), line_of(text, 1, "use_it"), line_of(text, 0, "steps"), line_of(text, 1, None)]
    [1, 8, 3, 6]
    """
    text = re.sub(r"('''|\"\"\").*?\1", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    places: dict[tuple[str | int, str | None], int] = {}
    table: str | int = ""
    rows = 0
    for number, line in enumerate(text.split("\n"), 1):
        if header := HEADER.match(line):
            table = rows if header[1] == "[[" and header[2] == "row" else header[2]
            rows += header[1] == "[[" and header[2] == "row"
            places.setdefault((table, None), number)
            places.setdefault(("", header[2]), number)
        elif assignment := ASSIGNMENT.match(line):
            places.setdefault((table, assignment[1].replace("-", "_")), number)
    wanted = [("", key)] if row is None else [(row, key), ("common", key), (row, None)]
    return next((places[place] for place in wanted if place in places), None)


def next_rate(scores: Mapping[float, float]) -> float | None:
    """Return the rate that a grid lacks while its best lies at an edge: a step of the same ratio beyond it.

    Parameters
    ----------
    scores : mapping
        Rate to what it reached, lower is better; infinite or NaN where the run diverged.

    Examples
    --------
    >>> next_rate({0.01: 0.5, 0.1: 0.3})
    1.0
    >>> next_rate({0.01: 0.5, 0.1: 0.3, 1.0: float("inf")}) is None
    True
    """
    rates = sorted(scores)
    if len(rates) < 2:
        return None
    best = best_rate(scores)
    if best not in (rates[0], rates[-1]):
        return None
    ratio = rates[0] / rates[1] if best == rates[0] else rates[-1] / rates[-2]
    beyond = float(f"{best * ratio:.6g}")
    return beyond if 0 < beyond < math.inf else None


def best_rate(scores: Mapping[float, float]) -> float:
    """Return the rate with the lowest score; the smallest rate where all diverged."""
    return min(sorted(scores), key=lambda rate: scores[rate] if math.isfinite(scores[rate]) else math.inf)


def at_edge(best: float | str, rates: Sequence[float]) -> bool:
    """Tell whether a tuned rate is the smallest or largest of those tried, so that a better one may lie beyond."""
    return len(rates) > 1 and best in (min(rates), max(rates))
