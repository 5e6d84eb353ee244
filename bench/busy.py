"""Latency and CPU time of calls while other processes keep the CPUs busy, and of calls now and then.

Each contestant is a process of its own; they take turns, so that a slow moment of the machine hits them
alike. "always shared" has a thread on each CPU whatever happens, and they wait as GNU OpenMP lets them wait.
`--before PATH` adds the default of another checkout, built in place. Bounds are printed where they are
missed: with other work around, p50 1.5 times, p99 3 times and CPU time 2 times that of one thread; on a quiet
machine with calls every 10 ms, p50 1.15 times the better of one thread and of all that wait passively, CPU
time 2 times. `--quiet --before PATH` compares, over all of the bench's shapes, calls back to back on a quiet
machine with those of the other checkout.

`--csv PATH` keeps the figures and `--plot PATH` draws them; `bench/pages.py` does so later, for the site.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean
from typing import Any

SHAPES = ["8x64x28x28", "1x256x56x56", "32x256x56x56"]
OPERATIONS = ["inference", "training", "backward"]
ROUNDS = 5
PAUSE = 0.01
GNU_SPINS = "300000"  # of a thread of GNU OpenMP before it sleeps, where nothing is set
ROOT = Path(__file__).parents[1]

Row = dict[str, Any]


def contestant(threads: int | None) -> None:
    """Answer each line of JSON on standard input, (shape, operation, calls, pause), with the calls' times."""
    import numpy as np

    import fastbn

    def prepare(shape: list[int], operation: str) -> Callable[[], object]:
        rng = np.random.default_rng(0)
        x, grad_output = rng.standard_normal((2, *shape), np.float32)
        vectors = [rng.random(shape[1], np.float32) + np.float32(0.5) for _ in range(4)]
        how: Any = {"out": np.empty_like(x), "num_threads": threads}
        stats = fastbn.batch_stats(x)
        return {
            "inference": lambda: fastbn.batch_norm(x, *vectors, **how),
            "training": lambda: fastbn.batch_norm(x, *vectors, training=True, **how),
            "backward": lambda: fastbn.batch_norm_backward(grad_output, x, stats, *vectors[:2], **how),
        }[operation]

    calls: dict[tuple[Any, ...], Any] = {}
    for line in sys.stdin:
        shape, operation, count, pause = json.loads(line)
        key = (*shape, operation)
        if key not in calls:
            calls[key] = prepare(shape, operation)
            calls[key]()
        call, times = calls[key], []
        cpu = time.process_time()
        for _ in range(count):
            if pause:
                time.sleep(pause)
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        time.sleep(0.005)  # threads that spin on are paid for
        print(json.dumps([times, time.process_time() - cpu]), flush=True)


class Contestant:
    def __init__(self, threads: int | None, root: Path = ROOT, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if "OMP" not in name}
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).resolve(), "--contestant", str(threads or 0)],
            env=inherited | {"PYTHONPATH": str(root)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *question: Any) -> tuple[list[float], float]:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(question), file=self.process.stdin, flush=True)
        times, cpu = json.loads(self.process.stdout.readline())
        return times, cpu


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many other processes that never sleep."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(0.3 if count else 0)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[min(len(times) - 1, int(q * len(times)))]


def measure(contestants: dict[str, Contestant], shapes: list[str], seconds: float) -> Iterator[Row]:
    cpus = len(os.sched_getaffinity(0))
    for shape in ([*map(int, name.split("x"))] for name in shapes):
        for operation in OPERATIONS:
            for n in (0, cpus, 2 * cpus):
                for pause in 0.0, PAUSE:
                    found: dict[str, Any] = {name: ([], []) for name in contestants}
                    with busy(n):
                        for one in contestants.values():
                            one.ask(shape, operation, 20, pause)
                        typical = contestants["one thread"].ask(shape, operation, 5, pause)[0][2]
                        calls = round(seconds / ROUNDS / (typical + pause))
                        calls = min(max(40, calls), 4000)
                        for _ in range(ROUNDS):
                            for name, one in contestants.items():
                                times, cpu = one.ask(shape, operation, calls, pause)
                                found[name][0].extend(times)
                                found[name][1].append(cpu / calls)
                    row: Row = {"shape": shape, "operation": operation, "busy": n, "pause": pause}
                    for name, (times, cpus_a_call) in found.items():
                        row[name] = [
                            1e6 * quantile(times, 0.5),
                            1e6 * quantile(times, 0.99),
                            1e6 * sum(cpus_a_call) / ROUNDS,
                        ]
                    yield row


