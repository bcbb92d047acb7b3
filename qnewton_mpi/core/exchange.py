"""How the replicas' columns reach the ranks that combine them. MPI, no mathematics.

Every rank evaluates R gradients, the rows of an array (R, N). The optimizers' algebra runs on what a rank *holds*: a
range of the N coordinates, of every replica's column and of every vector. An exchange decides which range that is, and
moves data between the two layouts; the algebra is the same for all of them.

============  =======================  ========================================================================
exchange      held by a rank           words received per rank: the mean and the new parameters / all columns
============  =======================  ========================================================================
`allgather`   everything               2N(n−1)/n, an Allreduce / (M−R)N
`sliced`      N/n of the coordinates   2N(n−1)/n, a Reduce_scatter and an Allgather / (M−R)N/n, an Alltoall
`server`      everything on rank 0,    rank 0: (n−1)N, others N; Reduce and Broadcast / rank 0: (M−R)N
              nothing elsewhere
============  =======================  ========================================================================

Where the columns have crossed, the mean is taken from them instead. K combinations of the columns,
where those will do, cross as K + 1 means, the mean among them, or as columns, whichever are fewer words.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from qnewton_mpi.core.kernels import blockwise_products, double_products, inner
from qnewton_mpi.core.secants import Matrix
from qnewton_mpi.core.state import Kind
from qnewton_mpi.parallel import partition
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.device import Array, to_device, to_host
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
    def mean(self, rows: Array) -> Array:
        """Return the mean of all M rows, (held,)."""

    @abstractmethod
    def columns(self, rows: Array) -> Array:
        """Return all replicas' rows, (M, held), in the order of the replicas."""

    @abstractmethod
    def rows(self, columns: Array) -> Array:
        """Return this rank's replicas of columns (M, held) with all coordinates, (R, N)."""

    def hold(self, vector: Array) -> Array:
        """Return a copy of the held part of a vector (N,) that every rank has."""
        return array_namespace(vector).asarray(vector[self.held], copy=True)

    @abstractmethod
    def collect(self, vector: Array, buffer: str = "whole") -> Array:
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

    def combined(self, rows: Array, coefficients: Matrix) -> tuple[Array, Array]:
        """Return the mean z̄ (held,) and the combinations Σ_i c_ki z_i (K, held), by the fewer words.

        Parameters
        ----------
        rows : (R, N)
        coefficients : (K, M) host array
            Rows that add up to zero.
        """
        if self.fewer_as_columns(len(coefficients)):
            mean, columns = self.centred(rows)
            return mean, to_device(coefficients, columns) @ columns
        weights = np.concatenate([np.full((1, self.replicas), 1 / self.replicas), coefficients])
        sums = self.added_up(to_device(weights[:, self.local.start : self.local.stop], rows) @ rows)
        return sums[0, :], sums[1:, :]

    @abstractmethod
    def fewer_as_columns(self, combinations: int) -> bool:
        """Tell whether all replicas' columns are fewer words than sums of the mean and so many combinations."""

    @abstractmethod
    def added_up(self, vectors: Array) -> Array:
        """Return the sums (k, held) over the ranks of vectors (k, N). Counted are the fewer words."""

    def gathered(self, values: Matrix) -> Matrix:
        """Return each rank's values (k,), (n, k), the same on all ranks; zero where a rank before it holds the same."""
        return self._everyone((values if self.first else np.zeros_like(values))[None])

    def centred(self, rows: Array) -> tuple[Array, Array]:
        """Return the mean z̄ (held,) and the centred columns [z_i − z̄], (M, held)."""
        columns = self.columns(rows)
        mean = array_namespace(columns).mean(columns, axis=0)
        columns -= mean
        return mean, columns

    def gram(self, a: Array, b: Array, precise: bool = True) -> Matrix:
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

    def dots_of_parts(self, *products: tuple[Array, Array, Sequence[slice]]) -> list[Matrix]:
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

    def share(self, figures: Matrix, note: NDArray[np.int64], step: int) -> tuple[Matrix, NDArray[np.int64]]:
        """Return every replica's row of figures, (M, p), from this rank's (R, p), and every rank's note, (n, k).

        Here a rank may wait for another that is late, or has left (`Communicator.meet`).
        """
        width, words = figures.shape[1], len(note)
        self._count(lambda n: (n - 1) * (8 * width * self.replicas + n * note.nbytes))
        counts = [words + count * width for count in self.counts]
        numbers = np.concatenate([note.view(np.float64), figures.reshape(-1)])
        parts = np.split(self.communicator.meet(numbers, counts, f"step {step}"), np.cumsum(counts)[:-1])
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

    def _everyone(self, own: Matrix) -> Matrix:
        """Return the ranks' arrays (1, …) in rank order, (n, …)."""
        self._count(lambda n: n * (n - 1) * own.nbytes)
        return self.communicator.allgather(own, [1] * self.communicator.size)

    def _added(self, partial: Matrix) -> Matrix:
        """Return the sum of the ranks' arrays (1, …) in rank order, without the first axis."""
        return self._everyone(partial).sum(axis=0)  # type: ignore[no-any-return]


