"""Time fastbn against its peers and against the memory limit, side by side in one process.

    python bench/compare.py [--quick] [--json PATH] [--markdown PATH] [--plots DIR] ...

For each shape and operation every contestant is checked against a float64 oracle, then all take turns, round
by round in an order that changes, until the time for the row is spent; a contestant's time is its median.

One process, because arrays, allocator and clock are then the same for all. Its price is that thread pools
meet: the workers of GNU OpenMP spin for some 10 ms after a parallel region before they sleep, those of other
pools for less, and would take a core from whoever comes next. So before each turn all other threads of the
process must be seen asleep (settle), and the turn begins with untimed calls that wake the contestant's own
pool and bring its own data into cache. Every pool keeps its default wait policy, as users have it.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import random
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from fnmatch import fnmatch
from itertools import repeat
from pathlib import Path

import numpy as np
import peers
import report
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from shapes import SHAPES, label, values_per_channel

ISA_ENVIRONMENT = {
    "avx2": {
        "FASTBN_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "baseline": {
        "FASTBN_ISA": "baseline",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
        "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
}
# Memory that was freed is used again and never given back, in huge pages: so contestants that cannot be given
# an output array pay for no page faults either. The table "as called by default" goes without.
KEEP_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"
SAMPLE_SECONDS = 1e-3
SIT_OUT = 3.0  # a peer that is this many times behind the fastest takes part in the first rounds only
TOLERANCE = 1e-2


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all CPUs")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="such as training backward+relu; default: all")
    parser.add_argument(
        "--shapes", nargs="+", metavar="PATTERN", help="such as 32x256x56x56 '*x7x7'; default: all"
    )
    parser.add_argument(
        "--contestants", nargs="+", metavar="NAME", help="such as fastbn oneDNN; default: all"
    )
    parser.add_argument(
        "--seconds", type=float, default=4, help="for the rounds of a row (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="at least (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="--seconds 0 --rounds 3")
    parser.add_argument(
        "--isa", choices=ISA_ENVIRONMENT, help="hold every contestant that can be held to this one"
    )
    parser.add_argument("--default-calls", action="store_true", help="fresh outputs, the default allocator")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--markdown", type=Path, metavar="PATH")
    parser.add_argument("--plots", type=Path, metavar="DIR")
    args = parser.parse_args(arguments)
    if args.quick:
        args.seconds, args.rounds = 0, 3
    return args


def start_again_in(environment):
    """Run this program anew with these variables, which libraries read when they are loaded."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)


def cpus_by_core():
    """The CPUs this process may run on: one of each core, then the others."""

    def rank_on_core(cpu):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first = siblings.read_text().replace("-", ",").split(",")[0] if siblings.exists() else cpu
        return int(first) != cpu, cpu

    return sorted(os.sched_getaffinity(0), key=rank_on_core)


def settle(limit=0.2):
    """Wait until every other thread of this process sleeps."""
    me = str(threading.get_native_id())
    deadline = time.perf_counter() + limit
    while time.perf_counter() < deadline:
        for task in os.listdir("/proc/self/task"):
            if task != me:
                try:
                    status = Path(f"/proc/self/task/{task}/stat").read_text()
                except OSError:  # it has ended
                    continue
                if status.rpartition(") ")[2][0] == "R":
                    break
        else:
            return
        time.sleep(5e-4)


def timed(call, n):
    """Seconds a call, over n calls."""
    start = time.perf_counter()
    for _ in repeat(None, n):
        call()
    return (time.perf_counter() - start) / n


class Oracle:
    """Float64 results for some channels of each array."""

    def __init__(self, task):
        d = task.data
        self.count = d.count
        c = d.shape[1]
        self.channels = np.unique(np.linspace(0, c - 1, min(c, 6)).astype(int))

        def pick(a):
            a = a.reshape(a.shape[0], a.shape[1], -1) if a.ndim > 1 else a[None, :, None]
            return a[:, self.channels].astype(np.float64)

        x, dy = pick(d.x), pick(d.grad_output)
        w, b, mean, var = (pick(a) for a in (d.weight, d.bias, d.running_mean, d.running_var))
        if task.kind != "inference":
            mean, var = x.mean((0, 2), keepdims=True), x.var((0, 2), keepdims=True)
        normalized = (x - mean) / np.sqrt(var + peers.EPS)
        y = normalized * w + b + (pick(d.residual) if task.residual else 0)
        if task.kind == "backward":
            dy = dy * (y > 0) if task.relu else dy
            dw, db = (dy * normalized).sum((0, 2), keepdims=True), dy.sum((0, 2), keepdims=True)
            dx = w / np.sqrt(var + peers.EPS) * (dy - db / d.count - normalized * dw / d.count)
            self.expected = dx, dw, db
        else:
            self.expected = (np.maximum(y, 0) if task.relu else y,)

    def disagreement(self, result, axis):
        """What is wrong with a result, or None."""
        if len(result) != len(self.expected):
            return f"{len(result)} results instead of {len(self.expected)}"
        for i, (a, expected) in enumerate(zip(result, self.expected, strict=True), 1):
            a, per_channel = np.asarray(a), np.ndim(a) == 1
            a = a[None] if per_channel else np.moveaxis(a, axis, 1)
            # A ReLU's mask may differ where its argument is 0 but for rounding: so do few elements, and sums.
            size = np.abs(expected) + (math.sqrt(self.count) if per_channel else 1)
            wrong = ~(np.abs(a[:, self.channels].reshape(expected.shape) - expected) <= TOLERANCE * size)
            if wrong.mean() > 1e-4:
                return f"{wrong.mean():.1%} of its result {i} is wrong"
        return None


