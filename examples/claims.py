"""What batch norm is said to do, put to the test on handwritten digits, with layer norm beside it.

Perceptrons of three hidden layers of 128, trained by plain stochastic gradient descent, and stacks of 50
blocks as they are before any training. All is done with five seeds, for initial weights and batches: lines
and first figures are the means, bands and figures in brackets go from the least to the greatest of the five.
docs/claims.md tells what came out.

    python examples/claims.py [rates | depth | order | dropout | batch_size ...] [--short] [--out build/demo]
"""

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen

import matplotlib.pyplot as plt
import numpy as np
from digits_mlp import Data, Labels, Linear, ReLU, cross_entropy, load_data
from layers import BatchNorm, Chain, Dropout, Layer, LayerNorm, Skip
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.progress import track
from rich.table import Table
from threadpoolctl import threadpool_limits

import fastbn
from fastbn.typing import Array

Norm = Callable[[int], Layer] | None
Hidden = Callable[[int], list[Layer]]  # the layers behind a linear one of so many features
Measurements = Iterator[tuple[str, str, float, float]]  # (diagram, curve, x, y)
Curves = dict[str, dict[float, list[float]]]  # by name and x the y of each seed

SEEDS = range(5)
WIDTHS = (64, 128, 128, 128, 10)
BATCH = 64
RATE = 0.1
NORMS: dict[str, Norm] = {"plain": None, "batch norm": BatchNorm, "layer norm": LayerNorm}
COLOURS = {"plain": "tab:orange", "batch norm": "tab:blue", "layer norm": "tab:green"}
GUESSING = 0.9  # the error of guessing one of ten digits


# ---- networks


def perceptron(hidden: Hidden, rng: np.random.Generator, scale: float = 1) -> Chain:
    """Linear layers, and behind each but the last the layers that `hidden(features)` makes."""
    layers: list[Layer] = []
    for inputs, outputs in pairwise(WIDTHS[:-1]):
        layers += [Linear(inputs, outputs, scale, rng), *hidden(outputs)]
    return Chain(*layers, Linear(*WIDTHS[-2:], scale, rng))


def before(norm: Norm) -> Hidden:
    """What is hidden: a norm and then the ReLU, or the ReLU alone."""
    return lambda features: [norm(features), ReLU()] if norm else [ReLU()]


def after(norm: Callable[[int], Layer]) -> Hidden:
    return lambda features: [ReLU(), norm(features)]


def complete_batches(order: Labels, size: int) -> list[Labels]:
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


def train(
    network: Chain,
    data: Data,
    rng: np.random.Generator,
    *,
    epochs: int,
    rate: float = RATE,
    batch: int = BATCH,
) -> Chain:
    """Stochastic gradient descent on the training images; returns the network, ready for evaluation."""
    x, _, labels, _ = data
    for _ in range(epochs):
        for rows in complete_batches(rng.permutation(len(x)), batch):
            _, grad = cross_entropy(network.forward(x[rows]), labels[rows])
            network.backward(grad)
            for parameter, gradient in network.gradients:
                parameter -= np.float32(rate) * gradient
    network.set_training(False)
    return network


def error(network: Chain, data: Data) -> float:
    """Share of wrong answers on the test images."""
    _, x, _, labels = data
    return float((network.forward(x).argmax(1) != labels).mean())


def trained_error(hidden: Hidden, data: Data, seed: int, *, scale: float = 1, **options: Any) -> float:
    rng = np.random.default_rng(seed)  # the same weights and batches for all that is compared
    return error(train(perceptron(hidden, rng, scale), data, rng, **options), data)


# ---- experiments: of one seed, each gives (diagram, curve, x, y) again and again
#
# A diagram is named by its y axis and its title, with a colon between them.


def try_rates(data: Data, seed: int, *, rates: tuple[float, ...], epochs: int) -> Measurements:
    for scale, rate, (name, norm) in product((0.1, 1, 10), rates, NORMS.items()):
        wrong = trained_error(before(norm), data, seed, scale=scale, rate=rate, epochs=epochs)
        yield f"test error: initial weights He x {scale:g}", name, rate, wrong


