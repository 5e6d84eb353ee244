"""PyTorch's own operations, in float32 or float64, to judge fastbn.torch by; and how near results must be."""

import numpy as np
import pytest
from operations import GRADIENT, MEAN, OUTPUT, ROUNDING, SUM, VARIANCE

torch = pytest.importorskip("torch")
F = torch.nn.functional

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish")
FUSED = (None, "relu", "relu6", "leaky_relu")
SLOPE = 0.25


def composite(input, running_mean, running_var, weight, bias, training, momentum=0.1, eps=1e-5, residual=None,
              activation=None):  # fmt: skip
    """What fastbn.torch.batch_norm stands for."""
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        z = z + residual
    return activate(z, activation)


def activate(z, activation):
    if activation is None:
        return z
    return F.leaky_relu(z, SLOPE) if activation == "leaky_relu" else getattr(F, activation)(z)


def double(*tensors):
    """Leaves of float64, or None."""
    return [
        None if t is None else t.detach().double().clone().requires_grad_(t.requires_grad) for t in tensors
    ]


def parameters(C, seed=0):
    """weight, bias, running_mean, running_var"""
    g = torch.Generator().manual_seed(seed)
    uniform = [torch.rand(C, generator=g) for _ in range(4)]
    return (
        (0.5 + uniform[0]).requires_grad_(),
        (2 * uniform[1] - 1).requires_grad_(),
        2 * uniform[2] - 1,
        0.5 + uniform[3],
    )


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def away_from_kinks(grad_output, z):
    """The gradient with 0 where an activation may be on either side of a kink, by rounding."""
    near = sum(((z - kink).abs() < 1e-4 for kink in (-3, 0, 3, 6)), torch.zeros_like(z, dtype=torch.bool))
    return torch.where(near, 0.0, grad_output)


class Bounds:
    """How far from float64 the float32 results of a call may be: the bounds that the kernels keep."""

    def __init__(self, x, weight, bias, mean, var, eps, training):
        self.C, self.others = x.shape[1], [d for d in range(x.ndim) if d != 1]
        self.column = [1, -1] + [1] * (x.ndim - 2)
        deviation = (var + eps).sqrt()
        self.invstd = 1 / deviation
        self.scale = self.invstd if weight is None else weight.abs() * self.invstd
        self.xhat = ((x - mean.view(self.column)) / deviation.view(self.column)).abs()
        self.scaled = (x - mean.view(self.column)).abs() * self.scale.view(self.column)
        self.training, self.count = training, x.numel() // self.C
        self.var = var

    def output(self, y):
        return OUTPUT * torch.maximum(torch.ones_like(y), torch.maximum(y.abs(), self.scaled))

    def running_mean(self, mean, momentum):
        return 2 * ROUNDING * mean.abs() + momentum * MEAN * self.var.sqrt() + 1e-12

    def running_var(self, var, momentum):
        return 2 * ROUNDING * var.abs() + momentum * VARIANCE * self.var * self.count / max(1, self.count - 1)

    def gradients(self, dz):
        """Of input, weight, bias and residual, where dz is the gradient before the activation."""
        g = dz.abs()
        sums = [(g * self.xhat).sum(self.others), g.sum(self.others)]
        bound = GRADIENT * g
        if self.training:
            means = [(s / self.count).view(self.column) for s in sums]
            bound = bound + SUM * (self.xhat * means[0] + means[1])
        return self.scale.view(self.column) * bound, SUM * sums[0], SUM * sums[1], ROUNDING * g


def assert_near(actual, expected, bound, name="result"):
    assert actual.shape == expected.shape, name
    error = (actual.detach().double() - expected.detach().double()).abs()
    bad = ~(error <= bound)
    assert not bad.any(), (
        f"{name}: {int(bad.sum())} of {bad.numel()} are off, by up to {float(error[bad].max()):.3g} "
        f"where {float(torch.as_tensor(bound).expand_as(error)[bad].min()):.3g} is allowed"
    )


def assert_same(actual, expected, name="result"):
    """To the bit, and alike in all that can be seen of a tensor."""
    if expected is None:
        assert actual is None, name
        return
    for attribute in ("shape", "dtype", "layout", "device", "requires_grad"):
        assert getattr(actual, attribute) == getattr(expected, attribute), (name, attribute)
    assert actual.stride() == expected.stride(), name
    np.testing.assert_array_equal(actual.detach().numpy(), expected.detach().numpy(), name)


def outcome(function, *args, **kwargs):
    """The result of a call, or the type and text of what it raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)
