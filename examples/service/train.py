"""Train the network of network.py on scikit-learn's digits and write its weights.

Batch norm and ReLU are done by fastbn, forward and backward, the rest by NumPy. Stochastic gradient descent
with momentum on three digits of four; the accuracy is that on the others. The same machine gives the same
weights each time.

    python examples/service/train.py [--epochs 30] [--out examples/service/weights.npz]
"""

import argparse
from pathlib import Path

import numpy as np
from network import (
    BRIGHTEST,
    CHANNELS,
    GROWTH,
    SQUEEZED,
    WEIGHTS,
    Network,
    Weights,
    columns,
    conv1x1,
    conv3x3,
    linear,
    mean_pool,
    softmax,
)
from numpy.typing import NDArray
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import fastbn
from fastbn.typing import Array

Labels = NDArray[np.int64]

BATCH = 64
RATE = np.float32(0.05)
MOMENTUM = np.float32(0.9)


class TrainedNetwork:
    """The network of network.py as it learns. After `backward`, `gradients` has those of `parameters`."""

    def __init__(self, rng: np.random.Generator) -> None:
        def he(*shape: int) -> Array:  # initial weights of He et al.
            return rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)

        def norm(channels: int) -> fastbn.BatchNorm2d:
            return fastbn.BatchNorm2d(channels, axis=-1, activation="relu")

        self.norms: dict[str, fastbn.BatchNorm2d] = {}
        self.parameters: Weights = {"first.weight": he(CHANNELS[0], 1, 3, 3)}
        for i, channels in enumerate(CHANNELS[:-1]):
            self.norms |= {f"layer{i}.norm1": norm(channels), f"layer{i}.norm2": norm(SQUEEZED)}
            self.parameters[f"layer{i}.conv1.weight"] = he(SQUEEZED, channels, 1, 1)
            self.parameters[f"layer{i}.conv2.weight"] = he(GROWTH, SQUEEZED, 3, 3)
        self.norms["norm"] = norm(CHANNELS[-1])
        for name, each in self.norms.items():
            self.parameters |= {f"{name}.weight": each.weight, f"{name}.bias": each.bias}
        self.parameters |= {
            "linear.weight": he(10, 4 * CHANNELS[-1]),
            "linear.bias": np.zeros(10, np.float32),
        }

    def forward(self, images: Array) -> Array:
        """Probabilities (N, 10) of images (N, 8, 8), normalized by the statistics of the batch."""
        self.images = images[..., None] / BRIGHTEST
        features = np.empty((*images.shape, CHANNELS[-1]), np.float32)
        features[..., : CHANNELS[0]] = conv3x3(self.images, self.parameters["first.weight"])
        self.inputs: Weights = {}  # of the convolutions
        for i, channels in enumerate(CHANNELS[:-1]):
            conv1, conv2 = f"layer{i}.conv1", f"layer{i}.conv2"
            x = self.inputs[conv1] = self.norms[f"layer{i}.norm1"](features[..., :channels])
            x = conv1x1(x, self.parameters[f"{conv1}.weight"], 0)
            x = self.inputs[conv2] = self.norms[f"layer{i}.norm2"](x)
            features[..., channels : channels + GROWTH] = conv3x3(x, self.parameters[f"{conv2}.weight"])
        self.pooled = mean_pool(self.norms["norm"](features))
        return softmax(linear(self.pooled, self.parameters["linear.weight"], self.parameters["linear.bias"]))

    def backward(self, probabilities: Array, labels: Labels) -> None:
        """Gradients of the mean cross-entropy of what `forward` gave."""
        grad: Array = (probabilities - np.eye(10, dtype=np.float32)[labels]) / np.float32(len(labels))
        self.gradients = {"linear.weight": grad.T @ self.pooled, "linear.bias": grad.sum(0)}
        n, h, w, _ = self.images.shape
        grad = (
            np.matmul(grad, self.parameters["linear.weight"]) / 16
        )  # each pixel had a sixteenth of its mean
        grad = grad.reshape(n, h // 4, w // 4, -1).repeat(4, axis=1).repeat(4, axis=2)
        grads = self.norm_backward("norm", grad)  # of all features; what each layer reads adds to it
        for i, channels in reversed([*enumerate(CHANNELS[:-1])]):
            grad = grads[..., channels : channels + GROWTH]
            grad = self.conv3x3_backward(f"layer{i}.conv2", grad)
            grad = self.norm_backward(f"layer{i}.norm2", grad)
            grad = self.conv1x1_backward(f"layer{i}.conv1", grad)
            grads[..., :channels] += self.norm_backward(f"layer{i}.norm1", grad)
        by_column = grads[..., : CHANNELS[0]].reshape(n * h * w, -1).T @ columns(self.images)
        self.gradients["first.weight"] = by_column.reshape(-1, 1, 3, 3)

    def norm_backward(self, name: str, grad: Array) -> Array:
        grads = self.norms[name].backward(grad)
        self.gradients |= {f"{name}.weight": grads.grad_weight, f"{name}.bias": grads.grad_bias}
        return grads.grad_input

    def conv1x1_backward(self, name: str, grad: Array) -> Array:
        x, weight = self.inputs[name], self.parameters[f"{name}.weight"]
        features, c, _, _ = weight.shape
        by_channel = grad.reshape(-1, features).T @ x.reshape(-1, c)
        self.gradients[f"{name}.weight"] = by_channel[:, :, None, None]
        return conv1x1(grad, weight.swapaxes(0, 1), 0)

    def conv3x3_backward(self, name: str, grad: Array) -> Array:
        x, weight = self.inputs[name], self.parameters[f"{name}.weight"]
        features, c, _, _ = weight.shape
        by_column = grad.reshape(-1, features).T @ columns(x)
        self.gradients[f"{name}.weight"] = by_column.reshape(features, 3, 3, c).transpose(0, 3, 1, 2)
        # A convolution too, with the filters turned round.
        return conv3x3(grad, weight[:, :, ::-1, ::-1].swapaxes(0, 1))

    def weights(self) -> Weights:
        """All that inference needs, running averages included, under PyTorch's names."""
        norms = {
            f"{name}.{part}": array
            for name, norm in self.norms.items()
            for part, array in norm.state_dict().items()
        }
        return self.parameters | norms


def load_data() -> tuple[Array, Array, Labels, Labels]:
    """Training and test images (N, 8, 8) with values from 0 to 16, training and test labels."""
    digits = load_digits()
    images = digits.images.astype(np.float32)
    split: tuple[Array, Array, Labels, Labels] = train_test_split(
        images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    return split


@threadpool_limits.wrap(limits=1, user_api="blas")  # batches this small gain nothing from more threads
def train(images: Array, labels: Labels, epochs: int) -> Weights:
    """Weights after so many epochs, the rate falling from RATE to 0 in half a cosine."""
    fastbn.set_num_threads(1)
    rng = np.random.default_rng(0)
    network = TrainedNetwork(rng)
    velocities = {name: np.zeros_like(array) for name, array in network.parameters.items()}
    for epoch in track(range(epochs), "training"):
        rate = RATE * np.float32((1 + np.cos(np.pi * epoch / epochs)) / 2)
        order = rng.permutation(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            shifted = np.roll(images[batch], rng.integers(-1, 2), axis=2)  # sideways, by a pixel at most
            network.backward(network.forward(shifted), labels[batch])
            for name, parameter in network.parameters.items():
                velocity = velocities[name]
                velocity *= MOMENTUM
                velocity += network.gradients[name]
                parameter -= rate * velocity
    return network.weights()


def accuracy(weights: Weights, images: Array, labels: Labels) -> float:
    probabilities, _ = Network(weights)(images)
    return float((probabilities.argmax(1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the .npz file to write")
    options = parser.parse_args()
    images, images_test, labels, labels_test = load_data()
    weights = train(images, labels, options.epochs)
    np.savez(options.out, **weights)
    right = accuracy(weights, images_test, labels_test)
    print(f"{right:.2%} of {len(labels_test)} test digits; weights: {options.out}")


if __name__ == "__main__":
    main()
