"""This checkout beside another one, built in place: time here / time there, per row, family and in all.

    python bench/versions.py ../before
    python bench/versions.py ../before --chain

Each is a process of its own; they take turns. Hot rows call again and again on the same arrays. In chain rows x is
written before, the call is made, and y is read after, each with memory of its own, more than the last-level cache in
all; what is timed is the call and the reading. The families are operation x layout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

ROOT = Path(__file__).parents[1]
OPERATIONS = ("inference", "inference+relu", "training", "training+relu", "backward", "backward+relu")
# arrays of 0.5 to 13 MB: layers of networks at batch 8
CHAIN_SHAPES = [(8, 64, 16, 16), (8, 96, 28, 28), (8, 64, 40, 40), (8, 256, 20, 20), (8, 128, 40, 40), (8, 256, 40, 40)]
CHAIN_BYTES = 200 << 20  # of all arrays of a chain row


def prepare(shape: list[int], layout: str, operation: str, threads: int, copies: int) -> Any:
    """What writes x, calls, and reads y, of one after the other of so many sets of arrays."""
    import numpy as np

    import fastbn

    axis = 1 if layout == "nchw" else -1
    name, _, activation = operation.partition("+")
    how: Any = {"axis": axis, "num_threads": threads, "activation": activation or None}
    order = shape if axis == 1 else [shape[0], *shape[2:], shape[1]]
    rng = np.random.default_rng(0)
    source, grad_output = rng.standard_normal((2, *order), np.float32)
    vectors = [rng.random(shape[1], np.float32) + np.float32(0.5) for _ in range(4)]
    sets = [[source.copy(), grad_output.copy(), np.empty_like(source)] for _ in range(copies)]
    stats = fastbn.batch_stats(source, axis=axis)
    at = 0

    def write() -> None:
        nonlocal at
        at = (at + 1) % copies
        x, g, _ = sets[at]
        np.copyto(g if name == "backward" else x, grad_output if name == "backward" else source)

    def call() -> None:
        x, g, y = sets[at]
        if name == "backward":
            fastbn.batch_norm_backward(g, x, stats, *vectors[:2], out=y, **how)
        else:
            fastbn.batch_norm(x, *vectors, training=name == "training", out=y, **how)

    def read() -> None:
        sets[at][2].sum()

    return write, call, read


def contestant() -> None:
    """Answer each line of JSON on standard input, (row, chain, calls), with the calls' times in seconds."""
    prepared: dict[str, Any] = {}
    for line in sys.stdin:
        row, chain, calls = json.loads(line)
        if str(row) not in prepared:
            prepared.clear()
            size = 4
            for n in row[0]:
                size *= n
            prepared[str(row)] = prepare(*row, copies=max(3, CHAIN_BYTES // (3 * size)) if chain else 1)
        write, call, read = prepared[str(row)]
        times = []
        for _ in range(calls):
            if chain:
                write()
            start = time.perf_counter()
            call()
            if chain:
                read()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


class Contestant:
    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).resolve(), "--contestant", "there"],
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *question: Any) -> list[float]:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(question), file=self.process.stdin, flush=True)
        times: list[float] = json.loads(self.process.stdout.readline())
        return times


def rows(chain: bool, only: list[str] | None) -> list[tuple[list[int], str, str]]:
    from shapes import SHAPES

    found = []
    for shape in CHAIN_SHAPES if chain else SHAPES:
        for layout in ("nchw", "nhwc") if len(shape) > 2 and shape[2:] != (1, 1) else ("nchw",):
            for operation in OPERATIONS:
                alone = len(shape) == 2 and shape[0] == 1  # one value a channel: nothing to train on
                if (alone and "inference" not in operation) or (only and operation not in only):
                    continue
                found.append((list(shape), layout, operation))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("there", type=Path, help="the other checkout")
    parser.add_argument("--chain", action="store_true", help="chain rows in place of hot ones")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.1, help="a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operations", nargs="+", metavar="OP", choices=OPERATIONS)
    parser.add_argument("--contestant", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        contestant()
        return
    here, there = Contestant(ROOT), Contestant(args.there.resolve())
    families: dict[str, list[float]] = defaultdict(list)
    for shape, layout, operation in rows(args.chain, args.operations):
        row = (shape, layout, operation, args.threads)
        typical = min(there.ask(row, args.chain, 5))
        here.ask(row, args.chain, 5)
        calls = min(max(5, round(args.seconds / typical)), 5000)
        ratios, best = [], []
        for _ in range(args.rounds):
            now = median(here.ask(row, args.chain, calls))
            before = median(there.ask(row, args.chain, calls))
            ratios.append(now / before)
            best.append(now)
        ratio = median(ratios)
        families[f"{operation} {layout}"].append(ratio)
        label = "x".join(map(str, shape))
        print(f"{label:18} {layout} {operation:15} {1e6 * median(best):10.1f} us {ratio:6.3f}", flush=True)
    print("time here / time there, geometric means:")
    for family, found in families.items():
        print(f"  {family:22} {geometric_mean(found):.3f}   worst {max(found):.2f}, of {len(found)}")
    everything = [ratio for found in families.values() for ratio in found]
    print(f"  all {len(everything)} rows: {geometric_mean(everything):.3f}, worst {max(everything):.2f}")


if __name__ == "__main__":
    main()
