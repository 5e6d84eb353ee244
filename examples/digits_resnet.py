"""What fastbn changes about a network of PyTorch, the time: a small ResNet on digits, with it and without.

One of two equal networks is accelerated, in one line. They are trained on the same batches by turns, an epoch
each, and judged on digits that were held back. Losses agree but for rounding, which training makes grow.

    python examples/digits_resnet.py [--quick] [--out build/demo]
"""

import argparse
import copy
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fastbn.torch

BATCH = 64
NAMES = ("PyTorch", "fastbn")

Results = dict[str, list[tuple[list[float], float, float]]]  # losses, seconds, accuracy of each epoch


class Block(nn.Module):
    """Two convolutions with a shortcut around them (He et al., 2016). Nothing in it knows of fastbn."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(x)
        y = self.relu(self.bn1(y))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


def make_network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def load_data() -> list[torch.Tensor]:
    """Training and test images, training and test labels; three digits of four are for training."""
    x, labels = load_digits(return_X_y=True)
    x = (x / 8 - 1).astype("float32").reshape(-1, 1, 8, 8)
    split = train_test_split(x, labels, test_size=0.25, random_state=0, stratify=labels)
    return [torch.from_numpy(each) for each in split]


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    labels: torch.Tensor,
    order: torch.Tensor,
) -> tuple[list[float], float]:
    """Losses of the batches, and the seconds that they took."""
    network.train()
    losses = []
    start = time.perf_counter()
    for batch in order.split(BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


def accuracy(network: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    network.eval()
    with torch.no_grad():
        return float((network(x).argmax(1) == labels).float().mean())


def train(width: int, epochs: int) -> tuple[nn.Module, Results]:
    """The network with fastbn, and what both came to."""
    x, x_test, labels, labels_test = load_data()
    plain = make_network(width)
    networks = {"PyTorch": plain, "fastbn": fastbn.torch.accelerate(copy.deepcopy(plain))}
    optimizers = {
        name: torch.optim.SGD(network.parameters(), 0.02, momentum=0.9) for name, network in networks.items()
    }
    for network in networks.values():  # a first step takes longer; these are on copies
        again = copy.deepcopy(network)
        train_epoch(again, torch.optim.SGD(again.parameters()), x, labels, torch.arange(BATCH))
    results: Results = {name: [] for name in NAMES}
    for epoch in track(range(epochs), "training"):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for name, network in networks.items():
            losses, seconds = train_epoch(network, optimizers[name], x, labels, order)
            results[name].append((losses, seconds, accuracy(network, x_test, labels_test)))
    return networks["fastbn"], results


def print_table(console: Console, results: Results) -> None:
    table = Table(title="A ResNet on handwritten digits, with PyTorch's batch norm and with fastbn's")
    table.add_column("epoch", justify="right")
    for heading in ("mean loss", "test accuracy", "seconds"):
        for name in NAMES:
            table.add_column(f"{heading}\n{name}", justify="right")
    for epoch, both in enumerate(zip(*(results[name] for name in NAMES), strict=True), 1):
        losses = [f"{sum(losses) / len(losses):.5f}" for losses, _, _ in both]
        accuracies = [f"{accuracy:.1%}" for _, _, accuracy in both]
        table.add_row(str(epoch), *losses, *accuracies, *(f"{seconds:.2f}" for _, seconds, _ in both))
    console.print(table)


def draw(path: Path, results: Results) -> None:
    """The losses over each other, and the time of each epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    styles = {
        "PyTorch": {"linewidth": 4, "color": "tab:orange"},
        "fastbn": {"linewidth": 1.2, "color": "black"},
    }
    for name in NAMES:
        left.plot([loss for losses, _, _ in results[name] for loss in losses], label=name, **styles[name])
    left.set(xlabel="batch", ylabel="loss", yscale="log", title="the same losses")
    left.legend()
    for shift, name in zip((-0.2, 0.2), NAMES, strict=True):
        seconds = [seconds for _, seconds, _ in results[name]]
        places = [epoch + 1 + shift for epoch in range(len(seconds))]
        right.bar(places, seconds, 0.4, label=name, color=styles[name]["color"])
    right.set(xlabel="epoch", ylabel="seconds", title="time")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="two epochs of a narrow network")
    options = parser.parse_args()
    console = Console()

    network, results = train(*((8, 2) if options.quick else (32, 8)))
    print_table(console, results)
    with fastbn.torch.record() as calls:
        network(torch.zeros(2, 1, 8, 8))
    console.print(str(calls), highlight=False)
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "digits_resnet.png"
    draw(picture, results)
    console.print(f"Picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
