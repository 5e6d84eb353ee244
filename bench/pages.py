"""What README.md and the site show of the figures that compare.py, busy.py and networks.py leave.

    python bench/pages.py [DIR]

DIR, docs/performance by default, has summary.csv and about.csv, of which chart.png and by_peer.md are made;
busy.csv, if it is there, becomes busy.png and busy.md, and networks.csv becomes networks.png.
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
BLUE, GREY = "#1f6feb", "#b1b8c0"  # colours of fastbn, and of others
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
    summary = [
        Line(
            int(line["threads"]), line["operation"], line["layout"], line["peer"],
            float(line["ratio"]), int(line["rows"]), int(line["behind"]),
        )
        for line in lines_of(folder / "summary.csv")
    ]  # fmt: skip
    about = [(int(line["threads"]), line["what"], line["value"]) for line in lines_of(folder / "about.csv")]
    return summary, about


def lines_of(path):
    """The lines of a CSV file, as dictionaries."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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


def pyplot():
    """The one of matplotlib, which draws to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure, title, path):
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=160)
    pyplot().close(figure)


def draw(summary, about, path):
    """An operation a panel, a number of threads a line of panels, a library a bar."""
    plt = pyplot()
    threads = sorted({line.threads for line in summary})
    size = 5.4, 0.8 + 1.4 * len(threads)  # narrow, so that it can be read on a phone
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
                axis.barh(i, length, color=BLUE if bar == OURS else GREY, height=0.75)
                axis.text(length, i, f" {length:.1f}" if length else " has none", va="center", fontsize=9)
            names = ["oneDNN,\nblocked" if bar == "oneDNN" else bar for bar, _ in bars]
            axis.set_yticks(range(len(bars)), names if axis is panels[0] else [], fontsize=9)
            axis.tick_params(length=0)
            axis.set_xticks([])
            axis.invert_yaxis()
            axis.spines[:].set_visible(False)
            if number == threads[0]:
                axis.set_title(title, fontsize=10)
        panels[0].set_ylabel(threads_of(number), fontsize=10)
    axes[0, 0].set_xlim(0, 1.15 * axes[0, 0].get_xlim()[1])
    save(
        figure,
        f"Time of a call on {machine(about)}, fastbn = 1: shorter is better. Geometric means over\n"
        "shapes from 4 KB to 103 MB; oneDNN has its own layout, NumPy one thread",
        path,
    )


# Of busy.csv: its contestants, and what a reader is told of them.
SLASH = "\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}"
BUSY = {"default": OURS, "one thread": "one thread", "always shared": "always shared out"}


def short(cpu):
    """A CPU's name as titles have it: AMD EPYC, Intel Xeon."""
    return " ".join(cpu.replace("(R)", "").split()[:2])


def situations(lines, operation):
    """(other processes, pause): the lines of a picture or table, by contestant, of the first shape."""
    found = defaultdict(dict)
    for line in lines:
        if (line["shape"], line["operation"]) == (lines[0]["shape"], operation):
            found[int(line["busy"]), line["every_ms"]][line["contestant"]] = line
    return found


def when(busy, every):
    return f"{'back to back' if every == '0' else f'every {every} ms'}, {busy or 'no'} others"


def busy_table(lines):
    """Microseconds of the first shape, as the page has them."""
    rows = []
    for operation in KINDS:
        for (busy, every), by_contestant in situations(lines, operation).items():
            cells = [
                SLASH.join(by_contestant[name][figure] for figure in ("p50", "p99", "cpu_time"))
                for name in BUSY
            ]
            rows.append([operation, str(busy), "back to back" if every == "0" else f"{every} ms", *cells])
    yield from markdown_table(("operation", "busy", "every", *BUSY.values()), rows)


def draw_busy(lines, path):
    """An operation a panel, a situation a line; from the median, a dot, to the 99th percentile."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(KINDS), figsize=(7.2, 3), sharex=True, sharey=True, layout="constrained"
    )
    for axis, operation in zip(axes, KINDS, strict=True):
        found = situations(lines, operation)
        for i, (name, color, marker) in enumerate(zip(BUSY, (BLUE, GREY, "#d1495b"), "os^", strict=True)):
            for place, by_contestant in enumerate(found.values()):
                p50, p99 = (float(by_contestant[name][figure]) for figure in ("p50", "p99"))
                y = place + 0.24 * (i - 1)
                axis.plot([p50, p99], [y, y], color=color, linewidth=2, alpha=0.5)
                axis.plot(p50, y, marker, color=color, markersize=5, label=BUSY[name] if not place else None)
        axis.set_title(operation, fontsize=10)
        axis.set_xscale("log")
        axis.set_xlabel("microseconds", fontsize=9)
        axis.set_yticks(range(len(found)), [when(*situation) for situation in found], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(BUSY), fontsize=9, frameon=False)
    save(
        figure,
        f"A call of {lines[0]['shape']} on {short(lines[0]['cpu'])}, while other processes never sleep:\n"
        "the median, and a line to the 99th percentile",
        path,
    )


def draw_networks(lines, path):
    """A mode a panel, a network and layout a bar; what is measured in float32."""
    plt = pyplot()
    modes = list(dict.fromkeys(line["mode"] for line in lines))
    lines = [line for line in lines if line["precision"] == "float32"]
    places = list(dict.fromkeys((line["network"], line["layout"]) for line in lines))
    size = 7.2, 0.9 + 0.23 * len(places)
    figure, axes = plt.subplots(
        1, len(modes), figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        for line in (line for line in lines if line["mode"] == mode):
            place, ratio = places.index((line["network"], line["layout"])), float(line["ratio"])
            axis.barh(place, ratio - 1, left=1, color=BLUE if ratio > 1 else GREY, height=0.7)
            axis.text(max(ratio, 1), place, f" {ratio:.2f}", va="center", fontsize=9)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title({"training": "training step"}.get(mode, mode), fontsize=10)
        axis.set_yticks(range(len(places)), [", ".join(place) for place in places], fontsize=9)
        axis.tick_params(length=0)
        axis.set_xticks([])
        axis.spines[:].set_visible(False)
    axes[0, 0].invert_yaxis()
    least, most = axes[0, 0].get_xlim()
    axes[0, 0].set_xlim(least, most + 0.2 * (most - least))
    one = lines[0]
    setting = f"{threads_of(int(one['threads']))}, batch {one['batch']} at {one['size']} pixels"
    save(
        figure,
        f"Networks of torchvision on {short(one['cpu'])}, {setting}, float32:\n"
        "PyTorch's time / with fastbn.torch.accelerate; right of 1 is faster",
        path,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, metavar="DIR")
    folder = parser.parse_args().folder
    summary, about = read(folder)
    (folder / "by_peer.md").write_text("\n".join(tables(summary, about)))
    draw(summary, about, folder / "chart.png")
    if (folder / "busy.csv").exists():
        lines = lines_of(folder / "busy.csv")
        (folder / "busy.md").write_text("\n".join(busy_table(lines)) + "\n")
        draw_busy(lines, folder / "busy.png")
    if (folder / "networks.csv").exists():
        draw_networks(lines_of(folder / "networks.csv"), folder / "networks.png")


if __name__ == "__main__":
    main()
