"""What the networks of claims.py are made of, besides the linear layers and ReLUs of digits_mlp.py.

Each layer has `forward`, `backward`, which takes the gradient of what `forward` put out, and after that
`gradients`, pairs of a parameter and its gradient.
"""

from typing import Protocol

import numpy as np
from digits_mlp import Gradients

import fastbn
from fastbn.typing import Array


class Layer(Protocol):
    def forward(self, x: Array, /) -> Array: ...

    def backward(self, grad: Array, /) -> Array: ...

    @property
    def gradients(self) -> Gradients: ...


class BatchNorm:
    """fastbn's layer: statistics of the batch in training, running averages in evaluation."""

    training = True

    def __init__(self, features: int) -> None:
        self.bn = fastbn.BatchNorm1d(features)

    def forward(self, x: Array) -> Array:
        return self.bn.train(self.training)(x)

    def backward(self, grad: Array) -> Array:
        grads = self.bn.backward(grad)
        self.gradients: Gradients = [(self.bn.weight, grads.grad_weight), (self.bn.bias, grads.grad_bias)]
        return grads.grad_input


class LayerNorm:
    """Each row by its own mean and variance, over the features (Ba, Kiros and Hinton, 2016)."""

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        self.weight, self.bias = np.ones(features, np.float32), np.zeros(features, np.float32)
        self.eps = np.float32(eps)

    def forward(self, x: Array) -> Array:
        centred = x - x.mean(1, keepdims=True)
        self.scale = 1 / np.sqrt(np.square(centred).mean(1, keepdims=True) + self.eps)
        self.normalized = centred * self.scale
        y: Array = self.normalized * self.weight + self.bias
        return y

    def backward(self, grad: Array) -> Array:
        self.gradients: Gradients = [(self.weight, (grad * self.normalized).sum(0)), (self.bias, grad.sum(0))]
        grad = grad * self.weight
        along = (grad * self.normalized).mean(1, keepdims=True)
        of_x: Array = self.scale * (grad - grad.mean(1, keepdims=True) - self.normalized * along)
        return of_x


class Dropout:
    """In training a share of the values, drawn at random, becomes 0; the others grow to make up for it."""

    gradients: Gradients = []  # noqa: RUF012
    training = True

    def __init__(self, share: float, rng: np.random.Generator) -> None:
        self.share, self.rng = np.float32(share), rng

    def forward(self, x: Array) -> Array:
        if not self.training:
            return x
        self.factor = (self.rng.random(x.shape, np.float32) >= self.share) / (1 - self.share)
        return x * self.factor

    def backward(self, grad: Array) -> Array:
        return grad * self.factor


class Chain:
    """Layers one after the other."""

    def __init__(self, *layers: Layer) -> None:
        self.layers = layers

    def set_training(self, training: bool) -> None:
        """To training or evaluation, in chains within chains too; layers with one mode do not look at it."""
        for layer in self.layers:
            if isinstance(layer, Chain):
                layer.set_training(training)
            else:
                layer.training = training  # type: ignore[attr-defined]

    def forward(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, grad: Array) -> Array:
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        return grad

    @property
    def gradients(self) -> Gradients:
        return [pair for layer in self.layers for pair in layer.gradients]


class Skip(Chain):
    """What comes in is added to what the layers make of it (He et al., 2016)."""

    def forward(self, x: Array) -> Array:
        return x + super().forward(x)

    def backward(self, grad: Array) -> Array:
        return grad + super().backward(grad)
