"""How far a run is: what the loop carries from step to step besides the state of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.core.state import Kind


@dataclass
class Position:
    """How far a run is: what the loop itself carries from step to step, and which run it is (bytes)."""

    lengths: ClassVar = {"skipped": "skipped"}
    step: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    skipped: NDArray[np.int64] | None = None
    run: NDArray[np.uint8] | None = None

    @property
    def state(self) -> dict[str, Kind]:
        return dict.fromkeys(vars(self), Kind.SHARED)
