"""The kernels of this checkout beside those of another one, built in place: time here / time there.

    python bench/versions.py ../before
    python bench/versions.py ../before --chain

Both are loaded into one process and take turns on the same arrays, because where arrays happen to lie in
memory matters more than most changes. Hot rows call again and again on the same arrays. In chain rows x is
written before, the call is made, and y is read after, each with memory of its own, more than the last-level
cache in all; what is timed is the call and the reading. The families are operation x layout.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import defaultdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
from shapes import CHAIN, CHAIN_BYTES, SHAPES

from fastbn import _kernels

OPERATIONS = ("inference", "inference+relu", "training", "training+relu", "backward", "backward+relu")


def kernels_of(checkout: Path) -> Any:
    [file] = (checkout / "fastbn").glob("_kernels*.so")
    spec = spec_from_file_location("fastbn._kernels", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Row:
    """One operation on one shape, with so many sets of arrays, and how each version is called on them."""

    def __init__(
        self, shape: tuple[int, ...], layout: str, operation: str, threads: int, chain: bool
    ) -> None:
        self.name, _, activation = operation.partition("+")
        self.label = f"{'x'.join(map(str, shape)):18} {layout} {operation:15}"
        self.family = f"{operation} {layout}"
        self.chain = chain
        axis = 1 if layout == "nchw" else -1
        order = shape if axis == 1 else (shape[0], *shape[2:], shape[1])
        rng = np.random.default_rng(0)
        self.x, self.g = rng.standard_normal((2, *order), np.float32)
        vectors = [rng.random(shape[1], np.float32) + np.float32(0.5) for _ in range(4)]
        copies = max(3, CHAIN_BYTES // (3 * self.x.nbytes)) if chain else 1
        self.sets = [(self.x.copy(), self.g.copy(), np.empty_like(self.x)) for _ in range(copies)]
        self.at = 0
        stats = _kernels.stats(self.x, axis, threads)
        mean, var, weight, bias = vectors
        how = 1e-5, axis, None, activation or None, 0.01  # eps, axis, residual, activation, slope
        eps, *rest = how

        def call(kernels: Any) -> None:
            x, g, y = self.sets[self.at]
            if self.name == "inference":
                kernels.normalize(x, mean, var, False, weight, bias, eps, *rest, y, threads, None)
            elif self.name == "training":
                kernels.forward(x, weight, bias, eps, *rest, y, threads, mean, var, 0.1, True, False)
            else:
                kernels.backward(g, x, *stats, weight, bias, eps, True, *rest, y, threads)

        self.call = call

    def turn(self, kernels: Any, calls: int) -> float:
        """The median of the calls' times."""
        times = []
        for _ in range(calls):
            if self.chain:
                self.at = (self.at + 1) % len(self.sets)
                x, g, _ = self.sets[self.at]
                np.copyto(g if self.name == "backward" else x, self.g if self.name == "backward" else self.x)
            start = time.perf_counter()
            self.call(kernels)
            if self.chain:
                self.sets[self.at][2].sum()
            times.append(time.perf_counter() - start)
        return median(times)


def rows(chain: bool, threads: int, only: list[str] | None, shapes: list[str] | None) -> Any:
    for shape in CHAIN if chain else SHAPES:
        if shapes and "x".join(map(str, shape)) not in shapes:
            continue
        for layout in ("nchw", "nhwc") if len(shape) > 2 and math.prod(shape[2:]) > 1 else ("nchw",):
            for operation in only or OPERATIONS:
                if (
                    math.prod(shape) > shape[1] or "inference" in operation
                ):  # no training on one value a channel
                    yield Row(shape, layout, operation, threads, chain)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("there", type=Path, help="the other checkout")
    parser.add_argument("--chain", action="store_true", help="chain rows in place of hot ones")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.05, help="a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", choices=_kernels.supported_isas())
    parser.add_argument("--operations", nargs="+", metavar="OP", choices=OPERATIONS)
    parser.add_argument("--shapes", nargs="+", metavar="NxCxHxW")
    args = parser.parse_args()
    there = kernels_of(args.there)
    for kernels in (_kernels, there) if args.isa else ():
        kernels.set_isa(args.isa)
    families: dict[str, list[float]] = defaultdict(list)
    for row in rows(args.chain, args.threads, args.operations, args.shapes):
        row.turn(_kernels, 3)
        calls = min(max(3, round(args.seconds / row.turn(there, 5))), 5000)
        turns = [(row.turn(_kernels, calls), row.turn(there, calls)) for _ in range(args.rounds)]
        ratio = median(now / before for now, before in turns)
        families[row.family].append(ratio)
        print(f"{row.label} {1e6 * median(now for now, _ in turns):10.1f} us {ratio:6.3f}", flush=True)
    print("time here / time there, geometric means:")
    for family, found in families.items():
        print(f"  {family:22} {geometric_mean(found):.3f}   worst {max(found):.2f}, of {len(found)}")
    everything = [ratio for found in families.values() for ratio in found]
    print(f"  all {len(everything)} rows: {geometric_mean(everything):.3f}, worst {max(everything):.2f}")


if __name__ == "__main__":
    main()
