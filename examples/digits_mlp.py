"""What batch norm buys: a multilayer perceptron on handwritten digits, with and without it.

64 pixels -> 256 -> 128 -> 10 classes with ReLU between them, trained by plain stochastic gradient descent
at learning rates from harmless to absurd, from initial weights of several sizes. Batch norm and ReLU are
done by fastbn, forward and backward, the rest by NumPy. The accuracy is that on digits which were held
back, normalized by running averages.

    python examples/digits_mlp.py [--quick] [--out build/demo]
"""

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastbn
from fastbn.typing import Array

Labels = NDArray[np.int64]
Data = tuple[Array, Array, Labels, Labels]  # training and test images, training and test labels
Gradients = list[tuple[Array, Array]]  # (parameter, gradient)
Results = dict[tuple[bool, float, float], list[float]]  # accuracies by (batch norm, rate, scale)

RATES = (0.01, 0.1, 1, 3, 10)
SCALES = (0.1, 1, 10)  # of the initial weights, times He initialization
BATCH = 64


class Linear:
    def __init__(
        self, inputs: int, outputs: int, scale: float, rng: np.random.Generator, bias: bool = True
    ) -> None:
        he = scale * np.sqrt(2 / inputs)
        self.weight = rng.normal(0, he, (inputs, outputs)).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32) if bias else None

    def forward(self, x: Array) -> Array:
        self.x = x
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, grad: Array) -> Array:
        self.gradients = [(self.weight, self.x.T @ grad)]
        if self.bias is not None:
            self.gradients.append((self.bias, grad.sum(0)))
        return grad @ self.weight.T


class ReLU:
    gradients: Gradients = []  # noqa: RUF012

    def forward(self, x: Array) -> Array:
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, grad: Array) -> Array:
        return grad * (self.y > 0)


class BatchNormReLU:
    """Batch norm and ReLU, each way in one call of fastbn."""

    def __init__(self, features: int) -> None:
        self.bn: fastbn.BatchNorm = fastbn.BatchNorm1d(features, activation="relu")

    def forward(self, x: Array) -> Array:
        return self.bn(x)

    def backward(self, grad: Array) -> Array:
        grads = self.bn.backward(grad)
        self.gradients = [(self.bn.weight, grads.grad_weight), (self.bn.bias, grads.grad_bias)]
        return grads.grad_input


class Perceptron:
    """Linear layers with ReLU between them, and with batch norm before each ReLU where it is wanted."""

    def __init__(
        self, widths: tuple[int, ...], batch_norm: bool, scale: float, rng: np.random.Generator
    ) -> None:
        self.layers: list[Linear | ReLU | BatchNormReLU] = []
        for inputs, outputs in pairwise(widths[:-1]):
            # Batch norm subtracts any bias of the layer before it, and brings its own.
            self.layers.append(Linear(inputs, outputs, scale, rng, bias=not batch_norm))
            self.layers.append(BatchNormReLU(outputs) if batch_norm else ReLU())
        self.layers.append(Linear(widths[-2], widths[-1], scale, rng))

    def set_mode(self, training: bool) -> None:
        for layer in self.layers:
            if isinstance(layer, BatchNormReLU):
                layer.bn.train(training)

    def forward(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, grad: Array) -> Array:
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        return grad

    def gradients(self) -> Gradients:
        """(parameter, gradient) of every layer, after `backward`."""
        return [pair for layer in self.layers for pair in layer.gradients]


def cross_entropy(logits: Array, labels: Labels) -> tuple[np.float32, Array]:
    """Mean cross-entropy of the softmax, and its gradient with respect to `logits`."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(1, keepdims=True)
    exps = np.exp(shifted)
    sums = exps.sum(1, keepdims=True)
    loss = (np.log(sums[:, 0]) - shifted[rows, labels]).mean()
    grad = exps / sums
    grad[rows, labels] -= 1
    return loss, grad / np.float32(len(labels))


def accuracy(network: Perceptron, x: Array, labels: Labels) -> float:
    """Share of right answers with running averages in place of the batch's statistics."""
    network.set_mode(training=False)
    right = float((network.forward(x).argmax(1) == labels).mean())
    network.set_mode(training=True)
    return right


