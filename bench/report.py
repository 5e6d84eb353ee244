"""What the JSON of compare.py says: the tables, the rows where fastbn is behind, the plots, the summaries.

    python bench/report.py RESULTS.json [--csv DIR] [--markdown PATH] [--plots DIR]

The summaries are what is kept of a run, and what the site's figures are made from. summary.csv has a line for
each operation, layout and peer: the geometric mean of peer's time / fastbn's, over how many rows, and in how
many of them fastbn is behind by more than 3 %; the peer "best" is the fastest one of each row in this layout,
and the layout "blocked" is beside fastbn in NCHW. about.csv tells machine, versions, and what was left out.
Chain rows and other dtypes have a summary of their own, such as summary-bfloat16.csv. Lines of other numbers
of threads stay as they are.
"""

import argparse
import csv
import json
from collections import defaultdict
from math import prod
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from shapes import label

LEVEL = 1.03  # nobody is ahead within this ratio
OURS = "fastbn"
LIMITS = ("memory limit", "memory limit of two passes")
USER_LAYOUTS = ("NCHW", "channels-last", "(N, C)")


class Row(NamedTuple):
    """fastbn in one layout that users hold, with its peers and the memory limits of the same row."""

    shape: tuple
    op: str
    layout: str
    ours: dict
    peers: list
    limits: tuple  # in one pass and in two, or None

    def ratio(self, entry):
        """A peer's time over fastbn's beside it."""
        return median(entry) / entry["beside"][self.layout]

    def best(self, any_layout=False):
        """The best peer, in the same layout or in any."""
        found = [e for e in self.peers if any_layout or e["layout"] == self.layout]
        return min(found, key=self.ratio, default=None)

    @property
    def speedup(self):
        """Over the best peer in the same layout."""
        return self.ratio(self.best())

    @property
    def lead(self):
        """Over the best peer in any layout."""
        return self.ratio(self.best(any_layout=True))

    @property
    def share(self):
        """Of the memory limit."""
        return self.ratio(self.limits[0])

    @property
    def lead_of_two_passes(self):
        """The best peer over a loop of two passes over memory; None where one pass is enough."""
        if self.layout == "NCHW" or not self.limits[1]:
            return None
        return self.lead / self.ratio(self.limits[1])


def median(entry):
    return entry["microseconds"]["median"]


def spread(entry):
    """Interquartile range over median."""
    us = entry["microseconds"]
    return (us["q75"] - us["q25"]) / us["median"]


def who(entry):
    return f"{entry['contestant']} {entry['layout']}" if entry else ""


def rows(results):
    for row in results["rows"]:
        limits = tuple(next((e for e in row["entries"] if e["contestant"] == n), None) for n in LIMITS)
        for ours in (e for e in row["entries"] if e["contestant"] == OURS):
            theirs = [e for e in row["entries"] if ours["layout"] in e.get("beside", ()) and e not in limits]
            yield Row(tuple(row["shape"]), row["op"], ours["layout"], ours, theirs, limits)


def by_peer(results):
    """(op, layout, peer): the ratios of all rows, and of "best" the best peer's."""
    found = defaultdict(list)
    for row in rows(results):
        for entry in row.peers:
            # What is blocked is beside fastbn in the first layout.
            if entry["layout"] == row.layout or (entry["layout"] == "blocked" and row.layout == "NCHW"):
                found[row.op, entry["layout"], entry["contestant"]].append(row.ratio(entry))
        if row.best():
            found[row.op, row.layout, "best"].append(row.speedup)
    return found


def summary(results):
    """The figures the bench ends with."""
    table = [row for row in rows(results) if row.best()]
    by_op = defaultdict(list)
    for row in table:
        by_op[row.op].append(row)
    behind = [row for row in table if row.lead * LEVEL < 1]
    disturbed = [
        times for r in results["rows"] for times in r["interference"].values() if sum(times.values()) > 0.1
    ]
    return {
        "rows": len(table),
        "behind": [
            {
                "row": f"{label(row.shape)} {row.layout} {row.op}",
                "ratio": round(row.lead, 3),
                "peer": who(row.best(any_layout=True)),
                "two_passes": row.lead_of_two_passes and round(row.lead_of_two_passes, 3),
            }
            for row in sorted(behind, key=lambda row: row.lead)
        ],
        "speedup": geometric_mean([row.speedup for row in table]) if table else None,
        "speedup_by_op": {op: geometric_mean([row.speedup for row in found]) for op, found in by_op.items()},
        "activation_cost": activation_cost(results),
        "disturbed_rows": len(disturbed),
    }


def activation_cost(results):
    """What fusing ReLU costs fastbn, and SiLU in its place: geometric mean and largest ratio of times."""
    times = {(row.shape, row.layout, row.op): median(row.ours) for row in rows(results)}
    ratios = defaultdict(list)
    for (shape, layout, op), time in times.items():
        for more in ("+relu", "+silu"):
            other = op + more if more == "+relu" else op.replace("+relu", more)
            if other != op and (shape, layout, other) in times:
                ratios[f"{other} beside {op}"].append(times[shape, layout, other] / time)
    return {what: {"mean": geometric_mean(found), "largest": max(found)} for what, found in ratios.items()}


