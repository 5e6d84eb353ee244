"""The first layer of a network on real photographs: Conv2d(3, 16, 3, padding=1), BatchNorm2d(16), ReLU.

Batch norm and ReLU are done by fastbn in one call, and by a NumPy baseline. Both are timed and their
results are compared, in training (statistics of the batch, running averages updated) and in inference
(running averages). The convolution is NumPy's in both cases and not timed. The feature maps become a
picture.

    python examples/first_layer.py [--quick] [--out build/demo]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen

import matplotlib.pyplot as plt
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_sample_images

import fastbn
from fastbn import baseline
from fastbn.typing import Array

CHANNELS = 16


def load_photographs() -> Array:
    """Two photographs of scikit-learn as an array of shape (2, 3, 427, 640), values from 0 to 1."""
    images = np.stack(load_sample_images().images).astype(np.float32) / 255
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def random_crops(photographs: Array, count: int, size: int, rng: np.random.Generator) -> Array:
    """A training batch as image networks get it: squares from anywhere, every other one mirrored."""
    _, _, height, width = photographs.shape
    crops = []
    for i in range(count):
        top, left = rng.integers(height - size), rng.integers(width - size)
        crop = photographs[i % len(photographs), :, top : top + size, left : left + size]
        crops.append(crop[..., ::-1] if i % 4 > 1 else crop)
    return np.stack(crops)


def make_filters(rng: np.random.Generator) -> tuple[Array, list[str]]:
    """Weights (16, 3, 3, 3) and names: eight filters for edges and colours, eight random ones (He)."""
    grey = np.array([0.299, 0.587, 0.114], np.float32)
    vertical = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32)
    rising = np.array([[0, 1, 2], [-1, 0, 1], [-2, -1, 0]], np.float32)
    laplace = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32)
    blur = np.full((3, 3), 1 / 9, np.float32)
    by_hand = {  # name: (weight of red, green and blue, spatial filter)
        "vertical edges": (grey, vertical),
        "horizontal edges": (grey, vertical.T),
        "rising diagonals": (grey, rising),
        "falling diagonals": (grey, rising[:, ::-1]),
        "spots": (grey, -laplace),
        "brightness": (grey, blur),
        "red - green": (np.array([1, -1, 0], np.float32), blur),
        "blue - yellow": (np.array([-0.5, -0.5, 1], np.float32), blur),
    }
    drawn = CHANNELS - len(by_hand)
    random = rng.normal(0, np.sqrt(2 / 27), (drawn, 3, 3, 3)).astype(np.float32)
    filters = [colour[:, None, None] * spatial for colour, spatial in by_hand.values()]
    return np.concatenate([filters, random]), [*by_hand, *(f"random {i + 1}" for i in range(drawn))]


def conv2d(images: Array, filters: Array) -> Array:
    """3x3 convolution, padding 1: the patches under the filter become columns of one matrix per image."""
    n, c, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = sliding_window_view(padded, (3, 3), axis=(2, 3)).transpose(0, 1, 4, 5, 2, 3)
    columns = patches.reshape(n, c * 9, height * width)
    y: Array = filters.reshape(len(filters), -1) @ columns
    return y.reshape(n, len(filters), height, width)


def race(
    description: str, contestants: dict[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; they take turns, so that a slow moment hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in track(range(-3, rounds), description):
        for name, run in contestants.items():
            start = perf_counter()
            run()
            if turn >= 0:  # the turns before warm up caches, threads and memory
                seconds[name].append(perf_counter() - start)
    return seconds


def add_result(
    table: Table, mode: str, x: Array, seconds: dict[str, list[float]], difference: np.float32
) -> None:
    fast, plain = (1e3 * median(seconds[name]) for name in ("fastbn", "NumPy"))
    shape = "x".join(map(str, x.shape))
    table.add_row(
        mode, shape, f"{plain:.2f} ms", f"{fast:.2f} ms", f"{plain / fast:.1f}", f"{difference:.1e}"
    )


def draw(path: Path, photographs: Array, maps: Array, names: list[str], before: Array, after: Array) -> None:
    """The photographs beside their feature maps; below, the spread of each channel before and after."""
    figure = plt.figure(figsize=(20, 12), layout="constrained")
    *rows, bottom = figure.subfigures(3, 1, height_ratios=[3, 3, 3.2], hspace=0.02)
    for row, photograph, features in zip(rows, photographs, maps, strict=True):
        panels = row.subplot_mosaic(
            [["photograph", *range(8)], ["photograph", *range(8, 16)]], width_ratios=[2.2] + 8 * [1]
        )
        panels["photograph"].imshow(photograph.transpose(1, 2, 0))
        for i, (feature, name) in enumerate(zip(features, names, strict=True)):
            image = panels[i].imshow(feature, cmap="magma", vmin=0, vmax=3)
            panels[i].set_title(name, fontsize=11)
        for axes in panels.values():
            axes.axis("off")
        row.colorbar(
            image,
            ax=list(panels.values()),
            label="deviations above the mean",
            pad=0.01,
            aspect=15,
            shrink=0.9,
        )
    for axes, x, title in zip(
        bottom.subplots(1, 2, sharey=True),
        (before, after),
        (
            "after the convolution: each channel has its own mean and deviation",
            "after batch norm: mean 0, deviation 1",
        ),
        strict=True,
    ):
        values = x.transpose(1, 0, 2, 3).reshape(CHANNELS, -1)
        mean, deviation = values.mean(1), values.std(1)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.errorbar(names, mean, deviation, fmt="o", color="tab:purple", capsize=5, markersize=7)
        axes.tick_params("x", rotation=40)
        plt.setp(axes.get_xticklabels(), ha="right", rotation_mode="anchor")
        axes.set_ylabel("mean and deviation of the batch")
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(
        "Conv2d(3, 16, 3) → BatchNorm2d(16) → ReLU: all feature maps in one colour scale", fontsize=16
    )
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="small batch, few rounds")
    options = parser.parse_args()
    count, size, rounds = (4, 64, 3) if options.quick else (16, 224, 30)
    rng = np.random.default_rng(0)
    console = Console()

    photographs = load_photographs()
    filters, names = make_filters(rng)
    table = Table(title="Batch norm + ReLU behind a convolution")
    for column in ("", "shape", "NumPy", "fastbn", "times\nfaster", "largest\ndifference"):
        table.add_column(column, justify="right" if column else "left")

    # Training: normalize by the batch. momentum=None makes the running averages means over all batches.
    x = conv2d(random_crops(photographs, count, size, rng), filters)
    bn = fastbn.BatchNorm2d(CHANNELS, momentum=None, activation="relu")
    running_mean, running_var = bn.running_mean.copy(), bn.running_var.copy()  # the baseline has its own
    ours, theirs = np.empty_like(x), np.empty_like(x)
    seconds = race(
        "training ",
        {
            "fastbn": lambda: bn(x, out=ours),
            "NumPy": lambda: baseline.training_forward(
                x, running_mean, running_var, bn.weight, bn.bias, relu=True, out=theirs
            ),
        },
        rounds,
    )
    add_result(table, "training", x, seconds, np.abs(ours - theirs).max())

    # Inference: normalize the whole photographs by the running averages.
    whole = conv2d(photographs, filters)
    frozen = bn.freeze()
    ours, theirs = np.empty_like(whole), np.empty_like(whole)
    state = bn.running_mean, bn.running_var, bn.weight, bn.bias
    seconds = race(
        "inference",
        {
            "fastbn": lambda: frozen(whole, out=ours),
            "NumPy": lambda: baseline.inference(whole, *state, relu=True, out=theirs),
        },
        rounds,
    )
    add_result(table, "inference", whole, seconds, np.abs(ours - theirs).max())
    console.print(table)
    console.print(
        f"Median of {rounds} rounds, in turns; {fastbn.get_num_threads()} threads for fastbn. "
        f"{len(x)} crops of 2 photographs for training, the whole photographs for inference."
    )

    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "first_layer.png"
    normalized, _ = fastbn.batch_norm_forward(x)
    draw(picture, photographs, ours, names, x, normalized)
    console.print(f"Picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
