"""Full batches: multisecant quasi-Newton steps with columns from the replicas and from the history together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from qnewton_mpi.arrays import Array, Columns, Held, Vector, Vectors, to_device
from qnewton_mpi.core.optimizers.base import Optimizer
from qnewton_mpi.core.optimizers.settings import Settings
from qnewton_mpi.core.optimizers.values import LossAndGradient, Step
from qnewton_mpi.core.ritz import orthonormal
from qnewton_mpi.core.secants import leading_eigenpairs
from qnewton_mpi.core.settings import POSITIVE, setting
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import UserError

SUFFICIENT_DECREASE = 1e-4
NOTHING_LEFT = 1e-8  # of a squared norm of one
LEAST_CURVATURE = 1e-9  # of a probed direction, relative to the largest of its block


@dataclass(frozen=True)
class BlockBFGSSettings(Settings):
    """Settings of `BlockBFGS`."""

    lr: float | str = setting(1.0, "length of the first trial step, relative to the quasi-Newton step", POSITIVE)
    steps_kept: int = setting(50, "past steps whose secants are kept", POSITIVE)
    probes_kept: int = setting(40, "rounds of probes whose secants are kept", POSITIVE)
    probe_scale: float = setting(1e-3, "ρ, length of a probe's displacement", POSITIVE)


class Block(NamedTuple):
    """Secants: directions D (k, held), their products Y = D H, and the eigenvalues of D Yᵀ, which is diagonal."""

    directions: Vectors
    products: Vectors
    curvatures: Vector


class History:
    """The newest blocks of secants, the oldest of these first. Local.

    Parameters
    ----------
    most : int
        Blocks that are kept.
    held : (held,)
        Of the library, dtype and length of a direction.
    """

    state: ClassVar = {
        "directions": Kind.HELD,
        "products": Kind.HELD,
        "curvatures": Kind.SHARED,
        "lengths_of_blocks": Kind.SHARED,
    }
    lengths: ClassVar = {
        "directions": "secants",
        "products": "secants",
        "curvatures": "secants",
        "lengths_of_blocks": "blocks",
    }

    def __init__(self, most: int, held: Array) -> None:
        self.most = most
        self.directions = self.products = held[None, :][:0, :]
        self.curvatures, self.lengths_of_blocks = np.zeros(0), np.zeros(0, np.int64)

    def add(self, block: Block) -> None:
        """Keep a block, and one less of the oldest where they are too many."""
        concat = array_namespace(block.directions).concat
        first = int(self.lengths_of_blocks[: max(0, len(self.lengths_of_blocks) + 1 - self.most)].sum())
        self.directions = concat([self.directions[first:, :], block.directions])
        self.products = concat([self.products[first:, :], block.products])
        self.curvatures = np.append(self.curvatures[first:], block.curvatures)
        self.lengths_of_blocks = np.append(self.lengths_of_blocks, len(block.curvatures))[-self.most :]

    def clear(self) -> None:
        """Keep none."""
        self.directions, self.products = self.directions[:0, :], self.products[:0, :]
        self.curvatures, self.lengths_of_blocks = self.curvatures[:0], self.lengths_of_blocks[:0]

    @property
    def blocks(self) -> list[Block]:
        """All that are kept."""
        ends = np.cumsum([0, *self.lengths_of_blocks]).tolist()
        return [
            Block(self.directions[a:b, :], self.products[a:b, :], self.curvatures[a:b])
            for a, b in itertools.pairwise(ends)
        ]


class BlockBFGS(Optimizer[BlockBFGSSettings]):
    """Limited-memory block BFGS for a loss that is the same for all replicas, and not noisy.

    In one round replica 0 evaluates the gradient at w and each other replica at w + ρ q_i. Its difference gives H q_i,
    a secant; so does each step. With blocks of secants Y = D H, D Yᵀ = Δ⁻¹, H⁻¹ is updated from the oldest to the
    newest by

        H⁻¹ ← Dᵀ Δ D + (I − Dᵀ Δ Y) H⁻¹ (I − Yᵀ Δ D)

    which fulfils all secants of the block at once (Schnabel 1983; Gower, Goldfarb and Richtárik 2016, arXiv
    1603.09649); for one secant it is BFGS. The blocks of probes come after those of the steps. The next directions are
    block Krylov: of the products and of the gradient, what is orthogonal to the directions kept.

    A step that does not lessen the loss enough, or leads to where it is not finite, costs one more round, in which the
    replicas try M shorter ones at once; the next step is then at most twice as long as the best of these, relative to
    the quasi-Newton step.

    Its state is complete: a run that is restored goes on as it would have.

    Raises
    ------
    UserError
        Where the replicas' losses differ at the same parameters.

    Examples
    --------
    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import AllgatherExchange
    >>> from qnewton_mpi.parallel.communicator import Communicator
    >>> curvatures = np.geomspace(1, 1000, 12)
    >>> exchange = AllgatherExchange(Communicator(), replicas=4, size=12)
    >>> optimizer = BlockBFGS(BlockBFGS.settings_type(), np.ones(12), exchange)
    >>> def loss_and_gradient(w, replica):  # the same for all replicas
    ...     return float(w @ (curvatures * w)) / 2, curvatures * w
    >>> losses = [optimizer.step(loss_and_gradient)["loss"] for _ in range(12)]
    >>> losses[-1] < 1e-6 * losses[0]
    True
    """

    settings_type = BlockBFGSSettings
    minimum_replicas = 2
    state: ClassVar = {
        **Optimizer.state,
        "trial": Kind.SHARED,
        "before": Kind.HELD,
        "gradient": Kind.HELD,
        "loss": Kind.SHARED,
        "directions": Kind.HELD,
    }
    lengths: ClassVar = {"directions": "directions"}
    figure_names = (*Optimizer.figure_names, "length", "largest_eigenvalue", "smallest_eigenvalue")

    def start(self) -> None:
        self.trial = 1.0  # length of the next step, relative to the quasi-Newton step
        self.from_steps = History(self.settings.steps_kept, self.held)
        self.from_probes = History(self.settings.probes_kept, self.held)
        self.before = self.gradient = self.xp.zeros_like(self.held)  # where the last step began, and the gradient there
        self.loss = 0.0  # there
        self.directions = self.held[None, :][:0, :]  # of the next probes; none before the first step

    def parts(self) -> Mapping[str, Any]:
        return {**super().parts(), "from_steps": self.from_steps, "from_probes": self.from_probes}

    def propose(self, loss_and_gradient: LossAndGradient) -> Step:
        first = self.steps == 1
        if first:
            self.first_directions(loss_and_gradient)
        displacements = self.settings.probe_scale * self.with_zero(self.directions)
        columns, losses = self.columns_at(loss_and_gradient, displacements)
        # Not finite at a probe: too long a step as well.
        loss = float(losses[0]) if np.isfinite(losses).all() else np.inf
        gradient, length = columns[0, :], self.trial
        if not first and self.fails(loss):
            gradient, loss, length = self.shorten(loss_and_gradient)
        else:
            self.learn_probes((columns[1:, :] - gradient) / self.settings.probe_scale, gradient)
        if not first:
            self.learn_step(gradient)

        if length > 0:
            self.trial = min(1.0, 2 * length)
        d = self.trial * self.apply_inverse(gradient)
        self.before, self.gradient, self.loss = self.xp.asarray(self.held, copy=True), gradient, loss
        probes = self.from_probes.blocks
        newest = probes[-1].curvatures if probes else np.full(1, np.nan)
        figures = {"largest_eigenvalue": float(newest.max()), "smallest_eigenvalue": float(newest.min())}
        return Step(gradient, d, self.chosen_rate(), {"loss": loss, "length": length, **figures})

    def first_directions(self, loss_and_gradient: LossAndGradient) -> None:
        """Have all replicas evaluate at w, compare their losses, and start with the gradient and random directions."""
        batch = self.evaluate(loss_and_gradient)
        if not np.allclose(batch.losses, batch.losses[0], rtol=1e-5):
            raise UserError("BlockBFGS: replicas at the same parameters have different losses: all need the same data")
        self.directions = self.next_directions(self.exchange.mean(batch.rows)[None, :])

    def columns_at(self, loss_and_gradient: LossAndGradient, displacements: Columns) -> tuple[Columns, Vector]:
        """Return all replicas' gradients at their displacements, (M, held), in an array of their own, and their losses.

        One round.
        """
        batch = self.evaluate(loss_and_gradient, self.exchange.rows(displacements), self.steps > 1)
        return self.xp.asarray(self.exchange.columns(batch.rows), copy=True), batch.losses

    def with_zero(self, directions: Vectors) -> Columns:
        """Return the displacements (M, held) of replica 0, which has none, and of the others."""
        return self.xp.concat([self.xp.zeros_like(directions[:1, :]), directions])

    def fails(self, loss: float) -> bool:
        """Tell whether the step did not lessen the loss enough (Armijo's condition)."""
        slope = self.exchange.dots((self.gradient, self.held - self.before))[0]
        return loss > self.loss + SUFFICIENT_DECREASE * slope

    def shorten(self, loss_and_gradient: LossAndGradient) -> tuple[Held, float, float]:
        """Try the step's halves, quarters, … on the replicas and go to the best; back, forgetting all, if none is.

        Return the gradient and the loss there, and the length relative to the quasi-Newton step.
        """
        step = self.held - self.before
        lengths = 0.5 ** np.arange(1, self.exchange.replicas + 1)
        displacements = to_device(lengths - 1, step)[:, None] * step[None, :]
        columns, losses = self.columns_at(loss_and_gradient, displacements)
        best = int(np.argmin(losses))
        if losses[best] >= self.loss:
            self.from_steps.clear()
            self.from_probes.clear()
            self.trial *= float(lengths[-1])
            self.held = self.before
            return self.gradient, self.loss, 0.0
        self.held = self.before + float(lengths[best]) * step
        return columns[best, :], float(losses[best]), self.trial * float(lengths[best])

    def learn_step(self, gradient: Held) -> None:
        """Keep the secant of the last step."""
        s, y = self.held - self.before, gradient - self.gradient
        sy, ss = self.exchange.dots((s, y), (s, s))
        if sy > LEAST_CURVATURE * ss:
            self.from_steps.add(Block(s[None, :], y[None, :], np.array([sy])))

    def learn_probes(self, products: Vectors, gradient: Held) -> None:
        """Keep the secants of a round of probes along their Ritz vectors, and choose the next directions."""
        T = self.exchange.gram(self.directions, products)
        curvatures, V = np.linalg.eigh((T + T.T) / 2)
        positive = curvatures > LEAST_CURVATURE * curvatures[-1]
        if positive.any():
            rotation = to_device(V[:, positive].T, products)
            self.from_probes.add(Block(rotation @ self.directions, rotation @ products, curvatures[positive]))
        self.directions = self.next_directions(gradient[None, :], products)

    def next_directions(self, *candidates: Array) -> Array:
        """Return M − 1 orthonormal directions that are orthogonal to those kept, the first candidates' first.

        Random ones make up for candidates that the others and the directions kept span, and that would be rounding.
        """
        count, kept = self.exchange.replicas - 1, [block.directions for block in self.from_probes.blocks]
        room = max(0, self.exchange.size - 2 * count)
        kept = kept[-(room // count) :] if room >= count else []
        found = self.held[None, :][:0, :]
        for rows in (*candidates, None):
            missing = count - found.shape[0]
            if missing:
                rows = self.normal(self.steps) if rows is None else rows
                found = self.xp.concat([found, self.complement(rows, [*kept, found], missing)])
        return found

    def complement(self, rows: Array, kept: list[Array], count: int) -> Array:
        """Return `count` orthonormal rows or fewer: the most of what rows (n, held) span beyond the kept ones."""
        rows = rows / to_device(self.norms(rows), rows)[:, None]
        basis = self.xp.concat(kept)
        if basis.shape[0]:
            for _ in range(2):
                rows = rows - to_device(self.exchange.gram(rows, basis), rows) @ basis
        squares, vectors = leading_eigenpairs(self.exchange.gram(rows, rows), count)
        left = squares > NOTHING_LEFT
        if not left.any():
            return rows[:0, :]
        return orthonormal(self.exchange, to_device((vectors[:, left] / np.sqrt(squares[left])).T, rows) @ rows)

    def norms(self, rows: Vectors) -> Vector:
        """Return the rows' norms; 1 for zero."""
        norms = np.sqrt(np.diag(self.exchange.gram(rows, rows)))
        return np.where(norms > 0, norms, 1.0)

    def apply_inverse(self, z: Held) -> Held:
        """Return H⁻¹ z by the two loops of limited-memory BFGS, over blocks (Nocedal 1980)."""
        blocks, q, coefficients = self.from_steps.blocks + self.from_probes.blocks, z, []
        for block in reversed(blocks):
            a = self.exchange.gram(block.directions, q[None, :])[:, 0] / block.curvatures
            coefficients.append(a)
            q = q - to_device(a, q) @ block.products
        q = self.scale() * q
        for block, a in zip(blocks, reversed(coefficients), strict=True):
            b = self.exchange.gram(block.products, q[None, :])[:, 0] / block.curvatures
            q = q + to_device(a - b, q) @ block.directions
        return q

    def scale(self) -> float:
        """Return γ of H⁻¹ = γ I before any secant: yᵀs/yᵀy of the last step, at first 1/(largest Ritz value)."""
        if steps := self.from_steps.blocks:
            last = steps[-1]
            return float(last.curvatures[0]) / self.exchange.dots((last.products, last.products))[0]
        probes = self.from_probes.blocks
        return 1 / float(probes[-1].curvatures.max()) if probes else 1.0