class Entry:
    """A contestant in one row of the table: its fastest candidate and the samples."""

    def __init__(self, contestant, layout, candidate, seconds):
        self.contestant, self.layout, self.candidate = contestant.name, layout, candidate
        self.calls = max(1, round(SAMPLE_SECONDS / seconds))
        self.samples = []

    def take_turn(self):
        settle()
        timed(self.candidate.call, max(1, self.calls // 2))
        self.samples.append(timed(self.candidate.call, self.calls))

    @property
    def best(self):
        return min(self.samples)

    def as_json(self):
        names = ("min", "q10", "q25", "median", "q75", "q90", "max")
        values = np.quantile(self.samples, (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)) * 1e6
        return {
            "contestant": self.contestant,
            "layout": self.layout,
            "how": self.candidate.how,
            "calls_per_sample": self.calls,
            "samples": len(self.samples),
            "microseconds": {name: round(float(v), 4) for name, v in zip(names, values, strict=True)},
        }


def fastest(contestant, task, layout, oracle, complain):
    """The entry of a contestant, or None where it has no candidate for the task."""
    best = None
    for candidate in contestant.candidates(task, layout):
        result = candidate.result(candidate.call())
        wrong = oracle and oracle.disagreement(result, task.data.axis)
        del result
        if wrong:
            complain(f"{contestant.name} ({candidate.how}), {layout}: {wrong}; not timed")
            continue
        settle()
        seconds = timed(candidate.call, 1)
        repeats = 2 if seconds > 5e-3 else 5
        calls = max(1, int(2e-4 / seconds))
        seconds = min([timed(candidate.call, calls) for _ in range(repeats)])
        if best is None or seconds < best[0]:
            best = seconds, candidate
    return best and Entry(contestant, layout, best[1], best[0])


def measure(entries, args, progress):
    """Let the entries take turns until the time is spent."""
    order = random.Random(0)
    deadline = time.perf_counter() + args.seconds
    playing = list(entries)
    rounds = 0
    while rounds < args.rounds or (time.perf_counter() < deadline and rounds < 15 * args.rounds):
        order.shuffle(playing)
        for entry in playing:
            entry.take_turn()
        rounds += 1
        if rounds == min(5, args.rounds):
            leader = min(entry.best for entry in entries if entry.contestant != peers.MemoryLimit.name)
            playing = [
                entry
                for entry in entries
                if entry.best < SIT_OUT * leader or entry.contestant == peers.FastBN.name
            ]
        progress()


def cpu_seconds():
    """CPU time of everything on this machine (less idle), of this process, and stolen by the host."""
    ticks = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks[:3]) + sum(ticks[5:7])
    hertz = os.sysconf("SC_CLK_TCK")
    return busy / hertz, time.process_time(), ticks[7] / hertz


def interference(before, after, wall):
    busy, own, stolen = (b - a for a, b in zip(before, after, strict=True))
    return {"other_processes": round(max(0, busy - own) / wall, 3), "stolen_by_host": round(stolen / wall, 3)}


def machine():
    description = {"platform": platform.platform(), "python": platform.python_version()}
    try:
        output = subprocess.run(["lscpu", "--json"], capture_output=True, text=True, check=True).stdout
        description |= {
            item["field"].rstrip(":"): item["data"] for item in flatten(json.loads(output)["lscpu"])
        }
    except (OSError, subprocess.CalledProcessError):
        description["Model name"] = platform.processor()
    return description


def flatten(items):
    for item in items:
        if not item["field"].startswith("Vulnerability"):
            yield item
        yield from flatten(item.get("children", ()))


def thread_runtimes():
    """The OpenMP and TBB libraries in this process, as their file names."""
    names = {
        Path(line.split()[-1]).name
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/" in line
    }
    return sorted(name for name in names if name.startswith(("libgomp", "libiomp", "libomp", "libtbb")))


def groups(args):
    """(shape, operations) to time."""
    for shape in SHAPES:
        if args.shapes and not any(fnmatch(label(shape), pattern) for pattern in args.shapes):
            continue
        ops = [op for op in peers.OPS if op in (args.ops or peers.OPS)]
        yield shape, [op for op in ops if values_per_channel(shape) > 1 or op.startswith("inference")]


class Bench:
    """All contestants that are installed, and the rows they are timed on."""

    def __init__(self, args, console):
        self.args, self.console = args, console
        self.notes = []
        self.contestants = []
        for kind in peers.CONTESTANTS:
            if args.contestants and not any(name.lower() in kind.name.lower() for name in args.contestants):
                continue
            try:
                self.contestants.append(kind(args.threads))
            except (ImportError, OSError) as error:
                if kind is peers.FastBN:
                    sys.exit(f"fastbn cannot be imported, so there is nothing to compare: {error}")
                self.note(f"{kind.name} is left out: {error}")
        self.limits = dict.fromkeys(("limit", "limit_of_two_passes"))
        if not args.default_calls:
            try:
                for passes, name in enumerate(self.limits, 1):
                    self.limits[name] = peers.MemoryLimit(args.threads, passes)
            except (ImportError, OSError) as error:
                self.note(f"the memory limit is not measured: {error}")

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)
            self.console.print(f"[yellow]{text}", highlight=False)

    def row(self, shape, op, data, progress):
        """One row: every contestant in every layout it has, interleaved."""
        tasks = {layout: peers.Task(op, d, not self.args.default_calls) for layout, d in data.items()}
        layouts = peers.user_layouts(shape)
        oracle = Oracle(tasks[layouts[0]])
        entries = []
        for contestant in self.contestants:
            for layout in contestant.layouts:
                # What is blocked is compared with the arrays it was made from.
                like = layouts[0] if layout == peers.BLOCKED and peers.NCHW in layouts else layout
                if like not in layouts:
                    continue
                try:
                    entry = fastest(
                        contestant, tasks[like], layout, oracle, lambda text: self.note(f"{op}: {text}")
                    )
                except Exception as error:
                    message = (str(error).splitlines() or [type(error).__name__])[0]
                    self.note(
                        f"{label(shape)} {op}: {contestant.name}, {layout} is left out: {message[:150]}"
                    )
                    continue
                if entry:
                    entries.append(entry)
        limits = {
            name: limit and fastest(limit, tasks[layouts[0]], layouts[0], None, self.note)
            for name, limit in self.limits.items()
        }
        before, start = cpu_seconds(), time.perf_counter()
        measure([*entries, *filter(None, limits.values())], self.args, progress)
        return {
            "shape": shape,
            "op": op,
            "entries": [entry.as_json() for entry in entries],
            **{name: limit and limit.as_json() for name, limit in limits.items()},
            "interference": interference(before, cpu_seconds(), time.perf_counter() - start),
        }

    def rows(self):
        libc = ctypes.CDLL(None)
        todo = list(groups(self.args))
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        # Without its refreshing thread, which would be timed too.
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, auto_refresh=False
        ) as progress:
            bar = progress.add_task("", total=sum(len(ops) for _, ops in todo))
            for shape, ops in todo:
                data = {layout: peers.Data(shape, layout) for layout in peers.user_layouts(shape)}
                for op in ops:
                    progress.update(bar, description=f"{label(shape)} {op}", refresh=True)
                    yield self.row(shape, op, data, progress.refresh)
                    # With pages kept, only this returns what the row has used.
                    gc.collect()
                    libc.malloc_trim(0)
                    progress.advance(bar)


