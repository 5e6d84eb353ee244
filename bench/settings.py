"""Compare what can be set for a whole process: huge pages and allocators, for PyTorch plain and accelerated.

    python bench/settings.py [--networks mobilenet_v2 ...] [--quick] [--markdown PATH] ...

Runs bench/networks.py in a process of its own for each setting, one after the other and then all again. Tells
how long a training step takes (the least of the runs' medians), and what memory its process holds at most.
Allocators are those that are installed (Debian: libjemalloc2, libtcmalloc-minimal4).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from ctypes.util import find_library
from pathlib import Path

from report import markdown_table
from rich.console import Console
from rich.progress import track
from rich.table import Table

# Of glibc: all large blocks from its heap, and nothing of that given back.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(1 << 26)}
SETTINGS = {
    "as it is": {},
    "PyTorch's huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "glibc's huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "glibc keeps memory": KEPT,
    "glibc keeps memory in huge pages": {**KEPT, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "jemalloc": {"LD_PRELOAD": "jemalloc"},
    "jemalloc keeps memory in huge pages": {
        "LD_PRELOAD": "jemalloc",
        "MALLOC_CONF": "thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1",
    },
    "tcmalloc": {"LD_PRELOAD": "tcmalloc_minimal"},
}
WHO = ("plain", "accelerated")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["resnet50", "mobilenet_v2"], metavar="NAME")
    parser.add_argument("--layouts", nargs="+", default=["NCHW", "channels-last"])
    parser.add_argument("--size", type=int, default=112, help="pixels a side (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of a process (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="of each setting (default: %(default)s)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--quick", action="store_true", help="one small round: to see that it works")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--markdown", type=Path, metavar="PATH")
    args = parser.parse_args()
    if args.quick:
        args.size, args.rounds, args.runs = 32, 1, 1
    return args


def environment(setting):
    """What the setting sets; None where it needs a library that is not installed."""
    values = dict(SETTINGS[setting])
    if "LD_PRELOAD" in values:
        values["LD_PRELOAD"] = find_library(values["LD_PRELOAD"])
        if values["LD_PRELOAD"] is None:
            return None
    return values


def run(args, values):
    """The rows of bench/networks.py under these settings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.json")
        command = [
            sys.executable, Path(__file__).with_name("networks.py"), "--networks", *args.networks,
            "--layouts", *args.layouts, "--precisions", "float32", "--modes", "training",
            "--size", str(args.size), "--rounds", str(args.rounds), "--json", path,
        ]  # fmt: skip
        subprocess.run(command, env=os.environ | values, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())["rows"]


def best(runs):
    """By network and layout: (plain, accelerated) in milliseconds, and in megabytes."""
    found = {}
    for row in (row for rows in runs for row in rows):
        times, peaks = found.setdefault((row["network"], row["layout"]), ([], []))
        times.append([row["milliseconds"][who] for who in WHO])
        peaks.append([row["peak_megabytes"][who] for who in WHO])
    return {
        place: ([min(column) for column in zip(*times, strict=True)], peaks[0])
        for place, (times, peaks) in found.items()
    }


def main():
    args = parse()
    console = Console(width=None if sys.stdout.isatty() else 170)
    usable = {name: values for name in args.settings if (values := environment(name)) is not None}
    for name in args.settings:
        if name not in usable:
            console.print(f"left out, as its library is not installed: {name}")
    runs = {name: [] for name in usable}
    for name in track([*usable] * args.runs, console=console, auto_refresh=False):
        runs[name].append(run(args, usable[name]))
    results = {name: best(rows) for name, rows in runs.items()}
    first = next(iter(results.values()))
    headings = (
        "network",
        "layout",
        "setting",
        "PyTorch ms",
        "fastbn ms",
        "ratio",
        "against the first",
        "peak MB",
    )
    rows = []
    for place, (before, _) in first.items():
        for name, found in results.items():
            (plain, fast), peaks = found[place]
            gains = f"{before[0] / plain:.3f}, {before[1] / fast:.3f}"
            megabytes = " -> ".join("?" if peak is None else f"{peak:.0f}" for peak in peaks)
            rows.append(
                [*place, name, f"{plain:.1f}", f"{fast:.1f}", f"{plain / fast:.3f}", gains, megabytes]
            )
    table = Table(*headings, title="Training steps by what is set for the process")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"environment": usable, "runs": runs}, indent=1) + "\n")
    if args.markdown:
        words = [f"`python bench/settings.py {' '.join(sys.argv[1:])}`", ""]
        words += [
            f"- {name}: `{' '.join(f'{k}={v}' for k, v in usable[name].items()) or '-'}`" for name in usable
        ]
        text = ["# What is set for a process", "", *words, "", *markdown_table(headings, rows)]
        args.markdown.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
