"""Stateless batch normalization: arguments are checked, modes told apart, and a kernel is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fastbn import _kernels
from fastbn.statistics import BatchStats, GradSums

if TYPE_CHECKING:
    from collections.abc import Collection

    from fastbn.typing import Activation, Array, Mask, Running


class BatchNormGrads(NamedTuple):
    """What :func:`batch_norm_backward` returns: None where its `needs` do not name it."""

    grad_input: Array | Any
    grad_weight: Array | Any
    grad_bias: Array | Any
    grad_residual: Array | None


_new_tuple = tuple.__new__  # at half the cost of BatchNormGrads(*grads)

_NEEDS = ("input", "weight", "bias", "residual")


def batch_norm(
    x: Array,
    running_mean: Running | None,
    running_var: Running | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    unbiased: bool = True,
    mask: Mask | None = None,
    mask_output: bool = False,
    residual: Array | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Batch normalization, as ``torch.nn.functional.batch_norm`` (Ioffe and Szegedy, 2015).

    ``activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, with the statistics of `x` in
    training and the running ones otherwise.

    Parameters
    ----------
    x : ndarray of float32, float64, float16 or bfloat16 (of ml_dtypes), rank >= 2
        Not changed, unless it is also `out`. Walked without a copy where its memory is NCHW or channels-last,
        with any stride over batch and channels; copied once otherwise.
    running_mean, running_var : ndarray of float32, or both of float64, shape (C,), or None
        Running statistics. In training they are updated in place, or both None, and overlap nothing else;
        otherwise they are needed, and each variance plus `eps` is >= 0. See :func:`update_running` for when
        to prefer float64.
    weight, bias : ndarray of float32, or float64 where `x` is, shape (C,), or None
        Those of float16 and bfloat16 are widened.
        1 and 0 where None.
    training : bool
        Normalize with the statistics of `x`, and update the running ones.
    momentum : float
        Weight of the new value in the running ones, from 0 to 1.
    eps : float
        Added to the variance; finite, >= 0. Where the sum is 0 the output is `bias`.
    axis : int
        The channels' axis; -1 for channels-last.
    unbiased : bool
        Update `running_var` with the unbiased variance, n / (n - 1) of the one that normalizes, as PyTorch
        does; False for Keras, ONNX and Flax.
    mask : ndarray of bool, or None
        Which positions of `x` are real (True), for all channels alike: of the shape of `x` without its
        channels, or one that can be broadcast to it. Statistics are those of the real values, whatever the
        others are; where none is real, nothing is updated and the output is that of a normalized 0. Copied.
        The output is computed everywhere, and an evaluation the same with and without it.
    mask_output : bool
        Write 0 where `mask` is False.
    residual : ndarray of the dtype and shape of `x`, or None
        Added before the activation.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "hardswish"
        Applied in the same pass over memory.
    negative_slope : float
        Of "leaky_relu".
    out : ndarray of the dtype and shape of `x`, or None
        Where the result goes. May be `x`, and may overlap nothing else.
    num_threads : int or None
        At most so many threads; None for :func:`fastbn.get_num_threads`. Never changes a result.

    Returns
    -------
    ndarray of the dtype and shape of `x`
        A half is what float32 gives for the widened values, rounded once to nearest even.
        `out`, or a new array in the memory order of `x`.

    Raises
    ------
    TypeError
        If an array is of another dtype or byte order, dtypes are mixed otherwise than said above, or of the
        running ones only one is float64.
    ValueError
        If a shape, a length or an option does not fit, if `out` overlaps an input, or in training if a
        channel has one value only or a running array is read-only. Nothing has been written then.
    RuntimeError
        If an array is given another shape or other memory during the call, before anything is computed.

    Notes
    -----
    Here and in all of fastbn an array may also be one of another library, if it can be used in place: a
    ``torch.Tensor`` on the CPU that is detached, a JAX array, whatever offers the buffer protocol,
    ``__array_interface__`` or DLPack. New arrays are NumPy's.
    """
    if running_mean is None or running_var is None:
        _check_both_absent(running_mean, running_var, training)
    elif not training:
        return _kernels.normalize(
            x, running_mean, running_var, False, weight, bias, eps, axis, residual, activation,
            negative_slope, out, num_threads, None, None, mask, mask_output,
        )  # fmt: skip
    return _kernels.forward(
        x, weight, bias, eps, axis, residual, activation, negative_slope, out, num_threads,
        running_mean, running_var, momentum, unbiased, False, None, None, False, mask, mask_output,
    )[0]  # fmt: skip


