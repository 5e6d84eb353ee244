"""What the JSON of compare.py says: the tables, the rows where fastbn is behind, the plots.

python bench/report.py RESULTS.json [--markdown PATH] [--plots DIR]
"""

import argparse
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
USER_LAYOUTS = ("NCHW", "channels-last", "(N, C)")


class Row(NamedTuple):
    """fastbn in one layout that users hold, with the best peers and the memory limits of the same row."""

    shape: tuple
    op: str
    layout: str
    ours: dict
    same_layout: dict | None
    any_layout: dict | None
    limit: dict | None
    limit_of_two_passes: dict | None

    @property
    def speedup(self):
        """Over the best peer in the same layout."""
        return median(self.same_layout) / median(self.ours)

    @property
    def lead(self):
        """Over the best peer in any layout."""
        return median(self.any_layout) / median(self.ours)

    @property
    def share(self):
        """Of the memory limit."""
        return median(self.limit) / median(self.ours)

    @property
    def lead_of_two_passes(self):
        """The best peer over a loop of two passes over memory; None where one pass is enough."""
        if self.layout == "NCHW" or not self.limit_of_two_passes:
            return None
        return median(self.any_layout) / median(self.limit_of_two_passes)


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
        theirs = [e for e in row["entries"] if e["contestant"] != OURS]
        for ours in (e for e in row["entries"] if e["contestant"] == OURS):
            same = [e for e in theirs if e["layout"] == ours["layout"]]
            best = (min(es, key=median, default=None) for es in (same, theirs))
            limits = row["limit"], row.get("limit_of_two_passes")
            yield Row(tuple(row["shape"]), row["op"], ours["layout"], ours, *best, *limits)


def summary(results):
    """The figures the bench ends with."""
    table = [row for row in rows(results) if row.same_layout]
    by_op = defaultdict(list)
    for row in table:
        by_op[row.op].append(row)
    behind = [row for row in table if row.lead * LEVEL < 1]
    disturbed = [r for r in results["rows"] if sum(r["interference"].values()) > 0.1]
    return {
        "rows": len(table),
        "behind": [
            {
                "row": f"{label(row.shape)} {row.layout} {row.op}",
                "ratio": round(row.lead, 3),
                "peer": who(row.any_layout),
                "two_passes": row.lead_of_two_passes and round(row.lead_of_two_passes, 3),
            }
            for row in sorted(behind, key=lambda row: row.lead)
        ],
        "speedup": geometric_mean([row.speedup for row in table]) if table else None,
        "speedup_by_op": {op: geometric_mean([row.speedup for row in found]) for op, found in by_op.items()},
        "relu_cost": relu_cost(results),
        "disturbed_rows": len(disturbed),
    }


def relu_cost(results):
    """Time with a fused ReLU over time without it, by operation: geometric mean and largest."""
    times = {(row.shape, row.layout, row.op): median(row.ours) for row in rows(results)}
    ratios = defaultdict(list)
    for (shape, layout, op), time in times.items():
        fused = times.get((shape, layout, f"{op}+relu"))
        if fused:
            ratios[op].append(fused / time)
    return {op: {"mean": geometric_mean(found), "largest": max(found)} for op, found in ratios.items()}


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

    return [
        label(row.shape),
        row.op,
        row.layout,
        digits(median(row.ours)),
        f"{spread(row.ours):.1%}",
        *peer(row.same_layout),
        digits(row.speedup) if row.same_layout else "",
        *peer(row.any_layout),
        digits(row.lead) if row.any_layout else "",
        f"{row.share:.0%}" if row.limit else "",
    ]


def conclusion(results):
    """Lines for the end of every report."""
    found = summary(results)
    lines = list(results["notes"])
    if found["disturbed_rows"]:
        lines.append(f"{found['disturbed_rows']} rows were disturbed: others took more than 10 % of a core")
    for op, cost in found["relu_cost"].items():
        lines.append(
            f"fused ReLU, {op}: {cost['mean']:.3f} times the time without it, at most {cost['largest']:.3f}"
        )
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
    return [
        ", ".join((machine["Model name"], f"{machine.get('CPU(s)', '?')} CPUs", caches, machine["platform"])),
        f"{settings['threads']} threads, {settings['calls']}, ISA {isa}",
        f"{settings['date']}, {results['seconds']} s",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    ]


def markdown(results):
    """The whole report as Markdown."""
    text = ["# fastbn and its peers", "", *(f"{line}\n" for line in header(results))]
    text += [f"- {line}" for line in conclusion(results)]
    text += ["", "Medians in microseconds; spread is the interquartile range over the median.", ""]
    text += markdown_table(HEADINGS, map(cells, rows(results)))
    columns = list(dict.fromkeys(who(e) for row in results["rows"] for e in row["entries"]))
    lines = []
    for row in results["rows"]:
        times = {who(e): digits(median(e)) for e in row["entries"]}
        limit = digits(median(row["limit"])) if row["limit"] else ""
        lines.append([label(row["shape"]), row["op"], limit, *(times.get(name, "") for name in columns)])
    text += ["", "## Every contestant, median microseconds", ""]
    text += markdown_table(("shape", "op", "memory limit", *columns), lines)
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
    for name, title, value, needs in (
        ("speedup", "times as fast as the best peer in the same layout", "speedup", "same_layout"),
        ("memory_limit", "share of the memory limit", "share", "limit"),
    ):
        chosen = [row for row in table if getattr(row, needs)]
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


def show(results, console, markdown_path=None, plots_directory=None):
    """Print the table and the conclusion; write what was asked for."""
    table = Table(title="fastbn and the best peers", caption="\n".join(header(results)))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading[0] in "sol" else "right")
    for row in rows(results):
        behind = row.any_layout and row.lead * LEVEL < 1
        table.add_row(*cells(row), style="red" if behind else None)
    console.print(table)
    for line in conclusion(results):
        console.print(line, highlight=False, markup=False)
    if markdown_path:
        markdown_path.parent.mkdir(parents=True, exist_ok=True)
        markdown_path.write_text(markdown(results))
    if plots_directory:
        plot(results, plots_directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--markdown", type=Path, metavar="PATH")
    parser.add_argument("--plots", type=Path, metavar="DIR")
    args = parser.parse_args()
    show(json.loads(args.results.read_text()), Console(), args.markdown, args.plots)


if __name__ == "__main__":
    main()
