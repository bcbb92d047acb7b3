"""`qnewton-mpi train`: a run; its options are the settings' fields."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_type_hints

from qnewton_mpi.cli.arguments import Commands
from qnewton_mpi.config import RunConfig, TrainSettings, configured
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import base_type, describe
from qnewton_mpi.parallel.communicator import Communicator

# Whose fields the options are, by the method.
OWNERS: list[tuple[str, type]] = [
    ("", TrainSettings),
    *((name, kind.settings_type) for name, kind in OPTIMIZERS.items()),
]
OPTIONS = {item.name for _, kind in OWNERS for item in fields(kind)}


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("train", help="train a network on images; run it under mpiexec or srun")
    parser.add_argument(
        "toml", nargs="?", metavar="CONFIG.toml", help="options as a flat table; those of the command line win"
    )
    _add_options(parser.add_argument_group("run"), OWNERS[:1])
    _add_options(parser.add_argument_group("method"), OWNERS[1:])
    parser.set_defaults(process=process, check=check)


def _add_options(group: Any, owners: list[tuple[str, type]]) -> None:
    """Add an option for each field of the owners' dataclasses; those that share a name share an option."""
    texts: dict[str, dict[str, list[str]]] = {}
    kinds: dict[str, type] = {}
    for owner, kind in owners:
        for item in fields(kind):
            texts.setdefault(item.name, {}).setdefault(describe(item), []).append(owner)
            kinds[item.name] = base_type(get_type_hints(kind)[item.name])
    for name, parts in texts.items():
        flag = f"--{name.replace('_', '-')}"
        text = "; ".join(f"{', '.join(of)}: {said}" if any(of) else said for said, of in parts.items())
        text = text.replace("%", "%%")
        # Values stay strings here: `config` converts and checks them as it does those of a TOML file.
        if kinds[name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, metavar=name.rpartition("_")[2].upper())


def check(command: argparse.Namespace, ranks: int) -> None:
    """Settle the options of the file and of the command line, as `config`."""
    given = {name: value for name, value in vars(command).items() if name in OPTIONS}
    command.config = configured(command.toml, given, ranks)


def process(command: argparse.Namespace, communicator: Communicator) -> None:
    """Train, then tell what came out."""
    from qnewton_mpi.results.rows import table
    from qnewton_mpi.training.interruption import Noted
    from qnewton_mpi.training.loop import train
    from qnewton_mpi.training.runfile import Run

    config: RunConfig = command.config
    with Noted() as noted:
        path = train(config, communicator, {"command_line": command.line}, halted=lambda: bool(noted.came))
    communicator.from_root(lambda: print(f"{table([Run(path)])}\nwritten to {path}", flush=True))