def load_data() -> Data:
    """Training and test images, training and test labels; three digits of four are for training."""
    x, labels = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    data: Data = train_test_split(x, labels, test_size=0.25, random_state=0, stratify=labels)
    return data


def train(data: Data, batch_norm: bool, rate: float, scale: float, epochs: int) -> list[float]:
    """Train one network; returns its accuracy on the test images before the first epoch and after each."""
    x, x_test, labels, labels_test = data
    rng = np.random.default_rng(0)  # the same weights and batches for every network of these widths
    network = Perceptron((64, 256, 128, 10), batch_norm, scale, rng)
    accuracies = [accuracy(network, x_test, labels_test)]
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            _, grad = cross_entropy(network.forward(x[batch]), labels[batch])
            network.backward(grad)
            for parameter, gradient in network.gradients():
                parameter -= np.float32(rate) * gradient
        accuracies.append(accuracy(network, x_test, labels_test))
    return accuracies


def print_table(console: Console, results: Results, epochs: int) -> None:
    table = Table(
        title=f"Test accuracy after {epochs} epochs, without and with batch norm (BN)",
        caption="10% is guessing: learning has not begun, or steps too long have killed all ReLUs",
    )
    table.add_column("initial weights\nlearning rate", justify="right")
    for scale in SCALES:
        table.add_column(f"He x {scale:g}\nplain", justify="right")
        table.add_column("\nBN", justify="right")
    for rate in RATES:
        row = [f"{rate:g}"]
        for scale in SCALES:
            for batch_norm in (False, True):
                last = results[batch_norm, rate, scale][-1]
                colour = "green" if last > 0.9 else "yellow" if last > 0.5 else "red"
                row.append(f"[{colour}]{last:.1%}[/]")
        table.add_row(*row)
    console.print(table)


def draw(path: Path, results: Results) -> None:
    """A panel for each learning rate and scale, with both networks in it."""
    figure, panels = plt.subplots(
        len(SCALES), len(RATES), figsize=(16, 9), sharex=True, sharey=True, layout="constrained"
    )
    for scale, row in zip(SCALES, panels, strict=True):
        for rate, axes in zip(RATES, row, strict=True):
            axes.plot(results[True, rate, scale], color="tab:blue", label="batch norm", linewidth=2.5)
            axes.plot(results[False, rate, scale], color="tab:orange", label="plain", linewidth=2.5)
            axes.axhline(0.1, color="black", linestyle=":", linewidth=1.5, label="guessing")
            axes.grid(alpha=0.3)
            axes.set_ylim(0, 1.02)
    for rate, axes in zip(RATES, panels[0], strict=True):
        axes.set_title(f"learning rate {rate:g}")
    for scale, axes in zip(SCALES, panels[:, 0], strict=True):
        axes.set_ylabel(f"initial weights He x {scale:g}\ntest accuracy")
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    panels[0, 0].legend(loc="center right")
    figure.suptitle("What batch norm buys: a perceptron on handwritten digits", fontsize=15)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="two epochs")
    options = parser.parse_args()
    epochs = 2 if options.quick else 30
    console = Console()

    data = load_data()
    runs = [(batch_norm, rate, scale) for scale in SCALES for rate in RATES for batch_norm in (False, True)]
    with np.errstate(all="ignore"):  # where numbers overflow it shows in the accuracy
        results = {
            (batch_norm, rate, scale): train(data, batch_norm, rate, scale, epochs)
            for batch_norm, rate, scale in track(runs, "training")
        }

    print_table(console, results, epochs)
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "digits_mlp.png"
    draw(picture, results)
    console.print(f"Picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
