"""Batch normalization over many processes: merging over all ranks of MPI, and a layer that does so.

All ranks first gather a few numbers that tell what each is about to merge, so that ranks that are not in step
raise instead of waiting for each other or merging what does not belong together. With few ranks the first
numbers of the vectors themselves go along.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from fastbn import _kernels, threads
from fastbn.functional import _NEEDS, batch_norm_backward_sums
from fastbn.modules import BatchNorm
from fastbn.statistics import BatchStats, GradSums

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from numpy.typing import NDArray

    from fastbn.functional import BatchNormGrads
    from fastbn.typing import Array
    from fastbn.variants import Masked

    Float64 = NDArray[np.float64]

__all__ = ["SyncBatchNorm", "all_merge"]

Part = TypeVar("Part", BatchStats, GradSums)

# What each rank tells first: what it merges, in which layer (0: none), of how many channels, whether it knows
# with how many ranks it shares CPUs.
_HEADER = 4
_FAILED, _STATS, _SUMS = range(3)
_WHAT = {_STATS: "statistics", _SUMS: "sums of the gradient"}

_FIRST = 2 + 2 * 256  # numbers of the vectors that go along with that, at most: all, of up to 256 channels
_SHORT = 80_000  # bytes from all ranks: of more, an MPI may make as many messages in a row as there are ranks
# {ranks: bytes from all of them}, up to which gathering is less work than a tree: see docs/many_machines.md
_GATHERED = {16: 1 << 20, 64: _SHORT}
_COUNT = 1 << 53  # counts are sent as two numbers below this

_layers = itertools.count(1)
_knows_sharers = False


def all_merge(parts: Part | Iterable[Part], comm: Any) -> Part:
    """Merge over all ranks what each has: the same result, to the bit, on every rank.

    To be called by all ranks of `comm`, in the same order among their calls.

    Parameters
    ----------
    parts : BatchStats or GradSums, or an iterable of one kind
        This rank's part; several are merged first, in their order. It may be empty (of count 0), but must be
        of as many channels as those of the other ranks.
    comm : mpi4py.MPI.Comm, or any object with `size` and `all_gather`
        ``all_gather(vector)`` gets a float64 vector, which is equally long on all ranks, and returns those of
        all ranks in their order, as a sequence of arrays. For PyTorch's gloo::

            class Group:
                size = torch.distributed.get_world_size()

                def all_gather(self, vector):
                    tensor = torch.from_numpy(vector)
                    rows = [torch.empty_like(tensor) for _ in range(self.size)]
                    torch.distributed.all_gather(rows, tensor)
                    return rows

    Returns
    -------
    BatchStats or GradSums
        Merged in the order of ranks; where mpi4py's ranks are many, or have much, in that of a tree of
        neighbours. With one rank, what it has.

    Raises
    ------
    ValueError
        On every rank: if ranks have other kinds of parts, or parts of another number of channels, or if one
        could not take part because of an error of its own.
    TypeError
        If `parts` or `comm` is none of these; other ranks get a ValueError where `comm` is right.
    """
    merged: Part = _Ranks(comm).merge(lambda: _one(parts), 0)
    return merged


def _one(parts: Any) -> Any:
    if isinstance(parts, (BatchStats, GradSums)):
        return parts
    listed = list(parts) if hasattr(parts, "__iter__") else [parts]
    if not listed or not isinstance(listed[0], (BatchStats, GradSums)):
        got = type(listed[0]).__name__ if listed else "no part at all"
        raise TypeError(f"parts must be a BatchStats or a GradSums, or several of one kind, got {got}")
    return listed[0].merge(*listed[1:])


class SyncBatchNorm(BatchNorm):
    """A :class:`fastbn.BatchNorm` that takes the batches of all ranks for one, in training.

    Each rank calls it with a shard of the batch: of any size, even empty. The result, the gradient and the
    running averages are those of the whole batch, and the same averages, to the bit, are on every rank. In
    evaluation, and with one rank, there is no communication.

    All ranks call the same layers in the same order, forward and backward, and create them in the same order.
    Start the program by ``mpiexec -n 4 python -m mpi4py program.py``: without ``-m mpi4py`` an error on one
    rank leaves the others waiting for it.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, **options
        Those of :class:`fastbn.BatchNorm`, but for `virtual_batch_size` and `renorm`.
    comm : mpi4py.MPI.Comm, object as in :func:`all_merge`, or None
        None for ``mpi4py.MPI.COMM_WORLD``. Copies share it, pickles leave it out.
    reduce_parameters : bool
        Whether :meth:`backward` gives the gradients of weight and bias of the whole batch, the same on every
        rank; False gives each rank those of its own shard, whose sum they are. Costs nothing.

    Raises
    ------
    ImportError
        From a call with `comm` None, if there is no mpi4py or no MPI.
    ValueError
        From a call, on every rank: if all shards together have one value per channel, if ranks are at another
        layer, in another mode or of other channels, or if one of them could not take part because of an error
        of its own, which that rank raises.

    Notes
    -----
    The first call in training finds out how many ranks run on the same CPUs, and divides the threads that
    :func:`fastbn.get_num_threads` gives among them, unless ``OMP_NUM_THREADS``, ``FASTBN_NUM_THREADS`` or
    :func:`fastbn.set_num_threads` said how many, or the ranks are bound to CPUs of their own.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        comm: Any = None,
        reduce_parameters: bool = False,
        **options: Any,
    ) -> None:
        for name in "virtual_batch_size", "renorm":
            if options.get(name) is not None:
                raise ValueError(f"a SyncBatchNorm cannot have {name}, which makes other batches of a batch")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        if comm is not None:
            _Ranks(comm)  # which checks it
        self._shared = _Shared(comm)
        self._number = next(_layers)
        self.reduce_parameters = reduce_parameters

    @property
    def comm(self) -> Any:
        """The communicator; ``mpi4py.MPI.COMM_WORLD`` unless one was given."""
        return _world() if self._shared.comm is None else self._shared.comm

    def _normalize_by_batch(
        self,
        x: Array,
        residual: Array | None,
        out: Array | None,
        num_threads: int | None,
        weight: Array | None,
        bias: Array | None,
        masked: Masked,
    ) -> Array:
        if not self.training or (ranks := _Ranks(self.comm)).size == 1:
            return super()._normalize_by_batch(x, residual, out, num_threads, weight, bias, masked)
        averages: tuple[Any, Any] = (None, None)
        options: tuple[Any, ...] = ()

        def move(mean: Float64, var: Float64, count: int) -> None:
            _kernels.update_running(*averages, mean, var, count, *options)

        def of_shard() -> BatchStats:
            nonlocal x, averages, options
            x = _kernels.elements(x, "x")
            _kernels.check_input(x, self.axis, self._ranks, self.num_features, self.dtype)
            for name, array in ("residual", residual), ("out", out):
                if array is not None and (found := _kernels.elements(array, name).shape) != x.shape:
                    raise ValueError(f"{name} must have the shape of x, {x.shape}, got {found}")
            running_mean, running_var, exact, counter, momentum = self._to_move()
            averages = running_mean, running_var
            options = (momentum, self.unbiased, exact, counter, self.skip_nonfinite)
            if averages[0] is not None:
                nothing = np.zeros(self.num_features)
                move(nothing, nothing, 0)  # but what it checks
            return BatchStats._wrap(*_kernels.stats(x, self.axis, num_threads, masked.mask))

        stats = ranks.merge(of_shard, self._number)
        if stats.count == 1:
            raise ValueError(
                "training needs more than 1 value per channel, but the shards of all ranks together have 1; "
                "pass larger ones"
            )
        y = _kernels.normalize(
            x, stats.mean, stats.var, True, weight, bias, self.eps, self.axis, residual, self.activation,
            self.negative_slope, out, num_threads, self._ranks, None, *masked, stats.count,
        )  # fmt: skip
        if averages[0] is not None:
            move(stats.mean, stats.var, stats.count)
            if self.skip_nonfinite and not self._said_nonfinite:
                self._tell_nonfinite(stats.var)
        self._saved[0] = (x, residual, out, stats, None, masked)
        return y

    def backward(
        self,
        grad_output: Array,
        *,
        sums: GradSums | None = None,
        output: Array | None = None,
        needs: Collection[str] = _NEEDS,
        num_threads: int | None = None,
    ) -> BatchNormGrads:
        """Gradients of the latest call, from the gradient of its result on this rank.

        As :meth:`fastbn.BatchNorm.backward`, but that of a call in training goes through the statistics of
        the whole batch, and all ranks have to take part, with the same `needs`.

        Parameters
        ----------
        grad_output : ndarray of the shape and dtype of the call's `x`
        sums : GradSums, optional
            Those of the whole batch, if you have merged them: then there is no communication.
        output, needs, num_threads
            See :meth:`fastbn.BatchNorm.backward`.

        Returns
        -------
        named tuple of grad_input, grad_weight, grad_bias, grad_residual
            grad_weight and grad_bias as `reduce_parameters` says.

        Raises
        ------
        RuntimeError, ValueError, TypeError
            As :meth:`fastbn.BatchNorm.backward`, where other ranks raise a ValueError.
        """
        saved = self._saved[0]
        by_batch = saved is not None and saved[3] is not None and sums is None
        if not by_batch or (ranks := _Ranks(self.comm)).size == 1:
            return super().backward(
                grad_output, sums=sums, output=output, needs=needs, num_threads=num_threads
            )
        own: GradSums | None = None

        def of_shard() -> GradSums:
            nonlocal own
            x, residual, _, stats, _, masked = cast("tuple[Any, ...]", saved)
            own = batch_norm_backward_sums(
                grad_output, x, stats, self.weight, self.bias, self.eps, axis=self.axis, residual=residual,
                output=output, activation=self.activation, negative_slope=self.negative_slope,
                num_threads=num_threads, **masked._asdict(),
            )  # fmt: skip
            return own

        stats = cast("tuple[Any, ...]", saved)[3]
        total = ranks.merge(of_shard, self._number)
        grads = super().backward(grad_output, sums=total, output=output, needs=needs, num_threads=num_threads)
        if self.reduce_parameters:
            return grads
        weight, bias = cast("GradSums", own).parameter_grads(stats, self.eps, dtype=self.dtype)
        return grads._replace(
            grad_weight=None if grads.grad_weight is None else weight,
            grad_bias=None if grads.grad_bias is None else bias,
        )


