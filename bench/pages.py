"""What README.md and the site show of the summaries that compare.py leaves: the chart, and tables by peer.

    python bench/pages.py [DIR]

DIR, docs/performance by default, has summary.csv and about.csv; chart.png and by_peer.md are made of them.
"""

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from report import LEVEL, OURS, markdown_table

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "performance"
BEST, BLOCKED = "best", "blocked"  # the fastest peer of each row; oneDNN's own layout
CHARTED = {"inference+relu": "inference + ReLU", "training": "training forward", "backward": "backward"}
KINDS = ("inference", "training", "backward")
BARS = ("PyTorch", "oneDNN", "ONNX Runtime", "NumPy")  # the first words of peers' names


class Line(NamedTuple):
    """Of summary.csv: the geometric mean of peer's time / fastbn's, in the same layout."""

    threads: int
    operation: str
    layout: str
    peer: str
    ratio: float
    rows: int
    behind: int


def read(folder):
    """The lines of summary.csv, and (threads, what, value) of about.csv."""
    with (folder / "summary.csv").open(newline="") as file:
        summary = [
            Line(
                int(line["threads"]), line["operation"], line["layout"], line["peer"],
                float(line["ratio"]), int(line["rows"]), int(line["behind"]),
            )
            for line in csv.DictReader(file)
        ]  # fmt: skip
    with (folder / "about.csv").open(newline="") as file:
        about = [(int(line["threads"]), line["what"], line["value"]) for line in csv.DictReader(file)]
    return summary, about


def mean(lines):
    """Geometric mean over all rows of these lines, or None."""
    count = sum(line.rows for line in lines)
    return math.exp(sum(line.rows * math.log(line.ratio) for line in lines) / count) if count else None


def threads_of(number):
    return f"{number} thread{'s' * (number > 1)}"


def machine(about):
    return next(value for _, what, value in about if what == "machine").split(",")[0]


def tables(summary, about):
    """For each number of threads the means by peer, and in how many rows fastbn is behind."""
    for threads in sorted({line.threads for line in summary}):
        versions = {what: value.partition("+")[0] for number, what, value in about if number == threads}
        by_peer = defaultdict(list)
        for line in summary:
            if line.threads == threads:
                by_peer[line.peer, line.layout == BLOCKED].append(line)
        table = []
        for (peer, blocked), lines in by_peer.items():
            name = f"{peer} {versions.get(peer, '')}".strip() + ", blocked" * blocked
            means = [mean([line for line in lines if line.operation.startswith(kind)]) for kind in KINDS]
            behind, rows = sum(line.behind for line in lines), sum(line.rows for line in lines)
            table.append(
                (
                    peer != BEST,
                    mean(lines),
                    [
                        "**the best in each row**" if peer == BEST else name,
                        *(f"{value:.2f}" if value else "" for value in (*means, mean(lines))),
                        f"{behind} of {rows}",
                    ],
                )
            )
        yield f"How many times as long as fastbn each takes, {threads_of(threads)}, {machine(about)}:"
        yield "geometric means over rows in the same layout, and in how many of them fastbn is behind by more"
        yield f"than {LEVEL - 1:.0%}."
        yield ""
        yield from markdown_table(
            ("peer", *KINDS, "all", "rows behind"), [cells for *_, cells in sorted(table)]
        )
        yield ""
        worse = [line for line in summary if line.threads == threads and line.behind and line.peer != BEST]
        if worse:
            yield "Where those rows are:"
            yield ""
            yield from markdown_table(
                ("operation", "layout", "peer", "rows behind"),
                [
                    [line.operation, line.layout, line.peer, f"{line.behind} of {line.rows}"]
                    for line in sorted(worse, key=lambda line: -line.behind)
                ],
            )
            yield ""


def draw(summary, about, path):
    """An operation a panel, a number of threads a line of panels, a library a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    threads = sorted({line.threads for line in summary})
    size = 7.2, 0.8 + 1.5 * len(threads)
    figure, axes = plt.subplots(
        len(threads), len(CHARTED), figsize=size, sharex=True, layout="constrained", squeeze=False
    )
    for panels, number in zip(axes, threads, strict=True):
        for axis, (operation, title) in zip(panels, CHARTED.items(), strict=True):
            bars = [(OURS, 1.0)]
            for bar in BARS:
                by_peer = defaultdict(list)  # of several builds the fastest
                for line in summary:
                    chosen = (line.layout == BLOCKED) == (bar == "oneDNN") and line.peer.startswith(bar)
                    if chosen and (line.threads, line.operation) == (number, operation):
                        by_peer[line.peer].append(line)
                bars.append((bar, min(map(mean, by_peer.values()), default=0)))
            for i, (bar, length) in enumerate(bars):
                axis.barh(i, length, color="#1f6feb" if bar == OURS else "#b1b8c0", height=0.75)
                axis.text(length, i, f" {length:.1f}" if length else " has none", va="center", fontsize=9)
            names = ["oneDNN, blocked" if bar == "oneDNN" else bar for bar, _ in bars]
            axis.set_yticks(range(len(bars)), names if axis is panels[0] else [], fontsize=9)
            axis.tick_params(length=0)
            axis.set_xticks([])
            axis.invert_yaxis()
            axis.spines[:].set_visible(False)
            if number == threads[0]:
                axis.set_title(title, fontsize=10)
        panels[0].set_ylabel(threads_of(number), fontsize=10)
    axes[0, 0].set_xlim(0, 1.15 * axes[0, 0].get_xlim()[1])
    figure.suptitle(
        f"Time of a call on {machine(about)}, fastbn = 1: shorter is better\n"
        "Geometric means over shapes from 4 KB to 103 MB; oneDNN has its own layout, NumPy one thread",
        fontsize=9,
    )
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, metavar="DIR")
    folder = parser.parse_args().folder
    summary, about = read(folder)
    (folder / "by_peer.md").write_text("\n".join(tables(summary, about)))
    draw(summary, about, folder / "chart.png")


if __name__ == "__main__":
    main()
