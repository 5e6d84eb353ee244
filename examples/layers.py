"""What the networks of claims.py are made of, besides the linear layers and ReLUs of digits_mlp.py.

Each layer has `forward`, `backward`, which takes the gradient of what `forward` put out, and after that
`gradients`, pairs of a parameter and its gradient.
"""

import numpy as np

import fastbn


class BatchNorm:
    """fastbn's layer: statistics of the batch in training, running averages in evaluation."""

    training = True

    def __init__(self, features):
        self.bn = fastbn.BatchNorm1d(features)

    def forward(self, x):
        return self.bn.train(self.training)(x)

    def backward(self, grad):
        grads = self.bn.backward(grad)
        self.gradients = [(self.bn.weight, grads.grad_weight), (self.bn.bias, grads.grad_bias)]
        return grads.grad_input


class LayerNorm:
    """Each row by its own mean and variance, over the features (Ba, Kiros and Hinton, 2016)."""

    def __init__(self, features, eps=1e-5):
        self.weight, self.bias = np.ones(features, np.float32), np.zeros(features, np.float32)
        self.eps = np.float32(eps)

    def forward(self, x):
        centred = x - x.mean(1, keepdims=True)
        self.scale = 1 / np.sqrt(np.square(centred).mean(1, keepdims=True) + self.eps)
        self.normalized = centred * self.scale
        return self.normalized * self.weight + self.bias

    def backward(self, grad):
        self.gradients = [(self.weight, (grad * self.normalized).sum(0)), (self.bias, grad.sum(0))]
        grad = grad * self.weight
        along = (grad * self.normalized).mean(1, keepdims=True)
        return self.scale * (grad - grad.mean(1, keepdims=True) - self.normalized * along)


class Dropout:
    """In training a share of the values, drawn at random, becomes 0; the others grow to make up for it."""

    gradients = ()
    training = True

    def __init__(self, share, rng):
        self.share, self.rng = np.float32(share), rng

    def forward(self, x):
        if not self.training:
            return x
        self.factor = (self.rng.random(x.shape, np.float32) >= self.share) / (1 - self.share)
        return x * self.factor

    def backward(self, grad):
        return grad * self.factor


class Chain:
    """Layers one after the other."""

    def __init__(self, *layers):
        self.layers = layers

    def set_training(self, training):
        """To training or evaluation, in chains within chains too; layers with one mode do not look at it."""
        for layer in self.layers:
            if isinstance(layer, Chain):
                layer.set_training(training)
            else:
                layer.training = training

    def forward(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, grad):
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        return grad

    @property
    def gradients(self):
        return [pair for layer in self.layers for pair in layer.gradients]


class Skip(Chain):
    """What comes in is added to what the layers make of it (He et al., 2016)."""

    def forward(self, x):
        return x + super().forward(x)

    def backward(self, grad):
        return grad + super().backward(grad)
