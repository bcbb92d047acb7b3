"""Ranks that leave while others wait for them, by programs of their own: the job ends, and one line says who left."""

import re
import textwrap

import pytest

PROGRAM = """
import sys
import time

import numpy as np
from mpi4py import MPI

from qnewton_mpi.core.create import create
from qnewton_mpi.core.optimizers import Optimizer

world, step = MPI.COMM_WORLD, 0
rank, last = world.rank, world.size - 1


def loss_and_gradient(w, replica):
    during()
    return float(w @ w) / 2, w + replica


def during():
    pass


def steps(count, **options):
    global step
    optimizer = create("momentum", np.ones(5), world.size, lr=0.1, **options)
    for step in range(1, count + 1):
        optimizer.step(loss_and_gradient)


"""


@pytest.fixture
def ends(mpiexec, tmp_path):
    """Return run(body, ranks): exit code and lines of a program, which may end by itself or with one line of ours."""

    def run(body, ranks=3):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM + textwrap.dedent(body))
        finished = mpiexec(ranks, path)
        return finished.returncode, re.findall(r"qnewton-mpi: .*", finished.stderr), finished.stderr

    return run


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("first", [0, 1])
def test_fewer_steps_on_one_rank(ends, ranks, first):
    code, lines, _ = ends(f"steps(3 if rank == {first} else 4)", ranks)
    assert code == 2
    assert len(lines) == 1
    assert re.search(rf"rank {first} has left after step 3, rank \d waits for it in step 4: give all ranks", lines[0])


@pytest.mark.parametrize("how", ["sys.exit('no more')", "sys.exit(0)", "MPI.Finalize(); sys.exit(0)"])
def test_leaving_within_a_closure(ends, how):
    code, lines, text = ends(
        f"""
        def during():
            if rank == last and step == 3:
                {how}
        steps(9)
        """
    )
    assert code == 2
    assert len(lines) == 1
    assert "rank 2 has left after step 2, rank 0 waits for it in step 3" in lines[0]
    assert ("no more" in text) == ("no more" in how)


def test_leaving_before_there_is_an_optimizer(ends):
    code, lines, _ = ends("if rank == 1: sys.exit()\nsteps(3)")
    assert code == 2
    assert len(lines) == 1
    assert "rank 1 has left before rank 2, which waits for it in the set-up" in lines[0]


def test_an_exception_before_there_is_an_optimizer(ends):
    code, lines, text = ends("if rank == 1: raise KeyError('shard-17')\nsteps(3)")
    assert code == 1
    assert lines == ["qnewton-mpi: rank 1 of 3 failed:"]
    assert "KeyError: 'shard-17'" in text


def test_an_exception_that_the_program_tells_itself(ends):
    code, lines, text = ends(
        """
        sys.excepthook = lambda kind, error, trace: print("my own words:", error, file=sys.stderr)
        def during():
            if rank == 1 and step == 2:
                raise OSError("a shard is corrupt")
        steps(3)
        """
    )
    assert code != 0
    assert len(lines) == 1
    assert "rank 1 has left after step 1" in lines[0]
    assert "my own words: a shard is corrupt" in text


def test_leaving_a_part_of_the_world(ends):
    """The ranks of the other part go on meanwhile."""
    code, lines, _ = ends(
        """
        part = world.Split(rank // 2, rank)
        steps({0: 50, 1: 2}.get(rank, 1000000), communicator=part)
        """,
        4,
    )
    assert code == 2
    assert len(lines) == 1
    assert "rank 1 has left after step 2, rank 0 waits for it in step 3" in lines[0]


@pytest.mark.parametrize(("who", "expected"), [("rank == 1", 2), ("True", 0)])
def test_leaving_in_the_middle_of_a_step(ends, who, expected):
    """The others are in a collective of MPI's, where they see nothing; but where all leave, nobody waits."""
    code, lines, _ = ends(
        f"""
        move = Optimizer.move
        def leave(*arguments):
            if step == 2 and ({who}):
                sys.exit(0)
            return move(*arguments)
        Optimizer.move = leave
        steps(3)
        """
    )
    assert code == expected
    assert len(lines) == (expected > 0)
    assert not lines or "rank 1 has left in the middle of step 2" in lines[0]


def test_leaving_at_the_same_end_is_no_matter(ends):
    """One is late, one has something to do after the last step, and all have had an optimizer of their own."""
    code, lines, _ = ends(
        """
        create("sgd", np.ones(2), 2, communicator=MPI.COMM_SELF).step(lambda w, replica: (1.0, w + replica))
        steps(3)
        if rank == 0:
            time.sleep(0.5)
            create("sgd", np.ones(2), 2, communicator=MPI.COMM_SELF).step(lambda w, replica: (1.0, w + replica))
        """
    )
    assert (code, lines) == (0, [])


def test_messages_of_a_program_are_left_to_it(ends):
    """Who takes any message from workers gets none of ours, when some of them have left."""
    code, lines, _ = ends(
        """
        create("sgd", np.ones(2), 2, communicator=MPI.COMM_SELF)
        if rank > 0:
            world.send(rank, 0)
            if rank == 2:
                world.recv(source=0)
                world.send("the last", 0)
        else:
            assert {world.recv(), world.recv()} == {1, 2}
            time.sleep(0.5)  # in which rank 1 leaves
            world.send("go on", 2)
            assert world.recv() == "the last"
        """
    )
    assert (code, lines) == (0, [])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "alone",
    ['create("sgd", np.ones(2), world.size)', "Communicator().from_root(list)", "Communicator().together(list)"],
)
def test_what_one_rank_does_alone(ends, ranks, alone):
    """As `if rank == 0:` before what is for all: the others are in a step, in which they would wait for ever."""
    code, lines, _ = ends(
        f"""
        from qnewton_mpi.parallel.communicator import Communicator
        def during():
            if step == 2 and rank == last:
                {alone}
        steps(9)
        """,
        ranks,
    )
    assert code == 2
    assert len(lines) == 1
    assert re.search(
        r"rank \d waits in (an agreement|step 2), rank \d in (an agreement|step 2): let all ranks", lines[0]
    )


def test_who_is_late_is_waited_for(ends):
    """A rank that answers no question, busy as it is, and then the other one."""
    code, lines, _ = ends(
        """
        from qnewton_mpi.parallel import farewell
        farewell.ASK_AFTER = 0.1
        def during():
            if (step, rank) in ((1, 0), (2, 1), (3, 0), (4, 2)):
                time.sleep(0.5)
        steps(5)
        """
    )
    assert (code, lines) == (0, [])


def test_a_stall_names_the_rank(ends):
    code, lines, _ = ends(
        """
        from qnewton_mpi.parallel.communicator import Communicator
        world = Communicator()
        def during():
            if step == 2:
                if rank == 1:
                    time.sleep(1000)
                Communicator.of(world, 4)  # patient so far, however busy the machine is
        steps(3, communicator=world)
        """
    )
    assert code == 1
    assert len(lines) == 1
    assert re.search(r"stalled: rank \d has waited for rank\(s\) (0, )?1(, 2)? in step 2 for \d+ s", lines[0])
