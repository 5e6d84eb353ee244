"""A model's batch norms by the statistics of a whole data set, or of the batch that is being evaluated."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import islice, pairwise
from operator import length_hint
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

import fastbn
from fastbn.statistics import BatchStats


class _Found(NamedTuple):
    """What the batch norms of a model have seen."""

    statistics: dict[str, BatchStats]  # in the order of the layers' first calls
    calls: dict[str, int]  # in one forward pass, at most
    batches: int


class _Enough(BaseException):
    """Ends a forward pass behind the layer that is looked at; no ``except Exception`` holds it up."""


def recalibrate(
    model: Module,
    batches: Iterable[Any],
    *,
    method: str = "one_pass",
    num_batches: int | None = None,
    forward: Callable[[Module, Any], Any] | None = None,
    process_group: Any = None,
    progress: bool = False,
) -> dict[str, BatchStats]:
    """Replace the running averages of a model's batch norms by the statistics of a whole data set.

    Moving averages are mostly those of the latest batches, and of weights of some steps ago. Here the
    statistics of all batches are pooled (Chan, Golub and LeVeque, 1983), and each value weighs the same.
    ``torch.optim.swa_utils.update_bn`` takes the mean of the batches' variances, which misses what lies
    between the batches, and weighs a small last batch like the others.

    Parameters
    ----------
    model : torch.nn.Module
        Everything but its batch norms runs as in evaluation, dropout too. Its modes do not change.
    batches : iterable
        Of tensors; of lists or tuples, whose first element the model is called with; of mappings, which it
        is called with as keyword arguments. "sequential" goes over it once for each layer.
    method : {"one_pass", "sequential"}
        "one_pass": all layers at once, each normalizing by the batch at hand, as in training. This is exact
        for layers that no other batch norm stands before. Those behind see inputs which are normalized by
        other statistics than they will be in evaluation: theirs are off by percents where batches are
        alike, and by more than the deviation where they differ, as those of sorted data do.
        "sequential": layer by layer, those before it in evaluation by their new statistics. Exact for every
        layer, in as many passes as there are layers; a pass ends at its layer, so that together they take
        about half the time of so many whole ones.
    num_batches : int or None
        At most so many batches; None for all.
    forward : callable or None
        ``forward(model, batch)`` calls the model, where it wants to be called in another way.
    process_group : torch.distributed.ProcessGroup or None
        Pool over the ranks of a group, each of which brings its share of the batches and gets the same
        statistics; all must take part. ``torch.distributed.group.WORLD`` is all ranks, None this process.
    progress : bool
        Show a bar, if tqdm is installed.

    Returns
    -------
    dict of str to BatchStats
        By name of the layer. `running_mean`, `running_var` (unbiased) and `num_batches_tracked` (the number
        of batches) of the layers are written when all is known: after an exception the model is as it was.
        A layer that was not called is left alone, and not in the result; of one that is called several
        times in a forward pass, all calls are pooled.

    Raises
    ------
    ValueError
        If the model has no batch norm with running averages, or calls none, if there are no batches, or if
        a batch has a single value per channel for a layer.
    TypeError
        If the model cannot be called with a batch, or `batches` is an iterator and `method` "sequential".
    RuntimeError
        If another rank of `process_group` has failed.
    """
    if method not in ("one_pass", "sequential"):
        raise ValueError(f"method must be 'one_pass' or 'sequential', got {method!r}")
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, or None for all of them, got {num_batches}")
    if method == "sequential" and isinstance(batches, Iterator):
        raise TypeError(
            f"method='sequential' goes over the batches once for each layer, but the "
            f"{type(batches).__name__} given ends after the first time; give a list, a DataLoader or the like"
        )
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module  # or each call would send buffers round, and ranks may have more calls or fewer
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not layers:
        raise ValueError(
            f"model must have a batch norm with running averages, {type(model).__name__} has none"
        )
    averages = {name: (layer.running_mean, layer.running_var) for name, layer in layers.items()}

    def collect(names: Iterable[str], calls: int, title: str) -> _Found:
        wanted = {name: layers[name] for name in names}
        shown = _with_bar(batches, num_batches, title) if progress else islice(batches, num_batches)
        return _pool(lambda: _collect(model, wanted, shown, forward or _call, calls), process_group)

    with _by_the_batch(model, layers.values()), _uncompiled(), torch.no_grad():
        found = collect(layers, 0, "all layers")
        statistics = found.statistics
        if not found.batches:
            raise ValueError("batches must have at least one batch, got none")
        if not statistics:
            raise ValueError(f"model must call a batch norm with its batches, called none of {list(layers)}")
        if method == "sequential":
            names = list(statistics)
            for i, (before, name) in enumerate(pairwise(names), 2):
                new = [
                    values.to(old)
                    for old, values in zip(averages[before], _unbiased(statistics[before]), strict=True)
                ]
                layers[before].running_mean, layers[before].running_var = new
                title = f"layer {i} of {len(names)}"
                statistics |= collect([name], found.calls[name], title).statistics
    with torch.no_grad():
        for name, stats in statistics.items():
            for average, values in zip(averages[name], _unbiased(stats), strict=True):
                average.copy_(values)
            if layers[name].num_batches_tracked is not None:
                layers[name].num_batches_tracked.fill_(found.batches)
    return statistics


@contextmanager
def adapt(model: Module, *, prior: float = 16) -> Iterator[Module]:
    """Evaluate by statistics that are mixed from the running averages and the batch at hand.

    For data that differ from those of training in contrast, noise, sensor or weather (Schneider et al., 2020,
    "Improving robustness against common corruptions by covariate shift adaptation")::

        with fastbn.torch.adapt(model.eval(), prior=16):
            logits = model(images)

    A batch of n images weighs n, the running averages weigh `prior`: ``mean = (prior * running_mean + n *
    batch_mean) / (prior + n)``, and likewise the variance, from the batch's unbiased one. No gradient goes
    through the statistics.

    Parameters
    ----------
    model : torch.nn.Module
        Its batch norms evaluate in the context, whatever their mode; everything else is left to you. Those
        without running averages go on to normalize by the batch alone.
    prior : float
        How many images the running averages count for, at least 0. With 0 the batch decides alone.

    Yields
    ------
    torch.nn.Module
        `model`. Nothing of it has changed behind the context, after an exception either.

    Raises
    ------
    ValueError
        If `prior` is negative or not finite, or the model has no batch norm with running averages; with
        ``prior=0``, in a call whose batch has a single value per channel.

    Notes
    -----
    While a layer is called its averages are exchanged: one thread at a time may use the model.
    """
    if not 0 <= prior < float("inf"):
        raise ValueError(f"prior must be a finite number of images, at least 0, got {prior}")
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if all(layer.running_mean is None for layer in layers):
        raise ValueError(
            f"model must have a batch norm with running averages, {type(model).__name__} has none"
        )
    kept: dict[Module, tuple[bool, Tensor | None, Tensor | None]] = {}

    def mix(layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mean, var = layer.running_mean, layer.running_var
        kept[layer] = layer.training, mean, var
        layer.training = False
        x = _input(args, kwargs)
        if mean is None or var is None or not x.numel():
            return
        stats = batch_stats(x)
        if stats.count == 1 and not prior:
            raise ValueError(
                f"prior=0 needs more than one value per channel in a batch, got an input of shape "
                f"{tuple(x.shape)}; with a prior above 0 the running averages decide such a case"
            )
        share = len(x) / (prior + len(x))
        layer.running_mean, layer.running_var = (
            torch.lerp(average.detach().cpu().double(), values, share).to(average)
            for average, values in zip((mean, var), _unbiased(stats), strict=True)
        )

    def put_back(layer: Module, args: object, output: object) -> None:
        if layer in kept:  # or another hook has failed before ours
            layer.training, layer.running_mean, layer.running_var = kept.pop(layer)

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(mix, with_kwargs=True))
            handles.append(layer.register_forward_hook(put_back, prepend=True, always_call=True))
        with _uncompiled():
            yield model
    finally:
        for handle in handles:
            handle.remove()
        for layer in list(kept):  # such as of a call that Ctrl-C has ended
            put_back(layer, None, None)


def batch_stats(x: Tensor) -> BatchStats:
    """Statistics of a tensor of shape (N, C, ...), by the kernels or, where it is wider, in float64."""
    x = x.detach().cpu()
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return fastbn.batch_stats(x.float().numpy(), num_threads=torch.get_num_threads())
    if not x.numel():
        return BatchStats(np.zeros(x.shape[1]), np.zeros(x.shape[1]), 0)
    others = [axis for axis in range(x.ndim) if axis != 1]
    var, mean = torch.var_mean(x.double(), others, correction=0)
    return BatchStats(mean.numpy(), var.numpy(), x.numel() // x.shape[1])


def _unbiased(stats: BatchStats) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance in float64; of a single value the latter is 0."""
    return torch.tensor(stats.mean), torch.tensor(stats.var * (stats.count / max(stats.count - 1, 1)))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _call(model: Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        return model(batch[0])
    raise TypeError(
        f"batches must be of tensors, of lists or tuples that begin with one, or of mappings, got "
        f"{type(batch).__name__}; forward=lambda model, batch: ... tells how to call the model with it"
    )


def _collect(
    model: Module,
    layers: dict[str, Module],
    batches: Iterable[Any],
    forward: Callable[[Module, Any], Any],
    calls: int,
) -> _Found:
    """Statistics of what comes into `layers`; so many calls of one of them end a forward pass, 0 never do."""
    statistics: dict[str, BatchStats] = {}
    most: dict[str, int] = {}
    now: Counter[str] = Counter()

    def look(name: str) -> Callable[..., None]:
        def hook(layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input(args, kwargs)
            stats = batch_stats(x)
            now[name] += 1
            most[name] = max(most.get(name, 0), now[name])
            if stats.count:
                statistics[name] = statistics[name] + stats if name in statistics else stats
            if now[name] == calls:
                raise _Enough
            if stats.count == 1:
                raise ValueError(
                    f"batches must have more than one value per channel for the batch norm {name!r}, got an "
                    f"input of shape {tuple(x.shape)}; leave such a batch out, as a DataLoader with "
                    f"drop_last=True does"
                )

        return hook

    handles = [
        layer.register_forward_pre_hook(look(name), with_kwargs=True) for name, layer in layers.items()
    ]
    number = 0
    try:
        for batch in batches:
            number += 1
            now.clear()
            with suppress(_Enough):
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return _Found(statistics, most, number)


def _pool(work: Callable[[], _Found], group: Any) -> _Found:
    """What `work` finds on all ranks of a group together; where it fails on one, it fails on all."""
    if group is None:
        return work()
    found, failure = _Found({}, {}, 0), None
    try:
        found = work()
    except Exception as error:
        failure = error
    ranks: list[Any] = [None] * torch.distributed.get_world_size(group)
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    torch.distributed.all_gather_object(ranks, (found, said), group=group)
    if failure is not None:
        raise failure
    statistics: dict[str, BatchStats] = {}
    calls: Counter[str] = Counter()
    for rank, (theirs, said) in enumerate(ranks):
        if said is not None:
            raise RuntimeError(f"rank {rank} of the process group has failed, and all stop with it: {said}")
        for name, stats in theirs.statistics.items():
            statistics[name] = statistics[name] + stats if name in statistics else stats
        calls |= Counter(theirs.calls)  # the larger number
    return _Found(statistics, calls, sum(theirs.batches for theirs, _ in ranks))


@contextmanager
def _by_the_batch(model: Module, layers: Iterable[Module]) -> Iterator[None]:
    """`model` in evaluation, but for `layers`, which normalize by the batch and have no averages to move."""
    # One by one: the train() and eval() of some classes do more, such as merging weights.
    modes = [(module, module.training) for module in model.modules()]
    averages = [(layer, layer.running_mean, layer.running_var) for layer in layers]
    try:
        for module, _ in modes:
            module.training = False
        for layer, _, _ in averages:
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, mean, var in averages:
            layer.running_mean, layer.running_var = mean, var


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled code does not look for hooks that came later, so the model itself is called."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _with_bar(batches: Iterable[Any], num_batches: int | None, title: str) -> Iterable[Any]:
    shown = islice(batches, num_batches)
    try:
        from tqdm import tqdm
    except ImportError:
        return shown
    total = min(length_hint(batches) or sys.maxsize, num_batches or sys.maxsize)
    bar: Iterable[Any] = tqdm(shown, title, None if total == sys.maxsize else total)
    return bar