def main():
    args = parse()
    threads = str(args.threads)
    environment = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE"}
    environment |= {} if args.default_calls else {"GLIBC_TUNABLES": KEEP_PAGES}
    environment |= ISA_ENVIRONMENT.get(args.isa, {})
    start_again_in(environment)
    cpus = cpus_by_core()
    if args.threads > len(cpus):
        sys.exit(f"--threads {args.threads}: this process may run on {len(cpus)} CPUs")
    os.sched_setaffinity(0, cpus[: args.threads])  # not every pool is told its size

    console = Console(width=None if sys.stdout.isatty() else 200)
    bench = Bench(args, console)
    gc.disable()
    start = time.perf_counter()
    results = {
        "settings": {
            "command": " ".join(["compare.py", *sys.argv[1:]]),
            "threads": args.threads,
            "calls": "as called by default" if args.default_calls else "outputs preallocated",
            "isa": args.isa,
            "environment": environment,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
        "machine": machine(),
        "versions": {contestant.name: contestant.version for contestant in bench.contestants},
        "rows": [],
    }
    try:
        for row in bench.rows():
            results["rows"].append(row)
    except KeyboardInterrupt:
        bench.note("interrupted: the table is not complete")
    results["thread_runtimes"] = thread_runtimes()
    results["notes"] = bench.notes
    results["seconds"] = round(time.perf_counter() - start)
    results["summary"] = report.summary(results)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    report.show(results, console, args.markdown, args.plots)


if __name__ == "__main__":
    main()
