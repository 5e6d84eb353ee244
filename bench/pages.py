"""What the site shows of compare.py: a CSV of all medians, and made of it the chart and the tables.

    python bench/pages.py [RESULTS.json ...] [--folder DIR]

With results, such as those of a run with one thread and of one with two, peers.csv is written anew. chart.png
and by_peer.md are made of peers.csv, so they can be made again without measuring.
"""

import argparse
import csv
import json
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from report import LEVEL, OURS, USER_LAYOUTS, markdown_table, median
from shapes import label

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "performance"
KEYS = ("cpu", "threads", "shape", "operation", "layout")
LIMIT = "memory limit"
CHARTED = {"inference+relu": "inference + ReLU", "training": "training forward", "backward": "backward"}
BARS = ("fastbn", "PyTorch", "oneDNN", "ONNX Runtime", "NumPy")


class Row(NamedTuple):
    """Median microseconds of one operation on arrays of one layout, by contestant."""

    cpu: str
    threads: int
    shape: str
    operation: str
    layout: str
    times: dict[str, float]


def write_csv(path, runs):
    """The medians of these runs, a column for each contestant and version."""
    names = list(dict.fromkeys(name for results in runs for name in results["versions"].items()))
    lines = []
    for results in runs:
        for row in results["rows"]:
            fixed = (
                results["machine"]["Model name"],
                results["settings"]["threads"],
                label(row["shape"]),
                row["op"],
            )
            for layout in dict.fromkeys(entry["layout"] for entry in row["entries"]):
                medians = {e["contestant"]: median(e) for e in row["entries"] if e["layout"] == layout}
                limit = row["limit"] if layout in USER_LAYOUTS else None
                times = [limit and median(limit), *(medians.get(name) for name, _ in names)]
                lines.append([*fixed, layout, *("" if time is None else f"{time:.4g}" for time in times)])
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEYS, LIMIT, *(f"{name} {version.partition('+')[0]}" for name, version in names)])
        writer.writerows(lines)


def read_csv(path):
    """The rows of such a file; contestants keep their versions."""
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            fixed = [line.pop(key) for key in KEYS]
            line.pop(LIMIT)
            fixed[1] = int(fixed[1])
            yield Row(*fixed, {name: float(time) for name, time in line.items() if time})


def ours(names):
    return next(name for name in names if name.split()[0] == OURS)


def same_layout(rows):
    """{peer: ratios} of its time to fastbn's in each row that both have, and under "" of the best peer's."""
    ratios = {}
    for row in rows:
        if row.layout not in USER_LAYOUTS or len(row.times) < 2:
            continue
        mine = row.times[ours(row.times)]
        theirs = {name: time / mine for name, time in row.times.items() if time is not mine}
        for name, ratio in (*theirs.items(), ("", min(theirs.values()))):
            ratios.setdefault(name, []).append(ratio)
    return ratios


def best_layouts(rows):
    """{(shape, operation): {contestant: its time in the layout that suits it best}}."""
    best = {}
    for row in rows:
        times = best.setdefault((row.shape, row.operation), {})
        for name, time in row.times.items():
            times[name] = min(time, times.get(name, time))
    return best


def behind(rows, any_layout):
    """(ratio, row, peer, its layout) where the best peer is ahead, the worst first."""
    found = []
    for row in rows:
        if row.layout not in USER_LAYOUTS:
            continue
        mine = row.times[ours(row.times)]
        theirs = [
            (time, name, other.layout)
            for other in rows
            if (other.shape, other.operation) == (row.shape, row.operation)
            and (any_layout or other.layout == row.layout)
            for name, time in other.times.items()
            if name != ours(row.times)
        ]
        time, name, layout = min(theirs, default=(mine, "", ""))
        if time * LEVEL < mine:
            found.append((time / mine, row, name, layout))
    return sorted(found, key=lambda item: item[0])


def tables(rows):
    """What the page of benchmarks includes: the means by peer, and the rows where fastbn is behind."""
    runs = {t: [row for row in rows if row.threads == t] for t in sorted({row.threads for row in rows})}
    ratios = {t: same_layout(run) for t, run in runs.items()}
    means = {t: {name: geometric_mean(rs) for name, rs in found.items()} for t, found in ratios.items()}
    many = max(runs)
    yield f"How many times as long as fastbn each takes in the same layout, on {rows[0].cpu}: geometric means"
    yield "over all rows that it has."
    yield ""
    lines = [
        [name or "**the best in each row**", *(f"{means[t].get(name, 0):.2f}" for t in runs)]
        for name in sorted(means[many], key=means[many].get)
    ]
    yield from markdown_table(("peer", *map(threads_of, runs)), lines)
    for t, run in runs.items():
        count, same, anywhere = len(ratios[t][""]), behind(run, False), behind(run, True)
        yield ""
        yield f"With {threads_of(t)} fastbn is behind by more than {LEVEL - 1:.0%} in {len(same)} of {count}"
        yield f"rows in the same layout, and in {len(anywhere)} where a peer may have any layout, oneDNN's"
        yield "blocked one too:"
        yield ""
        yield from markdown_table(
            ("rows where fastbn is behind", "its speed, of the peer's", "peer"),
            [
                [f"{row.shape} {row.layout} {row.operation}", f"{ratio:.2f}", f"{name}, {layout}"]
                for ratio, row, name, layout in [*same, *(item for item in anywhere if item not in same)]
            ],
        )


def threads_of(number):
    return f"{number} thread{'s' * (number > 1)}"


def draw(rows, path):
    """An operation a panel, a number of threads a line of panels, a contestant a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    threads = sorted({row.threads for row in rows})
    size = 7.2, 0.8 + 1.5 * len(threads)
    figure, axes = plt.subplots(
        len(threads), len(CHARTED), figsize=size, sharex=True, layout="constrained", squeeze=False
    )
    for line, t in zip(axes, threads, strict=True):
        best = best_layouts([row for row in rows if row.threads == t])
        for axis, (operation, title) in zip(line, CHARTED.items(), strict=True):
            for i, bar in enumerate(BARS):
                ratios = []
                for (_, op), times in best.items():
                    found = [time for name, time in times.items() if name.startswith(bar)]
                    if op == operation and found:
                        ratios.append(min(found) / times[ours(times)])
                length = geometric_mean(ratios) if ratios else 0
                axis.barh(i, length, color="#1f6feb" if bar == OURS else "#b1b8c0", height=0.75)
                axis.text(length, i, f" {length:.1f}" if length else " has none", va="center", fontsize=9)
            axis.set_yticks(range(len(BARS)), BARS if axis is line[0] else [], fontsize=9)
            axis.tick_params(length=0)
            axis.set_xticks([])
            axis.invert_yaxis()
            axis.spines[:].set_visible(False)
            if t == threads[0]:
                axis.set_title(title, fontsize=10)
        line[0].set_ylabel(threads_of(t), fontsize=10)
    axes[0, 0].set_xlim(0, 1.15 * axes[0, 0].get_xlim()[1])
    shapes = len({row.shape for row in rows})
    figure.suptitle(
        f"Time of a call on {rows[0].cpu}, fastbn = 1: shorter is better\n"
        f"Geometric means over {shapes} shapes, each in the layout that suits it best; NumPy has one thread",
        fontsize=9,
    )
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS.json")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: docs/performance")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "peers.csv"
    if args.results:
        write_csv(path, [json.loads(result.read_text()) for result in args.results])
    rows = list(read_csv(path))
    (args.folder / "by_peer.md").write_text("\n".join(tables(rows)) + "\n")
    draw(rows, args.folder / "chart.png")


if __name__ == "__main__":
    main()
