"""recalibrate: the running averages of layers become the exact statistics of a whole data set."""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from fastbn import _kernels
from fastbn.modules import BatchNorm
from fastbn.stand_ins import standing_in
from fastbn.statistics import BatchStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from fastbn.typing import Array
    from fastbn.variants import Masked

    Float64 = NDArray[np.float64]
    Model = Callable[[Any], Any]


@overload
def recalibrate(
    layer_or_callable: BatchNorm, batches: Iterable[Any], *, method: str = ..., progress: bool = ...
) -> BatchStats: ...
@overload
def recalibrate(
    layer_or_callable: Model | Sequence[Model],
    batches: Iterable[Any],
    *,
    method: str = ...,
    progress: bool = ...,
) -> dict[BatchNorm, BatchStats]: ...
def recalibrate(
    layer_or_callable: BatchNorm | Model | Sequence[Model],
    batches: Iterable[Any],
    *,
    method: str = "one_pass",
    progress: bool = False,
) -> BatchStats | dict[BatchNorm, BatchStats]:
    """Replace running averages by the statistics of all batches together.

    Statistics are pooled over batches as :meth:`BatchStats.merge` does, so that neither their order nor their
    sizes matter. Only one batch is in memory at a time.

    Parameters
    ----------
    layer_or_callable : BatchNorm, callable, or sequence of callables
        One layer, whose inputs the batches are; a function or object that is called with a batch and calls
        layers on its way; or a list of layers and functions, each called with what the one before returned.
        Layers are found by being called, in the thread that calls this function; whatever the mode they are
        in. What else depends on a mode, such as dropout, has to be in evaluation. Frozen layers stay as they
        are, and so do layers without running averages, and layers that are not called.
    batches : iterable
        Of what the first argument takes: float32 arrays for a layer. Sizes may differ, and empty batches do
        not count. A generator will do for ``method="one_pass"``.
    method : {"one_pass", "sequential"}
        How a layer normalizes meanwhile; a layer on its own does not need to.

        "one_pass": by the statistics of each batch, as in training. Exact for layers that no other batch norm
        stands before. For the others it is not, because they see what is normalized by batch: their
        statistics are off by some percent with shuffled batches, and were by up to 3.4 times with batches
        sorted by class.

        "sequential": layer after layer, in the order of their first calls, those before by their new
        averages. Exact for all, for as many passes over the batches as there are layers; all but the first
        go only as far as the layer in question, by an exception that is no :class:`Exception`. A layer that
        is called again behind another one cannot be exact: there its passes go all the way, and the layers
        between normalize by batch.
    progress : bool
        Show a bar for each pass, if tqdm is installed.

    Returns
    -------
    BatchStats, or dict of BatchNorm to BatchStats
        What the averages were replaced by; for a callable of each layer, in the order of their first calls.
        Calls of one layer, however many, are pooled.

    Raises
    ------
    TypeError
        If one of the arguments is of another kind, or a batch is not what the layer takes.
    ValueError
        If there is no value or only one per channel, no layer was called, an array to be written is
        read-only, or "sequential" is to go over a generator, which can be gone over once only.

    Notes
    -----
    Running averages, and counters, which become the number of batches that had values for the layer, are
    written when all is done. Until then, and after an exception, layers are as they were. `unbiased` and
    `skip_nonfinite` of a layer mean what they mean in training.

    A batch with one value per channel is normalized by what is pooled so far.
    """
    if isinstance(batches, np.ndarray):
        raise TypeError(
            "batches must be an iterable of batches, got one array; pass [x] if it is one batch, or "
            "numpy.array_split(x, k) to cut it"
        )
    if method not in ("one_pass", "sequential"):
        raise ValueError(f'method must be "one_pass" or "sequential", got {method!r}')
    if isinstance(layer_or_callable, BatchNorm):
        if not layer_or_callable._has_averages():
            raise ValueError(
                "recalibrate() needs running averages, and track_running_stats=False keeps none; "
                "batch_stats() and BatchStats.merge() give statistics alone"
            )
        first = _Pass(layer_or_callable, target=layer_or_callable)
    else:
        if method == "sequential" and isinstance(batches, Iterator):
            raise ValueError(
                f'method="sequential" goes over the batches once for each layer, but a '
                f"{type(batches).__name__} can be gone over only once; pass a list, or an object whose "
                f'iter() begins anew, or take method="one_pass"'
            )
        first = _Pass(_as_callable(layer_or_callable))
    pools = first.over(batches, progress, "statistics")
    if not pools:
        raise ValueError(
            "there are no values to take statistics of: pass batches that are not empty, and a layer, or a "
            "callable that calls layers with running averages, not frozen ones, in this thread"
        )
    if method == "sequential":
        pools = _one_by_one(first.model, pools, batches, progress)
    _write(pools)
    results = {layer: pool.total() for layer, pool in pools.items()}
    return results[layer_or_callable] if isinstance(layer_or_callable, BatchNorm) else results


