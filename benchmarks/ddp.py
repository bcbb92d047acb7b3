"""`mpiexec -n 2 python -m benchmarks.ddp`: steps of the default beside DistributedDataParallel's, on the same ranks.

One run has them all, a few steps of each in turn, so that a busy machine is as busy for each. Timed are whole steps on
batches that are there: forward, backward, what crosses the ranks, the update. What is told are ratios to AdamW's.
"""

from __future__ import annotations

import argparse
import functools
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.workloads import problems
from benchmarks.workloads.optimizers import PEERS, check
from benchmarks.workloads.problems import Batch, Problem
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.torch import QuasiNewton

Step = Callable[[Batch], object]

WORKLOADS = ("mlp", "text", "convnet-mnist")
REFERENCE, RATE = "adamw", 1e-3
PEERS_HERE = REFERENCE, "muon", "soap"
FIRST = 12  # steps of each before any is timed: the default's first ones do more


def there_is(name: str) -> bool:
    """Tell whether a peer's package is installed. Local."""
    try:
        check(name)
    except UserError:
        return False
    return True


def share(batch: Batch, comm: MPI.Comm, device: str) -> Batch:
    """Return this rank's samples of a batch on a device, as many as any other rank's."""
    return tuple(part.tensor_split(comm.size)[comm.rank][: len(part) // comm.size].to(device) for part in batch)


def peer(problem: Problem, model: DistributedDataParallel, name: str, steps: int) -> Step:
    """Return the step of an optimizer of PyTorch's interface. Local."""
    optimizer = PEERS[name].build(model, RATE, steps)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        problem.loss(model, *batch).backward()
        optimizer.step()

    return step


def ours(problem: Problem, model: nn.Module, replicas: int, comm: MPI.Comm) -> Step:
    """Return the step of the default with so many replicas on all ranks. Collective."""
    optimizer = QuasiNewton(
        model.parameters(),
        samples=problem.samples // replicas,
        replicas_per_rank=replicas // comm.size,
        communicator=Communicator(comm),
    )
    loss = functools.partial(problem.loss, model)
    return lambda batch: optimizer.step(loss, *batch)


def wait(comm: MPI.Comm) -> None:
    """Wait until all ranks and their GPUs are through with what they had to do. Collective."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    comm.Barrier()


def seconds(step: Step, batches: Sequence[Batch], comm: MPI.Comm) -> float:
    """Return the seconds of a step, until the last rank is through with all. Collective."""
    wait(comm)
    started = time.perf_counter()
    for batch in batches:
        step(batch)
    wait(comm)
    return (time.perf_counter() - started) / len(batches)


def compared(
    problem: Problem, replicas: Sequence[int], steps: int, rounds: int, comm: MPI.Comm, device: str = "cpu"
) -> Iterator[tuple[str, float, float]]:
    """Yield each contestant, its median milliseconds a step, and the median of its ratios to AdamW's. Collective."""
    total = FIRST + steps * rounds
    stepping = {
        f"DDP, {name}": peer(problem, DistributedDataParallel(problem.model(0).to(device)), name, total)
        for name in PEERS_HERE
        if there_is(name)
    }
    stepping |= {f"default, M = {m}": ours(problem, problem.model(0).to(device), m, comm) for m in replicas}
    batches = problem.batches(0)
    first = [share(next(batches), comm, device) for _ in range(FIRST)]
    for step in stepping.values():
        seconds(step, first, comm)
    times: dict[str, list[float]] = {name: [] for name in stepping}
    for _ in range(rounds):
        some = [share(next(batches), comm, device) for _ in range(steps)]
        for name, step in stepping.items():
            times[name].append(seconds(step, some, comm))
    reference = times[f"DDP, {REFERENCE}"]
    for name, found in times.items():
        ratios = [own / other for own, other in zip(found, reference, strict=True)]
        yield name, 1000 * statistics.median(found), statistics.median(ratios)


def join(comm: MPI.Comm) -> None:
    """Begin PyTorch's own communication, gloo, among the ranks of MPI. Collective."""
    host = comm.bcast(socket.gethostname() if comm.size > 1 else "localhost")
    store = dist.TCPStore(host, 0, comm.size, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(store.port if store else None)
    store = store or dist.TCPStore(host, port, comm.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)


def main() -> None:
    """Run the command. Collective."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ddp", description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, metavar="NAME")
    parser.add_argument(
        "--replicas", nargs="+", type=int, help="M, on all ranks; default: one and four a rank, at least 2 and 8"
    )
    parser.add_argument("--steps", type=int, default=20, help="of each in a round; after 20 the bases move")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of PyTorch, of each rank: cuda where there is one GPU")
    parser.add_argument("--data-dir", help="folder of the data sets, as of qnewton-mpi train")
    options, comm = parser.parse_args(), MPI.COMM_WORLD
    torch.set_num_threads(1)
    join(comm)
    replicas = options.replicas or sorted({max(2, comm.size), max(8, 4 * comm.size)})
    if any(m < 2 or m % comm.size for m in replicas):
        parser.error(f"--replicas: multiples of the {comm.size} ranks, at least 2")
    if comm.rank == 0:
        print(f"{comm.size} rank(s) on {options.device}, one thread each; batch of the workload\n")
        print("| workload | optimizer | ms a step | of AdamW's |\n| --- | --- | --- | --- |")
    for name in options.workloads:
        problem = problems.load(name, options.data_dir)
        for what, milliseconds, ratio in compared(
            problem, replicas, options.steps, options.rounds, comm, options.device
        ):
            if comm.rank == 0:
                print(f"| {name} | {what} | {milliseconds:.1f} | {ratio:.2f} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
