"""Time fastbn against its peers and against the memory limit.

    python bench/compare.py [--quick] [--chain] [--dtype bfloat16] [--csv DIR] [--markdown PATH] ...

Each peer has a process of its own, in which it and fastbn take turns on the same arrays: libraries then do
not meet in one process, of which several bring their own oneDNN, OpenMP or TBB, and what counts is the ratio
of two times that were measured side by side. For each shape and operation both are checked against a float64
oracle, then they take turns, round by round in an order that changes, until the time for the row is spent; a
time is the median of the turns.

The two thread pools still meet: workers that spin after a parallel region would take a core from whoever
comes next. So before each turn all other threads of the process must be seen asleep (settle), and the turn
begins with untimed calls that wake the contestant's own pool and bring its own data into cache. Every pool
keeps its default wait policy, as users have it.

Rows are hot: the same call on the same arrays again and again. In chain rows (--chain) x is written before,
the call is made, and y is read after, each call with memory of its own, more than the last-level cache in
all; what is timed is the call and the reading.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from datetime import datetime, timezone
from fnmatch import fnmatch
from itertools import repeat
from pathlib import Path

import numpy as np
import peers
import report
import tasks
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from shapes import CHAIN, CHAIN_BYTES, FEW, SHAPES, label, values_per_channel

ISA_ENVIRONMENT = {
    "avx2": {
        "FASTBN_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "NUMBA_CPU_NAME": "haswell",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "baseline": {
        "FASTBN_ISA": "baseline",
        "ATEN_CPU_CAPABILITY": "default",
        "NUMBA_CPU_NAME": "nehalem",
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
CHAIN_SECONDS = 1e-2
SIT_OUT = 3.0  # a peer that is this many times behind the fastest takes part in the first rounds only
TOLERANCE = 1e-2


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all CPUs")
    parser.add_argument(
        "--ops", nargs="+", metavar="OP", choices=tasks.OPS + tasks.MORE_OPS,
        help=f"{' '.join(tasks.OPS)} (default: these), {' '.join(tasks.MORE_OPS)}",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", metavar="PATTERN", help="such as 32x256x56x56 '*x7x7'; default: all"
    )
    parser.add_argument("--few", action="store_true", help="six shapes for everyone")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="such as oneDNN; default: all")
    parser.add_argument("--dtype", choices=tasks.DTYPES, default="float32", help="of the arrays")
    parser.add_argument("--chain", action="store_true", help="chain rows in place of hot ones")
    parser.add_argument(
        "--seconds", type=float, default=0.1, help="for the rounds of a row (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="at least (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="--seconds 0 --rounds 3")
    parser.add_argument(
        "--isa", choices=ISA_ENVIRONMENT, help="hold every contestant that can be held to this one"
    )
    parser.add_argument("--default-calls", action="store_true", help="fresh outputs, the default allocator")
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: in build/bench")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="summaries: see report.py")
    parser.add_argument("--markdown", type=Path, metavar="PATH")
    parser.add_argument("--plots", type=Path, metavar="DIR")
    parser.add_argument("--beside", choices=peers.GROUPS, help=argparse.SUPPRESS)  # a process of its own
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
            a = np.moveaxis(a, d.axis, 1) if a.ndim > 1 else a[None, :]
            a = a[:, self.channels]
            return a.reshape(*a.shape[:2], -1).astype(np.float64)

        x, dy = pick(d.x), pick(d.grad_output)
        w, b, mean, var = (pick(a) for a in (d.weight, d.bias, d.running_mean, d.running_var))
        if task.kind != "inference":
            mean, var = x.mean((0, 2), keepdims=True), x.var((0, 2), keepdims=True)
        normalized = (x - mean) / np.sqrt(var + tasks.EPS)
        y = normalized * w + b + (pick(d.residual) if task.residual else 0)
        if task.kind == "backward":
            dy = dy * (y > 0) if task.relu else dy
            dw, db = (dy * normalized).sum((0, 2), keepdims=True), dy.sum((0, 2), keepdims=True)
            dx = w / np.sqrt(var + tasks.EPS) * (dy - db / d.count - normalized * dw / d.count)
            self.expected = dx, dw, db
        else:
            y = y / (1 + np.exp(-y)) if task.activation == "silu" else y
            self.expected = (np.maximum(y, 0) if task.relu else y,)

    def disagreement(self, result, axis):
        """What is wrong with a result, or None."""
        if len(result) != len(self.expected):
            return f"{len(result)} results instead of {len(self.expected)}"
        for i, (a, expected) in enumerate(zip(result, self.expected, strict=True), 1):
            a, per_channel = np.asarray(a), np.ndim(a) == 1
            a = a[None] if per_channel else np.moveaxis(a, axis, 1)
            a = a[:, self.channels].reshape(expected.shape).astype(np.float64)
            # A ReLU's mask may differ where its argument is 0 but for rounding: so do few elements, and sums.
            size = np.abs(expected) + (math.sqrt(self.count) if per_channel else 1)
            wrong = ~(np.abs(a - expected) <= TOLERANCE * size)
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


class ChainEntry(Entry):
    """A contestant in a chain row: one way to do the task, on each set of arrays."""

    def __init__(self, contestant, layout, sets, candidates):
        self.contestant, self.layout, self.candidate = contestant.name, layout, candidates[0]
        self.sets, self.candidates = sets, candidates
        self.source = sets[0].written.copy()
        self.kept = [None] * len(sets)  # what a library allocates stays, as in a network
        self.at = 0
        self.samples = []
        self.calls = 3
        seconds = self.take_turn()
        self.samples.clear()
        self.calls = min(max(3, round(CHAIN_SECONDS / seconds)), len(sets))

    def step(self):
        """Seconds of the next call and of reading what it returned."""
        self.at = (self.at + 1) % len(self.sets)
        candidate = self.candidates[self.at]
        self.kept[self.at] = None
        np.copyto(self.sets[self.at].written, self.source)
        start = time.perf_counter()
        self.kept[self.at] = output = candidate.call()
        candidate.result(output)[0].sum()
        return time.perf_counter() - start

    def take_turn(self):
        settle()
        self.samples.append(statistics.median(self.step() for _ in range(self.calls)))
        return self.samples[-1]


def right_candidates(contestant, candidates, task, layout, oracle, complain):
    """Those whose results are right, with their places in the order of all."""
    for i, candidate in enumerate(candidates):
        where = f"{contestant.name} ({candidate.how}), {layout}"
        try:
            result = candidate.result(candidate.call())
        except Exception as error:
            complain(f"{where}: {first_line(error)}; not timed")
            continue
        wrong = oracle and contestant.checked and oracle.disagreement(result, task.data.axis)
        del result
        if wrong:
            complain(f"{where}: {wrong}; not timed")
            continue
        yield i, candidate


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]


def fastest(contestant, task, layout, oracle, complain):
    """The entry of a contestant, or None where it has no candidate for the task."""
    candidates, best = contestant.candidates(task, layout), None
    for _, candidate in right_candidates(contestant, candidates, task, layout, oracle, complain):
        settle()
        seconds = timed(candidate.call, 1)
        repeats = 2 if seconds > 5e-3 else 5
        calls = max(1, int(2e-4 / seconds))
        seconds = min([timed(candidate.call, calls) for _ in range(repeats)])
        if best is None or seconds < best[0]:
            best = seconds, candidate
    return best and Entry(contestant, layout, best[1], best[0])


def fastest_in_chain(contestant, sets, layout, oracle, complain):
    """The same for a chain row. Its first set is checked, written to after the candidates were made."""
    first, values = sets[0], sets[0].written.copy()
    first.written[:] = 0
    ways = list(contestant.candidates(first, layout))
    first.written[:] = values
    places = [i for i, _ in right_candidates(contestant, ways, first, layout, oracle, complain)]
    others = [list(contestant.candidates(task, layout)) for task in sets[1:]] if places else []
    entries = [
        ChainEntry(contestant, layout, sets, [ways[i], *(candidates[i] for candidates in others)])
        for i in places
    ]
    return min(entries, key=lambda entry: entry.take_turn(), default=None)


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
            leader = min(entry.best for entry in entries if entry.contestant not in peers.LIMITS)
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


def groups(args, shapes=SHAPES):
    """(shape, operations) to time, of these shapes."""
    exact = [text for text in args.shapes or () if re.fullmatch(r"\d+(x\d+)+", text)]
    named = [tuple(map(int, text.split("x"))) for text in exact]
    for shape in [*shapes, *(shape for shape in named if shape not in shapes)]:
        if args.shapes and not any(fnmatch(label(shape), pattern) for pattern in args.shapes):
            continue
        ops = [op for op in tasks.OPS + tasks.MORE_OPS if op in (args.ops or tasks.OPS)]
        yield shape, [op for op in ops if values_per_channel(shape) > 1 or op.startswith("inference")]


class Bench:
    """One group of contestants beside fastbn, and the rows they are timed on, in this process."""

    def __init__(self, args, console):
        self.args, self.console = args, console
        self.notes = []
        try:
            self.ours = peers.FastBN(args.threads)
        except ImportError as error:
            sys.exit(f"fastbn cannot be imported, so there is nothing to compare: {error}")
        self.theirs = []
        for kind in peers.GROUPS[args.beside]:
            try:
                self.theirs.append(kind(args.threads))
            except (ImportError, OSError) as error:
                self.note(f"{args.beside} is left out: {first_line(error)}")
        wanted = [c for c in self.theirs if args.dtype in c.dtypes and (c.chain or not args.chain)]
        for contestant in self.theirs:
            if contestant not in wanted:
                what = "chain rows" if args.chain and not contestant.chain else args.dtype
                self.note(f"{contestant.name} is left out: it has no {what}")
        self.theirs = wanted
        self.everyone = [*wanted, self.ours]
        try:
            self.ours.fastbn.batch_stats(tasks.Data((2, 1), tasks.NC, args.dtype).x)
        except TypeError as error:
            self.note(f"fastbn refuses {args.dtype}: {first_line(error)}")
            self.everyone.remove(self.ours)

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)
            self.console.print(f"[yellow]{text}", highlight=False)

    def groups(self):
        args = self.args
        for shape, ops in groups(args, CHAIN if args.chain else FEW if args.few else SHAPES):
            theirs = [
                c
                for c in self.theirs
                if args.shapes or args.chain or c.shapes is None or label(shape) in c.shapes
            ]
            if theirs:
                yield shape, ops, theirs

    def data(self, shape):
        """By layout a list of Data: of chain rows so many that they do not fit in a cache."""
        first = None
        found = {}
        for layout in tasks.user_layouts(shape):
            found[layout] = [tasks.Data(shape, layout, self.args.dtype, like=first)]
            first = first or found[layout][0]
            if self.args.chain:
                copies = max(3, CHAIN_BYTES // (3 * first.x.nbytes)) - 1
                found[layout] += [
                    tasks.Data(shape, layout, self.args.dtype, like=first) for _ in range(copies)
                ]
        return found

    def entry(self, contestant, sets, layout, oracle):
        op = sets[0].op

        def complain(text):
            self.note(f"{op}: {text}")

        try:
            if self.args.chain:
                return fastest_in_chain(contestant, sets, layout, oracle, complain)
            return fastest(contestant, sets[0], layout, oracle, complain)
        except Exception as error:
            self.note(f"{op}: {contestant.name}, {layout} is left out: {first_line(error)}")
            return None

    def row(self, shape, op, theirs, data, progress):
        """One row: fastbn and the others in every layout they have, interleaved; None without others."""
        sets = {
            layout: [tasks.Task(op, d, not self.args.default_calls) for d in found]
            for layout, found in data.items()
        }
        layouts = tasks.user_layouts(shape)
        oracle = Oracle(sets[layouts[0]][0])
        entries = []
        for contestant in self.everyone:
            if contestant is not self.ours and contestant not in theirs:
                continue
            for layout in contestant.layouts:
                # What is blocked is compared with the arrays it was made from.
                blocked = layout == tasks.BLOCKED and tasks.NCHW in layouts and not self.args.chain
                like = layouts[0] if blocked else layout
                if like in layouts and (entry := self.entry(contestant, sets[like], layout, oracle)):
                    entries.append(entry)
            if not entries:
                return None
        before, start = cpu_seconds(), time.perf_counter()
        measure(entries, self.args, progress)
        return {
            "shape": shape,
            "op": op,
            "entries": [entry.as_json() for entry in entries],
            "interference": interference(before, cpu_seconds(), time.perf_counter() - start),
        }

    def rows(self):
        libc = ctypes.CDLL(None)
        todo = list(self.groups())
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        # Without its refreshing thread, which would be timed too.
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, auto_refresh=False
        ) as progress:
            bar = progress.add_task(self.args.beside, total=sum(len(ops) for _, ops, _ in todo))
            for shape, ops, theirs in todo:
                data = self.data(shape)
                for op in ops:
                    name = f"{self.args.beside}: {label(shape)} {op}"
                    progress.update(bar, description=name, refresh=True)
                    row = self.row(shape, op, theirs, data, progress.refresh)
                    if row:
                        yield row
                    # With pages kept, only this returns what the row has used.
                    gc.collect()
                    libc.malloc_trim(0)
                    progress.advance(bar)
            progress.update(bar, description=self.args.beside)


def run_beside(args, console):
    """The process of one group."""
    cpus = cpus_by_core()
    if args.threads > len(cpus):
        sys.exit(f"--threads {args.threads}: this process may run on {len(cpus)} CPUs")
    os.sched_setaffinity(0, cpus[: args.threads])  # not every pool is told its size
    bench = Bench(args, console)
    gc.disable()
    rows = list(bench.rows())
    versions = {contestant.name: contestant.version for contestant in [bench.ours, *bench.theirs]}
    versions = {name: version for name, version in versions.items() if version}
    results = {"rows": rows, "versions": versions, "runtimes": thread_runtimes(), "notes": bench.notes}
    args.json.write_text(json.dumps(results))


def merged(parts):
    """The rows of all groups together. What a peer took is told with what fastbn took beside it, by layout.

    Of fastbn's own entries the one with the middle median stays.
    """
    rows, ours = {}, defaultdict(list)
    for group, part in parts.items():
        for found in part["rows"]:
            key = tuple(found["shape"]), found["op"]
            row = rows.setdefault(key, {"shape": key[0], "op": key[1], "entries": [], "interference": {}})
            row["interference"][group] = found["interference"]
            beside = {}
            for entry in found["entries"]:
                if entry["contestant"] == report.OURS:
                    beside[entry["layout"]] = report.median(entry)
                    ours[(*key, entry["layout"])].append(entry)
            for entry in found["entries"]:
                if entry["contestant"] != report.OURS:
                    row["entries"].append(entry | {"beside": beside})
    for (shape, op, _), entries in ours.items():
        entries.sort(key=report.median)
        rows[shape, op]["entries"].append(entries[len(entries) // 2])
    order = list(dict.fromkeys([*SHAPES, *CHAIN, *(shape for shape, _ in rows)]))
    ops = tasks.OPS + tasks.MORE_OPS
    return [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), ops.index(key[1])))]


def main():
    args = parse()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if args.beside:
        run_beside(args, console)
        return
    threads = str(args.threads)
    names = ("OMP", "OPENBLAS", "MKL", "NUMBA")
    environment = {f"{name}_NUM_THREADS": threads for name in names}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE"}
    environment |= {} if args.default_calls else {"GLIBC_TUNABLES": KEEP_PAGES}
    environment |= ISA_ENVIRONMENT.get(args.isa, {})
    start = time.perf_counter()
    parts, notes, seconds = {}, [], {}
    for group in peers.GROUPS:
        if args.contestants and not any(name.lower() in group.lower() for name in args.contestants):
            continue
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "results.json")
            command = [sys.executable, *sys.argv, "--beside", group, "--json", str(path)]
            try:
                done = subprocess.run(command, env=os.environ | environment)
            except KeyboardInterrupt:
                notes.append("interrupted: the table is not complete")
                break
            if path.exists():
                parts[group] = json.loads(path.read_text())
                notes += [note for note in parts[group]["notes"] if note not in notes]
            else:
                notes.append(f"{group} is left out: its process ended with {done.returncode}")
        seconds[group] = round(time.perf_counter() - begun)
    results = {
        "settings": {
            "command": " ".join(["compare.py", *sys.argv[1:]]),
            "threads": args.threads,
            "dtype": args.dtype,
            "chain": args.chain,
            "calls": "as called by default" if args.default_calls else "outputs preallocated",
            "isa": args.isa,
            "environment": environment,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
        "machine": machine(),
        "versions": {name: version for part in parts.values() for name, version in part["versions"].items()},
        "rows": merged(parts),
        "thread_runtimes": {group: part["runtimes"] for group, part in parts.items()},
        "notes": notes,
        "seconds_by_group": seconds,
        "seconds": round(time.perf_counter() - start),
    }
    results["summary"] = report.summary(results)
    path = args.json or peers.BUILD / f"peers{report.suffix(results)}-{args.threads}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    report.show(results, console, args.csv, args.markdown, args.plots)
    console.print(f"Every row: {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