def missed(row: Row) -> list[str]:
    """The bounds that the default does not keep, with the ratio that it has."""
    p50, p99, cpu = row["default"]
    one50, one99, one_cpu = row["one thread"]
    if row["busy"]:
        found = {"p50": (p50 / one50, 1.5), "p99": (p99 / one99, 3), "CPU": (cpu / one_cpu, 2)}
    elif row["pause"]:
        found = {"p50": (p50 / min(one50, row["passive"][0]), 1.15), "CPU": (cpu / one_cpu, 2)}
    else:
        return []
    return [f"{name} {ratio:.2f} > {bound}" for name, (ratio, bound) in found.items() if ratio > bound]


def write_csv(path: Path, rows: list[Row], contestants: dict[str, Contestant]) -> None:
    """A line for each row and contestant, in microseconds."""
    from compare import machine

    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["cpu", "shape", "operation", "busy", "every_ms", "contestant", "p50", "p99", "cpu_time"]
        )
        for row in rows:
            place = [
                machine()["Model name"], "x".join(map(str, row["shape"])), row["operation"], row["busy"],
                f"{1e3 * row['pause']:g}",
            ]  # fmt: skip
            for name in contestants:
                writer.writerow([*place, name, *(f"{value:.0f}" for value in row[name])])


def compare_quiet(contestants: dict[str, Contestant], seconds: float) -> None:
    """How long the default takes beside that of before, back to back, with nothing else at work."""
    from shapes import SHAPES, label

    by_operation: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}
    for shape in SHAPES:
        for operation in OPERATIONS:
            if operation != "inference" and math.prod(shape) == shape[1]:
                continue
            typical = contestants["before"].ask(shape, operation, 50, 0)[0][25]
            contestants["default"].ask(shape, operation, 50, 0)
            calls = min(max(10, round(seconds / ROUNDS / typical)), 20_000)
            medians = []
            for _ in range(ROUNDS):
                now, before = (contestants[name].ask(shape, operation, calls, 0)[0] for name in contestants)
                medians.append(quantile(now, 0.5) / quantile(before, 0.5))
            by_operation[operation].append(quantile(medians, 0.5))
            print(f"{label(shape):20} {operation:10} {by_operation[operation][-1]:.2f}", flush=True)
    everything = [ratio for found in by_operation.values() for ratio in found]
    means = [f"{name} {geometric_mean(found):.3f}" for name, found in by_operation.items()]
    print("time now / before, geometric means:", *means, f"all {geometric_mean(everything):.3f}", sep="  ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--before", type=Path, metavar="PATH", help="a checkout to compare with, built in place"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of calls for each cell (default: %(default)s)"
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxCx...", help="default: three")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="keep the figures")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw those of --csv")
    parser.add_argument("--quiet", action="store_true", help="compare calls back to back; needs --before")
    parser.add_argument("--contestant", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant is not None:
        contestant(args.contestant or None)
        return
    if args.plot and not args.csv:
        parser.error("--plot draws what --csv keeps: give both")
    if args.quiet:
        compare_quiet(
            {"default": Contestant(None), "before": Contestant(None, args.before.resolve())}, args.seconds
        )
        return
    cpus = len(os.sched_getaffinity(0))
    contestants = {
        "default": Contestant(None),
        "one thread": Contestant(1),
        "passive": Contestant(cpus, OMP_WAIT_POLICY="passive"),
        "always shared": Contestant(cpus, GOMP_SPINCOUNT=GNU_SPINS),
    }
    if args.before:
        contestants["before"] = Contestant(None, args.before.resolve())
    print("microseconds: p50 / p99 / CPU time a call")
    print("| shape | operation | busy | every | " + " | ".join(contestants) + " | missed |")
    print("|---" * (len(contestants) + 5) + "|")
    rows: list[Row] = []
    for row in measure(contestants, args.shapes, args.seconds):
        cells = [" / ".join(f"{value:.0f}" for value in row[name]) for name in contestants]
        shape, every = "x".join(map(str, row["shape"])), f"{1e3 * row['pause']:g} ms" if row["pause"] else "-"
        rows.append(row)
        print("|", " | ".join([shape, row["operation"], str(row["busy"]), every, *cells]), "|",
              ", ".join(missed(row)), "|", flush=True)  # fmt: skip
    misses = sum(bool(missed(row)) for row in rows)
    print(f"{misses} rows miss a bound" if misses else "all bounds are kept")
    for one in contestants.values():
        one.process.kill()
    if args.csv:
        write_csv(args.csv, rows, contestants)
    if args.plot:
        from pages import draw_busy, lines_of

        draw_busy(lines_of(args.csv), args.plot)


if __name__ == "__main__":
    main()
