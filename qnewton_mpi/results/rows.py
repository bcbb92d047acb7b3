"""Runs side by side: which of them are one row, what a row is called, and the table of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.data.datasets import short_name
from qnewton_mpi.data.parts import TEST, VALIDATION
from qnewton_mpi.models import choice
from qnewton_mpi.options import Free, TrainSettings, free
from qnewton_mpi.results.layout import DIGEST, FINISHED
from qnewton_mpi.results.run import Run
from qnewton_mpi.results.words import two_digits

# The options that a run may have otherwise and come to the same end but for rounding; two change how long it takes.
PASSING = free(Free.ALWAYS) - {"exchange", "transport"} | {"evaluate_every", "seed"}
BESIDES = (DIGEST, "ranks", "version_qnewton_mpi")  # attributes that are no options, and tell runs apart
IN_LABEL = ("method", "replicas", "lr", "nesterov")  # what `Run.label` says
NETWORK = "network"  # for the options that choose it, which are one word of a label
DIGITS = 6  # of a digest


def distinct(runs: Iterable[Run]) -> list[Run]:
    """Return each run once, though its file be named twice or copied: of a run's files the one that is farthest."""
    found: dict[str, Run] = {}
    for run in runs:
        name = str(run.attributes.get("run", run.path.resolve()))
        if name not in found or run.last("step") > found[name].last("step"):
            found[name] = run
    return list(found.values())


def rows(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the runs of each row, by its name: they differ in nothing but the seed, or are repetitions.

    A name is the method, M and the rate, and whatever else is not the same in all rows.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(configuration(run).items())), []).append(run)
    differing = differences([dict(key) for key in groups])
    return {
        ", ".join([group[0].label, *(word for name in differing if (word := said(name, dict(key).get(name))))]): group
        for key, group in groups.items()
    }


def configuration(run: Run) -> dict[str, Any]:
    """Return what makes a run what it is, but for its seed; of options that are later than its file, the defaults."""
    kinds: list[Any] = [TrainSettings]
    kinds += [OPTIMIZERS[m].settings_type] if (m := run.attributes["method"]) in OPTIMIZERS else []
    options = {
        item.name: None if item.default is MISSING else item.default
        for kind in kinds
        for item in fields(kind)
        if item.name not in (*PASSING, "model", *choice.ALL)
    }
    own = {name: run.attributes.get(name, default) for name, default in options.items()}
    besides = {name: run.attributes.get(name) for name in BESIDES}
    return {NETWORK: choice.title(run.attributes)} | own | besides


def differences(configurations: list[dict[str, Any]]) -> list[str]:
    """Return the names of what differs among those that have it, without what `Run.label` says."""
    names = dict.fromkeys(name for each in configurations for name in each if name not in IN_LABEL)
    found = [name for name in names if len({each[name] for each in configurations if name in each}) > 1]
    data = {each["data"] for each in configurations}
    if len({(each["data"], each[DIGEST]) for each in configurations}) == len(data) and DIGEST in found:
        found.remove(DIGEST)  # the name of the data says it
    return found


def said(name: str, value: Any) -> str:
    """Return an option as a label has it; nothing of one that is not given.

    Examples
    --------
    >>> said("damping", 0.30000000000000004), said("version_qnewton_mpi", "0.1.0"), said("steps", None)
    ('damping=0.30000000000000004', 'qnewton_mpi=0.1.0', '')
    """
    if value is None:
        return ""
    if isinstance(value, float) and float(f"{value:g}") == value:
        value = f"{value:g}"
    if name == DIGEST:
        value = value[:DIGITS]
    return str(value) if name == NETWORK else f"{name.removeprefix('version_')}={value}"


def title(runs: Iterable[Run]) -> str:
    """Return what all runs have in common of network, data and batch: "convnet (tanh), mnist, batch 256"."""
    attributes = [run.attributes for run in runs]

    def common(name: str, default: Any = None) -> Any:
        values = {a.get(name, default) for a in attributes}
        return values.pop() if len(values) == 1 else None

    networks, model = {choice.title(a) for a in attributes}, common("model", "convnet")
    data, batch = common("data"), common("batch")
    words = [
        networks.pop() if len(networks) == 1 else model or "",
        short_name(data) if data else "",
        f"batch {batch:,}" if batch else "",
    ]
    return ", ".join(word for word in words if word)


def table(runs: list[Run]) -> str:
    """Return the closing table: where the runs stood after their last evaluation, mean ± std over those of a label.

    It shows the parts of the data that were held out of any of them. A last column says what became of them, unless all
    are finished.
    """
    held_out = [part for part in (VALIDATION, TEST) if any(part in run.held_out for run in runs)]
    columns: dict[str, tuple[Callable[[float], str], Callable[[Run], float]]] = {
        "epochs": ("{:.4g}".format, lambda run: run.last("epoch")),
        "train NLL": ("{:.4f}".format, lambda run: run.last("train_nll")),
    }
    for part in held_out:
        accuracy = f"{part} accuracy" if len(held_out) > 1 else "accuracy"
        columns[f"{part} NLL"] = ("{:.4f}".format, lambda run, part=part: run.last(f"{part}_nll"))  # type: ignore[misc]
        columns[accuracy] = ("{:.2%}".format, lambda run, part=part: run.last(f"{part}_accuracy"))  # type: ignore[misc]
    columns |= {
        "noise scale": (two_digits, lambda run: run.noise_scale),
        "seconds": ("{:.1f}".format, lambda run: run.last("wall_seconds")),
        "samples/s": (
            "{:,.0f}".format,
            lambda run: run.last("sample_gradients") / max(run.last("wall_seconds"), 1e-9),
        ),
    }
    states = {run: run.state.partition(":")[0] for run in runs}
    with_states = set(states.values()) != {FINISHED}
    lines = [("run", "runs", *columns, *(["status"] if with_states else []))]
    for label, group in rows(runs).items():
        lacking = [part for part in held_out if not any(part in run.held_out for run in group)]
        cells = [
            "–" if name.partition(" ")[0] in lacking else mean_and_spread([figure(run) for run in group], text)
            for name, (text, figure) in columns.items()
        ]
        if with_states:
            counts = Counter(states[run] for run in group)
            cells.append(", ".join(f"{n} {state}" if len(group) > 1 else state for state, n in counts.items()))
        lines.append((label, str(len(group)), *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def mean_and_spread(values: list[float], text: Callable[[float], str]) -> str:
    """Return the mean as text, and ± the standard deviation where the values differ.

    Examples
    --------
    >>> [mean_and_spread(values, "{:.2f}".format) for values in ([1.0, 2.0], [1.0, 1.0], [math.nan])]
    ['1.50 ± 0.71', '1.00', 'nan']
    """
    with np.errstate(all="ignore"):
        spread = np.std(values, ddof=1) if len(set(values)) > 1 else math.nan
        return text(float(np.mean(values))) + (f" ± {text(float(spread))}" if math.isfinite(spread) else "")