def gradient_lengths(
    norm: Norm,
    block: type[Chain],
    scale: float,
    count: int,
    x: Array,
    labels: Labels,
    rng: np.random.Generator,
) -> Array:
    """How long the loss's gradient is behind 0, 1, ... `count` blocks, relative to that behind the last.

    A block is [norm,] ReLU and linear layer, as a Chain or with a Skip. Nothing has been trained.
    """
    width = WIDTHS[1]
    first = Linear(x.shape[1], width, scale, rng)
    blocks = [block(*before(norm)(width), Linear(width, width, scale, rng)) for _ in range(count)]
    last = Linear(width, WIDTHS[-1], scale, rng)
    _, grad = cross_entropy(Chain(first, *blocks, last).forward(x), labels)
    grad = last.backward(grad)
    lengths = [np.linalg.norm(grad)]
    for each in reversed(blocks):
        grad = each.backward(grad)
        lengths.append(np.linalg.norm(grad))
    return np.asarray(np.array(lengths[::-1]) / lengths[0])


def try_depth(data: Data, seed: int, *, count: int, images: int) -> Measurements:
    x, _, labels, _ = data
    measured = "length of the gradient, 1 behind the last block"
    stacks: dict[str, tuple[type[Chain], float]] = {
        f"{measured}: He weights": (Chain, 1),
        f"{measured}: He weights x 0.7": (Chain, 0.7),
        f"{measured}: He weights, skip connections": (Skip, 1),
    }
    for (diagram, (block, scale)), (name, norm) in product(stacks.items(), NORMS.items()):
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(x), images, replace=False)
        lengths = gradient_lengths(norm, block, scale, count, x[rows], labels[rows], rng)
        for behind, length in enumerate(lengths):
            yield diagram, name, behind, length


def try_order(data: Data, seed: int, *, rates: tuple[float, ...], epochs: int) -> Measurements:
    norms = {"batch norm": BatchNorm, "layer norm": LayerNorm}
    for rate, (norm, make) in product(rates, norms.items()):
        places = {"plain": before(None), "before the ReLU": before(make), "after the ReLU": after(make)}
        for place, hidden in places.items():
            wrong = trained_error(hidden, data, seed, rate=rate, epochs=epochs)
            yield f"test error: {norm}", place, rate, wrong


def recalibrated(network: Chain, x: Array) -> Chain:
    """A copy whose batch norms have the statistics of all of `x` in evaluation, layer after layer."""
    network = copy.deepcopy(network)
    for layer in network.layers:
        if isinstance(layer, BatchNorm):
            momentum, layer.bn.momentum = layer.bn.momentum, 1  # one batch, of all
            layer.training = True
            layer.forward(x)
            layer.training = False
            layer.bn.momentum = momentum
        x = layer.forward(x)
    return network


def variance_shift(trained: Chain, calibrated: Chain, x: Array) -> tuple[float, float]:
    """Variance in training over variance in evaluation, at the first batch norm behind a dropout.

    As measured, and as it must be: dropout adds share / (1 - share) of a value's mean square to its variance,
    each value for itself, and a linear layer adds up such variances with the squares of its weights.
    """
    layers: tuple[Any, ...] = calibrated.layers[:6]
    *first, linear, norm = layers
    norm_of_training: Any = trained.layers[5]
    in_training, in_evaluation = norm_of_training.bn.running_var.sum(), norm.bn.running_var.sum()
    share = first[-1].share
    added = share / (1 - share) * np.square(Chain(*first).forward(x)).mean(0) @ np.square(linear.weight)
    return in_training / in_evaluation, 1 + added.sum() / in_evaluation


def try_dropout(data: Data, seed: int, *, shares: tuple[float, ...], epochs: int) -> Measurements:
    def with_dropout(dropout: Callable[[], Layer], norm: Norm = None) -> Hidden:
        return lambda features: [*before(norm)(features), dropout()]

    def trained(hidden: Hidden, *behind: Layer) -> Chain:
        rng = np.random.default_rng(seed)
        *layers, last = perceptron(hidden, rng).layers
        return train(Chain(*layers, *behind, last), data, rng, epochs=epochs)

    for share in shares:
        dropout = partial(Dropout, share, np.random.default_rng((seed, 1)))  # each with other draws
        plain = trained(with_dropout(dropout))
        behind = trained(before(BatchNorm), dropout())
        between = trained(with_dropout(dropout, BatchNorm))
        calibrated = recalibrated(between, data[0])
        wrong = {
            "dropout, no batch norm at all": plain,
            "dropout behind all batch norms": behind,
            "dropout between batch norms": between,
            "the same, statistics taken without dropout": calibrated,
        }
        for name, network in wrong.items():
            yield "test error: by the place of the dropout", name, share, error(network, data)
        shift = variance_shift(between, calibrated, data[0])
        for name, ratio in zip(("as measured", "by theory"), shift, strict=True):
            yield "variance in training / in evaluation: first batch norm behind dropout", name, share, ratio


