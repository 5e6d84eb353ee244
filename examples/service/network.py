"""The network that is served: convolutions by NumPy, batch norm and ReLU by fastbn or by NumPy as well.

It is a small DenseNet: 8x8 pixels -> 3x3 convolution to 64 channels -> 12 layers -> batch norm, ReLU -> means
of 4x4 pixels -> a linear layer -> the probabilities of ten digits. Each layer reads all channels so far, by
batch norm, ReLU, 1x1 convolution to 8, batch norm, ReLU, 3x3 convolution to 8, which then join the others.

A layer's second batch norm stands directly behind a convolution and is folded into that, at no cost. Its
first cannot be: what it reads is read by all later ones too, and behind it is a ReLU. Such batch norms are
what fastbn is for. Arrays of pixels are (N, H, W, C): a convolution of all images is one matrix product then.
Weights have the shapes of PyTorch.
"""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.lib.stride_tricks import as_strided

import fastbn
from fastbn.typing import Activation, Array

Weights = dict[str, Array]  # by PyTorch's names

WEIGHTS = Path(__file__).with_name("weights.npz")
BRIGHTEST = np.float32(16)  # of scikit-learn's pixels; the network sees values from 0 to 1
LAYERS = 12
SQUEEZED = 8  # channels between the convolutions of a layer
GROWTH = 8  # channels that it adds
CHANNELS = [64 + GROWTH * i for i in range(LAYERS + 1)]  # before each layer, and behind the last


class Network:
    """The trained network. It never changes, so any number of threads may call it at once."""

    def __init__(self, weights: Weights, batch_norm: str = "fastbn") -> None:
        if batch_norm not in NORMS:
            raise ValueError(f"batch_norm must be 'fastbn' or 'numpy', got {batch_norm!r}")
        layers = [state(weights, f"layer{i}.") for i in range(LAYERS)]
        norms = [state(layer, "norm1.") for layer in layers] + [state(weights, "norm.")]
        self.norms = [NORMS[batch_norm](norm) for norm in norms]
        self.first = weights["first.weight"]
        self.squeezes = [
            fastbn.fold_conv(layer["conv1.weight"], None, batch_norm_layer(state(layer, "norm2.")))
            for layer in layers
        ]
        self.convs = [layer["conv2.weight"] for layer in layers]
        self.linear = state(weights, "linear.")

    def __call__(self, images: Array) -> tuple[Array, float]:
        """Probabilities (N, 10) of images (N, 8, 8), and the seconds that batch norm took, with its ReLU."""
        features = np.empty((*images.shape, CHANNELS[-1]), np.float32)
        features[..., : CHANNELS[0]] = conv3x3(images[..., None] / BRIGHTEST, self.first)
        memory = np.empty_like(features)  # for what the batch norms put out, one after the other
        seconds = 0.0
        for i, channels in enumerate(CHANNELS):
            x = memory.reshape(-1)[: images.size * channels].reshape(*images.shape, channels)
            start = perf_counter()
            self.norms[i](features[..., :channels], out=x)
            seconds += perf_counter() - start
            if i < LAYERS:
                x = conv1x1(x, *self.squeezes[i])
                np.maximum(x, 0, out=x)
                features[..., channels : channels + GROWTH] = conv3x3(x, self.convs[i])
        return softmax(linear(mean_pool(x), **self.linear)), seconds


def load(batch_norm: str = "fastbn") -> Network:
    """The network with the weights that train.py has left."""
    with np.load(WEIGHTS) as weights:
        return Network(dict(weights), batch_norm)


def state(weights: Weights, prefix: str) -> Weights:
    """The part of `weights` whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): a for name, a in weights.items() if name.startswith(prefix)}


def batch_norm_layer(state: Weights, activation: Activation | None = None) -> fastbn.BatchNorm2d:
    bn = fastbn.BatchNorm2d(len(state["weight"]), axis=-1, activation=activation)
    bn.load_state_dict(state)
    return bn.eval()


def fastbn_norm(state: Weights) -> Callable[..., object]:
    return batch_norm_layer(state, "relu").freeze()


def numpy_norm(state: Weights, eps: float = 1e-5) -> Callable[..., object]:
    """Plain NumPy at its best: one multiplication and one addition, of what is known beforehand."""
    scale = state["weight"] / np.sqrt(state["running_var"] + np.float32(eps))
    shift = state["bias"] - state["running_mean"] * scale

    def norm(x: Array, out: Array) -> None:
        np.multiply(x, scale, out=out)
        out += shift
        np.maximum(out, 0, out=out)

    return norm


NORMS = {"fastbn": fastbn_norm, "numpy": numpy_norm}


def columns(x: Array) -> Array:
    """The 3x3 surroundings of each pixel, zeros beyond the edges: (N * H * W, 9 * C)."""
    n, h, w, c = x.shape
    padded = np.zeros((n, h + 2, w + 2, c), x.dtype)
    padded[:, 1:-1, 1:-1] = x
    image, row, pixel, channel = padded.strides  # three pixels of a row lie side by side
    return as_strided(padded, (n, h, w, 3, 3 * c), (image, row, pixel, row, channel)).reshape(-1, 9 * c)


def conv3x3(x: Array, weight: Array) -> Array:
    """Convolution with padding 1 of (N, H, W, C), weights (features, C, 3, 3), no bias."""
    matrix = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    return (columns(x) @ matrix.T).reshape(*x.shape[:-1], -1)


def conv1x1(x: Array, weight: Array, bias: Array | float) -> Array:
    """Convolution of (N, H, W, C), weights (features, C, 1, 1)."""
    y: Array = x.reshape(-1, x.shape[-1]) @ weight[:, :, 0, 0].T
    y += bias
    return y.reshape(*x.shape[:-1], -1)


def mean_pool(x: Array) -> Array:
    """Means of 4x4 pixels, one row for each image: (N, H / 4 * W / 4 * C)."""
    n, h, w, c = x.shape
    means: Array = x.reshape(n, h // 4, 4, w // 4, 4, c).mean((2, 4))
    return means.reshape(n, -1)


def linear(x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.T + bias


def softmax(logits: Array) -> Array:
    exps = np.exp(logits - logits.max(1, keepdims=True))
    probabilities: Array = exps / exps.sum(1, keepdims=True)
    return probabilities
