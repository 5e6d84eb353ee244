"""Run the pytest-benchmark suite against the NumPy baseline and print how many times faster fastbn is.

    python bench/ratios.py [pytest arguments, such as -k "backward and 56x56"]

An entry is fastbn's median time and, in bold, NumPy's median time / fastbn's median time, median over
bursts. The suite's own JSON, with every round, stays in build/bench/numpy.json, also for `pytest-benchmark
compare`.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean, median

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from shapes import label

import fastbn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "bench" / "numpy.json"


def run(extra_arguments):
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    suite = Path(__file__).with_name("test_against_numpy.py")
    options = ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={RESULTS}", "-q"]
    status = pytest.main([str(suite), f"--rootdir={ROOT}", *options, *extra_arguments])
    if status:
        sys.exit(status)
    return json.loads(RESULTS.read_text())


def burst_medians(benchmarks):
    """{(shape, axis): {op: {contestant: median seconds of each burst}}}, in the order of the suite."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for benchmark in benchmarks:
        case = benchmark["params"]
        key = tuple(case["shape"]), case["axis"]
        found[key][case["op"]][case["contestant"]].append(benchmark["stats"]["median"])
    return found


def print_ratios(results, console):
    cpu = results["machine_info"]["cpu"].get("brand_raw", "unknown CPU")
    found = burst_medians(results["benchmarks"])
    ops = list(dict.fromkeys(op for by_op in found.values() for op in by_op))
    threads = f"{fastbn.get_num_threads()} thread{'s' * (fastbn.get_num_threads() > 1)}"
    table = Table(
        title="fastbn: microseconds, and how many times faster than NumPy",
        caption=f"{cpu}; fastbn {fastbn.__version__}, {threads}; NumPy {np.__version__}",
    )
    table.add_column("N x C x spatial", no_wrap=True)
    table.add_column("channels", no_wrap=True)
    for op in ops:
        table.add_column(op, justify="right", no_wrap=True)
    ratios = defaultdict(list)
    for (shape, axis), by_op in found.items():
        row = [label(shape), "last" if axis == -1 else "second"]
        for op in ops:
            times = by_op[op]
            if not times:  # no training with one value per channel
                row.append("")
                continue
            ratio = median(n / f for n, f in zip(times["numpy"], times["fastbn"], strict=True))
            ratios[op].append(ratio)
            fast = 1e6 * median(times["fastbn"])
            row.append(f"{fast:,.{0 if fast >= 100 else 1}f} [bold]{ratio:5.1f}[/]")
        table.add_row(*row)
    table.add_section()
    table.add_row("geometric mean", "", *(f"[bold]{geometric_mean(ratios[op]):5.1f}[/]" for op in ops))
    console.print(table)
    console.print(f"Every round: {RESULTS}", soft_wrap=True)


if __name__ == "__main__":
    measured = run(sys.argv[1:])
    console = Console()
    print_ratios(measured, console if console.is_terminal else Console(width=100))
