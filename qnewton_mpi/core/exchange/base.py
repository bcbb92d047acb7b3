"""What every exchange has, and what those have in common."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array, Columns, Held, Matrix, Rows, Vector, Vectors, Whole, to_device, to_host
from qnewton_mpi.core.exchange.cost import WORD, Network, Traffic
from qnewton_mpi.core.kernels import blockwise_products, double_products, inner
from qnewton_mpi.core.state import Kind
from qnewton_mpi.parallel import partition
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.transport import Transport


class Exchange(ABC):
    """Moves rows (this rank's replicas, all coordinates) to columns (all replicas, held coordinates) and back.

    All methods are collective but for `divide`, `hold` and `summed`. The arrays that `mean`, `columns`, `rows` and
    `collect` return may be used again by the next call of the same method.

    Parameters
    ----------
    communicator : Communicator
    replicas : int
        M, over all ranks; rank r holds share r of `partition.bounds(M, ranks)`, so that M need not be a multiple.
    size : int
        N, the number of parameters.
    transport : Transport, optional
        How vectors cross the network; by default through host memory.

    Attributes
    ----------
    local : range
        The global indices of this rank's replicas.
    held : slice
        The coordinates that this rank holds.
    bytes_sent : int
        By all ranks together, so far: what each collective must move at least, 2B(n−1) for an Allreduce of B bytes over
        n ranks (bandwidth-optimal algorithm), otherwise what is not yet where it has to be.
    bytes_sent_by_replicas : int
        The same if every replica were on a rank of its own, n = M.

    Examples
    --------
    On one rank, whose rows are the replicas of all:

    >>> import numpy as np
    >>> from qnewton_mpi.core.exchange import SlicedExchange
    >>> exchange = SlicedExchange(Communicator(), replicas=2, size=3)
    >>> rows = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    >>> exchange.held, exchange.mean(rows).tolist()
    (slice(0, 3, None), [2.0, 2.0, 2.0])
    >>> mean, G = exchange.centred(rows)
    >>> exchange.gram(G, G).tolist()
    [[2.0, -2.0], [-2.0, 2.0]]
    """

    name: ClassVar[str]
    held: slice
    state: ClassVar = {"bytes_sent": Kind.SHARED, "bytes_sent_by_replicas": Kind.SHARED}

    def __init__(
        self, communicator: Communicator, replicas: int, size: int, transport: Transport | None = None
    ) -> None:
        self.communicator = communicator
        self.transport = transport or Transport(communicator)
        self.replicas = replicas
        self.size = size
        limits = partition.bounds(replicas, communicator.size)
        self.counts = [last - first for first, last in itertools.pairwise(limits)]
        self.local = range(limits[communicator.rank], limits[communicator.rank + 1])
        self.bytes_sent = 0
        self.bytes_sent_by_replicas = 0
        self._buffers: dict[str, Array] = {}
        self.divide(())

    @abstractmethod
    def divide(self, pieces: Sequence[int]) -> None:
        """Settle which coordinates each rank holds, of pieces of the given lengths none in part; () if any may be cut.

        To be called before anything is held.
        """

    @abstractmethod
    def mean(self, rows: Rows) -> Held:
        """Return the mean of all M rows, (held,)."""

    @abstractmethod
    def columns(self, rows: Rows) -> Columns:
        """Return all replicas' rows, (M, held), in the order of the replicas."""

    @abstractmethod
    def rows(self, columns: Columns) -> Rows:
        """Return this rank's replicas of columns (M, held) with all coordinates, (R, N)."""

    def hold(self, vector: Whole) -> Held:
        """Return a copy of the held part of a vector (N,) that every rank has."""
        return array_namespace(vector).asarray(vector[self.held], copy=True)

    @abstractmethod
    def collect(self, vector: Held, buffer: str = "whole") -> Whole:
        """Return the whole (N,) of a held vector, bitwise the same on every rank where the held parts are.

        It stays what it is until the next call with the same name of a buffer.
        """

    @abstractmethod
    def summed(self) -> slice:
        """Return the held coordinates whose products this rank adds: over the ranks, each of the N once."""

    @property
    def whole(self) -> slice:
        """All N coordinates, as a span."""
        return slice(0, self.size)

    @property
    def first(self) -> bool:
        """Whether no rank before this one holds the same coordinates."""
        return True

    def combined(self, rows: Rows, coefficients: Matrix) -> tuple[Held, Vectors]:
        """Return the mean z̄ (held,) and the combinations Σ_i c_ki z_i (K, held), by the fewer words.

        Parameters
        ----------
        rows : (R, N)
        coefficients : (K, M) host array
            Rows that add up to zero.
        """
        weights = np.concatenate([np.full((1, self.replicas), 1 / self.replicas), coefficients])
        if self.fewer_as_columns(self.communicator.size, self.replicas, len(coefficients)):
            sums = to_device(weights, rows) @ self.columns(rows)
            return array_namespace(sums).asarray(sums[0, :], copy=True), sums[1:, :]  # ḡ outlives the others
        sums = self.added_up(to_device(weights[:, self.local.start : self.local.stop], rows) @ rows)
        return sums[0, :], sums[1:, :]

    @classmethod
    @abstractmethod
    def fewer_as_columns(cls, ranks: int, replicas: int, combinations: int) -> bool:
        """Tell whether all replicas' columns are fewer words than sums of the mean and so many combinations. Local."""

    @abstractmethod
    def added_up(self, vectors: Array) -> Array:
        """Return the sums (k, held) over the ranks of vectors (k, N). Counted are the fewer words."""

    @classmethod
    def seconds(cls, network: Network, traffic: Traffic, ranks: int, replicas: int, parameters: int) -> float:
        """Return the predicted seconds of communication in a step: n ranks, M replicas, N parameters, float32. Local.

        That is small messages, twice, for losses and scalar products; the means; the columns or what takes their place;
        and the way back.
        """
        if ranks == 1:
            return 0.0
        size, k = WORD * parameters, traffic.combinations
        columns = cls.columns_seconds(network, ranks, replicas * size)
        one = (
            columns
            if k is None or cls.fewer_as_columns(ranks, replicas, k)
            else cls.sum_seconds(network, ranks, (k + 1) * size)
        )
        there = traffic.means * cls.sum_seconds(network, ranks, size) + traffic.columns * one
        return 2 * network.allgather(ranks, 0) + there + cls.back_seconds(network, ranks, size, traffic.rows * columns)

    @staticmethod
    @abstractmethod
    def columns_seconds(network: Network, ranks: int, size: float) -> float:
        """Return the seconds in which all replicas' columns, of this many bytes, come to where they are held. Local."""

    @staticmethod
    @abstractmethod
    def sum_seconds(network: Network, ranks: int, size: float) -> float:
        """Return the seconds in which vectors of this many bytes are added up to where they are held. Local."""

    @staticmethod
    @abstractmethod
    def back_seconds(network: Network, ranks: int, size: float, rows: float) -> float:
        """Return the seconds of the new parameters' way back, given those of columns to their replicas. Local."""

    def gathered(self, values: Vector) -> Matrix:
        """Return each rank's values (k,), (n, k), the same on all ranks; zero where a rank before it holds the same."""
        return self._everyone((values if self.first else np.zeros_like(values))[None])

    def centred(self, rows: Rows) -> tuple[Held, Columns]:
        """Return the mean z̄ (held,) and the centred columns [z_i − z̄], (M, held)."""
        columns = self.columns(rows)
        mean = array_namespace(columns).mean(columns, axis=0)
        columns -= mean
        return mean, columns

    def gram(self, a: Vectors, b: Annotated[Array, "q held"], precise: bool = True) -> Matrix:
        """Return A Bᵀ for held columns a (p, held) and b (q, held): (p, q), host float64, bitwise equal on all ranks.

        Each rank multiplies its coordinates in float64; the partial products are all-gathered and added in rank order,
        which an Allreduce does not promise.

        Parameters
        ----------
        a, b : array
        precise : bool, optional
            False: blocks of 2¹⁴ coordinates are multiplied in the arrays' precision and only their products added in
            float64. With float32 they are off by about 10⁻⁷ ‖a‖ ‖b‖, in less than half of the time.
        """
        part = self.summed()
        left = a[:, part]
        right = left if a is b else b[:, part]
        partial = (double_products if precise else blockwise_products)(left, right)
        return self._added(to_host(partial)[None])

    def dots(self, *pairs: tuple[Array, Array]) -> list[float]:
        """Return Σ x·y over all coordinates (and columns) of each pair of held arrays, the same on all ranks."""
        return [float(sums[0]) for sums in self.dots_of_parts(*((x, y, [self.whole]) for x, y in pairs))]

    def dots_of_parts(self, *products: tuple[Array, Array, Sequence[slice]]) -> list[Vector]:
        """Return for each x, y, spans the Σ x·y over the coordinates of each span (and columns), (spans,).

        All cross the network at once.
        """
        part, first = self.summed(), self.held.start

        def own(span: slice) -> slice:
            return slice(max(part.start, span.start - first), max(part.start, min(part.stop, span.stop - first)))

        # One array of all sums, so that a GPU is waited for once.
        sums = [inner(x[..., own(span)], y[..., own(span)]) for x, y, spans in products for span in spans]
        everyone = self._added(to_host(array_namespace(products[0][0]).stack(sums))[None])
        return np.split(everyone, np.cumsum([len(spans) for *_, spans in products])[:-1])

    def share(self, numbers: Matrix, note: NDArray[np.int64], step: int) -> tuple[Matrix, NDArray[np.int64]]:
        """Return every replica's numbers, (M, p), from this rank's (R, p), and every rank's note, (n, k).

        Here a rank may wait for another that is late, or has left (`Communicator.meet`).
        """
        width, words = numbers.shape[1], len(note)
        self._count(lambda n: (n - 1) * (8 * width * self.replicas + n * note.nbytes))
        counts = [words + count * width for count in self.counts]
        own = np.concatenate([note.view(np.float64), numbers.reshape(-1)])
        parts = np.split(self.communicator.meet(own, counts, f"step {step}"), np.cumsum(counts)[:-1])
        everyone = np.concatenate([part[words:] for part in parts]).reshape(-1, width)
        return everyone, np.stack([part[:words] for part in parts]).view(np.int64)

    def _sum(self, rows: Array) -> Array:
        """Return the sum of this rank's rows, (N,)."""
        return rows[0, :] if rows.shape[0] == 1 else array_namespace(rows).sum(rows, axis=0)

    def _divided(self, total: Array) -> Array:
        """Return the mean of the M replicas from their sum, in its place."""
        total /= self.replicas
        return total

    def _buffer(self, name: str, shape: tuple[int, ...], like: Array) -> Array:
        """Return the array of a name, the same at each call. A new one would cost a page fault every 4 KiB."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape or buffer.dtype != like.dtype:
            xp = array_namespace(like)
            buffer = self._buffers[name] = xp.empty(shape, dtype=like.dtype, device=device(like))
        return buffer

    def _row_bytes(self, like: Array) -> int:
        return int(self.size * array_namespace(like).finfo(like.dtype).bits // 8)

    def _count(self, sent: Callable[[int], float]) -> None:
        """Count a collective that makes n ranks together send sent(n) bytes."""
        self.bytes_sent += round(sent(self.communicator.size))
        self.bytes_sent_by_replicas += round(sent(self.replicas))

    def _everyone(self, own: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the ranks' arrays (1, …) in rank order, (n, …)."""
        self._count(lambda n: n * (n - 1) * own.nbytes)
        return self.communicator.allgather(own, [1] * self.communicator.size)

    def _added(self, partial: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of the ranks' arrays (1, …) in rank order, without the first axis."""
        return self._everyone(partial).sum(axis=0)  # type: ignore[no-any-return]
