"""The command line: what fastbn does with this machine, and whether it pays there.

python -m fastbn info [--json]
python -m fastbn bench [--shape 32x64x56x56 ...] [--threads 1 4 ...] [--seconds 0.5] [--json]
python -m fastbn plan 32x256x56x56 [--op training] [--layout nhwc] [--dtype float16] [--threads 2]
                     [--machine zen5] [--json]
python -m fastbn --version

`fastbn` alone says the same where fastbn is installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from statistics import geometric_mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn import _kernels, baseline
from fastbn.config import show_config
from fastbn.threads import MAX_THREADS

Shape = tuple[int, ...]
Call = Callable[[], object]

# A single image, batches that fit and do not fit into most caches, a table, and a tiny call.
SHAPES = [(1, 64, 112, 112), (8, 64, 28, 28), (32, 64, 56, 56), (4096, 256), (1, 16, 8, 8)]

PAUSE = 0.02  # seconds in which the OpenMP threads of the call before, which go on spinning, fall asleep
SAMPLE = 0.005  # seconds of calls that are timed as one, and of calls before them that warm up


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        if args.command == "bench":
            _bench(args, show_config("dicts"))
        elif args.command == "plan":
            _plan(args)
        elif args.json:
            print(json.dumps(show_config("dicts"), indent=2))
        else:
            show_config()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has had enough, such as `head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell has it
    except (MemoryError, ValueError) as error:  # of shapes, of the environment
        sys.exit(f"{parser.prog} {args.command}: {error}")


def _parser() -> argparse.ArgumentParser:
    is_script = os.path.basename(sys.argv[0]).partition(".")[0] == "fastbn"
    parser = argparse.ArgumentParser(
        prog="fastbn" if is_script else "python -m fastbn", description="Batch normalization for CPUs."
    )
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="instruction set, OpenMP, threads, caches, output memory")
    bench = commands.add_parser("bench", help="time fastbn against NumPy on this machine")
    bench.add_argument(
        "--shape", nargs="+", type=_shape, default=SHAPES, metavar="NxCx...", help="such as 32x64x56x56"
    )
    bench.add_argument(
        "--threads", nargs="+", type=_threads, metavar="N", help="default: 1 and what fastbn takes by itself"
    )
    bench.add_argument("--seconds", type=_seconds, default=0.5, help="for each row (default: %(default)s)")
    plan = commands.add_parser("plan", help="how an operation goes over its arrays, and why")
    plan.add_argument("shape", type=_shape, metavar="NxCx...", help="channels second, such as 32x256x56x56")
    plan.add_argument("--op", default="training", choices=_PLANNED, help="default: %(default)s")
    plan.add_argument("--layout", default="nchw", choices=("nchw", "nhwc"), help="default: %(default)s")
    plan.add_argument("--dtype", default="float32", choices=_kernels.dtypes(), help="default: %(default)s")
    plan.add_argument("--threads", type=_threads, metavar="N", help="default: what fastbn takes by itself")
    plan.add_argument("--machine", choices=_kernels.machines(), help="in place of this one")
    plan.add_argument("--residual", action="store_true", help="with a residual")
    for command in (info, bench, plan):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _shape(text: str) -> Shape:
    lengths = text.split("x")
    if len(lengths) < 2 or not all(length.isdecimal() and int(length) for length in lengths):
        raise argparse.ArgumentTypeError(
            f"expected two or more lengths of at least 1, such as 32x64x56x56, got {text!r}"
        )
    return tuple(map(int, lengths))


def _threads(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= MAX_THREADS):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MAX_THREADS}, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text!r}")
    return seconds


def _check_memory(shapes: Iterable[Shape]) -> None:
    """Refuse what would make the machine swap or the kernel end the process."""
    try:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return
    for shape in shapes:
        needed = 5 * 4 * math.prod(shape)  # x, grad_output, out, and what NumPy puts in between
        if needed > available:
            raise MemoryError(
                f"--shape {'x'.join(map(str, shape))} takes {needed / 2**30:,.1f} GiB of memory, and this "
                f"machine has {available / 2**30:,.1f} GiB; give a smaller one"
            )


_PLANNED = ("inference", "stats", "training", "sums", "backward", "grad_input")

_WAYS = {
    "elementwise": "elements are shared out",
    "owned": "each group of channels has an owner, who takes it through both passes",
    "overlapped": "owners of channels; the second pass of a group in one loop with the first of the next",
    "tiled": "tiles are shared out, then channels, then elements",
}


def _plan(args: argparse.Namespace) -> None:
    n, c, *spatial = args.shape
    last = args.layout == "nhwc" and bool(spatial)
    order = (n, *spatial, c) if last else args.shape
    threads = args.threads or fastbn.get_num_threads()
    plan = _kernels.plan(
        order,
        args.op,
        axis=-1 if last else 1,
        dtype=args.dtype,
        threads=threads,
        residual=args.residual,
        machine=args.machine,
    )
    if args.json:
        print(json.dumps(plan, indent=2))
        return
    print("\n".join(_told(plan, args.machine or "this one")))


def _told(plan: dict[str, Any], machine: str) -> Iterator[str]:
    """A plan in words, a line each."""
    why = plan["why"]
    sizes = f"N {plan['N']}, C {plan['C']}, S {plan['S']}"
    yield f"{plan['operation']} of {plan['dtype']} in {plan['layout']}: {sizes}"
    yield f"machine   {machine}, by the thresholds of {plan['class']!r}; {plan['threads']} threads"
    yield f"way       {_WAYS[plan['way']]}: {why['way']}"
    if plan["sums"]:
        folded = f", {plan['fold']} rows folded into one" if plan["fold"] > 1 else ""
        yield f"tiles     {plan['tiles']} of each channel{folded}"
    if plan["owned"]:
        yield f"owners    {plan['groups']} shares of {plan['owned']} channels, {plan['group']} at a time"
    if plan["owned"] < plan["C"]:
        shares = ", ".join(f"{count} of {name}" for name, count in plan["shares"].items())
        yield f"shares    {shares}{'; by columns' if plan['by_columns'] else ''}"
    for name in ("sums", "apply", "overlap"):
        how = plan[name]
        if how:
            told = [f"{how['rows']} rows at a time"] if how["rows"] else []
            told += [f"coefficients of {how['period']} vectors in registers"] if how["period"] else []
            told += ["sample by sample"] if how["by_batch"] else []
            told += [f"prefetches {how['ahead']} elements ahead"] if how["ahead"] else ["prefetches nothing"]
            told += [f"stores {how['store']}"] if name != "sums" else []
            told += ["from the end"] if name == "apply" and plan["reversed"] else []
            yield f"{name:9} {', '.join(told)}"
    if plan["apply"]:
        yield f"because   {why['rows']}"
    yield f"data      from {'memory' if plan['from_memory'] else 'the cache'}: {why['store']}"
    yield f"scratch   {plan['scratch']:,} bytes"


def _bench(args: argparse.Namespace, config: dict[str, Any]) -> None:
    _check_memory(args.shape)
    threads = list(dict.fromkeys(args.threads or (1, config["threads"]["count"])))
    rows = _rows(args.shape, threads, args.seconds)
    if args.json:
        results = list(rows)
        print(json.dumps({"config": config, "results": results, "note": _note(results)}, indent=2))
        return
    title = "Batch norm: microseconds, and how many times faster than NumPy"
    caption = f"fastbn {config['version']}, {config['isa']}; NumPy {config['numpy']}"
    headings = [
        "N x C x spatial",
        "operation",
        "NumPy",
        *(f"fastbn, {n} thread{'s' * (n > 1)}" for n in threads),
    ]
    total = sum(len(_operations(shape)) for shape in args.shape)
    try:
        import rich  # noqa: F401
    except ImportError:
        _print_plain(rows, title, caption, headings)
    else:
        _print_rich(rows, title, caption, headings, total)


def _cells(row: dict[str, Any]) -> list[str]:
    return ["x".join(map(str, row["shape"])), row["operation"], f"{row['numpy_us']:,.1f}"]


def _speedup(ratio: float) -> str:
    return f"{ratio:5.1f}" if ratio >= 0.95 else f"{ratio:5.2g}"  # never 0.0


def _means(rows: list[dict[str, Any]]) -> list[str]:
    entries = zip(*(row["fastbn"] for row in rows), strict=True)
    return [_speedup(geometric_mean(entry["speedup"] for entry in column)) for column in entries]


def _note(rows: list[dict[str, Any]]) -> str | None:
    """What to make of rows in which several threads took much longer than one, if there are any."""
    slow = 0
    for row in rows:
        alone = [entry["us"] for entry in row["fastbn"] if entry["threads"] == 1]
        shared = [entry["us"] for entry in row["fastbn"] if entry["threads"] > 1]
        slow += bool(alone and shared) and max(shared) > 1.5 * alone[0]
    if not slow:
        return None
    return (
        f"In {slow} of {len(rows)} rows several threads took more than 1.5 times as long as one: threads "
        "waited for each other, because other work has the CPUs or because the CPUs are fewer than they. "
        'See "A busy machine" in docs/deployment.md.'
    )


def _print_plain(rows: Iterable[dict[str, Any]], title: str, caption: str, headings: list[str]) -> None:
    """A row as soon as it is measured."""

    def line(cells: Iterable[str]) -> None:
        texts = [f"{cell:{'<' if i < 2 else '>'}20}" for i, cell in enumerate(cells)]
        print(" ".join(texts).rstrip(), flush=True)

    print(title)
    line(headings)
    printed = []
    for row in rows:
        line([*_cells(row), *(f"{entry['us']:,.1f} {_speedup(entry['speedup'])}" for entry in row["fastbn"])])
        printed.append(row)
    line(["geometric mean", "", "", *_means(printed)])
    print(caption)
    if note := _note(printed):
        print(note)


def _print_rich(
    rows: Iterable[dict[str, Any]], title: str, caption: str, headings: list[str], total: int
) -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    table = Table(title=title, caption=caption)
    for i, heading in enumerate(headings):
        table.add_column(heading, no_wrap=i < 2, justify="left" if i < 2 else "right")
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    timed = []
    for row in track(rows, "Timing", total, console=Console(stderr=True), transient=True):
        times = [f"{entry['us']:,.1f} [bold]{_speedup(entry['speedup'])}[/]" for entry in row["fastbn"]]
        table.add_row(*_cells(row), *times)
        timed.append(row)
    table.add_section()
    table.add_row("geometric mean", "", "", *(f"[bold]{mean}[/]" for mean in _means(timed)))
    console.print(table)
    if note := _note(timed):
        print(note)


def _operations(shape: Shape) -> list[str]:
    one_value_per_channel = math.prod(shape) == shape[1]
    return ["inference+relu", *([] if one_value_per_channel else ["training", "backward"])]


def _rows(shapes: Iterable[Shape], threads: list[int], seconds: float) -> Iterator[dict[str, Any]]:
    """What was measured, a shape and an operation at a time."""
    for shape in shapes:
        problem = _Problem(shape)
        for operation in _operations(shape):
            problem.check(operation)
            ours = [problem.call(operation, n) for n in threads]
            numpy_time, *our_times = _medians([problem.call(operation), *ours], seconds)
            yield {
                "shape": shape,
                "operation": operation,
                "numpy_us": round(1e6 * numpy_time, 3),
                "fastbn": [
                    {
                        "threads": n,
                        "us": round(1e6 * our_time, 3),
                        "speedup": float(f"{numpy_time / our_time:.4g}"),
                    }
                    for n, our_time in zip(threads, our_times, strict=True)
                ],
            }


class _Problem:
    """Arrays of one shape, and what NumPy and fastbn do with them, both writing to the same output."""

    def __init__(self, shape: Shape) -> None:
        rng = np.random.default_rng(0)
        c = shape[1]
        self.x, self.grad_output = (rng.standard_normal(shape, np.float32) for _ in range(2))
        self.weight, self.bias, self.mean = rng.standard_normal((3, c), np.float32)
        self.var = rng.random(c, np.float32) + np.float32(0.5)
        self.stats = fastbn.batch_stats(self.x)
        invstd = 1 / np.sqrt(self.stats.var + 1e-5)
        self.batch = self.stats.mean.astype(np.float32), invstd.astype(np.float32)
        self.out = np.empty_like(self.x)

    def call(self, operation: str, num_threads: int | None = None) -> Call:
        """By fastbn with `num_threads`, or by NumPy."""
        affine = self.weight, self.bias
        inputs = self.x, self.mean.copy(), self.var.copy(), *affine
        how: dict[str, Any] = {"out": self.out}
        if num_threads is None:
            return {
                "inference+relu": lambda: baseline.inference(*inputs, relu=True, **how),
                "training": lambda: baseline.training_forward(*inputs, **how),
                "backward": lambda: baseline.backward(
                    self.grad_output, self.x, *self.batch, self.weight, **how
                ),
            }[operation]
        how["num_threads"] = num_threads
        return {
            "inference+relu": lambda: fastbn.batch_norm(*inputs, activation="relu", **how),
            "training": lambda: fastbn.batch_norm(*inputs, training=True, **how),
            "backward": lambda: fastbn.batch_norm_backward(
                self.grad_output, self.x, self.stats, *affine, **how
            ),
        }[operation]

    def check(self, operation: str) -> None:
        """Both compute the same, or there is nothing to compare."""

        def result(num_threads: int | None) -> NDArray[np.float32]:
            self.out.fill(np.nan)
            self.call(operation, num_threads)()
            return self.out[[0, -1]]

        np.testing.assert_allclose(
            result(1), result(None), 1e-3, 1e-3, err_msg=f"{operation} of {self.x.shape}: fastbn and NumPy"
        )


def _medians(calls: list[Call], seconds: float) -> list[float]:
    """Seconds of each call. They take turns, so that a slow moment of the machine hits them alike."""
    counts = [max(1, round(SAMPLE / _timed(call, 1))) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    deadline = time.perf_counter() + seconds
    while len(samples[0]) < 3 or time.perf_counter() < deadline:
        for call, count, found in zip(calls, counts, samples, strict=True):
            time.sleep(PAUSE)
            _timed(call, count)
            found.append(_timed(call, count))
    return [median(found) for found in samples]


def _timed(call: Call, count: int) -> float:
    """Seconds a call, over `count` calls."""
    start = time.perf_counter()
    for _ in repeat(None, count):
        call()
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
