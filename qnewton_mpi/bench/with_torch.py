"""Beside PyTorch, where it is installed: the gradients of the convnet, and what its adapter adds to a step. Local."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
from mpi4py import MPI

from qnewton_mpi.bench.steps import BATCH
from qnewton_mpi.bench.tables import Table
from qnewton_mpi.bench.timing import seconds_of
from qnewton_mpi.models.convnet import DENSE_WIDTHS, Convnet
from qnewton_mpi.models.layers import ACTIVATIONS
from qnewton_mpi.parallel.communicator import Communicator


def gradients(rounds: int) -> Iterator[Table]:
    """Time the convnet's gradients beside PyTorch's on the same network, one thread each; nothing without it. Local."""
    try:
        import torch
    except ImportError:
        return
    from qnewton_mpi.models.reference import torch_layers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = Table(
        f"samples/s of the local gradients, PyTorch {torch.__version__}",
        ("images", "activation", "batch", "samples/s", "PyTorch", "ratio"),
    )
    for shape in DENSE_WIDTHS:
        for activation in ACTIVATIONS:
            for batch in (32, 256):
                random = np.random.default_rng(0)
                images, labels = random.standard_normal((batch, *shape), np.float32), random.integers(0, 10, batch)
                network = Convnet(shape, activation)
                parameters = network.initial_parameters(seed=0)
                peer, tensors = torch_layers(network, parameters), (torch.tensor(images), torch.tensor(labels))

                def theirs(peer: Any = peer, tensors: Any = tensors) -> None:
                    peer.zero_grad()
                    torch.nn.functional.cross_entropy(peer(tensors[0]), tensors[1]).backward()  # type: ignore[no-untyped-call]

                def ours(network: Convnet = network, arguments: Any = (parameters, images, labels)) -> None:
                    network.loss_and_gradient(*arguments)

                both = [
                    (seconds_of(ours, 1024 // batch, 1)[0], seconds_of(theirs, 1024 // batch, 1)[0])
                    for _ in range(rounds)
                ]
                mine, other = (batch / statistics.median(times) for times in zip(*both, strict=True))
                ratio = statistics.median(b / a for a, b in both)
                table.rows.append(("×".join(map(str, shape)), activation, batch, round(mine), round(other), ratio))
    torch.set_num_threads(threads)
    yield table


def adapter(rounds: int) -> Iterator[Table]:
    """Time `qnewton_mpi.torch` on two replicas against what it calls; nothing without PyTorch. Local."""
    try:
        import torch

        from qnewton_mpi.torch import QuasiNewton
    except ImportError:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = Table(
        "steps of sgd through the PyTorch adapter, M = 2",
        ("N", "ms", "gradients, ms", "algebra, ms", "ms/(gradients + algebra)"),
    )
    inputs = torch.randn(BATCH, 512)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))
    alone = Communicator(MPI.COMM_SELF)
    optimizer = QuasiNewton(
        model.parameters(), samples=BATCH // 2, replicas_per_rank=2, method="sgd", communicator=alone
    )

    def closure() -> float:
        mine = optimizer.share(inputs)
        loss = torch.nn.functional.mse_loss(model(mine), mine)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def both() -> None:
        for _ in range(2):
            model.zero_grad()
            closure()

    core, zero = optimizer.core, np.zeros(optimizer.core.exchange.size, np.float32)
    actions = (lambda: optimizer.step(closure), both, lambda: core.step(lambda w, replica: (1.0, zero)))
    times = [[seconds_of(action, 4, 1)[0] for action in actions] for _ in range(rounds)]
    medians = [statistics.median(column) * 1e3 for column in zip(*times, strict=True)]
    ratio = statistics.median(whole / (gradient + algebra) for whole, gradient, algebra in times)
    table.rows.append((core.exchange.size, *medians, ratio))
    torch.set_num_threads(threads)
    yield table
