"""Time fastbn with several numbers of threads, side by side in one process.

    python bench/scaling.py [--threads 1 2 4 8 16] [--csv PATH] [--plot PATH] ...

The rows are those of compare.py, and so is the way to time them. The memory limit of a row is measured with
the same numbers of threads: beyond the caches it says what more threads can bring at best. Each number of
threads has a pool of its own, on CPUs of different cores as far as there are that many, and none is left when
the next has its turn.
"""

import argparse
import csv
import gc
import json
import os
import random
import statistics
import sys
import time
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from statistics import geometric_mean

import compare
import peers
import tasks
from report import digits, markdown_table
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shapes import label

from fastbn import _kernels, set_num_threads

SLOWER = 1.05  # more threads are not slower than fewer if they take less than so many times as long
SIZES = {
    "below 1 MB": (0, 1e6),
    "1 to 8 MB": (1e6, 8e6),
    "8 to 32 MB": (8e6, 32e6),
    "above 32 MB": (32e6, 1e12),
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", metavar="T", help="default: 1, 2, 4 ... all CPUs")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="such as training backward+relu; default: all")
    parser.add_argument("--shapes", nargs="+", metavar="PATTERN", help="such as '*x7x7'; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="JSON", help="show those of an earlier run")
    parser.add_argument(
        "--json",
        type=Path,
        default=peers.BUILD / "scaling.json",
        metavar="PATH",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="PATH", help="medians alone, as the documentation has them"
    )
    parser.add_argument("--markdown", type=Path, metavar="PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH")
    return parser.parse_args()


def take_cpus(cpus):
    """From now on that many threads, on these CPUs: a new pool inherits them."""
    _kernels.release_pool()
    os.sched_setaffinity(0, cpus)
    set_num_threads(len(cpus))


def measure(shape, op, data, layout, args, cpus):
    """A row: median microseconds of fastbn and of the memory limit by number of threads."""
    task = tasks.Task(op, data, True)
    passes = 1 if layout == tasks.NCHW or task.kind == "inference" else 2
    entries = {"fastbn": [], "limit": []}
    for t in args.threads:
        take_cpus(cpus[:t])
        contestants = {"fastbn": peers.FastBN(t), "limit": peers.MemoryLimit(t, passes)}
        for name, contestant in contestants.items():
            entry = compare.fastest(contestant, task, layout, None, print)
            entries[name] += [(cpus[:t], entry)] if entry else []
    playing = [*entries["fastbn"], *entries["limit"]]
    for _ in range(args.rounds):
        random.shuffle(playing)
        for team, entry in playing:
            take_cpus(team)
            entry.take_turn()
    medians = {name: [statistics.median(e.samples) * 1e6 for _, e in es] for name, es in entries.items()}
    return {"shape": shape, "op": op, "layout": layout, **medians}


def slower(row, threads):
    """(more threads, fewer, fastbn's ratio, the memory limit's or None) where more are slower."""
    times, limits = row["fastbn"], row["limit"]
    for i, time_of_more in enumerate(times):
        best = min(range(i + 1), key=times.__getitem__)
        if time_of_more > SLOWER * times[best]:
            limit = limits[i] / limits[best] if limits else None
            yield threads[i], threads[best], time_of_more / times[best], limit


def speedups(rows, name):
    """Geometric means over rows, by number of threads."""
    return [geometric_mean([row[name][0] / row[name][i] for row in rows]) for i in range(len(rows[0][name]))]


def summary(results):
    """(operation, size, rows, speed-ups of fastbn, of the memory limit)."""
    for kind in ("inference", "training", "backward"):
        for size, (least, most) in SIZES.items():
            rows = [
                row
                for row in results["rows"]
                if row["op"].startswith(kind) and least <= 4 * prod(row["shape"]) < most and row["limit"]
            ]
            if rows:
                yield kind, size, len(rows), speedups(rows, "fastbn"), speedups(rows, "limit")


def tables(results):
    """(title, headings, lines) of the report."""
    threads = results["threads"]
    each = [f"{t} threads" for t in threads]
    yield (
        "Speed-up over one thread, and that of the memory limit",
        ("operation", "size of x", "rows", *each),
        [
            [kind, size, str(n), *(f"{a:.2f} ({b:.2f})" for a, b in zip(ours, limits, strict=True))]
            for kind, size, n, ours, limits in summary(results)
        ],
    )
    yield (
        "Rows that more threads slow down",
        ("shape", "op", "layout", "threads", "times as long", "memory limit"),
        [
            [
                label(row["shape"]),
                row["op"],
                row["layout"],
                f"{more}, not {fewer}",
                f"{ratio:.2f}",
                f"{limit:.2f}" if limit else "",
            ]
            for row in results["rows"]
            for more, fewer, ratio, limit in slower(row, threads)
        ],
    )
    yield (
        "All rows, median microseconds",
        ("shape", "op", "layout", *each, "speed-up", "of memory limit"),
        [
            [
                label(row["shape"]), row["op"], row["layout"], *map(digits, row["fastbn"]),
                digits(row["fastbn"][0] / row["fastbn"][-1]),
                f"{row['limit'][-1] / row['fastbn'][-1]:.0%}" if row["limit"] else "",
            ]
            for row in results["rows"]
        ],
    )  # fmt: skip


def write_csv(path, results):
    """Median microseconds, a column for each number of threads."""
    each = [f"{name}, {t} threads" for name in ("fastbn", "memory limit") for t in results["threads"]]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cpu", "shape", "operation", "layout", *each])
        for row in results["rows"]:
            limits = row["limit"] or [None] * len(row["fastbn"])
            times = ["" if time is None else f"{time:.4g}" for time in [*row["fastbn"], *limits]]
            writer.writerow(
                [results["machine"]["Model name"], label(row["shape"]), row["op"], row["layout"], *times]
            )


def plot(results, path):
    """An operation a panel, a size a colour; the memory limit dotted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    threads = results["threads"]
    found = list(summary(results))
    kinds = list(dict.fromkeys(kind for kind, *_ in found))
    figure, axes = plt.subplots(
        1,
        len(kinds),
        figsize=(4 * len(kinds), 4),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        for i, size in enumerate(SIZES):
            for _, _, _, ours, limits in (f for f in found if f[:2] == (kind, size)):
                axis.plot(threads, ours, f"C{i}o-", label=size)
                axis.plot(threads, limits, f"C{i}:")
        axis.plot(threads, threads, color="black", linewidth=0.8)
        axis.set(title=kind, xscale="log", yscale="log", xlabel="threads")
        axis.set_xticks(threads, threads)
        axis.set_yticks(threads, threads)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("times as fast as one thread")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SIZES))
    figure.suptitle("fastbn by number of threads, and (dotted) the memory limit")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(args, console):
    """Time all rows."""
    compare.start_again_in({"GLIBC_TUNABLES": compare.KEEP_PAGES})
    cpus = compare.cpus_by_core()
    args.threads = args.threads or sorted({*(1 << i for i in range(len(cpus).bit_length())), len(cpus)})
    if max(args.threads) > len(cpus):
        sys.exit(f"--threads {max(args.threads)}: this process may run on {len(cpus)} CPUs")
    gc.disable()
    start = time.perf_counter()
    results = {
        "command": " ".join(["scaling.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": compare.machine(),
        "isa": _kernels.get_isa(),
        "threads": args.threads,
        "rows": [],
    }
    for shape, ops in track(list(compare.groups(args)), console=console, auto_refresh=False):
        for layout in tasks.user_layouts(shape):
            os.sched_setaffinity(0, cpus)
            data = tasks.Data(shape, layout)
            results["rows"] += [measure(shape, op, data, layout, args, cpus) for op in ops]
    results["seconds"] = round(time.perf_counter() - start)
    return results


def main():
    args = parse()
    console = Console(width=None if sys.stdout.isatty() else 160)
    results = json.loads(args.results.read_text()) if args.results else run(args, console)
    text = []
    for title, headings, lines in tables(results):
        table = Table(*headings, title=title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        text += [f"## {title}", "", *markdown_table(headings, lines), ""]
    if not args.results:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.csv:
        write_csv(args.csv, results)
    if args.markdown:
        machine = results["machine"]["Model name"], results["isa"], results["date"], f"{results['seconds']} s"
        args.markdown.write_text(
            "\n".join(["# fastbn by number of threads", "", ", ".join(machine), "", *text])
        )
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