def statistics_error(x: Array, order: Labels, size: int) -> tuple[float, ...]:
    """How far batches' means and variances are from those of all of `x`: root mean squares.

    Means in terms of the deviation, variances in terms of the variance.
    """
    whole = fastbn.batch_stats(x)
    parts = [fastbn.batch_stats(x[rows]) for rows in complete_batches(order, size)]
    means = np.array([part.mean for part in parts]) - whole.mean
    variances = np.array([part.var for part in parts]) - whole.var
    return tuple(
        np.sqrt(np.square(errors).mean()) for errors in (means / np.sqrt(whole.var), variances / whole.var)
    )


def error_by_batches(network: Chain, x: Array, labels: Labels, order: Labels, size: int) -> float:
    """Share of wrong answers where each batch is normalized by its own statistics, as in training."""
    network = copy.deepcopy(network)  # whose running averages go astray
    network.set_training(True)
    wrong = [network.forward(x[rows]).argmax(1) != labels[rows] for rows in complete_batches(order, size)]
    return float(np.mean(wrong))


def try_batch_size(data: Data, seed: int, *, sizes: tuple[int, ...], epochs: int) -> Measurements:
    x, x_test, _, labels_test = data
    rng = np.random.default_rng(seed)
    judge = train(perceptron(before(BatchNorm), rng), data, rng, epochs=epochs)
    features = Linear(WIDTHS[0], WIDTHS[1], 1, rng).forward(x)
    mixed, by_digit = rng.permutation(len(x_test)), np.argsort(labels_test, kind="stable")
    for size in sizes:
        errors = statistics_error(features, rng.permutation(len(x)), size)
        theory = np.sqrt((len(x) - size) / (size * (len(x) - 1)))  # of draws without replacement
        names = "mean, in deviations", "variance, relative", "mean, by theory"
        for name, value in zip(names, (*errors, theory), strict=True):
            yield "error, root mean square: statistics of a batch", name, size, value

        diagram = f"test error: trained by batches of {BATCH}, evaluated by others"
        yield diagram, "running averages", size, error(judge, data)
        if size > 1:  # one value has no variance
            for name, rows in {
                "of the batch, digits mixed": mixed,
                "of the batch, digits sorted": by_digit,
            }.items():
                yield diagram, name, size, error_by_batches(judge, x_test, labels_test, rows, size)

        diagram = "test error: trained by batches of that size"
        for name, norm in NORMS.items():
            if size > 1 or norm is not BatchNorm:
                rng = np.random.default_rng(seed)
                network = perceptron(before(norm), rng)
                train(network, data, rng, epochs=epochs, rate=RATE * size / BATCH, batch=size)
                yield diagram, name, size, error(network, data)
                if norm is BatchNorm:
                    yield (
                        diagram,
                        "batch norm, statistics of all",
                        size,
                        error(recalibrated(network, x), data),
                    )


# ---- tables and pictures


class Experiment(NamedTuple):
    claim: str
    measure: Callable[..., Measurements]
    x: str
    x_scale: str
    full: dict[str, Any]
    short: dict[str, Any]


