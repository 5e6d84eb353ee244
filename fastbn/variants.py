"""What a training call of a layer does otherwise with `virtual_batch_size` (ghost batches) or `renorm`."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from fastbn import _kernels
from fastbn.functional import BatchNormGrads, batch_norm_backward

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn.modules import BatchNorm
    from fastbn.statistics import BatchStats
    from fastbn.typing import Array, Mask

    Float64 = NDArray[np.float64]
    Pair = tuple[Float64, Float64]


class Masked(NamedTuple):
    """What a call of a layer was given of a mask."""

    mask: Mask | None = None
    mask_output: bool = False

    def of(self, x: Array, axis: int, part: slice) -> Masked:
        """That of a part of x, cut along its first axis."""
        if self.mask is None:
            return self
        return self._replace(mask=_kernels.positions(self.mask, x, axis)[part])


class Renorm(NamedTuple):
    """Options of batch renormalization (Ioffe, 2017, arXiv:1702.03275): how far it may correct a batch.

    A layer with ``renorm=Renorm()`` normalizes a training batch as evaluation would, up to bounds: by the
    batch's mean and deviation, then ``* r + d``, where ``r = batch deviation / running deviation`` is clipped
    to [rmin, rmax] and ``d = (batch mean - running mean) / running deviation`` to [-dmax, dmax]. The gradient
    takes r and d for constants. With ``Renorm(rmax=1, dmax=0)`` that is plain batch normalization.

    Parameters
    ----------
    rmax : float
        At least 1; inf for no bound.
    dmax : float
        At least 0; inf for no bound.
    rmin : float or None
        From 0 to `rmax`; None for 1 / rmax, as in the paper.
    momentum : float or None
        None takes r and d from the running averages that evaluation uses, as in the paper. A number, from 0
        to 1, makes the layer keep averages of mean and deviation for r and d alone, in which each batch has
        this weight. They begin with the running averages, and again where the layer's state is loaded or
        reset: copies and pickles of a layer have them, a state_dict does not.

    Notes
    -----
    `rmax` and `dmax` are those at which the paper arrives, for running averages that follow the batches
    already. It begins with plain batch normalization and widens the bounds while it trains: set ``bn.renorm``
    to another Renorm to do so.

    Keras' ``renorm_clipping`` has the same three bounds, by default none; its ``renorm_momentum`` is one
    minus `momentum`. Keras averages the deviation for evaluation too, fastbn the variance, as without
    `renorm`.
    """

    rmax: float = 3.0
    dmax: float = 5.0
    rmin: float | None = None
    momentum: float | None = None


def train(
    layer: BatchNorm,
    x: Array,
    residual: Array | None,
    out: Array | None,
    num_threads: int | None,
    masked: Masked,
) -> Array:
    """A training call of a layer that has one of the two, or both: then each ghost batch is corrected."""
    x = _kernels.elements(x, "x")
    _kernels.check_input(x, layer.axis, layer._ranks, layer.num_features, layer.dtype)
    added = None if residual is None else _kernels.elements(residual, "residual")
    y = None if out is None else _kernels.elements(out, "out")
    parts = _ghost_batches(layer, x)
    if len(parts) > 1:
        _check_whole(layer, x, added, y, parts, masked)
        if y is None:
            y = np.empty_like(x)
    renorm: Renorm | None = layer.renorm
    done: list[tuple[BatchStats, Pair | None]] = []
    for part in parts:
        weight, bias, correction = layer.weight, layer.bias, None
        of_part = masked.of(x, layer.axis, part)
        if renorm is not None:
            mean, var, count = _kernels.stats(x[part], layer.axis, num_threads, of_part.mask)
            batch, reference = (mean, np.sqrt(var + layer.eps)), _reference(layer)
            if count:
                correction = _correction(renorm, batch, reference)
                weight, bias = _corrected(layer, correction)
        written = layer._normalize_by_batch(
            x[part], _of(added, part), _of(y, part), num_threads, weight, bias, of_part
        )
        _, _, _, stats, _, _ = layer._saved[0]  # type: ignore[misc]
        done.append((cast("BatchStats", stats), correction))
        if renorm is not None and renorm.momentum is not None and count and layer.track_running_stats:
            layer._followed = _moved(layer, renorm.momentum, reference, batch)
    layer._saved[0] = (x, residual, out, None, partial(_gradients, layer, parts, done), masked)
    if out is not None:
        return out
    return written if y is None else y


def _gradients(
    layer: BatchNorm,
    parts: list[slice],
    done: list[tuple[BatchStats, Pair | None]],
    grad_output: Array,
    x: Array,
    residual: Array | None,
    num_threads: int | None,
    masked: Masked,
) -> BatchNormGrads:
    """Gradients of a call of :func:`train`, which has cut x into `parts` and `done` that to each."""
    grad_output = _kernels.elements(grad_output, "grad_output")
    if grad_output.shape != x.shape:
        raise ValueError(f"grad_output must have the shape of x, {x.shape}, got {grad_output.shape}")
    added = None if residual is None else _kernels.elements(residual, "residual")
    grad_input = np.empty_like(x) if len(parts) > 1 else None
    of_parts = []
    for part, (stats, correction) in zip(parts, done, strict=True):
        weight, bias = layer.weight, layer.bias
        if correction is not None:
            weight, bias = _corrected(layer, correction)
        grads = batch_norm_backward(
            grad_output[part],
            x[part],
            stats,
            weight,
            bias,
            layer.eps,
            axis=layer.axis,
            residual=_of(added, part),
            activation=layer.activation,
            negative_slope=layer.negative_slope,
            out=_of(grad_input, part),
            num_threads=num_threads,
            **masked.of(x, layer.axis, part)._asdict(),
        )
        if correction is not None:  # y = r * weight * normalized + d * weight + bias
            r, d = correction
            by_both = r * grads.grad_weight + d * grads.grad_bias
            grads = grads._replace(grad_weight=_rounded(by_both, layer.dtype))
        of_parts.append(grads)
    if grad_input is None:
        return of_parts[0]
    grad_residuals = [grads.grad_residual for grads in of_parts if grads.grad_residual is not None]
    return BatchNormGrads(
        grad_input,
        _rounded(np.sum([grads.grad_weight for grads in of_parts], 0, np.float64), layer.dtype),
        _rounded(np.sum([grads.grad_bias for grads in of_parts], 0, np.float64), layer.dtype),
        np.concatenate(grad_residuals) if grad_residuals else None,
    )


def _of(array: Array | None, part: slice) -> Array | None:
    return None if array is None else array[part]


def _rounded(vector: Float64, dtype: np.dtype[Any]) -> Array:
    with np.errstate(all="ignore"):  # a channel may hold NaN, Inf or what is beyond float32
        return vector.astype(dtype)


# Ghost batches


def checked_size(value: Any) -> int | None:
    """What a layer's `virtual_batch_size` is set to."""
    if value is None:
        return None
    size = _kernels.whole(value, "virtual_batch_size", "be less than 2**63")
    if size < 1:
        raise ValueError(f"virtual_batch_size must be at least 1, or None for whole batches, got {size}")
    return size


