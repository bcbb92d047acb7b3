"""The options of `train` as its help and the documents have them, from the settings' fields: groups, units, texts."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from typing import Any, get_type_hints

from qnewton_mpi.cli.arguments import Parser
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import FRACTION, base_type, describe
from qnewton_mpi.options import TrainSettings

# What the options that are no method's are for; those that are not named here are the run's.
RUN = "run"
PURPOSES: dict[str, tuple[str, ...]] = {
    RUN: (),
    "data": ("data", "data_dir", "validation", "image_size", "augment", "label_smoothing"),
    "network": ("model", "activation", "hidden", "blocks", "width", "init_from", "init_which"),
    "ranks and devices": ("device", "exchange", "transport", "check_replicas", "stall_timeout"),
    "checkpoints and limits": (
        *("checkpoint", "checkpoint_every", "resume", "time_limit", "stop_signals", "on_nonfinite"),
    ),
    "output": ("output", "overwrite", "log", "log_dir", "progress"),
}
# What an option's value is counted in, or what it names, where the type does not say it.
UNITS = {
    **dict.fromkeys(("steps", "warmup", "evaluate_every", "checkpoint_every", "check_replicas"), "STEPS"),
    **dict.fromkeys(("update_every", "probe_every"), "STEPS"),
    **dict.fromkeys(("time_limit", "stall_timeout"), "SECONDS"),
    **dict.fromkeys(("data_dir", "checkpoint", "log_dir"), "FOLDER"),
    "output": "FILE.h5",
    "data": "NAME|PATH",
    "image_size": "HEIGHTxWIDTH",
    "augment": "KIND,KIND",
    "model": "NAME|MODULE:FACTORY",
    "hidden": "WIDTH,WIDTH,…",
    "blocks": "NUMBER,NUMBER,…",
    "width": "CHANNELS",
    "init_from": "FILE|FOLDER",
    "patience": "EVALUATIONS",
    "replicas": "M",
    "batch": "SAMPLES",
    "epochs": "EPOCHS",
    "stop_signals": "NAME,NAME,…",
    "basis_every": "UPDATES",
}
BY_TYPE = {int: "N", float: "NUMBER", str: "TEXT"}
METHODS: dict[str, type] = {name: kind.settings_type for name, kind in OPTIMIZERS.items()}
OPTIONS = {item.name for kind in (TrainSettings, *METHODS.values()) for item in fields(kind)}


def purposes() -> dict[str, list[Field[Any]]]:
    """Return the fields that are no method's, by what they are for, in their order. Local."""
    named = {name: purpose for purpose, names in PURPOSES.items() for name in names}
    found: dict[str, list[Field[Any]]] = {purpose: [] for purpose in PURPOSES}
    for item in fields(TrainSettings):
        found[named.get(item.name, RUN)].append(item)
    return found


def by_methods() -> dict[tuple[str, ...], list[str]]:
    """Return the names of the methods' options, by the methods that have them: those of the most first. Local."""
    owners: dict[str, list[str]] = {}
    for method, kind in METHODS.items():
        for item in fields(kind):
            owners.setdefault(item.name, []).append(method)
    found: dict[tuple[str, ...], list[str]] = {}
    for name, methods in sorted(owners.items(), key=lambda pair: -len(pair[1])):
        found.setdefault(tuple(methods), []).append(name)
    return found


def add_options(parser: Parser) -> None:
    """Add an option for each field; methods that share a name share the option. Local.

    Values stay strings: `config` converts and checks them as it does those of a TOML file.
    """
    for purpose, items in purposes().items():
        group = parser.add_argument_group(purpose)
        for item in items:
            _add(group, [item], describe(item))
    for methods, names in by_methods().items():
        everyone = len(methods) == len(METHODS)
        group = parser.add_argument_group("every method" if everyone else f"method {', '.join(methods)}")
        for name in names:
            items = [next(item for item in fields(METHODS[method]) if item.name == name) for method in methods]
            _add(group, items, text_of(methods, items))


def text_of(methods: tuple[str, ...], items: list[Field[Any]]) -> str:
    """Return what is said of the options of one name, by the methods that have them, and who takes which words."""
    if len({describe(item) for item in items}) == 1:
        parts = [describe(items[0])]
    elif len({item.metadata["help"] for item in items}) == 1:
        defaults = _by_methods(methods, [str(item.default) for item in items])
        told = ", ".join(f"{default} of {who}" for default, who in defaults.items())
        parts = [f"{items[0].metadata['help']} (default {told})"]
    else:
        parts = [f"{who}: {what}" for what, who in _by_methods(methods, [describe(item) for item in items]).items()]
    for word in dict.fromkeys(word for item in items for word in item.metadata["words"]):
        takes = [method for method, item in zip(methods, items, strict=True) if word in item.metadata["words"]]
        parts += [f"{word} is for {', '.join(takes)}"] if len(takes) < len(methods) else []
    return "; ".join(parts)


def _by_methods(methods: tuple[str, ...], texts: list[str]) -> dict[str, str]:
    """Return who says each of the texts, in words."""
    said: dict[str, list[str]] = {}
    for method, text in zip(methods, texts, strict=True):
        said.setdefault(text, []).append(method)
    return {text: " and ".join(filter(None, [", ".join(who[:-1]), who[-1]])) for text, who in said.items()}


def metavar(items: list[Field[Any]]) -> str:
    """Return what stands for the value of the options of one name: choices in braces, a unit, or a type."""
    item = items[0]
    check = item.metadata["check"]
    if check is not None and check.choices:
        return f"{{{','.join(check.choices)}}}"
    kind = base_type(_hint(item))
    unit = UNITS.get(item.name) or ("FRACTION" if check == FRACTION else BY_TYPE[kind])
    words = dict.fromkeys(word for each in items for word in each.metadata["words"])
    return "|".join([unit, *words])


def _add(group: Any, items: list[Field[Any]], text: str) -> None:
    flag, said = f"--{items[0].name.replace('_', '-')}", text.replace("%", "%%")
    if base_type(_hint(items[0])) is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=said)
    else:
        group.add_argument(flag, default=argparse.SUPPRESS, help=said, metavar=metavar(items))


def _hint(item: Field[Any]) -> Any:
    """Return the type of a field, whichever of the settings has it."""
    owner = next(kind for kind in (TrainSettings, *METHODS.values()) if item in fields(kind))
    return get_type_hints(owner)[item.name]
