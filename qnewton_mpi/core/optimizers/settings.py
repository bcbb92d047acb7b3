"""The settings that every optimizer has."""

from __future__ import annotations

from dataclasses import dataclass

from qnewton_mpi.core.settings import NOT_NEGATIVE, POSITIVE, setting

AUTO: tuple[str, ...] = ("auto",)


@dataclass(frozen=True)
class Settings:
    """The learning rate α of w ← w − α d, and a decay of w beside it.

    The decay is decoupled from the step (Loshchilov and Hutter 2019, arXiv 1711.05101), as in PyTorch's AdamW, with c
    the factor of a schedule: w ← (1 − c α λ) w − c α d. There α is about what a step changes each parameter by. A
    measured rate has another meaning, and another size in another unit of the loss. So with "auto" ‖Δw‖/√N takes its
    place: w ← (1 − λ ‖Δw‖/√N) w + Δw, and λ has the size that it has for AdamW.
    """

    lr: float | str = setting(0.3, "learning rate", POSITIVE)
    weight_decay: float = setting(
        0.0, "decoupled λ: a step takes lr·λ of w off, at lr auto ‖Δw‖/√N·λ; 0 is off", NOT_NEGATIVE
    )

    @property
    def shrinkage(self) -> float:
        """lr·λ; λ, where the rate is "auto"."""
        return self.weight_decay * (1.0 if isinstance(self.lr, str) else self.lr)
