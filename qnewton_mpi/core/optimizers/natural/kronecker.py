"""The default method: the covariance of the replicas' gradients, layer by layer, in its Kronecker eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qnewton_mpi.arrays import Array, Held, Matrix, to_host
from qnewton_mpi.core.exchange.cost import Traffic
from qnewton_mpi.core.layers import layer_shapes
from qnewton_mpi.core.means import Mean, at_least, lasting
from qnewton_mpi.core.optimizers.natural.layer import Layer
from qnewton_mpi.core.optimizers.natural.method import NaturalGradient
from qnewton_mpi.core.optimizers.natural.settings import NaturalGradientSettings
from qnewton_mpi.core.optimizers.natural.values import Update
from qnewton_mpi.core.optimizers.values import Batch, Figures
from qnewton_mpi.core.settings import NOT_NEGATIVE, POSITIVE, setting
from qnewton_mpi.core.state import Kind

REFERENCE_BATCH = 256  # that a numerical rate is meant for
FIRST_UPDATES, FIRST_COMBINATIONS = 10, 8
FIRST_SHARES = 20  # steps, before which the shares of signal are not known well enough
SHARE_WEIGHT = 0.04  # of an update in the means that they are known from
COMBINATIONS = 5  # in the seed of their random numbers: no others have it


@dataclass(frozen=True)
class KroneckerSettings(NaturalGradientSettings):
    """Settings of `kronecker`."""

    damping: float = setting(0.07, "ε, of a layer's mean V", POSITIVE)
    flattening: float = setting(0.25, "of V's exponent, where a step is noise; 0 is off", NOT_NEGATIVE)
    least_share: float = setting(0.2, "of signal that a group of directions is taken to have; 1 is off", POSITIVE)
    basis_every: int = setting(5, "updates between steps of the eigenbases, but for the first ones", POSITIVE)
    max_side: int = setting(2048, "a longer side of a layer keeps the coordinates as its basis", POSITIVE)
    leading: int = setting(64, "directions of a long side that are taken with all of the other side's", POSITIVE)
    combinations: int = setting(3, "of the replicas' differences in an update, but for the first ones", POSITIVE)


class Kronecker(NaturalGradient[KroneckerSettings]):
    """The natural gradient with F layer by layer, each diagonal in a Kronecker eigenbasis.

    A layer's share of a combination of the replicas' gradients is a matrix X_k = √(b/K) Σ_i ξ_ki g_i, (outputs,
    inputs + 1) with the bias last, ξ_k random, orthonormal, and Σ_i ξ_ki = 0. M − 1 of them are all their differences;
    there are 8 at most in the first ten updates, then 3, and the squares have the same mean.

        A = Σ_k X_kᵀ X_k,  U_A ← qr((A + ρ I) U_A)     running means, and their eigenvectors by
        B = Σ_k X_k X_kᵀ,  U_B ← qr((B + ρ I) U_B)     orthogonal iteration
        V = Σ_k (U_Bᵀ X_k U_A)²                        elementwise: F's diagonal in this basis
        P⁻¹ Z = U_B [(U_Bᵀ Z U_A)/(V + ε)] U_Aᵀ,    ε = 0.07 mean V

    A side longer than 2,048 keeps the coordinates as its basis. Where both are longer than 128, and neither is so long,
    the 64 leading directions of each are taken with all of the other side's, and the others' V with each other is one
    number, its mean.

    That is for steps of signal alone. With ν the share of noise in a step's dᵀz and φ = ν², the last line is

        P⁻¹ Z = τ U_B [s^ν (U_Bᵀ Z U_A) n^(−φ/4) (V + ε)^(φ/4 − 1)] U_Aᵀ

    where n = Σ V (V + ε)^(φ/4 − 1) is the layer's noise, and τ leaves the noise of all layers, tr(P⁻¹F), as it is with
    1/(V + ε). Newton's step divides noise too by the curvature, and is then longest where there is nothing to gain; of
    full whitening, the other extreme, the exponent would be −½. From the 20th step on s, 1 before, is the share of
    signal of a group of directions, those of a layer with V within the same factor of 4:

        s = max(1 − Σ N/Σ S, 0.2),    S = ⟨b z̃²/Σ_k a_k²⟩,  N = ⟨V⟩,    z̃ = U_Bᵀ Z U_A,  z = Σ_k a_k ḡ_{t−k}

    with running means ⟨ ⟩ over about 25 updates and b the samples of a step, so that S is V where all is noise.

    What crosses the network at an update is the mean and the combinations, added up, or all replicas' columns where
    those are fewer (`Exchange.combined`).

    The eigenbasis is K-FAC's and Shampoo's (Martens and Grosse 2015; Gupta et al. 2018), the diagonal in it EKFAC's
    (George et al. 2018) and SOAP's (Vyas et al. 2024). What differs is the estimate, from the differences of the
    replicas: no products of activations, any layer whose parameters are a matrix, and F itself, where Shampoo and SOAP
    take a root of the second moment of the mean gradient. A numerical rate is meant for a batch of 256 and grows as
    √batch; "auto", the default, is `noise_limited_rate`.

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> random = np.random.default_rng(0)
    >>> x, truth = random.standard_normal((8, 32, 3)), np.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]])
    >>> y = x @ truth.T + random.standard_normal((8, 32, 2))
    >>> def loss_and_gradient(w, replica):  # a layer of 3 inputs and 2 outputs, targets of unit noise
    ...     errors = x[replica] @ w.reshape(2, 3).T - y[replica]
    ...     return float((errors**2).sum()) / 64, (errors.T @ x[replica] / 32).reshape(-1)
    >>> exchange = AllgatherExchange(Communicator(), replicas=8, size=6)
    >>> optimizer = Kronecker(Kronecker.settings_type(), np.zeros(6), exchange, samples=32, shapes=[(2, 3)])
    >>> losses = [optimizer.step(loss_and_gradient)["loss"] for _ in range(50)]
    >>> losses[0] > 9, losses[-1] < 1
    (True, True)
    """

    settings_type = KroneckerSettings
    state: ClassVar = {**NaturalGradient.state, "largest": Kind.SHARED}
    figure_names = (*NaturalGradient.figure_names, "largest_eigenvalue")

    @classmethod
    def traffic(cls, settings: KroneckerSettings) -> Traffic:
        updates = 1 / settings.update_every
        return Traffic(columns=updates, means=1 - updates, combinations=settings.combinations)

    def pieces(self) -> list[int]:
        return [layer.stop - layer.start for layer in layer_shapes(self.shapes)]

    def start(self) -> None:
        super().start()
        held = self.exchange.held
        inside = [shape for shape in layer_shapes(self.shapes) if held.start <= shape.start and shape.stop <= held.stop]
        sizes = self.settings.max_side, self.settings.leading
        self.layers = [Layer(self.held, shape, held.start, *sizes) for shape in inside]
        self.largest = 0.0  # of V
        self.rounded = Mean(lasting(self.settings.memory))  # what V has of rounding
        self.tiny = float(self.xp.finfo(self.held.dtype).smallest_normal) ** 0.5  # where there is no gradient

    def parts(self) -> Mapping[str, Any]:
        return {**super().parts(), "rounded": self.rounded, **{f"layer-{layer.start}": layer for layer in self.layers}}

    def fixed_rate(self, rate: float) -> float:
        return rate * math.sqrt(self.batch / REFERENCE_BATCH)

    def update_is_due(self) -> bool:
        return self.steps <= FIRST_UPDATES or self.steps % self.settings.update_every == 0

    def update(self, batch: Batch, noise: float) -> Update:
        mean, combined = self.exchange.combined(batch.rows, self.coefficients())
        seen = []
        for layer in self.layers:
            seen.append(layer.add(combined[:, layer.span], mean[layer.span], self.weight))
            if self.updates <= FIRST_UPDATES or self.updates % self.settings.basis_every == 0:
                layer.renew_bases()
        self.rounded.add(self.rounding(batch) / self.exchange.size)
        least = max(self.rounded.value, self.tiny)
        both = [self.scales(layer, least, noise) for layer in self.layers]
        figures = [self.held[:0]]
        for layer, (newton, flattened), before in zip(self.layers, both, seen, strict=True):
            V = layer.variances
            sums = [layer.sum(table) for table in (V, V * newton, V * flattened)]
            figures.append(self.xp.stack([*sums, *before, self.xp.max(V)]))
        own = to_host(self.xp.concat(figures)).astype(np.float64).reshape(-1, 6)
        everyone = self.exchange.gathered(np.concatenate([own[:, :5].sum(axis=0), own[:, 5].max(initial=0.0)[None]]))
        trace, known, flat, *before = everyone[:, :5].sum(axis=0).tolist()
        self.largest = float(everyone[:, 5].max())
        for layer, (newton, flattened) in zip(self.layers, both, strict=True):
            layer.scales = flattened * (known / flat) if flat > 0 else newton
        return Update(mean, trace, known, (before[0], before[1]) if self.updates > 1 else None)

    def coefficients(self) -> Matrix:
        """Return the rows √(b/K) ξ_k, (K, M), ξ_k random, orthonormal, and orthogonal to the ones. Local.

        So Σ_k x_k x_kᵀ of the combinations x_k has the expectation b/(M−1) G Gᵀ, and for K = M − 1 is it. The first has
        entries of one size, as many of either sign: then it is exact too where one replica alone differs.
        """
        replicas = self.exchange.replicas
        wanted = FIRST_COMBINATIONS if self.steps <= FIRST_UPDATES else self.settings.combinations
        number = min(wanted, replicas - 1)
        random = np.random.default_rng([self.seed, COMBINATIONS, self.steps])
        columns = random.standard_normal((replicas, number))
        columns[:, 0] = random.permutation(np.resize([1, -1], replicas) * (np.arange(replicas) < replicas // 2 * 2))
        rows = np.linalg.qr(columns - columns.mean(axis=0))[0].T
        return math.sqrt(self.samples / number) * rows

    def scales(self, layer: Layer, least: float, noise: float) -> tuple[Array, Array]:
        """Return of a layer 1/(V + ε), ε a share of the mean V and at least what V has of rounding, and that flattened.

        Given ν, φ = ν²: s^ν n^(−φ/4) (V + ε)^(φ/4 − 1), n = Σ V (V + ε)^(φ/4 − 1) its noise. Local.
        """
        flatness = noise**2
        mean = layer.sum(layer.variances) / layer.size
        damped = layer.variances + self.xp.maximum(self.settings.damping * mean, least)
        exponent = self.settings.flattening * flatness
        scales = damped ** (exponent - 1)
        scales = scales * self.xp.maximum(layer.sum(layer.variances * scales), self.tiny) ** -exponent
        if self.steps >= FIRST_SHARES:
            scales = scales * layer.signal_shares(self.settings.least_share) ** noise
        return 1 / damped, scales

    def apply_inverse(self, z: Held, noise: float | None = None) -> Held:
        """Return P⁻¹ z; at an update, take z̃² and V into the means from which the next one has its shares of signal."""
        parts = [z[:0]]
        for layer in self.layers:
            view = layer.view(z[None, layer.span])
            if noise is not None:
                layer.compare(view.squares() / noise, at_least(SHARE_WEIGHT)(self.updates))
            parts.append(layer.flat(view.times(layer.scales)))
        return self.xp.concat(parts)

    def fisher_figures(self) -> Figures:
        return {"largest_eigenvalue": self.largest}
