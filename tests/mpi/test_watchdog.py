"""The watchdog on any number of ranks, by a clock of the test's own: whom it names, and that it gives back all."""

from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel import watchdog
from qnewton_mpi.parallel.communicator import COMMUNICATION, PHASES, Communicator
from qnewton_mpi.parallel.watchdog import Watchdog

LIMIT = 10.0


@pytest.fixture
def watched(communicator, monkeypatch):
    """Return watch(dog, *pauses): what the watchdog of this rank says, looking after each of the pauses, in seconds.

    One rank after another, without threads: all ranks' notes are as the test wrote them.
    """
    now = [1000.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(watchdog.threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(watchdog.threading.Thread, "join", lambda thread: None)

    def watch(dog, *pauses):
        def abort(text, code):
            raise SystemExit(text)

        left = iter(pauses)

        def wait(pause):
            step = next(left, None)
            now[0] += step or 0.0
            return step is None

        said, alive = None, dog._notes[communicator.rank, 2]
        for turn in range(communicator.size):
            communicator.mpi.Barrier()
            if turn != communicator.rank:
                continue
            with monkeypatch.context() as patch:
                patch.setattr(dog, "_stop", SimpleNamespace(wait=wait, set=lambda: None))
                patch.setattr(communicator, "abort", abort)
                try:
                    dog._watch()
                except SystemExit as ended:
                    said = str(ended)
            dog._notes[communicator.rank, 2] = alive
        communicator.mpi.Barrier()
        return said

    return watch


def note(dog, rank, phase, began=1000.0, alive=1e9):
    """Write what a rank and its watchdog would; `alive` in the future is a watchdog that stays so."""
    dog._notes[rank] = began, PHASES.index(phase), alive


def note_all(dog, communicator, **others):
    """Have all ranks wait but for the last, of which `others` tell."""
    if communicator.rank == 0:
        for rank in range(communicator.size):
            note(dog, rank, COMMUNICATION)
        if others:
            note(dog, communicator.size - 1, **others)
    communicator.mpi.Barrier()


@pytest.mark.parametrize(("phase", "alive"), [("loading", 1e9), ("gradient", 1000.0), (COMMUNICATION, 1000.0)])
def test_who_is_too_long_in_a_phase_is_named_once(communicator, watched, phase, alive):
    """In the collective too where its watchdog is still: the process is stopped."""
    last = communicator.size - 1
    if phase == COMMUNICATION and last == 0:
        pytest.skip("a stopped process says nothing of itself")
    with Watchdog(communicator, LIMIT) as dog:
        note_all(dog, communicator, phase=phase, alive=alive)
        stopped = communicator.rank == last > 0 and alive == 1000.0
        said = communicator.mpi.allgather(watched(dog, *[1.0] * (0 if stopped else 11)))
    told = [text for text in said if text]
    assert len(told) == 1
    assert f"rank {last} has been in phase '{phase}' for 11 s" in told[0]


def test_ranks_that_wait_are_patient(communicator, watched):
    """Twice the limit: all wait for a rank of another node, whose own watchdog is to say so first."""
    with Watchdog(communicator, LIMIT) as dog:
        note_all(dog, communicator)
        assert watched(dog, *[1.0] * 20) is None
        said = communicator.mpi.allgather(watched(dog, *[1.0] * 21))
    assert "wait for a rank of another node" in said[0]
    assert not any(said[1:])


def test_a_job_that_was_suspended_whole_is_not_stalled(communicator, watched):
    """What it missed counts for nobody; what it does not do afterwards does."""
    with Watchdog(communicator, LIMIT) as dog:
        note_all(dog, communicator, phase="gradient")
        assert watched(dog, 1.0, 1.0, 500.0, *[1.0] * 10) is None
        assert any(communicator.mpi.allgather(watched(dog, 1.0, 500.0, *[1.0] * 11)))


def test_a_rank_that_has_left_does_not_have_to_speak(communicator, watched):
    if communicator.size < 3:
        pytest.skip("three ranks")
    with Watchdog(communicator, LIMIT) as dog:
        note_all(dog, communicator, phase="gradient")
        if communicator.rank == 0:
            note(dog, 0, COMMUNICATION, np.inf, np.inf)
        said = communicator.mpi.allgather(watched(dog, *([1.0] * 11 if communicator.rank else [])))
    assert [rank for rank, text in enumerate(said) if text] == [1]


@pytest.mark.parametrize("error", [None, UserError])
def test_what_it_takes_it_gives_back(error):
    """An MPI library has some 2,000 communicators; a study has more runs."""
    alone = Communicator(MPI.COMM_SELF)  # which is a matter of milliseconds
    for _ in range(1100):  # each takes two: of the node, and of the window
        try:
            with Watchdog(alone, 600.0):
                if error is not None:
                    raise error("told to all")
        except UserError:
            pass
    assert alone.notes is None