def _as_callable(given: Model | Sequence[Model]) -> Model:
    chain: Sequence[Any] = given if isinstance(given, (list, tuple)) else [given]
    for link in chain:
        if not callable(link):
            raise TypeError(
                f"layer_or_callable must be a BatchNorm, a callable, or a list of these, "
                f"got {type(link).__name__}"
            )

    def run(batch: Any) -> None:
        for link in chain:
            batch = link(batch)

    return run


def _shown(batches: Iterable[Any], progress: bool, description: str) -> Iterable[Any]:
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            return tqdm(batches, desc=description, unit="batch")  # type: ignore[no-any-return]
    return batches


class _Pool:
    """The statistics of a layer's inputs, so far."""

    FAN_IN = 16  # of the tree by which they are merged, so that a million batches are rounded five times

    def __init__(self, layer: BatchNorm) -> None:
        _check_writable(layer)  # now, not after hours
        self.parts: list[BatchStats] = []
        self.calls = 0
        self.batches = 0
        self.latest = -1  # number of a batch

    def add(self, stats: BatchStats, batch: int) -> None:
        if stats.count:
            self.calls += 1
            self.batches += batch != self.latest
            self.latest = batch
            self.parts.append(stats)
            merges = self.calls
            while merges % self.FAN_IN == 0:
                self.parts[-self.FAN_IN :] = [_merged(self.parts[-self.FAN_IN :])]
                merges //= self.FAN_IN

    def total(self) -> BatchStats:
        return _merged(self.parts)


def _check_writable(layer: BatchNorm) -> None:
    for name in "running_mean", "running_var", "num_batches_tracked":
        array = getattr(layer, name)
        if array is not None and not array.flags.writeable:
            raise ValueError(f"{name} of the layer is read-only; give the layer a writable copy first")


def _merged(parts: list[BatchStats]) -> BatchStats:
    return parts[0].merge(*parts[1:])


class _Averages(NamedTuple):
    """What statistics are in a layer."""

    mean: Array
    var: Array
    exact: tuple[Float64, Float64]


class _Reached(BaseException):
    """Ends a forward pass behind the layer in question; no Exception, which a model may catch."""


class _Pass:
    """One pass of a model over the batches, standing in for the layers that it calls."""

    def __init__(
        self,
        model: Model,
        settled: dict[BatchNorm, _Averages] | None = None,
        target: BatchNorm | None = None,
    ) -> None:
        self.model = model
        self.settled = {} if settled is None else settled  # layers that evaluate
        self.target = target  # behind which a batch needs to go no further
        self.thread = get_ident()
        self.pools: dict[BatchNorm, _Pool] = {}
        self.batch = 0  # its number

    def over(self, batches: Iterable[Any], progress: bool, description: str) -> dict[BatchNorm, _Pool]:
        """Pools of the layers that got values and are not settled, in the order of their first calls."""
        for batch in _shown(batches, progress, description):
            # Only while the model runs: what makes the batches may call layers, too.
            with standing_in(self.call), suppress(_Reached):
                self.model(batch)
            self.batch += 1
            del batch  # before the next one is made
        return {layer: pool for layer, pool in self.pools.items() if pool.calls}

    def call(
        self,
        layer: BatchNorm,
        x: Array,
        residual: Array | None,
        out: Array | None,
        num_threads: int | None,
        masked: Masked,
    ) -> Array | None:
        if get_ident() != self.thread or not layer._has_averages():
            return None
        averages = self.settled.get(layer)
        if averages is not None:
            return _normalize(layer, averages, x, residual, out, num_threads, masked)
        x = _kernels.elements(x, "x")
        _kernels.check_input(x, layer.axis, layer._ranks, layer.num_features, layer.dtype)
        pool = self.pools.get(layer)
        if pool is None:
            pool = self.pools[layer] = _Pool(layer)
        stats = BatchStats._wrap(*_kernels.stats(x, layer.axis, num_threads, masked.mask))
        pool.add(stats, self.batch)
        if layer is self.target:
            raise _Reached
        by = pool.total() if stats.count == 1 else stats
        return _normalize(layer, by, x, residual, out, num_threads, masked)


