"""The configuration of a run: frozen, validated on one rank before any work starts."""

from __future__ import annotations

import os
import signal
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS, Settings
from qnewton_mpi.core.schedules import SCHEDULES
from qnewton_mpi.core.settings import FRACTION, NOT_NEGATIVE, POSITIVE, build, one_of, setting
from qnewton_mpi.data import augmentation, datasets, published
from qnewton_mpi.errors import UserError, did_you_mean, printable
from qnewton_mpi.files.whole import read_whole, reason
from qnewton_mpi.models import choice
from qnewton_mpi.models.layers import ACTIVATIONS
from qnewton_mpi.parallel.transport import TRANSPORTS

DEFAULT_REPLICAS = 8
DEFAULT_EPOCHS = 10
POLICIES = ("abort", "skip", "rollback")
LONGEST_TOML = 100_000  # bytes
MOST_DOTS = 100  # in a line of it: for a key of 50,000 parts, a.a.a. …, `tomllib` takes minutes


def known_signals(names: str) -> bool:
    """Tell whether all of the names with commas between them are signals that can be taken."""
    known = {number.name.removeprefix("SIG") for number in signal.Signals} - {"KILL", "STOP"}
    return set(names.split(",")) <= known


@dataclass(frozen=True)
class TrainSettings:
    """What a training run needs besides the settings of its method."""

    method: str = setting("kronecker", "how a step follows from the gradients", one_of(*OPTIMIZERS))
    data: str = setting(
        published.EMBEDDED,
        f"{', '.join(published.NAMES)}, or a path: of a .npz or HDF5 file, or a folder of pictures in class folders",
        (str.isprintable, "must be of characters that can be printed"),
    )
    data_dir: str | None = setting(
        None,
        f"folder of a named set's files (else ${published.VARIABLE}, {published.SYSTEM_FOLDER}, the download cache)",
    )
    validation: float | None = setting(
        None,
        "fraction of the training images that is held out and evaluated, the same for all seeds (default "
        f"{datasets.DEFAULT_VALIDATION} of what has no other part, else none)",
        FRACTION,
    )
    image_size: str | None = setting(
        None,
        "HEIGHTxWIDTH that the pictures of a folder are resized to (default: as they are, all of one size)",
        (datasets.is_size, "must be HEIGHTxWIDTH in pixels, as 32x32"),
    )
    replicas: int | None = setting(
        None,
        f"M, spread over the ranks as evenly as it goes (default {DEFAULT_REPLICAS}, or one a rank if there are more)",
        POSITIVE,
    )
    batch: int = setting(256, "global batch, over all replicas; a multiple of M", POSITIVE)
    epochs: int | None = setting(None, f"passes over the training set (default {DEFAULT_EPOCHS})", POSITIVE)
    steps: int | None = setting(None, "steps, instead of epochs", POSITIVE)
    schedule: str = setting("constant", "of the learning rate", one_of(*SCHEDULES))
    warmup: int = setting(0, "steps over which the rate grows linearly first", NOT_NEGATIVE)
    ema: float = setting(0.99, "decay of the exponential mean of the iterates that is evaluated too", FRACTION)
    evaluate_every: int | None = setting(None, "steps between evaluations (default: an epoch)", POSITIVE)
    model: str = setting(
        "convnet",
        "convnet (the poster's), mlp, resnet (PyTorch), or MODULE:FACTORY, a torch.nn.Module of your own",
        (choice.is_model, "must be convnet, mlp, resnet, or MODULE:FACTORY, where a torch.nn.Module of yours is made"),
    )
    activation: str | None = setting(
        None, "of the network's layers (default tanh; of a resnet relu)", one_of(*ACTIVATIONS)
    )
    hidden: str | None = setting(
        None,
        "of an mlp: the widths of its hidden layers, with commas between them (default 512,512)",
        (choice.are_sizes, "must be whole numbers with commas between them, as 512,512"),
    )
    blocks: str | None = setting(
        None,
        "of a resnet: blocks of two convolutions in each stage, with commas between them (default 2,2,2)",
        (choice.are_sizes, "must be whole numbers with commas between them, as 2,2,2"),
    )
    width: int | None = setting(
        None, "of a resnet: channels in its first stage, doubled in the next (default 16)", POSITIVE
    )
    label_smoothing: float = setting(
        0.0, "share of each label that is spread over all classes, in the losses of the steps; NLL stays NLL", FRACTION
    )
    augment: str | None = setting(
        None,
        "of the images of a step: crop (moved by up to an eighth of the sides), flip (one in two), or crop,flip",
        (augmentation.are_kinds, "must be crop, flip or crop,flip"),
    )
    patience: int | None = setting(
        None, "evaluations without a lower validation NLL after which the run ends (default: never)", POSITIVE
    )
    init_from: str | None = setting(
        None, "a run's file or folder of checkpoints, whose parameters the run begins with (default: random ones)"
    )
    init_which: str = setting("last", "which of that run's parameters", one_of("last", "ema", "tail", "best"))
    seed: int = setting(0, "of the initial parameters, the order of the samples and random spreads", NOT_NEGATIVE)
    device: str = setting("cpu", "where arrays are; cuda needs CuPy", one_of("cpu", "cuda"))
    exchange: str = setting(
        "auto",
        "how columns cross the network; auto is what should take the least time",
        one_of("auto", *EXCHANGES),
    )
    transport: str = setting(
        "auto",
        "how arrays on GPUs cross the network: host (the default), cuda (a CUDA-aware MPI, tried first), nccl",
        one_of(*TRANSPORTS),
    )
    output: str | None = setting(None, "HDF5 file of the run (default runs/DATA-METHOD-mM-seedSEED.h5)")
    overwrite: bool = setting(False, "replace an existing output file")
    checkpoint: str | None = setting(None, "folder for checkpoints of all state, the last two kept (default: none)")
    checkpoint_every: int | None = setting(None, "steps between checkpoints (default: an epoch)", POSITIVE)
    resume: bool = setting(
        False, "go on from the newest sound checkpoint, if there is one; at a constant schedule to more --epochs, too"
    )
    time_limit: float | None = setting(
        None, "seconds after which to save, stop and exit with 75 (default: a minute before SLURM's limit)", POSITIVE
    )
    stop_signals: str = setting(
        "USR1,USR2,TERM,INT",
        "signals at which to save, stop and exit with 75; leave out what a library of yours takes for itself",
        (known_signals, "must be names of signals without SIG, with commas between them"),
    )
    on_nonfinite: str = setting(
        "abort",
        "what to do about a gradient that is not finite: end, leave the batch out, or go back to the last checkpoint",
        one_of(*POLICIES),
    )
    stall_timeout: float | None = setting(
        None, "seconds in one phase after which a rank is named and the job ended (default: never)", POSITIVE
    )
    check_replicas: int | None = setting(
        None, "steps between comparisons of the parameters over the ranks (default: none)", POSITIVE
    )
    log_dir: str | None = setting(None, "folder for a log of each rank (default: none)")
    log: str | None = setting(
        None,
        "tensorboard: events of steps and evaluations, in a folder beside the output, with its name and .tensorboard",
        one_of("tensorboard"),
    )
    progress: str = setting(
        "auto", "auto is a bar on a terminal, lines elsewhere", one_of("auto", "bar", "lines", "off")
    )


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
