"""The oracle: batch normalization (Ioffe and Szegedy, 2015) in NumPy, one plain line a formula.

In float64, or longdouble for what comes in that.
"""

import numpy as np


def exact(a):
    a = np.asarray(a)
    return a.astype(np.longdouble if a.dtype == np.longdouble else np.float64, copy=False)


def column(vector, ndim, axis):
    """One value per channel, shaped to be combined with an array of `ndim` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return exact(vector).reshape(shape)


def others(x, axis):
    """All dimensions but that of the channels."""
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def batch_stats(x, axis=1, mask=None):
    """Mean, biased variance and count of the values of each channel, where `mask` is True."""
    x = exact(x)
    real = everywhere(mask, x, axis)
    count = np.count_nonzero(real) // max(1, x.shape[axis])
    if count == 0:
        return np.zeros(x.shape[axis]), np.zeros(x.shape[axis]), 0
    mean = np.where(real, x, 0).sum(others(x, axis)) / count
    deviation = np.where(real, x - column(mean, x.ndim, axis), 0)
    return mean, np.square(deviation).sum(others(x, axis)) / count, count


def everywhere(mask, x, axis):
    """A mask of one value a position as one of the shape of x."""
    if mask is None:
        return np.ones(x.shape, bool)
    positions = [n for i, n in enumerate(x.shape) if i != axis % x.ndim]
    return np.broadcast_to(np.expand_dims(np.broadcast_to(mask, positions), axis % x.ndim), x.shape)


def inverse_deviation(var, eps):
    """1 / sqrt(var + eps): 0 where there is no deviation at all, so that the output is `bias`; NaN below."""
    v = exact(var) + eps
    with np.errstate(invalid="ignore"):
        return np.divide(1.0, np.sqrt(v), out=np.zeros_like(v), where=v != 0)


def normalize(x, mean, var, eps=1e-5, axis=1):
    """x with mean 0 and deviation 1: what is multiplied by `weight`."""
    x = exact(x)
    return (x - column(mean, x.ndim, axis)) * column(inverse_deviation(var, eps), x.ndim, axis)


def activate(z, activation=None, negative_slope=0.01):
    if activation == "relu":
        return np.maximum(z, 0)
    if activation == "relu6":
        return np.clip(z, 0, 6)
    if activation == "leaky_relu":
        return np.where(z > 0, z, negative_slope * z)
    if activation == "hardswish":
        with np.errstate(invalid="ignore"):  # -inf * 0
            return z * np.clip(z + 3, 0, 6) / 6
    if activation == "silu":
        with np.errstate(invalid="ignore"):
            return np.where(z < -700, -0.0, z * sigmoid(z))  # 0 is the limit
    return z


def derivative(z, activation=None, negative_slope=0.01):
    """Of the activation; at its kinks, and at a NaN, as PyTorch chooses."""
    if activation == "relu":
        return np.where(z <= 0, 0.0, 1.0)
    if activation == "relu6":
        return np.where((z <= 0) | (z >= 6), 0.0, 1.0)
    if activation == "leaky_relu":
        return np.where(z > 0, 1.0, negative_slope)
    if activation == "hardswish":
        return np.where(z <= -3, 0.0, np.where(z < 3, z / 3 + 0.5, 1.0))
    if activation == "silu":
        with np.errstate(invalid="ignore"):
            inside = np.clip(z, -700, 700)
            return sigmoid(inside) * (1 + inside * (1 - sigmoid(inside)))
    return np.ones_like(z)


def sigmoid(z):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


def preactivation(x, mean, var, weight=None, bias=None, eps=1e-5, axis=1, residual=None):
    """What goes into the activation."""
    z = normalize(x, mean, var, eps, axis)
    if weight is not None:
        z = z * column(weight, z.ndim, axis)
    if bias is not None:
        z = z + column(bias, z.ndim, axis)
    if residual is not None:
        z = z + residual
    return z


def forward(
    x,
    mean,
    var,
    weight=None,
    bias=None,
    eps=1e-5,
    axis=1,
    residual=None,
    activation=None,
    negative_slope=0.01,
    mask=None,
):
    """With a mask, 0 where that is False."""
    z = preactivation(x, mean, var, weight, bias, eps, axis, residual)
    return np.where(everywhere(mask, z, axis), activate(z, activation, negative_slope), 0)


def backward(
    grad_output, x, mean, var, weight=None, bias=None, eps=1e-5, training=True, axis=1, residual=None,
    activation=None, negative_slope=0.01, z=None, mask=None, mask_output=False,
):  # fmt: skip
    """grad_input, grad_weight, grad_bias, and the gradient of what is added before the activation.

    With `training` mean and variance are taken for functions of `x` where `mask` is True, otherwise for
    constants. `z` may give preactivations as another computation has rounded them, to side with it at the
    activation's kinks. With `mask_output` the output is 0 where `mask` is False.
    """
    if z is None:
        z = preactivation(x, mean, var, weight, bias, eps, axis, residual)
    g = exact(grad_output) * derivative(z, activation, negative_slope)
    xhat = normalize(x, mean, var, eps, axis)
    real = everywhere(mask, g, axis)
    if mask_output:
        g, xhat = np.where(real, g, 0), np.where(real, xhat, 0)
    grad_bias = g.sum(others(g, axis))
    grad_weight = (g * xhat).sum(others(g, axis))
    scale = inverse_deviation(var, eps) * (1.0 if weight is None else exact(weight))
    grad_input = g
    if training and g.size:
        count = max(1, np.count_nonzero(real) // g.shape[axis])
        through = column(grad_bias, g.ndim, axis) + xhat * column(grad_weight, g.ndim, axis)
        grad_input = g - np.where(real, through / count, 0)
        if not real.any():  # the output is that of a normalized 0, whatever x is
            grad_input = np.zeros_like(g)
    return grad_input * column(scale, g.ndim, axis), grad_weight, grad_bias, g


def update_running(running_mean, running_var, mean, var, count, momentum=0.1, unbiased=True):
    """The new running mean and variance; an empty batch changes nothing."""
    running_mean, running_var = exact(running_mean), exact(running_var)
    if count == 0:
        return running_mean, running_var
    if unbiased and count > 1:
        var = np.asarray(var) * count / (count - 1)
    return (
        (1 - momentum) * running_mean + momentum * np.asarray(mean),
        (1 - momentum) * running_var + momentum * np.asarray(var),
    )
