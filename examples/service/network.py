"""The network that is served: convolutions by NumPy, batch norm and ReLU by fastbn or by the NumPy baseline.

8x8 pixels -> [3x3 convolution, batch norm, ReLU] twice, to 16 and to 32 channels -> means of 2x2 pixels ->
a linear layer -> the probabilities of ten digits. Arrays of pixels are (N, H, W, C): all convolutions of a
batch are one matrix product then. Weights have the shapes of PyTorch.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import fastbn
from fastbn import baseline
from fastbn.typing import Array

Weights = dict[str, Array]  # by PyTorch's names

WEIGHTS = Path(__file__).with_name("weights.npz")
BRIGHTEST = np.float32(16)  # of scikit-learn's pixels; the network sees values from 0 to 1


class Network:
    """The trained network. It never changes, so any number of threads may call it at once."""

    def __init__(self, weights: Weights, batch_norm: str = "fastbn") -> None:
        make_norm = {"fastbn": fastbn_norm, "numpy": numpy_norm}.get(batch_norm)
        if make_norm is None:
            raise ValueError(f"batch_norm must be 'fastbn' or 'numpy', got {batch_norm!r}")
        self.stages = [(weights[f"conv{i}.weight"], make_norm(state(weights, f"bn{i}."))) for i in (1, 2)]
        self.linear = state(weights, "linear.")

    def __call__(self, images: Array) -> tuple[Array, float]:
        """Probabilities (N, 10) of images (N, 8, 8), and the seconds that batch norm took."""
        x = images[..., None] / BRIGHTEST
        seconds = 0.0
        for conv, norm in self.stages:
            x = conv2d(x, conv)
            start = perf_counter()
            norm(x, out=x)
            seconds += perf_counter() - start
        return softmax(linear(mean_pool(x), **self.linear)), seconds


def load(batch_norm: str = "fastbn") -> Network:
    """The network with the weights that train.py has left."""
    with np.load(WEIGHTS) as weights:
        return Network(dict(weights), batch_norm)


def state(weights: Weights, prefix: str) -> Weights:
    """The part of `weights` whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): a for name, a in weights.items() if name.startswith(prefix)}


def fastbn_norm(state: Weights) -> Callable[..., Array]:
    bn = fastbn.BatchNorm2d(len(state["weight"]), axis=-1, activation="relu")
    bn.load_state_dict(state)
    return bn.freeze()


def numpy_norm(state: Weights) -> Callable[..., Array]:
    statistics: dict[str, Any] = {
        name: state[name] for name in ("running_mean", "running_var", "weight", "bias")
    }
    return partial(baseline.inference, **statistics, axis=-1, relu=True)


def columns(x: Array) -> Array:
    """The 3x3 surroundings of each pixel, zeros beyond the edges: (N * H * W, C * 9)."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sliding_window_view(padded, (3, 3), axis=(1, 2)).reshape(-1, 9 * x.shape[-1])


def conv2d(x: Array, weight: Array) -> Array:
    """3x3 convolution with padding 1 of (N, H, W, C), weights (features, C, 3, 3), no bias."""
    return (columns(x) @ weight.reshape(len(weight), -1).T).reshape(*x.shape[:-1], -1)


def mean_pool(x: Array) -> Array:
    """Means of 2x2 pixels, one row for each image: (N, H / 2 * W / 2 * C)."""
    n, h, w, c = x.shape
    means: Array = x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return means.reshape(n, -1)


def linear(x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.T + bias


def softmax(logits: Array) -> Array:
    exps = np.exp(logits - logits.max(1, keepdims=True))
    probabilities: Array = exps / exps.sum(1, keepdims=True)
    return probabilities
