"""The benchmark beside DistributedDataParallel."""

import pytest
import torch.distributed as dist

from benchmarks import ddp
from benchmarks.workloads import problems


def test_steps_are_timed_beside_those_of_distributed_data_parallel(communicator):
    replicas = max(2, communicator.size)
    ddp.join(communicator.mpi)
    try:
        found = list(ddp.compared(problems.load("linear"), [replicas], 2, 2, communicator.mpi))
    finally:
        dist.destroy_process_group()
    ratios = {name: ratio for name, milliseconds, ratio in found if milliseconds > 0}
    assert ratios["DDP, adamw"] == pytest.approx(1)
    assert ratios[f"default, M = {replicas}"] > 0