EXPERIMENTS = {
    "rates": Experiment(
        "Batch norm allows larger learning rates, and less care with initial weights",
        try_rates,
        "learning rate",
        "log",
        {"rates": (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30), "epochs": 30},
        {"rates": (0.01, 0.1, 1, 10), "epochs": 5},
    ),
    "depth": Experiment(
        "Batch norm keeps gradients from vanishing and exploding",
        try_depth,
        "blocks in front",
        "linear",
        {"count": 50, "images": 256},
        {"count": 50, "images": 256},
    ),
    "order": Experiment(
        "Batch norm belongs before the activation",
        try_order,
        "learning rate",
        "log",
        {"rates": (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30), "epochs": 30},
        {"rates": (0.01, 0.1, 1, 10), "epochs": 5},
    ),
    "dropout": Experiment(
        "Batch norm and dropout do not go together",
        try_dropout,
        "share that is dropped",
        "linear",
        {"shares": (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "epochs": 30},
        {"shares": (0, 0.25, 0.5, 0.75), "epochs": 5},
    ),
    "batch_size": Experiment(
        "Small batches are the ruin of batch norm",
        try_batch_size,
        "batch size",
        "log",
        {"sizes": (1, 2, 4, 8, 16, 32, 64, 128, 256), "epochs": 30},
        {"sizes": (1, 2, 8, 32, 256), "epochs": 3},
    ),
}


def collect(measurements: Iterable[tuple[str, str, float, float]]) -> dict[str, Curves]:
    """{diagram: {curve: {x: [y of each seed]}}}"""
    diagrams: dict[str, Curves] = {}
    for diagram, curve, x, y in measurements:
        diagrams.setdefault(diagram, {}).setdefault(curve, {}).setdefault(x, []).append(y)
    return diagrams


def is_share(diagram: str) -> bool:
    return diagram.startswith("test error")


def make_table(title: str, x_name: str, curves: Curves) -> Table:
    """A row for each x, or for some where there are many."""
    table = Table(title=title)
    table.add_column(x_name, justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    xs = list(next(iter(curves.values())))
    for x in xs[:: len(xs) // 10 or 1]:
        row = [f"{x:g}"]
        for curve in curves.values():
            if x in curve:
                figures = np.mean(curve[x]), min(curve[x]), max(curve[x])
                mean, least, most = (f"{y:.1%}" if is_share(title) else f"{y:.2g}" for y in figures)
                row.append(f"{mean} ({least} to {most})")
            else:
                row.append("-")
        table.add_row(*row)
    return table


def draw(path: Path, experiment: Experiment, diagrams: dict[str, Curves]) -> None:
    figure, panels = plt.subplots(1, len(diagrams), figsize=(6 * len(diagrams), 5.5), layout="constrained")
    for axes, (diagram, curves) in zip(panels, diagrams.items(), strict=True):
        others = iter(("tab:purple", "tab:red", "tab:olive", "tab:cyan"))
        for name, curve in curves.items():
            xs, ys = list(curve), np.array(list(curve.values()))
            if name.endswith("by theory"):
                axes.plot(xs, ys.mean(1), color="black", label=name, linestyle="--", zorder=3)
            else:
                colour = COLOURS.get(name) or next(others)
                marker = "o" if len(xs) < 20 else None
                axes.plot(xs, ys.mean(1), color=colour, label=name, linewidth=2.5, marker=marker)
                axes.fill_between(xs, ys.min(1), ys.max(1), color=colour, alpha=0.2)
        measured, _, title = diagram.partition(": ")
        axes.set(title=title, xlabel=experiment.x, ylabel=measured, xscale=experiment.x_scale)
        axes.grid(alpha=0.3)
        if experiment.x == "batch size":
            axes.set_xticks(experiment.full["sizes"], map(str, experiment.full["sizes"]))
            axes.xaxis.set_minor_locator(NullLocator())
        if is_share(diagram):
            axes.axhline(GUESSING, color="black", linestyle=":", linewidth=1.5, label="guessing")
            axes.set_yscale("log")
            axes.set_ylim(0.004, 1)
            ticks = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9)
            axes.set_yticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
            axes.yaxis.set_minor_locator(NullLocator())
        elif ys.max() > 10 * ys.min():
            axes.set_yscale("log")
        axes.legend()
    figure.suptitle(f"“{experiment.claim}”", fontsize=15)
    figure.supxlabel(
        f"Lines: means of {len(SEEDS)} seeds. Bands: from the least to the greatest.", fontsize=10
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*EXPERIMENTS, "all"], default="all", help="what to try")
    parser.add_argument("--short", action="store_true", help="few epochs, few points")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the pictures")
    options = parser.parse_args()
    names = EXPERIMENTS if "all" in options.names else options.names
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    data = load_data()
    fastbn.set_num_threads(1)  # arrays this small gain nothing from more

    for name in names:
        experiment = EXPERIMENTS[name]
        size = experiment.short if options.short else experiment.full
        console.rule(f"[bold]“{experiment.claim}”")
        # Where numbers overflow it shows in the answers.
        with threadpool_limits(limits=1, user_api="blas"), np.errstate(all="ignore"):
            diagrams = collect(
                measurement
                for seed in track(SEEDS, name)
                for measurement in experiment.measure(data, seed, **size)
            )
        for title, curves in diagrams.items():
            console.print(make_table(title, experiment.x, curves))
        picture = options.out / f"claims_{name}.png"
        draw(picture, experiment, diagrams)
        console.print(f"Picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
