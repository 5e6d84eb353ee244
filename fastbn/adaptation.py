"""adapt: evaluation by a mixture of the running averages and the statistics of the batch at hand."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn import _kernels
from fastbn.functional import batch_norm_backward
from fastbn.modules import BatchNorm
from fastbn.stand_ins import standing_in
from fastbn.statistics import BatchStats, _read_only

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastbn.functional import BatchNormGrads
    from fastbn.typing import Array, Mask
    from fastbn.variants import Masked


@contextmanager
def adapt(layer_or_layers: BatchNorm | Iterable[BatchNorm], *, prior: float = 16) -> Iterator[None]:
    """While the context lasts, calls of layers adapt to the batch at hand (Schneider et al., 2020).

    For data that has drifted from what the layers were trained on: corrupted images, another sensor, another
    site. A call with n images, the length of its first axis, normalizes by ``share * running average +
    (1 - share) * that of the batch``, mean and variance each, with ``share = prior / (prior + n)``. The
    variance of the batch is the unbiased one.

    The layers themselves are not touched: mode, averages and counter stay as they are, also where the context
    ends by an exception. It does not matter which mode they are in, and nothing is learned in training mode
    either. :meth:`BatchNorm.backward` takes the mixture for constants.

    Parameters
    ----------
    layer_or_layers : BatchNorm or iterable of BatchNorm
        Called in any thread. Frozen layers cannot adapt.
    prior : float
        How many images of the batch the running averages count for; finite, >= 0. With 0 they do not count.

    Raises
    ------
    TypeError
        If something is no :class:`BatchNorm`, or `prior` no number.
    ValueError
        If a layer has no running averages, or `prior` is out of range; in a call of a layer, if the batch has
        one value per channel.
    """
    alone = isinstance(layer_or_layers, BatchNorm)
    layers = [layer_or_layers] if alone else list(layer_or_layers)  # type: ignore[arg-type]
    for layer in layers:
        if not isinstance(layer, BatchNorm):
            raise TypeError(
                f"adapt() needs layers that are a fastbn.BatchNorm, got {type(layer).__name__}"
                f"{'; keep the layer that was frozen' if isinstance(layer, _kernels.Frozen) else ''}"
            )
        if not layer._has_averages():
            raise ValueError("adapt() needs running averages, and track_running_stats=False keeps none")
    if isinstance(prior, bool) or not isinstance(prior, (int, float, np.integer, np.floating)):
        raise TypeError(f"prior must be a number of images, got {prior!r}")
    if not 0 <= prior < math.inf:
        raise ValueError(f"prior must be finite and >= 0, got {prior}")
    adapting = {id(layer) for layer in layers}

    def stand_in(
        layer: BatchNorm,
        x: Array,
        residual: Array | None,
        out: Array | None,
        num_threads: int | None,
        masked: Masked,
    ) -> Array | None:
        if id(layer) not in adapting:
            return None
        return _normalize(layer, float(prior), x, residual, out, num_threads, masked)

    with standing_in(stand_in):
        yield


def _normalize(
    layer: BatchNorm,
    prior: float,
    x: Array,
    residual: Array | None,
    out: Array | None,
    num_threads: int | None,
    masked: Masked,
) -> Array:
    x = _kernels.elements(x, "x")
    _kernels.check_input(x, layer.axis, layer._ranks, layer.num_features, layer.dtype)
    stats = _mixture(layer, prior, x, num_threads, masked.mask)
    y = _kernels.normalize(
        x, stats.mean, stats.var, True, layer.weight, layer.bias, layer.eps, layer.axis, residual,
        layer.activation, layer.negative_slope, out, num_threads, layer._ranks,
        None, *masked, None, layer.dtype,
    )  # fmt: skip
    layer._saved[0] = (x, residual, out, None, partial(_gradients, layer, stats), masked)
    return y


def _mixture(
    layer: BatchNorm, prior: float, x: Array, num_threads: int | None, mask: Mask | None
) -> BatchStats:
    """What x is normalized by."""
    averages: Any = layer._averages()
    mean, var = (np.array(average, np.float64) for average in averages)
    batch_mean, batch_var, count = _kernels.stats(x, layer.axis, num_threads, mask)
    if count == 1:
        raise ValueError(
            f"adapt() needs more than 1 value per channel, got x of shape {x.shape} with axis={layer.axis}; "
            f"pass a larger batch, or evaluate without"
        )
    if count:
        images = x.shape[1 if layer.axis % x.ndim == 0 else 0]
        share = prior / (prior + images)
        with np.errstate(all="ignore"):  # NaN and Inf stay in their channel
            batch_var = batch_var * (count / (count - 1))
            if share == 0:  # of averages that are NaN nothing is to be left
                mean, var = batch_mean, batch_var
            else:
                mean = share * mean + (1 - share) * batch_mean
                var = share * var + (1 - share) * batch_var
    return BatchStats._wrap(_read_only(mean), _read_only(var), count)


def _gradients(
    layer: BatchNorm,
    stats: BatchStats,
    grad_output: Array,
    x: Array,
    residual: Array | None,
    num_threads: int | None,
    masked: Masked,
) -> BatchNormGrads:
    return batch_norm_backward(
        grad_output,
        x,
        stats,
        layer.weight,
        layer.bias,
        layer.eps,
        training=False,
        axis=layer.axis,
        residual=residual,
        activation=layer.activation,
        negative_slope=layer.negative_slope,
        num_threads=num_threads,
        **masked._asdict(),
    )
