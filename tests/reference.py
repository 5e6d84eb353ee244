"""The oracle: batch normalization (Ioffe and Szegedy, 2015) in float64 NumPy, one plain line a formula."""

import numpy as np


def column(vector, ndim, axis):
    """One value per channel, shaped to be combined with an array of `ndim` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(vector, np.float64).reshape(shape)


def others(x, axis):
    """All dimensions but that of the channels."""
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def batch_stats(x, axis=1):
    """Mean, biased variance and count of the values of each channel."""
    x = np.asarray(x, np.float64)
    if x.size == 0:
        return np.zeros(x.shape[axis]), np.zeros(x.shape[axis]), 0
    mean = x.mean(others(x, axis))
    var = np.square(x - column(mean, x.ndim, axis)).mean(others(x, axis))
    return mean, var, x.size // x.shape[axis]


def inverse_deviation(var, eps):
    """1 / sqrt(var + eps): 0 where there is no deviation at all, so that the output is `bias`; NaN below."""
    v = np.asarray(var, np.float64) + eps
    with np.errstate(invalid="ignore"):
        return np.divide(1.0, np.sqrt(v), out=np.zeros_like(v), where=v != 0)


def normalize(x, mean, var, eps=1e-5, axis=1):
    """x with mean 0 and deviation 1: what is multiplied by `weight`."""
    x = np.asarray(x, np.float64)
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
):
    z = preactivation(x, mean, var, weight, bias, eps, axis, residual)
    return activate(z, activation, negative_slope)


def backward(
    grad_output, x, mean, var, weight=None, bias=None, eps=1e-5, training=True, axis=1, residual=None,
    activation=None, negative_slope=0.01, z=None,
):  # fmt: skip
    """grad_input, grad_weight, grad_bias, and the gradient of what is added before the activation.

    With `training` mean and variance are taken for functions of `x`, otherwise for constants. `z` may give
    preactivations as another computation has rounded them, to side with it at the activation's kinks.
    """
    if z is None:
        z = preactivation(x, mean, var, weight, bias, eps, axis, residual)
    g = np.asarray(grad_output, np.float64) * derivative(z, activation, negative_slope)
    xhat = normalize(x, mean, var, eps, axis)
    grad_bias = g.sum(others(g, axis))
    grad_weight = (g * xhat).sum(others(g, axis))
    scale = inverse_deviation(var, eps) * (1.0 if weight is None else np.asarray(weight, np.float64))
    grad_input = g
    if training and g.size:
        count = g.size // g.shape[axis]
        grad_input = g - column(grad_bias, g.ndim, axis) / count
        grad_input = grad_input - xhat * column(grad_weight, g.ndim, axis) / count
    return grad_input * column(scale, g.ndim, axis), grad_weight, grad_bias, g


def update_running(running_mean, running_var, mean, var, count, momentum=0.1, unbiased=True):
    """The new running mean and variance; an empty batch changes nothing."""
    running_mean, running_var = np.asarray(running_mean, np.float64), np.asarray(running_var, np.float64)
    if count == 0:
        return running_mean, running_var
    if unbiased and count > 1:
        var = np.asarray(var) * count / (count - 1)
    return (
        (1 - momentum) * running_mean + momentum * np.asarray(mean),
        (1 - momentum) * running_var + momentum * np.asarray(var),
    )