def batch_stats(
    x: Array, *, axis: int = 1, mask: Mask | None = None, num_threads: int | None = None
) -> BatchStats:
    """Mean and biased variance of each channel.

    Summed in float32 over tiles around a shift near each tile's mean; tiles are pooled in float64 by the
    formula of Chan, Golub and LeVeque (1983). The result is the same to the bit for any number of threads.

    Parameters
    ----------
    x : ndarray of float32, float64, float16 or bfloat16 (of ml_dtypes), rank >= 2
    axis : int
        The channels' axis.
    mask : ndarray of bool, or None
        See :func:`batch_norm`. The count is that of the real positions.
    num_threads : int or None
        See :func:`batch_norm`.

    Returns
    -------
    BatchStats
        Of count 0 where `x` is empty, or nothing of it is real.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`.
    """
    return BatchStats._wrap(*_kernels.stats(x, axis, num_threads, mask))


def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    stats: BatchStats | None = None,
    axis: int = 1,
    mask: Mask | None = None,
    mask_output: bool = False,
    residual: Array | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, BatchStats]:
    """Normalize with the statistics of `x`, or with given ones.

    Parameters
    ----------
    x, weight, bias, eps, axis, mask, mask_output, residual, activation, negative_slope, out, num_threads
        See :func:`batch_norm`.
    stats : BatchStats or None
        Statistics to normalize with in place of those of `x`, such as pooled ones. With a mask, those of
        count 0 are of a batch of which nothing is real.

    Returns
    -------
    y : ndarray of the dtype and shape of `x`
    stats : BatchStats
        What it was normalized with; :func:`batch_norm_backward` wants it.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`.
    """
    if stats is not None:
        _check_stats(stats)
        y = _kernels.normalize(
            x, stats.mean, stats.var, True, weight, bias, eps, axis, residual, activation, negative_slope,
            out, num_threads, None, None, mask, mask_output, stats.count,
        )  # fmt: skip
        return y, stats
    y, mean, var, count = _kernels.forward(
        x, weight, bias, eps, axis, residual, activation, negative_slope, out, num_threads,
        None, None, 0.0, False, True, None, None, False, mask, mask_output,
    )  # fmt: skip
    return y, BatchStats._wrap(mean, var, count)


def batch_norm_backward(
    grad_output: Array,
    x: Array,
    stats: BatchStats,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    training: bool = True,
    axis: int = 1,
    mask: Mask | None = None,
    mask_output: bool = False,
    residual: Array | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    out: Array | None = None,
    num_threads: int | None = None,
    sums: GradSums | None = None,
    output: Array | None = None,
    needs: Collection[str] = _NEEDS,
) -> BatchNormGrads:
    """Gradients of batch normalization (Ioffe and Szegedy, 2015, section 3).

    Parameters
    ----------
    grad_output : ndarray of the dtype and shape of `x`
        Gradient of the loss with respect to the output.
    x, weight, bias, eps, axis, mask, mask_output, residual, activation, negative_slope, num_threads
        Those of the forward call. `bias` and `residual` matter with an activation, whose derivative is found
        again from them; with `residual` its gradient is returned too. With `mask` the gradient goes through
        the statistics to real positions only, but its sums run over all that was put out: over the others,
        too, unless 0 was put out there (`mask_output`) or what is there is not finite.
    stats : BatchStats
        What the forward call normalized with. In training, of all of `x`: of as many values per channel; with
        `sums` of at least as many.
    training : bool
        Whether the gradient goes through `stats`, as those of `x`; False takes them as constants.
    out : ndarray of the dtype and shape of `x`, or None
        Where grad_input goes. May overlap no input.
    sums : GradSums or None
        Where `x` is a part of the batch that `stats` are of: :func:`batch_norm_backward_sums` of all parts,
        merged. Then grad_weight and grad_bias are those of the whole batch.
    output : ndarray of the dtype and shape of `x`, or None
        What the forward call returned. The mask of "relu", "relu6" or "leaky_relu" (of a slope above 0) is
        found from it, with the same result, and the residual need not be kept.
    needs : collection of str
        Which of "input", "weight", "bias" and "residual" to return the gradients of. Without "input" it takes
        one pass over the arrays and not two, without "input" and "residual" nothing of their size is written.

    Returns
    -------
    BatchNormGrads
        grad_input and grad_residual (None without `residual` and `output`) of the shape of `x`, grad_weight
        and grad_bias of shape (C,), of the dtype of parameters. None in place of what `needs` does not name.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`; and if `sums` or `output` cannot be what it is to be, or `needs` names anything
        else. Nothing has been written then.
    """
    _check_stats(stats)
    given = None
    if sums is not None:
        _check_sums(sums)
        given = (sums.dz, sums.dz_dev, sums.count)
    grads = _kernels.backward(
        grad_output, x, stats.mean, stats.var, stats.count, weight, bias, eps, training, axis, residual,
        activation, negative_slope, out, num_threads, given, output,
        15 if needs is _NEEDS else _needed(needs), mask, mask_output,
    )  # fmt: skip
    if sums is not None:
        dtype = _kernels.dtype_of_parameters(_kernels.elements(x, "x"))
        parameters = zip(("weight", "bias"), sums.parameter_grads(stats, eps, dtype=dtype), strict=True)
        grads = (grads[0], *(grad if name in needs else None for name, grad in parameters), grads[3])
    return _new_tuple(BatchNormGrads, grads)


