"""The model from which the exchange is chosen."""

import pytest

from qnewton_mpi.core.exchange import AllgatherExchange, SlicedExchange, choose
from qnewton_mpi.core.exchange.cost import Network, Traffic
from qnewton_mpi.core.optimizers import OPTIMIZERS


def test_collectives():
    network = Network(latency=1.0, seconds_per_byte=0.5)
    assert network.allreduce(4, 2) == pytest.approx(2 * (1 + 1))  # recursive doubling
    assert network.allreduce(4, 1000) == pytest.approx(4 + 2 * 0.75 * 500)  # Rabenseifner
    assert network.allgather(4, 1000) == network.reduce_scatter(4, 1000) == pytest.approx(2 + 0.75 * 500)
    assert network.alltoall(8, 1000) == pytest.approx(7 + 0.875 * 500)
    assert network.alltoall(8, 1) == pytest.approx(3 * (1 + 0.25))


def test_sliced_of_one_replica_a_rank_costs_the_bytes_of_one_allreduce():
    only_bytes = Network(latency=0.0, seconds_per_byte=1.0)
    for name in ("sgd", "fisher", "kronecker"):
        kind = OPTIMIZERS[name]
        traffic = kind.traffic(kind.settings_type())
        assert SlicedExchange.seconds(only_bytes, traffic, 16, 16, 1000) == pytest.approx(2 * 15 / 16 * 4000)
    assert SlicedExchange.seconds(only_bytes, Traffic(columns=1, means=0, rows=1), 16, 16, 1000) == pytest.approx(
        3 * 15 / 16 * 4000
    )


def test_choice():
    assert choose(Traffic(), 1, 8, 10**9) == "allgather"  # nothing crosses
    assert choose(Traffic(), 16, 16, 1000) == "allgather"  # latency decides
    assert choose(Traffic(), 16, 16, 10**7) == "sliced"  # as many bytes, but state is shared out
    assert choose(Traffic(columns=1, means=0, rows=1), 16, 16, 10**7) == "sliced"


def test_combinations_are_added_up_where_columns_are_more():
    only_bytes = Network(latency=0.0, seconds_per_byte=1.0)
    allreduce = 2 * 15 / 16 * 4000
    traffic = Traffic(columns=0.25, means=0.75, combinations=1)
    assert SlicedExchange.seconds(only_bytes, traffic, 16, 16, 1000) == pytest.approx(allreduce)
    assert SlicedExchange.seconds(only_bytes, traffic, 16, 128, 1000) == pytest.approx(1.125 * allreduce)
    assert AllgatherExchange.seconds(only_bytes, traffic, 16, 128, 1000) == pytest.approx(1.25 * allreduce)