def _ghost_batches(layer: BatchNorm, x: Array) -> list[slice]:
    """As few parts of a batch as make none larger than `virtual_batch_size`; sizes differ by one at most."""
    size, rows = layer.virtual_batch_size, len(x)
    if size is None:
        return [slice(None)]
    if layer.axis % x.ndim == 0:
        raise ValueError(
            f"virtual_batch_size cuts x along its first axis, where axis={layer.axis} has the channels; "
            f"pass x with the batch first"
        )
    if rows <= size:
        return [slice(None)]
    count = -(-rows // size)
    least, larger = divmod(rows, count)
    if least == 1 and x.size == rows * layer.num_features:
        raise ValueError(
            f"training needs more than 1 value per channel, but virtual_batch_size={size} cuts x of shape "
            f"{x.shape} into parts of 1 row; set it to 2 at least, and pass more than 3 rows"
        )
    ends = [i * least + min(i, larger) for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _check_whole(
    layer: BatchNorm,
    x: Array,
    residual: Array | None,
    out: Array | None,
    parts: list[slice],
    masked: Masked,
) -> None:
    """Of the whole, before anything is written, what the kernels check of each part as it comes."""
    for name, array in ("residual", residual), ("out", out):
        if array is not None and array.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {x.shape}, got {array.shape}")
    inputs: dict[str, Any] = {"x": x, "residual": residual, "weight": layer.weight, "bias": layer.bias}
    if masked.mask is not None:
        inputs["mask"] = mask = _kernels.positions(masked.mask, x, layer.axis)
        if any(np.count_nonzero(mask[part]) == 1 for part in parts):
            raise ValueError(
                "training needs more than 1 value per channel, but in one of the parts that "
                f"virtual_batch_size={layer.virtual_batch_size} cuts x into mask is True at 1 position; "
                "pass a larger one"
            )
    averages = {"running_mean": layer.running_mean, "running_var": layer.running_var}
    for name, average in averages.items():
        _check_clear(name, average, inputs)
    if out is None:
        return
    if _same_memory(out, x):
        del inputs["x"]
    _check_clear("out", out, inputs | averages)
    if _overlap(out[parts[0]], out[parts[0].stop :]):
        raise ValueError(f"out has elements that share memory (strides {out.strides}); pass an array without")


def _check_clear(name: str, written: Array | None, others: dict[str, Array | None]) -> None:
    for name_of_other, other in others.items():
        if written is not None and other is not None and _overlap(written, other):
            raise ValueError(f"{name} overlaps {name_of_other}; pass memory of its own")


def _overlap(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _same_memory(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape have each element in the same place."""
    strides = zip(a.strides, b.strides, a.shape, strict=True)
    return a.ctypes.data == b.ctypes.data and all(s == t for s, t, n in strides if n > 1)


# Batch renormalization


def checked_renorm(value: Any) -> Renorm | None:
    """What a layer's `renorm` is set to."""
    if value is None or value is False:
        return None
    if value is True:
        return Renorm()
    if not isinstance(value, Renorm):
        raise TypeError(f"renorm must be None, True or a fastbn.Renorm, got {value!r}")
    rmax, dmax, rmin, momentum = value
    for name, bound in ("rmax", rmax), ("dmax", dmax), ("rmin", rmin):
        number = isinstance(bound, (int, float, np.integer, np.floating)) and not isinstance(bound, bool)
        if not number and (bound is not None or name != "rmin"):
            raise TypeError(f"{name} of renorm must be a number, got {bound!r}")
    if not rmax >= 1:
        raise ValueError(f"rmax of renorm must be at least 1, got {rmax}")
    if not dmax >= 0:
        raise ValueError(f"dmax of renorm must be at least 0, got {dmax}")
    if rmin is not None and not 0 <= rmin <= rmax:
        raise ValueError(f"rmin of renorm must be from 0 to rmax, which is {rmax}, got {rmin}")
    if momentum is not None:
        _kernels.check_momentum(momentum)
    return value


def _reference(layer: BatchNorm) -> Pair:
    """Mean and deviation that a batch is to be normalized by, up to the bounds."""
    if layer.renorm.momentum is not None and layer._followed is not None:
        return layer._followed
    if not layer._has_averages():
        raise ValueError("renorm needs running averages, and track_running_stats=False keeps none")
    mean, var = (np.asarray(average, np.float64) for average in layer._averages())
    shifted = var + layer.eps
    if (shifted < 0).any():
        channel = int(np.argmax(shifted < 0))
        raise ValueError(f"running_var[{channel}] + eps must be >= 0, got {var[channel]} + {layer.eps}")
    return mean, np.sqrt(shifted)


def _correction(renorm: Renorm, batch: Pair, reference: Pair) -> Pair:
    """r and d of algorithm 1 of the paper, from means and deviations."""
    (mean, deviation), (wanted_mean, wanted_deviation) = batch, reference
    with np.errstate(all="ignore"):  # NaN and Inf stay in their channel; 0 / 0 comes with eps=0 only
        r = np.where(deviation == wanted_deviation, 1, deviation / wanted_deviation)
        d = np.where(mean == wanted_mean, 0, (mean - wanted_mean) / wanted_deviation)
        rmin = 1 / renorm.rmax if renorm.rmin is None else renorm.rmin
        return np.clip(r, rmin, renorm.rmax), np.clip(d, -renorm.dmax, renorm.dmax)


def _corrected(layer: BatchNorm, correction: Pair) -> tuple[Array, Array]:
    """Weight and bias that do what r and d, and then those of the layer, would do."""
    weight, bias = correction
    with np.errstate(all="ignore"):
        if layer.weight is not None:
            weight, bias = weight * layer.weight, bias * layer.weight
        if layer.bias is not None:
            bias = bias + layer.bias
    return _rounded(weight, layer.dtype), _rounded(bias, layer.dtype)


def _moved(layer: BatchNorm, momentum: float, before: Pair, batch: Pair) -> Pair:
    """The averages for r and d alone, after a batch; of the deviation, as in the paper and in Keras."""
    with np.errstate(all="ignore"):
        mean, deviation = (
            (1 - momentum) * old + momentum * new for old, new in zip(before, batch, strict=True)
        )
    if not layer.skip_nonfinite:
        return mean, deviation
    finite = np.isfinite(batch[0]) & np.isfinite(batch[1])
    return np.where(finite, mean, before[0]), np.where(finite, deviation, before[1])
