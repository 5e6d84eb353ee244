"""Batch norm in NumPy, written to be fast: what fastbn is measured against. Nothing else in fastbn uses it.

float32 throughout, in place, no temporary of the size of `x`; sums by einsum, which reads an array once,
where mean() takes three times as long and var() more. Matrix products with ones are no faster over all, and
BLAS shares them out between threads, which costs them dear where other work keeps the CPUs busy. Working
block by block in cache is faster on some shapes and slower on others.

Every function writes its large result into `out`. `axis` is 1 for (N, C, ...) and -1 for (N, ..., C).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastbn.typing import Array


def inference(
    x: Array,
    running_mean: Array,
    running_var: Array,
    weight: Array,
    bias: Array,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    relu: bool = False,
    out: Array,
) -> Array:
    """Normalize by running statistics; returns `out`, which may be `x`."""
    layout = _layout(x.shape, axis)
    scale = weight / np.sqrt(running_var + eps)
    y = out.reshape(layout.shape)
    np.multiply(x.reshape(layout.shape), layout.spread(scale), out=y)
    y += layout.spread(bias - running_mean * scale)
    if relu:
        np.maximum(y, 0, out=y)
    return out


def training_forward(
    x: Array,
    running_mean: Array,
    running_var: Array,
    weight: Array,
    bias: Array,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    relu: bool = False,
    out: Array,
) -> tuple[Array, Array, Array]:
    """Normalize by batch statistics, update the running ones; returns `out`, mean and 1 / deviation."""
    layout = _layout(x.shape, axis)
    n = layout.values_per_channel
    x, y = x.reshape(layout.shape), out.reshape(layout.shape)
    mean = layout.sum(x) / n
    np.subtract(x, layout.spread(mean), out=y)
    var = layout.dot(y, y) / n
    invstd = 1 / np.sqrt(var + eps)
    y *= layout.spread(weight * invstd)
    y += layout.spread(bias)
    if relu:
        np.maximum(y, 0, out=y)
    running_mean += momentum * (mean - running_mean)
    running_var += momentum * (var * (n / (n - 1)) - running_var)
    return out, mean, invstd


def backward(
    grad_output: Array, x: Array, mean: Array, invstd: Array, weight: Array, *, axis: int = 1, out: Array
) -> tuple[Array, Array, Array]:
    """Gradients of `training_forward` without relu; returns grad_input (`out`), grad_weight and grad_bias."""
    layout = _layout(x.shape, axis)
    n = layout.values_per_channel
    dy, dx = grad_output.reshape(layout.shape), out.reshape(layout.shape)
    grad_bias = layout.sum(dy)
    np.subtract(x.reshape(layout.shape), layout.spread(mean), out=dx)
    grad_weight = layout.dot(dy, dx) * invstd
    dx *= layout.spread(grad_weight * invstd * np.float32(-1 / n))
    dx += dy
    dx -= layout.spread(grad_bias / n)
    dx *= layout.spread(weight * invstd)
    return out, grad_weight, grad_bias


@lru_cache(maxsize=8)
def _layout(shape: tuple[int, ...], axis: int) -> _ChannelsSecond | _ChannelsLast:
    if axis == 1 and math.prod(shape[2:]) > 1:
        return _ChannelsSecond(shape)
    return _ChannelsLast(shape[: 1 if axis == 1 else -1], shape[axis])


class _ChannelsSecond:
    """Arrays walked as (N, C, S)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        n, c, *spatial = shape
        s = math.prod(spatial)
        self.shape = n, c, s
        self.values_per_channel = n * s

    def spread(self, coefficients: Array) -> Array:
        return coefficients[:, None]

    def sum(self, a: Array) -> Any:
        return np.einsum("ncs->nc", a).sum(0)

    def dot(self, a: Array, b: Array) -> Any:
        return np.einsum("ncs,ncs->nc", a, b).sum(0)


class _ChannelsLast:
    """Arrays walked as (R, k, C): k rows side by side, for long inner loops also where C is small."""

    def __init__(self, leading: tuple[int, ...], c: int) -> None:
        rows = math.prod(leading)
        k = next(k for k in range(max(1, min(rows, 256 // c)), 0, -1) if rows % k == 0)
        self.shape = rows // k, k, c
        self.values_per_channel = rows

    def spread(self, coefficients: Array) -> Array:
        _, k, _ = self.shape
        return coefficients if k == 1 else np.tile(coefficients, (k, 1))

    def sum(self, a: Array) -> Any:
        return np.einsum("rkc->kc", a).sum(0)

    def dot(self, a: Array, b: Array) -> Any:
        return np.einsum("rkc,rkc->kc", a, b).sum(0)
