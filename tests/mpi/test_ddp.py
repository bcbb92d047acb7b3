"""The benchmark beside DistributedDataParallel."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import ddp
from benchmarks.workloads import problems


@pytest.fixture
def joined(communicator):
    ddp.join(communicator.mpi)
    yield communicator.mpi
    dist.destroy_process_group()


def test_all_are_timed_on_all_ranks(joined):
    replicas = max(2, joined.size)
    found = list(ddp.compared(problems.load("linear"), [replicas], 2, 2, joined))
    names = [name for name, *_ in found]
    assert names[0] == "DDP, adamw"
    assert names[-1] == f"default, M = {replicas}"
    assert all(0 < figure < math.inf for _, *figures in found for figure in figures)
    assert len({repr(names) for names in joined.allgather(names)}) == 1


def test_peers_learn_from_the_batch_of_all_ranks(joined):
    """A step of SGD leads to the same parameters as on the whole batch by one process."""
    problem = problems.load("linear")
    batch = tuple(part[: 12 * joined.size] for part in next(problem.batches(0)))
    shares = joined.allgather(ddp.share(batch, joined, "cpu"))
    for part, parts in zip(batch, zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), part)
    model, alone = DistributedDataParallel(problem.model(0)), problem.model(0)
    ddp.peer(problem, model, "sgd", 10)(ddp.share(batch, joined, "cpu"))
    problem.loss(alone, *batch).backward()
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter -= ddp.RATE * parameter.grad
    for own, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own, expected)
