"""What another dtype costs, or a smooth activation: time / time of float32, or of ReLU, of the same shape.

    python bench/dtypes.py
    python bench/dtypes.py --dtypes float16 --shapes 32x256x56x56 --isa avx2
    python bench/dtypes.py --activation silu --shapes 8x96x56x56 64x96x56x56

The two calls take turns, a burst each, in one process, each on arrays of its own; an entry is the median over
rounds of the ratio of the bursts' medians. By default of shapes beyond the caches.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from masks import burst
from shapes import channels_last, label

from fastbn import _kernels

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
OPERATIONS = ("inference", "training", "backward")
BEYOND = ["32x64x112x112", "32x256x56x56", "64x96x56x56"]


def call_of(
    shape: tuple[int, ...], axis: int, operation: str, dtype: str, activation: str | None, threads: int
) -> Callable[[], Any]:
    order = shape if axis == 1 else channels_last(shape)
    rng = np.random.default_rng(0)
    real = np.float64 if dtype == "float64" else np.float32
    x, g, y = (rng.standard_normal(order, np.float32).astype(DTYPES[dtype]) for _ in range(3))
    mean, var, weight, bias = (rng.random(shape[1]).astype(real) + real(0.5) for _ in range(4))
    stats = _kernels.stats(x, axis, threads)
    rest = axis, None, activation, 0.01, y, threads  # axis, residual, activation, slope, out

    def run() -> None:
        if operation == "inference":
            _kernels.normalize(x, mean, var, False, weight, bias, 1e-5, *rest, None)
        elif operation == "training":
            _kernels.forward(x, weight, bias, 1e-5, *rest, mean, var, 0.1, True, False)
        else:
            _kernels.backward(g, x, *stats, weight, bias, 1e-5, True, *rest)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.05, help="a burst (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", choices=_kernels.supported_isas())
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float16", "bfloat16", "float64"])
    parser.add_argument("--activation", help="of float32, beside ReLU, in place of dtypes")
    parser.add_argument("--shapes", nargs="+", metavar="NxCxHxW", default=BEYOND)
    args = parser.parse_args()
    if args.isa:
        _kernels.set_isa(args.isa)
    kinds = [("float32", args.activation)] if args.activation else [(name, None) for name in args.dtypes]
    families: dict[str, list[float]] = defaultdict(list)
    for text in args.shapes:
        shape = tuple(map(int, text.split("x")))
        for axis, layout in (1, "nchw"), (-1, "nhwc"):
            for operation in args.operations:
                for dtype, activation in kinds:
                    beside = "relu" if activation else None
                    these = call_of(shape, axis, operation, dtype, activation, args.threads)
                    those = call_of(shape, axis, operation, "float32", beside, args.threads)
                    burst(these, 2)
                    times = min(max(3, round(args.seconds / burst(those, 3))), 5000)
                    turns = [(burst(these, times), burst(those, times)) for _ in range(args.rounds)]
                    ratio = median(a / b for a, b in turns)
                    kind = activation or dtype
                    families[f"{operation} {kind}"].append(ratio)
                    took = 1e6 * median(a for a, _ in turns)
                    print(
                        f"{label(shape):18} {layout} {operation:10} {kind:9} {took:10.1f} us {ratio:6.2f}",
                        flush=True,
                    )
    print(f"time / time of float32{' with ReLU' if args.activation else ''}, geometric means:")
    for family, found in families.items():
        print(f"  {family:24} {geometric_mean(found):.2f}   worst {max(found):.2f}, of {len(found)}")


if __name__ == "__main__":
    main()