class AllgatherExchange(Exchange):
    """Every rank holds everything: means by Allreduce, columns by Allgather. No server, no state that differs."""

    name = "allgather"

    def divide(self, pieces: Sequence[int]) -> None:
        self.held = slice(0, self.size)

    def mean(self, rows: Array) -> Array:
        self._count(lambda n: 2 * (n - 1) * self._row_bytes(rows))
        mean = self._buffer("mean", (self.size,), rows)
        return self._divided(self.transport.allreduce(self._sum(rows), mean))

    def combined(self, rows: Array, coefficients: Matrix) -> tuple[Array, Array]:
        found = super().combined(rows, coefficients)
        self._buffers.pop("columns", None)  # as large as all gradients together, and needed at few steps
        return found

    def fewer_as_columns(self, combinations: int) -> bool:
        return self.communicator.size > 1 and self.replicas <= 2 * (combinations + 1)

    def added_up(self, vectors: Array) -> Array:
        self._count(lambda n: (n - 1) * min(2 * vectors.shape[0], self.replicas) * self._row_bytes(vectors))
        return self.transport.allreduce(vectors, self._buffer("sums", vectors.shape, vectors))

    def columns(self, rows: Array) -> Array:
        self._count(lambda n: (n - 1) * self.replicas * self._row_bytes(rows))
        everyone = self._buffer("columns", (self.replicas, self.size), rows)
        return self.transport.allgather(rows, self.counts, everyone)

    def rows(self, columns: Array) -> Array:
        return columns[self.local.start : self.local.stop, :]

    def collect(self, vector: Array, buffer: str = "whole") -> Array:
        return vector

    @property
    def first(self) -> bool:
        return self.communicator.rank == 0

    def summed(self) -> slice:
        return partition.share(self.size, self.communicator.size, self.communicator.rank)


class SlicedExchange(Exchange):
    """Each rank holds a slice of the coordinates: of all columns, and of all state.

    Columns come by Alltoall, means by Reduce_scatter, the new parameters go out by Allgather. So a step receives what
    one Allreduce does, and the state of the optimizers is N/n numbers where it is N elsewhere.
    """

    name = "sliced"

    def divide(self, pieces: Sequence[int]) -> None:
        self.bounds = self._bounds(pieces)
        self.words = [last - first for first, last in itertools.pairwise(self.bounds)]
        rank = self.communicator.rank
        self.held = slice(self.bounds[rank], self.bounds[rank + 1])

    def _bounds(self, pieces: Sequence[int]) -> list[int]:
        """Return where the ranks' slices begin and end: at the bounds of pieces, if there are any."""
        ranks = self.communicator.size
        return partition.bounds_of_pieces(pieces, ranks) if pieces else partition.bounds(self.size, ranks)

    def mean(self, rows: Array) -> Array:
        self._count(lambda n: (n - 1) * self._row_bytes(rows))
        mean = self._buffer("mean", (self.words[self.communicator.rank],), rows)
        return self._divided(self.transport.reduce_scatter(self._sum(rows), self.words, mean))

    def fewer_as_columns(self, combinations: int) -> bool:
        return self.replicas <= self.communicator.size * (combinations + 1)

    def added_up(self, vectors: Array) -> Array:
        number = vectors.shape[0]
        self._count(lambda n: (n - 1) * min(number, self.replicas / n) * self._row_bytes(vectors))
        sums = self._buffer("sums", (number, self.words[self.communicator.rank]), vectors)
        counts = [number * words for words in self.words]
        return self.transport.reduce_scatter(self._pack(vectors), counts, sums)

    def columns(self, rows: Array) -> Array:
        own, mine = len(self.local), self.words[self.communicator.rank]
        send = self._pack(rows)
        columns = self._buffer("columns", (self.replicas, mine), rows)
        self._count(lambda n: (n - 1) / n * self.replicas * self._row_bytes(rows))
        self.transport.alltoall(
            send, [own * words for words in self.words], columns, [mine * count for count in self.counts]
        )
        return columns

    def rows(self, columns: Array) -> Array:
        own, mine = len(self.local), self.words[self.communicator.rank]
        slices = self._buffer("slices", (own * self.size,), columns)
        self._count(lambda n: (n - 1) / n * self.replicas * self._row_bytes(columns))
        self.transport.alltoall(
            columns, [mine * count for count in self.counts], slices, [own * words for words in self.words]
        )
        return self._unpack(slices)

    def collect(self, vector: Array, buffer: str = "whole") -> Array:
        self._count(lambda n: (n - 1) * self._row_bytes(vector))
        whole = self._buffer(buffer, (self.size,), vector)
        return self.transport.allgather(vector, self.words, whole)

    def summed(self) -> slice:
        return slice(0, self.words[self.communicator.rank])

    def _pack(self, rows: Array) -> Array:
        """Return rows (k, N) as the slices of each rank one after the other, (k · N,); a single row is that already."""
        own, reshape = rows.shape[0], array_namespace(rows).reshape
        if own == 1:
            return rows[0, :]
        slices = self._buffer("slices", (own * self.size,), rows)
        for first, last in itertools.pairwise(self.bounds):
            slices[own * first : own * last] = reshape(rows[:, first:last], (-1,))
        return slices

    def _unpack(self, slices: Array) -> Array:
        """Return the rows (R, N) of what `_pack` returns."""
        own, reshape = len(self.local), array_namespace(slices).reshape
        if own == 1:
            return slices[None, :]
        rows = self._buffer("rows", (own, self.size), slices)
        for first, last in itertools.pairwise(self.bounds):
            rows[:, first:last] = reshape(slices[own * first : own * last], (own, last - first))
        return rows


class ServerExchange(SlicedExchange):
    """Rank 0 holds everything and sends back the result: the parameter-server layout, as a baseline only."""

    name = "server"

    def _bounds(self, pieces: Sequence[int]) -> list[int]:
        return [0] + [self.size] * self.communicator.size


EXCHANGES: dict[str, type[Exchange]] = {kind.name: kind for kind in (AllgatherExchange, SlicedExchange, ServerExchange)}
