"""Batch norm in Numba, written with care: what a good day's work in Python can reach.

Channels-second arrays are (N, C, S), channels-last ones (rows, C). Statistics are shifted by a value of the
channel and summed up in many lanes, so that the loops become vector code without reordering of sums by the
compiler; lanes and tiles are merged in float64. In (N, C, S) one thread does both passes of a channel, while
it is in cache; in (rows, C) it goes through its rows in tiles, and in the second pass back from the end.
"""

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
from numba import njit, prange

LANES = 64
TILE = 128  # rows


@lru_cache(None)
def kernels(parallel, fastmath, activation, residual):
    """The functions of this flavour; what they are called with is compiled when it first comes."""
    jit = njit(parallel=parallel, fastmath=fastmath, error_model="numpy", cache=True)
    serial = njit(fastmath=fastmath, error_model="numpy", cache=True)

    if activation == "relu":

        @serial
        def activate(v):
            zero = v - v
            return zero if v < zero else v
    elif activation == "silu":

        @serial
        def activate(v):
            one = np.float32(1)
            return v / (one + np.exp(-v))
    else:

        @serial
        def activate(v):
            return v

    if activation == "relu":

        @serial
        def masked(g, z):
            return g if z > np.float32(0) else np.float32(0)
    else:

        @serial
        def masked(g, z):
            return g

    @serial
    def normalize(x, y, other, mean, scale, bias):
        for j in range(x.size):
            v = (x[j] - mean) * scale + bias
            if residual:
                v += other[j]
            y[j] = activate(v)

    @serial
    def normalize_row(x, y, other, mean, scale, bias):
        for j in range(x.size):
            v = (x[j] - mean[j]) * scale[j] + bias[j]
            if residual:
                v += other[j]
            y[j] = activate(v)

    @jit
    def inference(x, y, other, mean, scale, bias):
        n, c, _ = x.shape
        for i in prange(n * c):
            b, k = i // c, i % c
            normalize(x[b, k], y[b, k], other[b, k], mean[k], scale[k], bias[k])

    @jit
    def inference_rows(x, y, other, mean, scale, bias):
        rows = x.shape[0]
        tiles = (rows + TILE - 1) // TILE
        for t in prange(tiles):
            for r in range(t * TILE, min(rows, (t + 1) * TILE)):
                normalize_row(x[r], y[r], other[r], mean, scale, bias)

    @serial
    def add_lanes(x, shift, sums, squares):
        whole = x.size - x.size % LANES
        for j in range(0, whole, LANES):
            for k in range(LANES):
                d = x[j + k] - shift
                sums[k] += d
                squares[k] += d * d
        for k in range(x.size - whole):
            d = x[whole + k] - shift
            sums[k] += d
            squares[k] += d * d

    @serial
    def finish(shift, total, square, count, k, running_mean, running_var, momentum):
        """Mean and biased variance of channel k, whose running averages are updated."""
        d = total / count
        mean, var = shift + d, max(square / count - d * d, 0.0)
        running_mean[k] += momentum * (mean - running_mean[k])
        running_var[k] += momentum * (var * count / (count - 1) - running_var[k])
        return mean, var

    @jit
    def training(x, y, weight, bias, running_mean, running_var, momentum, eps, parts):
        n, c, s = x.shape
        for k in prange(c):
            sums, squares = np.zeros(LANES, x.dtype), np.zeros(LANES, x.dtype)
            shift = x[0, k, 0]
            for b in range(n):
                add_lanes(x[b, k], shift, sums, squares)
            total, square = 0.0, 0.0
            for i in range(LANES):
                total += np.float64(sums[i])
                square += np.float64(squares[i])
            mean, var = finish(shift, total, square, n * s, k, running_mean, running_var, momentum)
            scale = x.dtype.type(weight[k] / np.sqrt(var + eps))
            for b in range(n - 1, -1, -1):
                normalize(x[b, k], y[b, k], x[b, k], x.dtype.type(mean), scale, bias[k])

    @serial
    def add_row(x, shift, sums, squares):
        for k in range(x.size):
            d = x[k] - shift[k]
            sums[k] += d
            squares[k] += d * d

    @jit
    def training_rows(x, y, weight, bias, running_mean, running_var, momentum, eps, parts):
        rows, c = x.shape
        shift = x[0]
        totals, squares = np.zeros((parts, c)), np.zeros((parts, c))
        for p in prange(parts):
            start, stop = rows * p // parts, rows * (p + 1) // parts
            s1, s2 = np.zeros(c, x.dtype), np.zeros(c, x.dtype)
            for first in range(start, stop, TILE):
                s1[:] = 0
                s2[:] = 0
                for r in range(first, min(stop, first + TILE)):
                    add_row(x[r], shift, s1, s2)
                for k in range(c):
                    totals[p, k] += s1[k]
                    squares[p, k] += s2[k]
        mean, scale = np.empty(c, x.dtype), np.empty(c, x.dtype)
        for k in range(c):
            m, var = finish(
                shift[k],
                totals[:, k].sum(),
                squares[:, k].sum(),
                rows,
                k,
                running_mean,
                running_var,
                momentum,
            )
            mean[k], scale[k] = m, weight[k] / np.sqrt(var + eps)
        for p in prange(parts):
            for r in range(rows * (p + 1) // parts - 1, rows * p // parts - 1, -1):
                normalize_row(x[r], y[r], x[r], mean, scale, bias)

    @serial
    def add_gradients(dy, x, mean, scale, bias, sums, products):
        whole = x.size - x.size % LANES
        for j in range(0, whole, LANES):
            for k in range(LANES):
                d = x[j + k] - mean
                g = masked(dy[j + k], d * scale + bias)
                sums[k] += g
                products[k] += g * d
        for k in range(x.size - whole):
            d = x[whole + k] - mean
            g = masked(dy[whole + k], d * scale + bias)
            sums[k] += g
            products[k] += g * d

    @serial
    def gradient(dy, x, dx, mean, scale, bias, sub, slope):
        for j in range(x.size):
            d = x[j] - mean
            dx[j] = scale * (masked(dy[j], d * scale + bias) - sub - d * slope)

    @jit
    def backward(dy, x, mean, invstd, weight, bias, dx, dw, db, parts):
        n, c, s = x.shape
        for k in prange(c):
            sums, products = np.zeros(LANES, x.dtype), np.zeros(LANES, x.dtype)
            scale = weight[k] * invstd[k]
            for b in range(n):
                add_gradients(dy[b, k], x[b, k], mean[k], scale, bias[k], sums, products)
            total, product = 0.0, 0.0
            for i in range(LANES):
                total += np.float64(sums[i])
                product += np.float64(products[i])
            db[k], dw[k] = total, product * invstd[k]
            sub = x.dtype.type(total / (n * s))
            slope = x.dtype.type(product / (n * s) * invstd[k] * invstd[k])
            for b in range(n - 1, -1, -1):
                gradient(dy[b, k], x[b, k], dx[b, k], mean[k], scale, bias[k], sub, slope)

    @serial
    def add_gradients_row(dy, x, mean, scale, bias, sums, products):
        for k in range(x.size):
            d = x[k] - mean[k]
            g = masked(dy[k], d * scale[k] + bias[k])
            sums[k] += g
            products[k] += g * d

    @serial
    def gradient_row(dy, x, dx, mean, scale, bias, sub, slope):
        for k in range(x.size):
            d = x[k] - mean[k]
            dx[k] = scale[k] * (masked(dy[k], d * scale[k] + bias[k]) - sub[k] - d * slope[k])

    @jit
    def backward_rows(dy, x, mean, invstd, weight, bias, dx, dw, db, parts):
        rows, c = x.shape
        scale = weight * invstd
        totals, products = np.zeros((parts, c)), np.zeros((parts, c))
        for p in prange(parts):
            start, stop = rows * p // parts, rows * (p + 1) // parts
            s1, s2 = np.zeros(c, x.dtype), np.zeros(c, x.dtype)
            for first in range(start, stop, TILE):
                s1[:] = 0
                s2[:] = 0
                for r in range(first, min(stop, first + TILE)):
                    add_gradients_row(dy[r], x[r], mean, scale, bias, s1, s2)
                for k in range(c):
                    totals[p, k] += s1[k]
                    products[p, k] += s2[k]
        sub, slope = np.empty(c, x.dtype), np.empty(c, x.dtype)
        for k in range(c):
            total, product = totals[:, k].sum(), products[:, k].sum()
            db[k], dw[k] = total, product * invstd[k]
            sub[k], slope[k] = total / rows, product / rows * invstd[k] * invstd[k]
        for p in prange(parts):
            for r in range(rows * (p + 1) // parts - 1, rows * p // parts - 1, -1):
                gradient_row(dy[r], x[r], dx[r], mean, scale, bias, sub, slope)

    return SimpleNamespace(
        inference=inference,
        inference_rows=inference_rows,
        training=training,
        training_rows=training_rows,
        backward=backward,
        backward_rows=backward_rows,
    )
