"""Run a study with a method more, kronecker-signal: directions have a part in a step by their share of signal.

Usage: mpiexec -n 2 python scripts/signal_shares.py STUDY.toml STUDY.h5

It is `qnewton-mpi compare` with a prototype of what docs/method.md tells under "Where the signal is". Groups of a
layer's directions are those whose V is within the same factor of 4. Over running means of about 50 steps a group has

    s = 1 − Σ P⁻¹V/b · Σ_k a_k² / Σ z̃ P⁻¹z̃,     z̃ = Q_Bᵀ Z Q_A,  z = Σ_k a_k ḡ_{t−k}

and d = c s P⁻¹z from the 20th step on, s at least a fifth, c such that the noise tr(P⁻¹F) stays as it is.
"""

from __future__ import annotations

import sys

import numpy as np
from extended_study import run
from numpy.typing import NDArray

from qnewton_mpi.core.optimizers import Kronecker
from qnewton_mpi.core.optimizers.base import Array
from qnewton_mpi.core.optimizers.natural_gradient import momentum_noise

FIRST_STEP, WEIGHT, LEAST = 20, 0.02, 0.2
GROUPS, MIDDLE = 64, 32  # powers of 4 of V, and the one that is V = 1


class SignalKronecker(Kronecker):
    """`kronecker` with a part for each group of directions by its share of signal. NumPy, one rank, no checkpoints."""

    def start(self) -> None:
        super().start()
        self.means = np.zeros((2, len(self.layers), GROUPS))  # of z̃ P⁻¹z̃, and what noise makes expect of it

    def apply_inverse(self, z: Array) -> Array:
        averaged = momentum_noise(self.settings.momentum, self.steps) / self.batch
        inverses = [self.inverse[layer.span].reshape(layer.variances.shape) for layer in self.layers]
        groups = [group(layer.variances) for layer in self.layers]
        seen = np.zeros_like(self.means)
        for k, (layer, inverse) in enumerate(zip(self.layers, inverses, strict=True)):
            rotated = layer.rotate(layer.matrices(z[None, layer.span]))[0]
            for row, terms in zip(
                seen[:, k], (rotated**2 * inverse, averaged * layer.variances * inverse), strict=True
            ):
                row += np.bincount(groups[k].ravel(), terms.ravel(), GROUPS)
        self.means += max(WEIGHT, 1 / self.steps) * (seen - self.means)
        if self.steps < FIRST_STEP:
            return super().apply_inverse(z)
        products, noise = self.means
        shares = np.maximum(1 - noise / np.maximum(np.maximum(products, noise), np.finfo(float).tiny), LEAST)
        scale = seen[1].sum() / (seen[1] * shares).sum()
        parts = [
            layer.scale(z[layer.span], (inverse * (scale * share)[labels]).astype(z.dtype).ravel())
            for layer, inverse, share, labels in zip(self.layers, inverses, shares, groups, strict=True)
        ]
        return np.concatenate(parts)


def group(variances: Array) -> NDArray[np.int64]:
    """Return which power of 4 each of V is in."""
    return np.clip(np.floor(np.log2(np.maximum(variances, 1e-12)) / 2).astype(int) + MIDDLE, 0, GROUPS - 1)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], {"kronecker-signal": SignalKronecker}))