def _normalize(
    layer: BatchNorm,
    by: BatchStats | _Averages,
    x: Array,
    residual: Array | None,
    out: Array | None,
    num_threads: int | None,
    masked: Masked,
) -> Array:
    """As the layer does in training by the statistics of a batch, in evaluation by averages."""
    return _kernels.normalize(
        x, by.mean, by.var, isinstance(by, BatchStats), layer.weight, layer.bias, layer.eps, layer.axis,
        residual, layer.activation, layer.negative_slope, out, num_threads, layer._ranks,
        by.exact if isinstance(by, _Averages) and layer.dtype == np.float32 else None, *masked,
        by.count if isinstance(by, BatchStats) else None, layer.dtype,
    )  # fmt: skip


def _one_by_one(
    model: Model, first: dict[BatchNorm, _Pool], batches: Iterable[Any], progress: bool
) -> dict[BatchNorm, _Pool]:
    """The layers of a first pass, in their order, each with all before it settled."""
    pools: dict[BatchNorm, _Pool] = {}
    settled: dict[BatchNorm, _Averages] = {}
    for layer, pool in first.items():
        if settled:
            # With several calls a batch, it is not known which is the last one.
            target = layer if pool.calls == pool.batches else None
            description = f"layer {len(settled) + 1} of {len(first)}"
            again = _Pass(model, settled, target).over(batches, progress, description)
            if layer not in again:
                raise ValueError(
                    "batches must be the same each time they are gone over, but a layer got values in the "
                    "first pass only"
                )
            pool = again[layer]
        pools[layer] = pool
        settled[layer] = _averages_of(layer, pool.total())
    return pools


def _averages_of(layer: BatchNorm, stats: BatchStats) -> _Averages:
    """The running averages that a layer is to have after these statistics."""
    if stats.count == 1:
        raise ValueError(
            "all batches together have 1 value per channel for a layer, which has no variance; pass more"
        )
    with np.errstate(all="ignore"):  # NaN stays in its channel; beyond float32 is inf, as in training
        var = stats.var * (stats.count / (stats.count - 1) if layer.unbiased else 1.0)
        rounded = stats.mean.astype(layer.dtype), var.astype(layer.dtype)
    exact = stats.mean.copy(), var
    if layer.skip_nonfinite:
        kept = ~(np.isfinite(rounded[0]) & np.isfinite(rounded[1]))
        for new, old in zip(rounded, (layer.running_mean, layer.running_var), strict=True):
            new[kept] = np.asarray(old)[kept]
    return _Averages(*rounded, exact)


def _write(pools: dict[BatchNorm, _Pool]) -> None:
    """All or nothing."""
    made = {layer: _averages_of(layer, pool.total()) for layer, pool in pools.items()}
    places: list[Any] = []
    values: list[Any] = []
    for layer, averages in made.items():
        _check_writable(layer)
        places += layer.running_mean, layer.running_var
        values += averages.mean, averages.var
        if layer.num_batches_tracked is not None:
            places.append(layer.num_batches_tracked)
            values.append(pools[layer].batches)
    for layer in made:
        layer._exact = layer._followed = None
    any(map(np.copyto, places, values))  # one call: no signal comes in between
    for layer, averages in made.items():
        layer._exact = averages.exact if layer.dtype == np.float32 else None
        if layer.skip_nonfinite and not layer._said_nonfinite:
            layer._tell_nonfinite(averages.exact[1])
