"""Training on several processes: the same weights as one process gets from the whole batch.

The perceptron of digits_mlp.py. Each rank has its rows of every batch; batch norm takes those of all ranks
for one, and the gradients of the weights are added up. Rank 0 then trains once more, alone on the whole
batches, and tells how far the weights are apart.

    mpiexec -n 4 python -m mpi4py examples/mpi_train.py [--epochs 3]

Without mpiexec it runs on one rank. It needs pip install mpi4py mpich.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from digits_mlp import BatchNormReLU, Gradients, Labels, Linear, cross_entropy, load_data
from mpi4py import MPI

import fastbn
from fastbn.distributed import SyncBatchNorm
from fastbn.typing import Array

BATCH, RATE, WIDTHS = 66, 0.3, (64, 128, 64, 10)


class Network:
    """Linear layers, each but the last with batch norm and ReLU behind it."""

    def __init__(self, batch_norm: Callable[[int], fastbn.BatchNorm]) -> None:
        rng = np.random.default_rng(0)  # the same weights on every rank
        self.layers: list[Linear | BatchNormReLU] = []
        for inputs, outputs in pairwise(WIDTHS[:-1]):
            self.layers.append(Linear(inputs, outputs, 1, rng, bias=False))
            hidden = BatchNormReLU(outputs)
            hidden.bn = batch_norm(outputs)
            self.layers.append(hidden)
        self.layers.append(Linear(*WIDTHS[-2:], 1, rng))

    def forward(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, grad: Array) -> Gradients:
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        return [pair for layer in self.layers for pair in layer.gradients]


def train(network: Network, x: Array, labels: Labels, epochs: int, comm: MPI.Comm | None) -> None:
    """`comm` None: alone."""
    rng = np.random.default_rng(1)  # the same batches on every rank
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for first in range(0, len(x), BATCH):
            batch = order[first : first + BATCH]
            mine = batch[rank::size]
            _, grad = cross_entropy(network.forward(x[mine]), labels[mine])
            grad *= np.float32(len(mine) / len(batch))  # of the mean over the whole batch
            gradients = network.backward(grad)
            if comm is not None:  # in one message, in float64
                flat = np.concatenate([g.ravel() for _, g in gradients]).astype(np.float64)
                comm.Allreduce(MPI.IN_PLACE, flat)
                parts = np.split(flat, np.cumsum([g.size for _, g in gradients])[:-1])
                gradients = [
                    (p, part.reshape(p.shape)) for (p, _), part in zip(gradients, parts, strict=True)
                ]
            for parameter, gradient in gradients:
                parameter -= (RATE * gradient).astype(np.float32)


def state(network: Network) -> list[Array]:
    """Weights, and running averages of the batch norms."""
    arrays: list[Array] = []
    for layer in network.layers:
        arrays += layer.bn.state_dict().values() if isinstance(layer, BatchNormReLU) else [layer.weight]
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
    epochs = parser.parse_args().epochs
    comm = MPI.COMM_WORLD
    x, x_test, labels, labels_test = load_data()

    network = Network(lambda features: SyncBatchNorm(features, activation="relu"))
    train(network, x, labels, epochs, comm)
    if comm.rank:
        return
    for layer in network.layers:
        if isinstance(layer, BatchNormReLU):
            layer.bn.eval()  # which takes no other rank
    right = (network.forward(x_test).argmax(1) == labels_test).mean()
    print(f"{comm.size} ranks, {fastbn.get_num_threads()} threads each: {right:.1%} of the test digits right")

    alone = Network(lambda features: fastbn.BatchNorm1d(features, activation="relu"))
    train(alone, x, labels, epochs, None)
    apart = max(np.abs(a - b).max() for a, b in zip(state(network), state(alone), strict=True))
    print(f"weights and averages of one process on whole batches are the same to {apart:.1e}")


if __name__ == "__main__":
    main()
