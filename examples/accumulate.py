"""Gradient accumulation that is exact with batch norm: a batch in parts, normalized as one.

Where a batch does not fit into memory, its gradient is added up over parts. With batch norm between the
layers the sum is another gradient, because each part is normalized by itself. Here it is the one of the
batch: the parts go through the network once for each batch norm to pool its statistics (BatchStats), once for
each to pool the sums that its gradient is made of (GradSums), and once for the gradients of the weights. Only
one part is in memory at a time, and everything is computed anew each time: 2 n + 1 passes for n batch norms.

A perceptron on handwritten digits, batches of 256 in parts of 32. The program prints how far its gradients
are from those of the whole batch, and what training comes to.

    python examples/accumulate.py [--epochs 10]
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastbn
from fastbn.typing import Array

WIDTHS = (64, 128, 64, 10)
BATCH, PART = 256, 32
RATE = np.float32(0.5)

Labels = NDArray[np.int64]
Part = tuple[Array, Labels]  # images and labels
Steps = list[tuple[Array, Array]]
Stats = list[fastbn.BatchStats]
OfBatch = tuple[float, list[Array], Stats]  # loss, gradients, statistics
How = Callable[["Network", list[Part]], OfBatch]


class Network:
    """Linear layers, and behind each but the last one batch norm and ReLU."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.weights = [rng.normal(0, np.sqrt(2 / n), (n, m)).astype(np.float32) for n, m in pairwise(WIDTHS)]
        self.norms = [fastbn.BatchNorm1d(width) for width in WIDTHS[1:-1]]

    def parameters(self) -> list[Array]:
        return [*self.weights, *(vector for bn in self.norms for vector in (bn.weight, bn.bias))]

    def forward(self, x: Array, stats: Stats) -> Steps:
        """Input and output of each linear layer, as far as the statistics of batch norms reach."""
        steps = [(x, x @ self.weights[0])]
        for bn, of_batch, weight in zip(self.norms, stats, self.weights[1:], strict=False):
            x, _ = fastbn.batch_norm_forward(
                steps[-1][1], bn.weight, bn.bias, bn.eps, stats=of_batch, activation="relu"
            )
            steps.append((x, x @ weight))
        return steps

    def backward(self, x: Array, labels: Labels, stats: Stats, sums: Sequence[fastbn.GradSums | None]) -> Any:
        """Summed loss and gradients of the linear layers, of a part of a batch.

        Where the sums of a batch norm are missing, those of this part are returned instead.
        """
        steps = self.forward(x, stats)
        loss, grad = cross_entropy(steps[-1][1], labels)
        gradients = [steps[-1][0].T @ grad]
        for k in reversed(range(len(self.norms))):
            x, z = steps[k]
            bn = self.norms[k]
            arguments = grad @ self.weights[k + 1].T, z, stats[k], bn.weight, bn.bias, bn.eps
            if sums[k] is None:
                return fastbn.batch_norm_backward_sums(*arguments, activation="relu")
            grad = fastbn.batch_norm_backward(*arguments, activation="relu", sums=sums[k]).grad_input
            gradients.append(x.T @ grad)
        return loss, gradients[::-1]

    def accuracy(self, x: Array, labels: Labels) -> float:
        """By the running averages."""
        averages = [fastbn.BatchStats(bn.running_mean, bn.running_var, 1) for bn in self.norms]
        return float((self.forward(x, averages)[-1][1].argmax(1) == labels).mean())


def cross_entropy(logits: Array, labels: Labels) -> tuple[float, Array]:
    """Summed over the rows, and its gradient with respect to `logits`."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(1, keepdims=True)
    exps = np.exp(shifted)
    sums = exps.sum(1, keepdims=True)
    grad = exps / sums
    grad[rows, labels] -= 1
    return float((np.log(sums[:, 0]) - shifted[rows, labels]).sum()), grad


def gradients_of_batch(network: Network, parts: list[Part]) -> OfBatch:
    """Mean loss of the batch that the parts make up, gradients as parameters() has them, and statistics."""
    count = len(network.norms)
    stats: Stats = []
    while len(stats) < count:
        first, *others = (fastbn.batch_stats(network.forward(x, stats)[-1][1]) for x, _ in parts)
        stats.append(first.merge(*others))
    sums: list[Any] = [None] * count
    for k in reversed(range(count)):
        of_parts = [network.backward(x, labels, stats, sums) for x, labels in parts]
        sums[k] = of_parts[0].merge(*of_parts[1:])
    losses, gradients = zip(*(network.backward(x, labels, stats, sums) for x, labels in parts), strict=True)
    total = [sum(each) for each in zip(*gradients, strict=True)]
    for bn, of_batch, of_gradient in zip(network.norms, stats, sums, strict=True):
        total += of_gradient.parameter_grads(of_batch, bn.eps)
    rows = np.float32(sum(len(x) for x, _ in parts))
    return sum(losses) / rows, [gradient / rows for gradient in total], stats


def gradients_of_parts(network: Network, parts: list[Part]) -> OfBatch:
    """What adding up comes to where each part is normalized by itself."""
    each = [gradients_of_batch(network, [part]) for part in parts]
    gradients = [
        sum(of_parts) / np.float32(len(parts)) for of_parts in zip(*(g for _, g, _ in each), strict=True)
    ]
    return sum(loss for loss, _, _ in each) / len(parts), gradients, each[0][2]


def cut(x: Array, labels: Labels, size: int = PART) -> list[Part]:
    return [(x[start : start + size], labels[start : start + size]) for start in range(0, len(x), size)]


def train(data: list[Array], epochs: int, how: How, size: int = PART) -> tuple[Network, list[float], float]:
    """A network trained on parts of that size; its loss in each step, and its accuracy on the test images."""
    x, x_test, labels, labels_test = data
    network, rng, losses = Network(), np.random.default_rng(1), []
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            loss, gradients, stats = how(network, cut(x[batch], labels[batch], size))
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter -= RATE * gradient
            for bn, of_batch in zip(network.norms, stats, strict=True):
                fastbn.update_running(bn.running_mean, bn.running_var, of_batch)
            losses.append(loss)
    return network, losses, network.accuracy(x_test, labels_test)


def distance(gradients: list[Array], expected: list[Array]) -> float:
    """The largest share of its length by which one of the gradients is off."""
    return max(
        float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        for ours, theirs in zip(gradients, expected, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    x, labels = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    data = train_test_split(x, labels, test_size=0.25, random_state=0, stratify=labels)

    ways = {
        f"whole batches of {BATCH}": (gradients_of_batch, BATCH),
        f"parts of {PART}, normalized as one": (gradients_of_batch, PART),
        f"parts of {PART}, each by itself": (gradients_of_parts, PART),
    }
    network, first = Network(), slice(BATCH)
    expected = None
    for name, (how, size) in ways.items():
        _, gradients, _ = how(network, cut(data[0][first], data[2][first], size))
        expected = gradients if expected is None else expected
        off = distance(gradients, expected)
        _, losses, accuracy = train(data, options.epochs, how, size)
        print(f"{name}: gradients off by {off:.1e}, loss {losses[-1]:.4f} at last, {accuracy:.1%} right")


if __name__ == "__main__":
    main()
