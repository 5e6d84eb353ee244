"""Train the network of network.py on scikit-learn's digits and write its weights.

Batch norm and ReLU are done by fastbn, forward and backward, the rest by NumPy. Stochastic gradient descent
with momentum on three digits of four; the accuracy is that on the others. The same machine gives the same
weights each time.

    python examples/service/train.py [--epochs 30] [--out examples/service/weights.npz]
"""

import argparse
from pathlib import Path

import numpy as np
from network import BRIGHTEST, WEIGHTS, Network, Weights, columns, conv2d, linear, mean_pool, softmax
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

        self.norms = [fastbn.BatchNorm2d(c, axis=-1, activation="relu") for c in (16, 32)]
        self.parameters = {
            "conv1.weight": he(16, 1, 3, 3),
            "conv2.weight": he(32, 16, 3, 3),
            "linear.weight": he(10, 32 * 4 * 4),
            "linear.bias": np.zeros(10, np.float32),
        }
        for i, norm in enumerate(self.norms, 1):
            self.parameters |= {f"bn{i}.weight": norm.weight, f"bn{i}.bias": norm.bias}

    def forward(self, images: Array) -> Array:
        """Probabilities (N, 10) of images (N, 8, 8), normalized by the statistics of the batch."""
        x = images[..., None] / BRIGHTEST
        self.inputs: list[Array] = []
        for i, norm in enumerate(self.norms, 1):
            self.inputs.append(x)
            x = norm(conv2d(x, self.parameters[f"conv{i}.weight"]))
        self.pooled = mean_pool(x)
        return softmax(linear(self.pooled, self.parameters["linear.weight"], self.parameters["linear.bias"]))

    def backward(self, probabilities: Array, labels: Labels) -> None:
        """Gradients of the mean cross-entropy of what `forward` gave."""
        grad: Array = (probabilities - np.eye(10, dtype=np.float32)[labels]) / np.float32(len(labels))
        self.gradients = {"linear.weight": grad.T @ self.pooled, "linear.bias": grad.sum(0)}
        n, h, w, _ = self.inputs[-1].shape
        grad = np.matmul(grad, self.parameters["linear.weight"]) / 4  # each pixel had a fourth of its mean
        grad = grad.reshape(n, h // 2, w // 2, -1).repeat(2, axis=1).repeat(2, axis=2)
        for i in (2, 1):
            grads = self.norms[i - 1].backward(grad)
            self.gradients |= {f"bn{i}.weight": grads.grad_weight, f"bn{i}.bias": grads.grad_bias}
            grad = grads.grad_input
            weight, x = self.parameters[f"conv{i}.weight"], self.inputs[i - 1]
            by_column = grad.reshape(-1, len(weight)).T @ columns(x)
            self.gradients[f"conv{i}.weight"] = by_column.reshape(weight.shape)
            if i > 1:  # the gradient of a convolution is one with the filters turned round
                grad = conv2d(grad, weight[:, :, ::-1, ::-1].swapaxes(0, 1))

    def weights(self) -> Weights:
        """All that inference needs, running averages included, under PyTorch's names."""
        norms = {
            f"bn{i}.{name}": array
            for i, norm in enumerate(self.norms, 1)
            for name, array in norm.state_dict().items()
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