class _Shared:
    """A communicator, which copies of a layer share and pickles leave out."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shared, (None,)


def _world() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter where there is no MPI library
        raise ImportError(
            f"mpi4py and an MPI library are needed, and there was: {error}; install both, such as by "
            "pip install mpi4py mpich, or pass comm="
        ) from error
    return MPI.COMM_WORLD


class _Ranks:
    """How vectors of all ranks come together."""

    size: int

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._is_mpi = not hasattr(comm, "all_gather")
        size = getattr(comm, "size", None)
        if not isinstance(size, int) or size < 1 or (self._is_mpi and not hasattr(comm, "Allgather")):
            raise TypeError(
                "comm must be a communicator of mpi4py, such as mpi4py.MPI.COMM_WORLD, or have `size` and "
                f"`all_gather`, got {comm!r}"
            )
        self.size = size

    def merge(self, make: Callable[[], Any], number: int) -> Any:
        """What all ranks make, merged. One that fails to make its own raises why, the others that it did."""
        if self.size == 1:
            return make()
        try:
            part = make()
            vector = _packed(part)
        except BaseException:
            self._tell(_FAILED, number, np.empty(0))
            raise
        kind = _STATS if isinstance(part, BatchStats) else _SUMS
        rows = self._tell(kind, number, vector)
        _check_in_step(rows[:, :_HEADER])
        self._find_sharers(rows)
        if self._is_mpi and self.size * vector.nbytes > self._most_gathered():
            return _unpacked(self._reduced(vector, type(part)), type(part))
        rows = rows[:, _HEADER:]
        rest = vector[rows.shape[1] :]
        if rest.size:
            rows = np.concatenate([rows, self._gather(rest)], axis=1)
        first, *others = [_unpacked(row[: vector.size], type(part)) for row in rows]
        return first.merge(*others)

    def _tell(self, kind: int, number: int, vector: Float64) -> Float64:
        """Header and first numbers of all ranks, whose length does not depend on what they are of.

        Of many ranks that all have the same header it is once for all.
        """
        row = np.zeros(_HEADER + self._along())
        row[:_HEADER] = kind, number, vector.size // 2 - 1, _knows_sharers
        along = vector[: row.size - _HEADER]
        row[_HEADER : _HEADER + along.size] = along
        if self._is_mpi and not self._most_gathered() and self._all_have(row):
            return row[None]
        return self._gather(row)

    def _all_have(self, row: Float64) -> bool:
        """Whether the rows of all ranks are this one, which is told in fewer messages than what they are."""
        from mpi4py import MPI

        ends = np.concatenate([row, -row])
        found = np.empty_like(ends)
        self._comm.Allreduce(ends, found, MPI.MAX)
        return np.array_equal(found, ends)

    def _along(self) -> int:
        return min(_FIRST, _SHORT // (8 * self.size) - _HEADER) if self._most_gathered() else 0

    def _most_gathered(self) -> int:
        return next((most for ranks, most in _GATHERED.items() if self.size <= ranks), 0)

    def _gather(self, vector: Float64) -> Float64:
        rows = np.empty((self.size, vector.size))
        if self._is_mpi:
            self._comm.Allgather(np.ascontiguousarray(vector), rows)
            return rows
        found = self._comm.all_gather(np.array(vector))
        if len(found) != self.size or any(len(row) != vector.size for row in found):
            raise ValueError(
                f"all_gather of comm must return the vectors of {self.size} ranks, {vector.size} long, "
                f"got such of {[len(row) for row in found]}"
            )
        for row, values in zip(rows, found, strict=True):
            row[...] = values
        return rows

    def _reduced(self, vector: Float64, kind: type[Part]) -> Float64:
        """All ranks' vectors merged along MPI's tree, on rank 0, and from there to all."""
        from mpi4py import MPI

        def merge(a: Any, b: Any, datatype: Any) -> None:
            lower, upper = np.frombuffer(a), np.frombuffer(b)
            upper[...] = _packed(_unpacked(lower, kind).merge(_unpacked(upper.copy(), kind)))

        whole = MPI.DOUBLE.Create_contiguous(vector.size).Commit()  # which no MPI takes apart
        operation = MPI.Op.Create(merge, commute=False)
        try:
            merged = np.empty_like(vector)
            self._comm.Reduce([vector, 1, whole], [merged, 1, whole], operation, 0)
            self._comm.Bcast(merged, 0)
            return merged
        finally:
            operation.Free()
            whole.Free()

    def _find_sharers(self, rows: Float64) -> None:
        """With how many ranks this one shares its CPUs; all ranks together, until all of them know."""
        global _knows_sharers
        if not self._is_mpi or rows[:, _HEADER - 1].all():
            return
        from mpi4py import MPI

        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        sharers = node.allgather(cpus).count(cpus)
        node.Free()
        if not _knows_sharers:
            _knows_sharers = True
            threads.share_cpus(sharers)


def _check_in_step(headers: Float64) -> None:
    failed = [rank for rank, kind in enumerate(headers[:, 0]) if kind == _FAILED]
    if failed:
        ranks = ", ".join(map(str, failed))
        raise ValueError(f"rank {ranks} could not take part, because of an error that it raises itself")
    places: dict[tuple[int, ...], list[int]] = {}
    for rank, header in enumerate(headers[:, : _HEADER - 1].astype(int).tolist()):
        places.setdefault(tuple(header), []).append(rank)
    if len(places) == 1:
        return
    told = [
        f"rank {', '.join(map(str, ranks))}: {_WHAT[kind]} of {channels} channels"
        + (f", in layer {number}" if number else "")
        for (kind, number, channels), ranks in places.items()
    ]
    raise ValueError(
        f"ranks are not in step ({'; '.join(told)}); all have to call the same layers, in the same order and "
        "mode. Layers are numbered as they are created"
    )


def _packed(part: BatchStats | GradSums) -> Float64:
    """The count, as two numbers, and both vectors."""
    vectors = (part.mean, part.var) if isinstance(part, BatchStats) else (part.dz, part.dz_dev)
    count = divmod(part.count, _COUNT)
    if count[0] >= _COUNT:
        raise ValueError(f"count must be below {_COUNT**2} to be merged over ranks, got {part.count}")
    return np.concatenate([count, *vectors])


def _unpacked(vector: Float64, kind: type[Part]) -> Part:
    vector.setflags(write=False)
    count = int(vector[0]) * _COUNT + int(vector[1])
    first, second = np.split(vector[2:], 2)
    return kind._wrap(first, second, count)
