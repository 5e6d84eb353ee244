"""What a mask costs: time with a mask / time without, on the same arrays.

    python bench/masks.py
    python bench/masks.py --kinds lengths --operations training --shapes 32x128x100

Both calls take turns, a burst each, in one process; an entry is the median over rounds of the ratio of the
bursts' medians. Masks are of two kinds: `lengths` keeps a beginning of each last axis of positions, as
sequences of all lengths from half to whole do when they are padded; `half` keeps every position by the toss
of a coin, which is the worst for whatever would skip many at once. `+zeros` is mask_output=True.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import defaultdict
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from shapes import SHAPES, channels_last, label, values_per_channel

from fastbn import _kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPERATIONS = ("stats", "training", "training+zeros", "backward", "backward+zeros", "inference+zeros")
KINDS = ("lengths", "half")


def mask_of(kind: str, positions: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "half":
        return rng.random(positions) < 0.5
    last = positions[-1]
    lengths = rng.integers(last - last // 2, last + 1, positions[:-1])
    return np.arange(last) < lengths[..., None]


def calls(shape: tuple[int, ...], axis: int, operation: str, kind: str, threads: int) -> Any:
    """The operation without a mask, and with one."""
    name, _, zeros = operation.partition("+")
    order = shape if axis == 1 else channels_last(shape)
    rng = np.random.default_rng(0)
    x, g, y = rng.standard_normal((3, *order), np.float32)
    mean, var, weight, bias = (rng.random(shape[1], np.float32) + np.float32(0.5) for _ in range(4))
    given = mask_of(kind, order[:1] + order[2:] if axis == 1 else order[:-1])
    rest = axis, None, "relu", 0.01, y, threads  # axis, residual, activation, slope, out

    def call(mask: np.ndarray | None) -> Callable[[], Any]:
        masked = {"mask": mask, "mask_output": bool(zeros)}
        stats = _kernels.stats(x, axis, threads, mask)

        def run() -> None:
            if name == "stats":
                _kernels.stats(x, axis, threads, mask)
            elif name == "inference":
                _kernels.normalize(x, mean, var, False, weight, bias, 1e-5, *rest, None, **masked)
            elif name == "training":
                _kernels.forward(x, weight, bias, 1e-5, *rest, mean, var, 0.1, True, False, **masked)
            else:
                _kernels.backward(g, x, *stats, weight, bias, 1e-5, True, *rest, **masked)

        return run

    return call(None), call(given)


def burst(call: Callable[[], Any], times: int) -> float:
    took = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return median(took)


def rows(args: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    for shape in SHAPES:
        if args.shapes and label(shape) not in args.shapes:
            continue
        for axis in (1, -1) if len(shape) > 2 and math.prod(shape[2:]) > 1 else (1,):
            for kind in args.kinds:
                for operation in args.operations:
                    if values_per_channel(shape) < 4:  # no training on fewer real values than two
                        continue
                    layout = "nchw" if axis == 1 else "nhwc"
                    name = f"{label(shape):18} {layout} {kind:8} {operation:15}"
                    yield name, f"{operation} {kind}", calls(shape, axis, operation, kind, args.threads)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.05, help="a burst (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", choices=_kernels.supported_isas())
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--shapes", nargs="+", metavar="NxCxHxW")
    args = parser.parse_args()
    if args.isa:
        _kernels.set_isa(args.isa)
    families: dict[str, list[float]] = defaultdict(list)
    for name, family, (without, masked) in rows(args):
        burst(masked, 2)
        times = min(max(3, round(args.seconds / burst(without, 3))), 5000)
        turns = [(burst(masked, times), burst(without, times)) for _ in range(args.rounds)]
        ratio = median(a / b for a, b in turns)
        families[family].append(ratio)
        print(f"{name} {1e6 * median(a for a, _ in turns):10.1f} us {ratio:6.2f}", flush=True)
    print("time with a mask / time without, geometric means:")
    for family, found in families.items():
        print(f"  {family:24} {geometric_mean(found):.2f}   worst {max(found):.2f}, of {len(found)}")


if __name__ == "__main__":
    main()
