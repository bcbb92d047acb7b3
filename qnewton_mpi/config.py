"""The configuration of a run: frozen, validated on one rank before any work starts."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from qnewton_mpi.core.optimizers import OPTIMIZERS, Settings
from qnewton_mpi.core.settings import build
from qnewton_mpi.data import augmentation, datasets, published
from qnewton_mpi.errors import UserError, did_you_mean, printable
from qnewton_mpi.files.whole import read_whole, reason
from qnewton_mpi.models import choice
from qnewton_mpi.options import DEFAULT_EPOCHS, DEFAULT_REPLICAS, TrainSettings

LONGEST_TOML = 100_000  # bytes
MOST_DOTS = 100  # in a line of it: for a key of 50,000 parts, a.a.a. …, `tomllib` takes minutes


@dataclass(frozen=True)
class RunConfig:
    """A run: what is trained, and the settings of the method."""

    training: TrainSettings
    optimizer: Settings

    @property
    def replicas(self) -> int:
        """M; `resolve` has settled it."""
        assert self.training.replicas is not None
        return self.training.replicas

    @property
    def output(self) -> Path:
        """The run's file; `resolve` has settled it."""
        assert self.training.output is not None
        return Path(self.training.output)

    def flat(self) -> dict[str, Any]:
        """Return all options as one mapping, as a TOML file would give them."""
        return {**asdict(self.training), **asdict(self.optimizer)}


def read_toml(path: str) -> dict[str, Any]:
    """Return a table of options; dashes in names count as underscores.

    Raises
    ------
    UserError
        For a file that cannot be read, is no TOML, or names an option twice, once with a dash.
    """
    try:
        text = read_whole(Path(path), LONGEST_TOML).decode("utf-8-sig")
        for number, line in enumerate(text.split("\n"), 1):
            if line.count(".") > MOST_DOTS:
                raise ValueError(f"line {number} has more than {MOST_DOTS} dots")
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: its TOML, its UTF-8, thousands of digits
        raise UserError(f"{printable(path)}: cannot be read as TOML: {reason(error)}") from error
    options: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in options:
            raise UserError(f"{printable(path)}: {printable(name)} is there twice, with a dash and with an underscore")
        options[name] = value
    return options


def configured(
    config: str | os.PathLike[str] | Mapping[str, Any] | None, options: Mapping[str, Any], ranks: int
) -> RunConfig:
    """Return the configuration of a TOML file or a table and of options, which win, for a number of ranks. Local.

    Raises
    ------
    UserError
        As `read_toml`, `run_config` and `resolve`.
    """
    table = config if isinstance(config, Mapping) else {} if config is None else read_toml(os.fspath(config))
    merged = {**table, **options}
    plain = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in merged.items() if v is not None}
    return resolve(run_config(plain), ranks)


def run_config(options: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a flat mapping of options, all values checked one by one.

    Raises
    ------
    UserError
        For an unknown option, one of another method, a value out of range, or options that contradict each other.
    """
    general = {item.name for item in fields(TrainSettings)}
    training = build(TrainSettings, {k: v for k, v in options.items() if k in general})
    kind = OPTIMIZERS[training.method].settings_type
    own = {item.name for item in fields(kind)}
    for name in options.keys() - general - own:
        owners = [m for m, o in OPTIMIZERS.items() if name in {item.name for item in fields(o.settings_type)}]
        if owners:
            raise UserError(f"{name} is an option of {', '.join(owners)}, not of {training.method}")
        like = did_you_mean(
            name, {*general, *(item.name for o in OPTIMIZERS.values() for item in fields(o.settings_type))}
        )
        raise UserError(f"unknown option '{printable(name)}'{like or '; see `qnewton-mpi train --help`'}")
    if training.epochs is not None and training.steps is not None:
        raise UserError("epochs and steps contradict each other: give one of them")
    return RunConfig(training, build(kind, {k: v for k, v in options.items() if k in own}))


def resolve(config: RunConfig, ranks: int) -> RunConfig:
    """Return the configuration with M and the output file settled for a number of ranks.

    Raises
    ------
    UserError
        Where M does not fit the ranks, the batch or the method, an option needs a folder of checkpoints, or there is no
        such data set.
    """
    training = config.training
    datasets.check_there(training.data)
    named = training.data in published.NAMES
    data = training.data if named else str(Path(training.data).absolute())  # the run's file may be used from elsewhere
    m = training.replicas or max(DEFAULT_REPLICAS, ranks)
    least = OPTIMIZERS[training.method].least_replicas(config.optimizer)
    if m < ranks:
        raise UserError(
            f"{m} replicas on {ranks} ranks leave ranks idle: use --replicas {ranks} or more, or fewer ranks"
        )
    if m < least:
        what = training.method + (" at the rate auto" if config.optimizer.lr == "auto" else "")
        raise UserError(f"{what} needs at least {least} replicas, not {m}: use --replicas {DEFAULT_REPLICAS}")
    if training.batch % m:
        nearest = max(m, round(training.batch / m) * m)
        raise UserError(f"a batch of {training.batch} cannot be shared by {m} replicas: use --batch {nearest}")
    if training.init_from is None and training.init_which != TrainSettings.init_which:
        raise UserError("--init-which needs a run to begin from: --init-from RUN.h5")
    if training.checkpoint is None:
        for option, given in (("resume", training.resume), ("checkpoint-every", training.checkpoint_every)):
            if given:
                raise UserError(f"--{option} needs a folder: --checkpoint DIR")
        if training.on_nonfinite == "rollback":
            raise UserError("--on-nonfinite rollback needs something to go back to: --checkpoint DIR")
    network = choice.settled(training.model, {name: getattr(training, name) for name in choice.ALL})
    model = "" if training.model == TrainSettings.model else f"-{training.model.replace(':', '-')}"
    name = datasets.short_name(data) + model
    output = training.output or f"runs/{name}-{training.method}-m{m}-seed{training.seed}.h5"
    epochs = DEFAULT_EPOCHS if training.epochs is None and training.steps is None else training.epochs
    init_from = training.init_from and str(Path(training.init_from).absolute())
    augment = training.augment and ",".join(augmentation.kinds_of(training.augment))
    settled: dict[str, Any] = {
        "replicas": m,
        "output": output,
        "epochs": epochs,
        "init_from": init_from,
        "augment": augment,
    }
    return replace(config, training=replace(training, data=data, **settled, **network))
