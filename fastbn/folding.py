"""Folding a batch norm into the layer right before or behind it; docs/folding.md says when."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn import _kernels
from fastbn.frozen import FrozenBatchNorm
from fastbn.modules import BatchNorm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fastbn.typing import Array

    Float64 = NDArray[np.float64]


def fold_conv(
    conv_weight: Array,
    conv_bias: Array | None,
    bn: BatchNorm | FrozenBatchNorm,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Array, Array]:
    """Weight and bias of the convolution that does what a convolution and then `bn` do.

    With ``scale = bn.weight / sqrt(bn.running_var + bn.eps)``, the weight of each output channel is
    multiplied by its `scale`, and the bias is ``(conv_bias - bn.running_mean) * scale + bn.bias`` (Jacob et
    al., 2018, section 3.2).

    Parameters
    ----------
    conv_weight : ndarray, (out_channels, in_channels / groups, ...)
        As PyTorch has it, with any number of spatial axes. With `transposed`, of shape
        (in_channels, out_channels / groups, ...).
    conv_bias : ndarray of the weight's dtype and shape (out_channels,), or None
    bn : BatchNorm or FrozenBatchNorm
        In evaluation mode, without activation. Its `axis` does not matter.
    transposed : bool
        Whether it is a transposed convolution.
    groups : int
        Number of groups of the convolution.

    Returns
    -------
    weight, bias : ndarray of the weight's dtype, shapes of `conv_weight` and (out_channels,)
        New arrays. All arithmetic is in float64 and rounded once.

    Raises
    ------
    ValueError
        If `bn` is in training mode, has no running statistics or an activation, which folding would lose; if
        `groups` does not divide the channels, or a shape does not fit.
    TypeError
        If an array is not of floats, dtypes differ, or `bn` not a batch norm of fastbn.
    """
    weight = _conv_weight(conv_weight)
    groups = _checked_groups(groups, weight)
    out_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    scale, bias = _scale_and_bias("conv_bias", conv_bias, out_channels, bn, weight.dtype)
    # Cut into groups, a group's output channels are on the third axis if transposed, on the second if not.
    by_group = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    in_group = (1, -1) if transposed else (-1, 1)
    folded = by_group * scale.reshape(groups, *in_group, *[1] * (weight.ndim - 2))
    return folded.reshape(weight.shape).astype(weight.dtype), bias


def fold_linear(
    linear_weight: Array, linear_bias: Array | None, bn: BatchNorm | FrozenBatchNorm
) -> tuple[Array, Array]:
    """Weight and bias of the linear layer that does what a linear layer and then `bn` do.

    Parameters
    ----------
    linear_weight : ndarray of shape (out_features, in_features)
        As PyTorch has it: the layer computes ``x @ linear_weight.T + linear_bias``.
    linear_bias : ndarray of the weight's dtype and shape (out_features,), or None
    bn : BatchNorm or FrozenBatchNorm
        As in :func:`fold_conv`.

    Returns
    -------
    weight, bias : ndarray of the weight's dtype, shapes of `linear_weight` and (out_features,)
        New arrays. All arithmetic is in float64 and rounded once.

    Raises
    ------
    ValueError, TypeError
        As :func:`fold_conv`.
    """
    weight = _kernels.elements(linear_weight, "linear_weight")
    if weight.ndim != 2:
        raise ValueError(f"linear_weight must have 2 axes, got shape {weight.shape}")
    scale, bias = _scale_and_bias("linear_bias", linear_bias, weight.shape[0], bn, weight.dtype)
    return (weight.astype(np.float64) * scale[:, np.newaxis]).astype(weight.dtype), bias


def fold_linear_next(
    bn: BatchNorm | FrozenBatchNorm, weight: Array, bias: Array | None
) -> tuple[Array, Array]:
    """Weight and bias of the linear layer that does what `bn` and then a linear layer do.

    With ``scale = bn.weight / sqrt(bn.running_var + bn.eps)`` and ``shift = bn.bias - bn.running_mean *
    scale``, the weight of each input channel is multiplied by its `scale`, and the bias is ``bias + weight @
    shift``.

    Parameters
    ----------
    bn : BatchNorm or FrozenBatchNorm
        As in :func:`fold_conv`, with in_features channels.
    weight : ndarray of shape (out_features, in_features)
        Of the layer behind `bn`, which computes ``x @ weight.T + bias``.
    bias : ndarray of the weight's dtype and shape (out_features,), or None

    Returns
    -------
    weight, bias : ndarray of the weight's dtype, shapes of `weight` and (out_features,)
        New arrays. All arithmetic is in float64 and rounded once.

    Raises
    ------
    ValueError, TypeError
        As :func:`fold_conv`.
    """
    weight = _kernels.elements(weight, "weight")
    if weight.ndim != 2:
        raise ValueError(f"weight must have 2 axes, got shape {weight.shape}")
    return _fold_next("bias", bias, bn, weight, 1)


def fold_conv_next(
    bn: BatchNorm | FrozenBatchNorm,
    conv_weight: Array,
    conv_bias: Array | None,
    *,
    padding: int | str | Sequence[int] = 0,
    groups: int = 1,
) -> tuple[Array, Array]:
    """Weight and bias of the convolution that does what `bn` and then a convolution do.

    As :func:`fold_linear_next`, where ``weight @ shift`` also adds up over the kernel.

    Parameters
    ----------
    bn : BatchNorm or FrozenBatchNorm
        As in :func:`fold_conv`, with in_channels channels.
    conv_weight : ndarray, (out_channels, in_channels / groups, ...)
        Of the convolution behind `bn`, with any number of spatial axes. A transposed convolution cannot take
        a batch norm in: at its borders fewer values of the kernel add up.
    conv_bias : ndarray of the weight's dtype and shape (out_channels,), or None
    padding : int, sequence of int, or "valid"
        The convolution's padding by zeros, of which there must be none. Padding by values of the image
        (reflect, replicate, circular) is none: it does no harm.
    groups : int
        Number of groups of the convolution.

    Returns
    -------
    weight, bias : ndarray of the weight's dtype, shapes of `conv_weight` and (out_channels,)
        New arrays. All arithmetic is in float64 and rounded once.

    Raises
    ------
    ValueError
        If there is padding, or as :func:`fold_conv`.
    TypeError
        As :func:`fold_conv`.
    """
    if isinstance(padding, str):
        padded = padding != "valid"
    else:
        padded = any(map(operator.index, padding if isinstance(padding, Iterable) else (padding,)))
    if padded:
        raise ValueError(
            f"padding must be 0, got {padding!r}: zeros are padded behind the batch norm, where its shift "
            f"does not reach, so that no bias is right both at the borders and inside; keep the batch norm, "
            f"as bn.freeze()"
        )
    weight = _conv_weight(conv_weight)
    return _fold_next("conv_bias", conv_bias, bn, weight, _checked_groups(groups, weight))


def _conv_weight(conv_weight: Array) -> Array:
    weight = _kernels.elements(conv_weight, "conv_weight")
    if weight.ndim < 3:
        raise ValueError(f"conv_weight must have at least 3 axes, got shape {weight.shape}; see fold_linear")
    return weight


def _checked_groups(groups: int, weight: Array) -> int:
    groups = operator.index(groups)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups must be at least 1 and divide the first axis of conv_weight, got {groups} for "
            f"shape {weight.shape}"
        )
    return groups


def _fold_next(
    name: str, bias: Array | None, bn: BatchNorm | FrozenBatchNorm, weight: Array, groups: int
) -> tuple[Array, Array]:
    out_channels, in_channels = weight.shape[0], weight.shape[1] * groups
    bn = _foldable(bn, in_channels, "input")
    bias = _bias(name, bias, out_channels, weight.dtype)
    scale = _scale(bn)
    shift = -bn.running_mean.astype(np.float64) * scale
    if bn.bias is not None:
        shift += bn.bias
    # Cut into groups: (groups, out_channels / groups, in_channels / groups, ...)
    by_group = weight.astype(np.float64).reshape(groups, out_channels // groups, *weight.shape[1:])
    of_inputs = (groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    shifted = (by_group * shift.reshape(of_inputs)).sum(tuple(range(2, by_group.ndim))).reshape(-1)
    if bias is not None:
        shifted += bias.astype(np.float64)
    folded = by_group * scale.reshape(of_inputs)
    return folded.reshape(weight.shape).astype(weight.dtype), shifted.astype(weight.dtype)


def _bias(name: str, bias: Array | None, out_channels: int, dtype: np.dtype[Any]) -> Array | None:
    """Checked; halves, of which float64 has all values, as they are."""
    if bias is None:
        return None
    bias = _kernels.elements(bias, name)
    if bias.dtype != dtype:
        raise TypeError(
            f"{name} must have the dtype of the weight, {dtype}, got {bias.dtype}; convert one of the two"
        )
    if bias.shape != (out_channels,):
        raise ValueError(f"{name} must have shape ({out_channels},), one value a channel, got {bias.shape}")
    return bias


def _scale_and_bias(
    name: str, bias: Array | None, out_channels: int, bn: BatchNorm | FrozenBatchNorm, dtype: np.dtype[Any]
) -> tuple[Float64, Array]:
    """What the weight of each output channel is to be multiplied by, and the folded bias."""
    bn = _foldable(bn, out_channels, "output")
    bias = _bias(name, bias, out_channels, dtype)
    scale, mean = _scale(bn), bn.running_mean.astype(np.float64)
    folded = (-mean if bias is None else bias.astype(np.float64) - mean) * scale
    if bn.bias is not None:
        folded += bn.bias
    return scale, folded.astype(dtype)


def _foldable(bn: BatchNorm | FrozenBatchNorm, channels: int, kind: str) -> FrozenBatchNorm:
    """`bn`, frozen, if it can be folded into a weight with so many channels of that kind."""
    if not isinstance(bn, (BatchNorm, FrozenBatchNorm)):
        raise TypeError(f"bn must be a BatchNorm or FrozenBatchNorm, got {type(bn).__name__}")
    if isinstance(bn, BatchNorm):
        if bn.training:
            raise ValueError(
                "bn is in training mode, whose statistics are not known beforehand; call bn.eval()"
            )
        bn = bn.freeze()
    if bn.activation is not None:
        raise ValueError(
            f"bn has activation={bn.activation!r}, which folding would lose; fold a batch norm without it "
            f"and apply it to the result"
            if kind == "output"
            else f"bn has activation={bn.activation!r}, which folding would lose: a layer cannot take in "
            f"what stands behind an activation; keep the batch norm, as bn.freeze()"
        )
    if bn.num_features != channels:
        raise ValueError(f"bn has {bn.num_features} channels, the weight {channels} {kind} channels")
    return bn


def _scale(bn: FrozenBatchNorm) -> Float64:
    var = bn.running_var.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale: Float64 = np.where(var + bn.eps == 0, 0, 1 / np.sqrt(var + bn.eps))  # as the kernels have it
    if bn.weight is not None:
        scale *= bn.weight
    return scale
