"""Optimizers: one `step(loss_and_gradient)` each, written as the equations are."""

from __future__ import annotations

from typing import Any

from qnewton_mpi.core.optimizers.base import Optimizer
from qnewton_mpi.core.optimizers.block_bfgs import BlockBFGS
from qnewton_mpi.core.optimizers.deflated import Deflated
from qnewton_mpi.core.optimizers.first_order import SGD, Adam, Momentum
from qnewton_mpi.core.optimizers.multisecant import Multisecant
from qnewton_mpi.core.optimizers.natural.fisher import Fisher
from qnewton_mpi.core.optimizers.natural.kronecker import Kronecker
from qnewton_mpi.core.optimizers.settings import Settings

OPTIMIZERS: dict[str, type[Optimizer[Any]]] = {
    "kronecker": Kronecker,
    "fisher": Fisher,
    "deflated": Deflated,
    "multisecant": Multisecant,
    "sgd": SGD,
    "momentum": Momentum,
    "adam": Adam,
}

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "BlockBFGS",
    "Deflated",
    "Fisher",
    "Kronecker",
    "Momentum",
    "Multisecant",
    "Optimizer",
    "Settings",
]