def batch_norm_backward_sums(
    grad_output: Array,
    x: Array,
    stats: BatchStats,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: Mask | None = None,
    mask_output: bool = False,
    residual: Array | None = None,
    output: Array | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    num_threads: int | None = None,
) -> GradSums:
    """The first half of :func:`batch_norm_backward`, for a batch in parts: what is to be summed over them.

    The parts may lie in one process or in many. Their statistics and their sums are merged, and then each has
    the gradient that it has in the whole batch::

        stats = batch_stats(x1) + batch_stats(x2)
        sums = batch_norm_backward_sums(g1, x1, stats) + batch_norm_backward_sums(g2, x2, stats)
        grads1 = batch_norm_backward(g1, x1, stats, sums=sums)
        grads2 = batch_norm_backward(g2, x2, stats, sums=sums)

    Parameters
    ----------
    grad_output, x, weight, bias, eps, axis, mask, mask_output, residual, output, activation, negative_slope
        See :func:`batch_norm_backward`. Of this part alone.
    num_threads : int or None
        See :func:`batch_norm`.
    stats : BatchStats
        Those of the whole batch: of at least as many values per channel as `x` has.

    Returns
    -------
    GradSums
        Of the values of `x` alone, by the mean of the whole batch. With `mask` its count is that of the real
        positions, and a part without any has sums nonetheless. Its
        :meth:`~fastbn.GradSums.parameter_grads` are the part's share in the gradients of weight and bias.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_backward`.
    """
    _check_stats(stats)
    dz, dz_dev, count = _kernels.backward_sums(
        grad_output, x, stats.mean, stats.var, stats.count, weight, bias, eps, axis, residual, output,
        activation, negative_slope, num_threads, mask, mask_output,
    )  # fmt: skip
    return GradSums._wrap(dz, dz_dev, count)


def update_running(
    running_mean: Running,
    running_var: Running,
    stats: BatchStats,
    momentum: float = 0.1,
    *,
    unbiased: bool = True,
) -> None:
    """Move running averages towards the statistics of a batch, in place.

    ``running = (1 - momentum) * running + momentum * batch``, in float64, rounded once. An empty batch
    (count 0) changes nothing. With a single value per channel the unbiased variance is not defined and the
    biased one, 0, is taken. A variance beyond the range of float32 is stored there as inf.

    A float32 average stops where a step rounds to nothing: where `momentum` times the distance to the batch
    is less than half of float32's spacing, 0.03 for values around 1e6. Where features are not scaled, so that
    means are many thousand deviations, or `momentum` is small, pass float64 arrays. Layers keep float64
    behind their float32 arrays.

    Parameters
    ----------
    running_mean, running_var : ndarray of float32, or both of float64, shape (C,)
    stats : BatchStats
    momentum : float
        Weight of the batch, from 0 to 1.
    unbiased : bool
        See :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        If an array is not a writable vector of float32 or float64, of as many channels as `stats` has.
    """
    _check_stats(stats)
    _kernels.update_running(running_mean, running_var, stats.mean, stats.var, stats.count, momentum, unbiased)


def _check_stats(stats: BatchStats) -> None:
    if not isinstance(stats, BatchStats):
        raise TypeError(f"stats must be a BatchStats, got {type(stats).__name__}")


def _check_sums(sums: GradSums) -> None:
    if not isinstance(sums, GradSums):
        raise TypeError(
            f"sums must be a GradSums, as batch_norm_backward_sums() gives it, got {type(sums).__name__}"
        )


def _needed(needs: Collection[str]) -> int:
    if not isinstance(needs, (tuple, list, set, frozenset)):
        raise TypeError(f"needs must be a tuple of {_NEEDS}, got {needs!r}")
    for name in needs:
        if name not in _NEEDS:
            raise ValueError(f"needs must name some of {_NEEDS}, got {name!r}")
    return sum(1 << i for i, name in enumerate(_NEEDS) if name in needs)


def _check_both_absent(running_mean: Running | None, running_var: Running | None, training: bool) -> None:
    if running_mean is not None or running_var is not None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{missing} is None but the other is not; pass running_mean and running_var, or neither"
        )
    if not training:
        raise ValueError("running_mean and running_var are needed unless training=True, got None")
