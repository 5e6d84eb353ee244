"""A trained network meets data that have shifted: what its batch norms can do about it, without a label.

A small convolutional network learns handwritten digits and is then shown the held-back ones as a bad scanner
would deliver them: lower contrast, a grey veil, noise. They come in batches, and are classified

- as they are, by the running averages of training;
- by averages that are mixed with the statistics of each batch, `fastbn.torch.adapt` (Schneider et al., 2020);
- by TENT (Wang et al., 2021), which besides takes a step on weights and biases of the batch norms after each
  batch, such that the next answers are surer.

    python examples/tent.py [--quick] [--out build/demo]
"""

import argparse
import copy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from fastbn.torch import BatchNorm2d, adapt, recalibrate

BATCH = 50
SHIFTS = (0.0, 0.25, 0.5, 0.75, 1.0)
WAYS = ("as it is", "adapt, prior 16", "adapt, prior 0", "TENT")


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), BatchNorm2d(16, activation="relu"),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), BatchNorm2d(32, activation="relu"), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), BatchNorm2d(32, activation="relu"),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class Tent:
    """What Wang et al. (2021), "Tent: fully test-time adaptation by entropy minimization", do."""

    def __init__(self, network: nn.Module, rate: float = 0.005) -> None:
        self.network = network.train().requires_grad_(False)
        parameters = []
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(True)
                # In all modes by the batch, and no average moves.
                module.track_running_stats = False
                module.running_mean = module.running_var = None
                parameters += [module.weight, module.bias]
        self.optimizer = torch.optim.Adam(parameters, rate)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Answers of before the step, which is for the images to come."""
        outputs = self.network(images)
        entropy = -(outputs.softmax(1) * outputs.log_softmax(1)).sum(1).mean()
        entropy.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return outputs.detach()


def load_data() -> list[torch.Tensor]:
    """Training and test images of (N, 1, 8, 8), training and test labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=0.4, random_state=0, stratify=labels)
    return [torch.tensor(part, dtype=torch.float32 if part.ndim > 1 else torch.long) for part in parts]


def shift(images: torch.Tensor, amount: float) -> torch.Tensor:
    """From the images themselves at 0 to a bad scan at 1."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (1 - 0.6 * amount) * images + amount * (0.5 + 0.12 * noise)


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in track(range(epochs), "training"):
        for batch in torch.randperm(len(images)).split(BATCH)[:-1]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    recalibrate(network, images.split(BATCH), method="sequential")  # moving averages lag behind the weights
    return network.eval()


def answer(network: nn.Module, images: torch.Tensor, way: str) -> torch.Tensor:
    """The classes that the network gives the batches, one after the other, in one of the WAYS."""
    network = copy.deepcopy(network)
    batches = images.split(BATCH)
    if way == "TENT":
        tent = Tent(network)
        outputs = [tent(batch) for batch in batches]
    else:
        with torch.no_grad():
            if way == "as it is":
                outputs = [network(batch) for batch in batches]
            else:
                with adapt(network, prior=int(way.split()[-1])):
                    outputs = [network(batch) for batch in batches]
    return torch.cat(outputs).argmax(1)


def draw(path: Path, images: torch.Tensor, accuracies: dict[str, list[float]]) -> None:
    """Some digits as they get worse, and the share of right answers beside them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    framed = [nn.functional.pad(shift(images[:8], amount), (1, 1, 1, 1)) for amount in SHIFTS]
    rows = torch.stack(framed)[:, :, 0]  # (shifts, digits, 10, 10)
    left.imshow(rows.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
    left.set_yticks([10 * i + 4.5 for i in range(len(SHIFTS))], [f"{amount:g}" for amount in SHIFTS])
    left.set_xticks([])
    left.set_ylabel("shift")
    for way, values in accuracies.items():
        right.plot(SHIFTS, values, marker="o", label=way, linewidth=2.5)
    right.axhline(0.1, color="black", linestyle=":", label="guessing")
    right.set_xlabel("shift")
    right.set_ylabel("right answers")
    right.set_ylim(0, 1.02)
    right.grid(alpha=0.3)
    right.legend(loc="lower left")
    figure.suptitle("Digits that a network was not trained for, and what its batch norms do about it")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="one epoch of training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the images are tiny
    images, test_images, labels, test_labels = load_data()
    network = train(images, labels, 1 if arguments.quick else 8)
    accuracies = {
        way: [
            (answer(network, shift(test_images, amount), way) == test_labels).float().mean().item()
            for amount in SHIFTS
        ]
        for way in WAYS
    }
    table = Table(title=f"Right answers among {len(test_images)} shifted digits, in batches of {BATCH}")
    table.add_column("shift", justify="right")
    for way in WAYS:
        table.add_column(way, justify="right")
    for i, amount in enumerate(SHIFTS):
        table.add_row(f"{amount:g}", *(f"{accuracies[way][i]:.1%}" for way in WAYS))
    Console().print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "tent.png"
    draw(path, test_images, accuracies)
    print(path)


if __name__ == "__main__":
    main()