def digits(value):
    """Microseconds, ratios: three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


HEADINGS = (
    "shape", "op", "layout", "fastbn us", "spread", "best peer, same layout", "us", "speed-up",
    "best peer, any layout", "us", "lead", "of memory limit",
)  # fmt: skip


def cells(row):
    def peer(entry):
        return [who(entry), digits(median(entry))] if entry else ["", ""]

    same, best = row.best(), row.best(any_layout=True)
    return [
        label(row.shape),
        row.op,
        row.layout,
        digits(median(row.ours)),
        f"{spread(row.ours):.1%}",
        *peer(same),
        digits(row.speedup) if same else "",
        *peer(best),
        digits(row.lead) if best else "",
        f"{row.share:.0%}" if row.limits[0] else "",
    ]


def peer_table(results):
    """(headings, lines): geometric means of peer's time / fastbn's in the same layout, rows behind."""
    found = by_peer(results)
    ops = list(dict.fromkeys(op for op, _, _ in found))
    lines = []
    for name, blocked in dict.fromkeys((peer, layout == "blocked") for _, layout, peer in found):
        cells, everything = [], []
        for op in ops:
            ratios = [
                ratio
                for (other, layout, peer), values in found.items()
                if (other, peer, layout == "blocked") == (op, name, blocked)
                for ratio in values
            ]
            cells.append(f"{geometric_mean(ratios):.2f}" if ratios else "")
            everything += ratios
        behind = sum(ratio * LEVEL < 1 for ratio in everything)
        title = f"{name}, blocked" if blocked else name
        lines.append([title, *cells, f"{geometric_mean(everything):.2f}", f"{behind} of {len(everything)}"])
    return ("peer", *ops, "all", "rows behind"), lines


def conclusion(results):
    """Lines for the end of every report."""
    found = summary(results)
    lines = list(results["notes"])
    if found["disturbed_rows"]:
        lines.append(
            f"{found['disturbed_rows']} rows of a peer were disturbed: others took more than 10 % of a core"
        )
    for what, cost in found["activation_cost"].items():
        lines.append(f"{what}: {cost['mean']:.3f} times the time, at most {cost['largest']:.3f}")
    for op, speedup in found["speedup_by_op"].items():
        lines.append(f"speed-up over the best peer in the same layout, {op}: {speedup:.2f}")
    if found["speedup"]:
        lines.append(
            f"geometric mean of the speed-up over the best peer in the same layout: {found['speedup']:.2f}"
        )
    for b in found["behind"]:
        bare = f"; two passes over memory alone: {b['two_passes']:.2f}" if b["two_passes"] else ""
        lines.append(f"behind: {b['row']}: {b['ratio']:.2f} of {b['peer']}{bare}")
    out_of_reach = sum(1 for b in found["behind"] if b["two_passes"] and b["two_passes"] * LEVEL < 1)
    if out_of_reach:
        lines.append(f"of these, rows in which two passes over memory alone are behind too: {out_of_reach}")
    lines.append(f"rows behind the best peer: {len(found['behind'])} of {found['rows']}")
    return lines


def header(results):
    settings, machine = results["settings"], results["machine"]
    levels = [name for name in ("L1d", "L2", "L3") if f"{name} cache" in machine]
    caches = ", ".join(f"{name} {machine[f'{name} cache']}" for name in levels)
    isa = settings["isa"] or "the best"
    what = f"{settings['dtype']}, chain rows" if settings["chain"] else settings["dtype"]
    return [
        ", ".join((machine["Model name"], f"{machine.get('CPU(s)', '?')} CPUs", caches, machine["platform"])),
        f"{settings['threads']} threads, {what}, {settings['calls']}, ISA {isa}",
        f"{settings['date']}, {results['seconds']} s",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    ]


def markdown(results):
    """The whole report as Markdown."""
    text = ["# fastbn and its peers", "", *(f"{line}\n" for line in header(results))]
    text += [f"- {line}" for line in conclusion(results)]
    text += ["", "Geometric means of a peer's time over fastbn's, in the same layout.", ""]
    text += markdown_table(*peer_table(results))
    text += ["", "Medians in microseconds; spread is the interquartile range over the median.", ""]
    text += markdown_table(HEADINGS, map(cells, rows(results)))
    columns = list(dict.fromkeys(who(e) for row in results["rows"] for e in row["entries"]))
    lines = []
    for row in results["rows"]:
        times = {who(e): digits(median(e)) for e in row["entries"]}
        lines.append([label(row["shape"]), row["op"], *(times.get(name, "") for name in columns)])
    text += ["", "## Every contestant, median microseconds", ""]
    text += markdown_table(("shape", "op", *columns), lines)
    return "\n".join(text) + "\n"


def markdown_table(headings, lines):
    yield f"| {' | '.join(headings)} |"
    yield f"|{' --- |' * len(headings)}"
    for line in lines:
        yield f"| {' | '.join(line)} |"


def plot(results, directory):
    """speedup.png and memory_limit.png: an operation a panel, a shape a line, a layout a colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    table = list(rows(results))
    shapes = list(dict.fromkeys(row.shape for row in table))
    ops = list(dict.fromkeys(row.op for row in table))
    names = [f"{label(shape)}  ({prod(shape) * 4e-6:.3g} MB)" for shape in shapes]
    directory.mkdir(parents=True, exist_ok=True)
    for name, title, value in (
        ("speedup", "times as fast as the best peer in the same layout", "speedup"),
        ("memory_limit", "share of the memory limit", "share"),
    ):
        chosen = [row for row in table if (row.best() if value == "speedup" else row.limits[0])]
        if not chosen:
            continue
        figure, axes = plt.subplots(
            1, len(ops), figsize=(2.4 * len(ops) + 2, 0.3 * len(shapes) + 1.5), sharex=True, sharey=True,
            layout="constrained", squeeze=False,
        )  # fmt: skip
        for axis, op in zip(axes[0], ops, strict=True):
            axis.set_title(op, fontsize=9)
            axis.axvline(1, color="black", linewidth=0.8)
            for layout, color, shift in zip(USER_LAYOUTS, ("C0", "C1", "C2"), (-0.15, 0.15, 0), strict=True):
                points = [row for row in chosen if (row.op, row.layout) == (op, layout)]
                axis.scatter(
                    [getattr(row, value) for row in points],
                    [shapes.index(row.shape) + shift for row in points],
                    s=16, color=color, label=layout,
                )  # fmt: skip
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
        if value == "speedup":
            axes[0, 0].set_xscale("log")
            axes[0, 0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[0, 0].xaxis.set_major_formatter("{x:g}")
            axes[0, 0].xaxis.set_minor_formatter(NullFormatter())
        axes[0, 0].set_ylim(len(shapes) - 0.5, -0.5)
        axes[0, 0].set_yticks(range(len(shapes)), names, fontsize=8)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
        figure.suptitle(f"fastbn: {title}", fontsize=11)
        figure.savefig(directory / f"{name}.png", dpi=130)
        plt.close(figure)


def suffix(results):
    """What the files of this kind of rows have in their names."""
    settings = results["settings"]
    dtype = "" if settings["dtype"] == "float32" else f"-{settings['dtype']}"
    return dtype + "-chain" * settings["chain"]


def update_csv(path, columns, threads, lines):
    """Write these lines, which are about so many threads, and keep those about others."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [line for line in list(csv.reader(file))[1:] if int(line[0]) != threads]
    everything = kept + [[str(threads), *map(str, line)] for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("threads", *columns))
        writer.writerows(sorted(everything, key=lambda line: int(line[0])))


def write_csv(results, directory):
    threads, kind = results["settings"]["threads"], suffix(results)
    lines = [
        (op, layout, peer, f"{geometric_mean(ratios):.3f}", len(ratios), sum(r * LEVEL < 1 for r in ratios))
        for (op, layout, peer), ratios in by_peer(results).items()
    ]
    columns = "operation", "layout", "peer", "ratio", "rows", "behind"
    update_csv(directory / f"summary{kind}.csv", columns, threads, lines)
    about = [("machine", line) for line in header(results)[:1]]
    about += [(name, results["settings"][name]) for name in ("command", "date")]
    about += [("seconds", results["seconds"])]
    about += results["versions"].items()
    about += [("note", note) for note in results["notes"]]
    update_csv(directory / f"about{kind}.csv", ("what", "value"), threads, about)


def show(results, console, csv_directory=None, markdown_path=None, plots_directory=None):
    """Print the table and the conclusion; write what was asked for."""
    table = Table(title="fastbn and the best peers", caption="\n".join(header(results)))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading[0] in "sol" else "right")
    for row in rows(results):
        behind = row.best(any_layout=True) and row.lead * LEVEL < 1
        table.add_row(*cells(row), style="red" if behind else None)
    console.print(table)
    headings, lines = peer_table(results)
    table = Table(title="peer's time / fastbn's, same layout, geometric means")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "peer" else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for line in conclusion(results):
        console.print(line, highlight=False, markup=False)
    if csv_directory:
        write_csv(results, csv_directory)
    if markdown_path:
        markdown_path.parent.mkdir(parents=True, exist_ok=True)
        markdown_path.write_text(markdown(results))
    if plots_directory:
        plot(results, plots_directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--csv", type=Path, metavar="DIR")
    parser.add_argument("--markdown", type=Path, metavar="PATH")
    parser.add_argument("--plots", type=Path, metavar="DIR")
    args = parser.parse_args()
    show(json.loads(args.results.read_text()), Console(), args.csv, args.markdown, args.plots)


if __name__ == "__main__":
    main()
