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
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnewton_mpi.config import run_config
from qnewton_mpi.errors import UserError
from qnewton_mpi.training.runfile import EPOCH_FIGURES

TOP_LEVEL = {"seeds", "tuning_seed", "tune_by", "extensions", "common", "row"}


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


def read_study(path: str) -> Study:
    """Return the study of a TOML file.

    Raises
    ------
    UserError
        For a file that cannot be read, an unknown key, options that no run accepts, or two rows of one name.
    """
    try:
        table = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {' '.join(str(error).split())}") from error
    unknown = table.keys() - TOP_LEVEL
    if unknown or not isinstance(table.get("row"), list):
        wrong = f"unknown {', '.join(sorted(unknown))}" if unknown else "there is no [[row]]"
        raise UserError(f"{path}: {wrong}; a study has {', '.join(sorted(TOP_LEVEL))}")
    study = Study(
        rows=tuple(row for entry in table["row"] for row in expand({**table.get("common", {}), **entry}, path)),
        seeds=tuple(table.get("seeds", [0, 1, 2, 3, 4])),
        tuning_seed=table.get("tuning_seed", 1000),
        tune_by=table.get("tune_by", "train_nll"),
        extensions=table.get("extensions", 3),
    )
    names = [row.name for row in study.rows]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"{path}: two rows are called {twice.pop()!r}: give each a name of its own")
    if study.tuning_seed in study.seeds:
        raise UserError(
            f"{path}: tuning_seed {study.tuning_seed} is among the seeds: rates must be judged on fresh ones"
        )
    if study.tune_by not in EPOCH_FIGURES:
        raise UserError(
            f"{path}: tune_by = {study.tune_by!r} is no figure of a run; known are {', '.join(EPOCH_FIGURES)}"
        )
    return study


def expand(entry: Mapping[str, Any], path: str) -> list[Row]:
    """Return the rows of an entry: one for each combination of its lists, but for `lr`, whose list is the grid."""
    options = dict(entry)
    name, baseline, rates = options.pop("name", None), options.pop("baseline", False), options.pop("lr", ())
    if not isinstance(name, str):
        raise UserError(f"{path}: every [[row]] needs a name")
    if isinstance(rates, str):  # "auto": nothing to tune
        options["lr"], rates = rates, ()
    grid = tuple(float(rate) for rate in (rates if isinstance(rates, list) else [rates] if rates else []))
    lists = {key: value for key, value in options.items() if isinstance(value, list)}
    rows = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        row = Row(" ".join([name, *(f"{k}={v}" for k, v in chosen.items())]), {**options, **chosen}, grid, baseline)
        try:
            for rate in grid or [None]:
                run_config({**row.options, **({"lr": rate} if rate else {})})
        except UserError as error:
            raise UserError(f"{path}: row {row.name!r}: {error}") from error
        rows.append(row)
    return rows


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
    if best == rates[0]:
        return float(f"{best * rates[0] / rates[1]:.6g}")
    if best == rates[-1]:
        return float(f"{best * rates[-1] / rates[-2]:.6g}")
    return None


def best_rate(scores: Mapping[float, float]) -> float:
    """Return the rate with the lowest score; the smallest rate where all diverged."""
    return min(sorted(scores), key=lambda rate: scores[rate] if math.isfinite(scores[rate]) else math.inf)


def at_edge(best: float | str, rates: Sequence[float]) -> bool:
    """Tell whether a tuned rate is the smallest or largest of those tried, so that a better one may lie beyond."""
    return len(rates) > 1 and best in (min(rates), max(rates))
