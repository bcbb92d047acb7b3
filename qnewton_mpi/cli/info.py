"""`qnewton-mpi info`: what the ranks run on."""

from __future__ import annotations

import argparse
import os

from qnewton_mpi import __version__
from qnewton_mpi.cli.arguments import Commands, add_command
from qnewton_mpi.core.exchange import choose
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.errors import UserError
from qnewton_mpi.options import DEFAULT_REPLICAS, TrainSettings
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.library import load_mpi

EXAMPLES = (
    "qnewton-mpi info",
    "mpiexec -n 4 qnewton-mpi info",
    "srun --mpi=pmi2 --nodes=2 --ntasks-per-node=4 qnewton-mpi info",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "info", "MPI library, ranks and nodes, threads, devices", EXAMPLES)
    parser.set_defaults(process=process)


def process(command: argparse.Namespace, communicator: Communicator) -> None:
    """Tell what the ranks run on."""
    from threadpoolctl import threadpool_info

    from qnewton_mpi.arrays import open_device

    try:
        device = open_device("cuda", communicator.node_rank).name
    except UserError:
        device = "no GPU"
    MPI = load_mpi()
    threads = max((pool["num_threads"] for pool in threadpool_info()), default=1)
    mine = (MPI.Get_processor_name(), communicator.rank, threads, len(os.sched_getaffinity(0)), device)
    everyone = communicator.mpi.allgather(mine)

    def end() -> None:
        print(f"qnewton-mpi  {__version__}")
        print(f"MPI          {MPI.Get_library_version().splitlines()[0]}".rstrip("\0 "))
        print(f"ranks        {communicator.size} on {len({row[0] for row in everyone})} node(s)")
        print("transport    host buffers (GPU arrays are staged through host memory)")
        print(f"exchange     {exchange_of(communicator.size)}")
        for node, rank, threads, cores, device in everyone:
            print(f"rank {rank:<7} {node}, {threads} BLAS thread(s), {cores} core(s) allowed, {device}")
        print(end="", flush=True)

    communicator.from_root(end)


def exchange_of(ranks: int) -> str:
    """Say which exchange "auto" chooses for the default method on these ranks, and why."""
    if ranks == 1:
        return "auto is allgather: on one rank nothing crosses the network"
    kind, replicas = OPTIMIZERS[TrainSettings().method], max(DEFAULT_REPLICAS, ranks)
    traffic = kind.traffic(kind.settings_type())
    sizes = [1000, 100_000, 10_000_000, 1_000_000_000]
    names = [choose(traffic, ranks, replicas, size) for size in sizes]
    text = ", ".join(f"{name} at N = {size:,}" for size, name in zip(sizes, names, strict=True))
    text = f"{names[0]} at any N" if len(set(names)) == 1 else text
    of = f"for {TrainSettings().method} with M = {replicas}"
    return f"auto, by predicted seconds, {of}: {text} (docs/explanation/scaling.md)"
