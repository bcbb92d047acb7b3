"""The options of a training run besides those of its method, each declared with its text, its check and its marks."""

from __future__ import annotations

import signal
from dataclasses import dataclass, fields
from enum import Enum

from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.schedules import SCHEDULES
from qnewton_mpi.core.settings import FRACTION, NOT_NEGATIVE, POSITIVE, one_of, setting
from qnewton_mpi.data import augmentation, datasets, published
from qnewton_mpi.models import choice
from qnewton_mpi.models.layers import ACTIVATIONS
from qnewton_mpi.parallel.transport import TRANSPORTS

DEFAULT_REPLICAS = 8
DEFAULT_EPOCHS = 10
POLICIES = ("abort", "skip", "rollback")


class Free(Enum):
    """Where an option may be another in a run and in its continuation: it is not compared then."""

    ALWAYS = "it changes nothing but rounding"
    GOING_ON = "it says when a run ends"
    WHERE_CONSTANT = "it is the length of a run, which the rates of a constant schedule do not depend on"


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
        free=Free.ALWAYS,
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
    epochs: int | None = setting(
        None, f"passes over the training set (default {DEFAULT_EPOCHS})", POSITIVE, free=Free.WHERE_CONSTANT
    )
    steps: int | None = setting(None, "steps, instead of epochs", POSITIVE, free=Free.WHERE_CONSTANT)
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
        None,
        "evaluations without a lower validation NLL after which the run ends (default: never)",
        POSITIVE,
        free=Free.GOING_ON,
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
        free=Free.ALWAYS,
    )
    transport: str = setting(
        "auto",
        "how arrays on GPUs cross the network: host (the default), cuda (a CUDA-aware MPI, tried first), nccl",
        one_of(*TRANSPORTS),
        free=Free.ALWAYS,
    )
    output: str | None = setting(
        None, "HDF5 file of the run (default runs/DATA-METHOD-mM-seedSEED.h5)", free=Free.ALWAYS
    )
    overwrite: bool = setting(False, "replace an existing output file", free=Free.ALWAYS)
    checkpoint: str | None = setting(
        None, "folder for checkpoints of all state, the last two kept (default: none)", free=Free.ALWAYS
    )
    checkpoint_every: int | None = setting(
        None, "steps between checkpoints (default: an epoch)", POSITIVE, free=Free.ALWAYS
    )
    resume: bool = setting(
        False,
        "go on from the newest sound checkpoint, if there is one; at a constant schedule to more --epochs, too",
        free=Free.ALWAYS,
    )
    time_limit: float | None = setting(
        None,
        "seconds after which to save, stop and exit with 75 (default: a minute before SLURM's limit)",
        POSITIVE,
        free=Free.ALWAYS,
    )
    stop_signals: str = setting(
        "USR1,USR2,TERM,INT",
        "signals at which to save, stop and exit with 75; leave out what a library of yours takes for itself",
        (known_signals, "must be names of signals without SIG, with commas between them"),
        free=Free.ALWAYS,
    )
    on_nonfinite: str = setting(
        "abort",
        "what to do about a gradient that is not finite: end, leave the batch out, or go back to the last checkpoint",
        one_of(*POLICIES),
        free=Free.ALWAYS,
    )
    stall_timeout: float | None = setting(
        None,
        "seconds in one phase after which a rank is named and the job ended (default: never)",
        POSITIVE,
        free=Free.ALWAYS,
    )
    check_replicas: int | None = setting(
        None, "steps between comparisons of the parameters over the ranks (default: none)", POSITIVE, free=Free.ALWAYS
    )
    log_dir: str | None = setting(None, "folder for a log of each rank (default: none)", free=Free.ALWAYS)
    log: str | None = setting(
        None,
        "tensorboard: events of steps and evaluations, in a folder beside the output, with its name and .tensorboard",
        one_of("tensorboard"),
        free=Free.ALWAYS,
    )
    progress: str = setting(
        "auto", "auto is a bar on a terminal, lines elsewhere", one_of("auto", "bar", "lines", "off"), free=Free.ALWAYS
    )


def free(*kinds: Free) -> set[str]:
    """Return the names of the options that are marked as one of these. Local."""
    return {item.name for item in fields(TrainSettings) if item.metadata.get("free") in kinds}
