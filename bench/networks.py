"""Time networks of torchvision, plain and accelerated by fastbn: training steps and evaluation.

    python bench/networks.py [--networks resnet18 ...] [--quick] [--json PATH] [--markdown PATH] ...

Both have the same random weights and input, and take turns in one process; a ratio is the median over rounds
of PyTorch's time over fastbn's. What batch norms, activations and additions take is that of separate steps
under PyTorch's profiler. Peak memory is that of further processes, one for each, on Linux.

What can be set for a whole process, for both alike, is kept with the results; bench/settings.py compares it.
"""

import argparse
import contextlib
import copy
import csv
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from statistics import geometric_mean, mean, median

import pages
import torch
import torch.nn.functional as F
from compare import machine
from report import markdown_table
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vision import import_torchvision

import fastbn.torch as fast
from fastbn.torch import modules

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
PRECISIONS = ("float32", "bfloat16")
MODES = ("training", "evaluation")
CONTESTANTS = ("plain", "accelerated")
SLOWER = 0.99
# How far the outputs of the two may be apart, as a share of the largest.
ALIKE = {"float32": 1e-3, "bfloat16": 0.1}

OURS = "fastbn.torch.batch_norm"  # what the profiler is told to call it
NORMS = {"forward": (OURS, "aten::batch_norm"), "backward": ("BatchNormBackward",)}
FORWARD = {
    *NORMS["forward"], "aten::relu", "aten::relu_", "aten::relu6", "aten::relu6_", "aten::hardtanh",
    "aten::hardtanh_", "aten::silu", "aten::silu_", "aten::hardswish", "aten::hardswish_", "aten::leaky_relu",
    "aten::leaky_relu_", "aten::add", "aten::add_",
}  # fmt: skip
# Of the names of nodes in the graph: ReluBackward0, NativeBatchNormBackward0, fastbn's _BatchNormBackward ...
BACKWARD = (*NORMS["backward"], "ReluBackward", "HardtanhBackward", "SiluBackward", "HardswishBackward")
NODE = "autograd::engine::evaluate_function: "


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of torchvision")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--batch", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=160, help="pixels a side (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: as PyTorch has it")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--quick", action="store_true", help="one round of 32 pixels: to see that it works")
    parser.add_argument("--results", type=Path, metavar="JSON", help="show those of an earlier run")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--markdown", type=Path, metavar="PATH")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="keep the times alone, as the site has them")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw those of --csv")
    parser.add_argument("--peak-of", choices=CONTESTANTS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.plot and not args.csv:
        parser.error("--plot draws what --csv keeps: give both")
    if args.quick:
        args.size, args.rounds = 32, 1
    return args


class Contestant:
    """A network with its optimizer, and the step or the call that is timed."""

    def __init__(self, model, x, labels, mode, precision):
        self.model = model.train(mode == "training")
        self.x, self.labels, self.mode, self.precision = x, labels, mode, precision
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        self.seconds = []

    def compute(self):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.model(self.x)

    def turn(self):
        if self.mode == "evaluation":
            with torch.no_grad():
                self.compute()
            return
        self.optimizer.zero_grad()
        F.cross_entropy(self.compute().float(), self.labels).backward()
        self.optimizer.step()

    def take_turn(self):
        start = time.perf_counter()
        self.turn()
        self.seconds.append(time.perf_counter() - start)


def network(name, layout):
    torch.manual_seed(0)
    model = getattr(import_torchvision().models, name)(weights=None)
    return model.to(memory_format=LAYOUTS[layout])


def inputs(args, layout):
    x = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=LAYOUTS[layout]), torch.arange(args.batch)


def contestants(args, name, layout, precision, mode):
    plain = network(name, layout)
    models = {"plain": plain, "accelerated": fast.accelerate(copy.deepcopy(plain))}
    return {who: Contestant(model, *inputs(args, layout), mode, precision) for who, model in models.items()}


def measure(args, name, layout, precision, mode):
    """A row of the results."""
    both = contestants(args, name, layout, precision, mode)
    with fast.record() as calls, torch.no_grad():
        outputs = [contestant.compute().double() for contestant in (both["accelerated"], both["plain"])]
    apart = ((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()).item()
    if mode == "evaluation" and not apart <= ALIKE[precision]:
        sys.exit(f"{name} {layout} {precision}: accelerated and plain are {apart:.1e} apart")
    for contestant in both.values():
        contestant.turn()
    gc.collect()
    for _ in range(args.rounds):
        for contestant in random.sample(list(both.values()), 2):
            contestant.take_turn()
    times = {who: contestant.seconds for who, contestant in both.items()}
    row = {
        "network": name,
        "layout": layout,
        "precision": precision,
        "mode": mode,
        "calls": Counter(call.how for call in calls),
        "milliseconds": {who: 1e3 * median(seconds) for who, seconds in times.items()},
        "ratio": median(a / b for a, b in zip(times["plain"], times["accelerated"], strict=True)),
        "inside": {who: inside(contestant) for who, contestant in both.items()},
    }
    if not args.no_memory and mode == "training":
        row["peak_megabytes"] = {who: peak(args, who, name, layout, precision) for who in CONTESTANTS}
    return row


@contextlib.contextmanager
def named_calls():
    """Let the profiler see the calls of our batch norm as such, whatever they go to."""
    ours = modules.batch_norm_of_layer

    def named(*args, **kwargs):
        with torch._C._profiler._RecordFunctionFast(OURS):  # at a tenth of what record_function takes
            return ours(*args, **kwargs)

    modules.batch_norm_of_layer = named
    try:
        yield
    finally:
        modules.batch_norm_of_layer = ours


def inside(contestant, turns=5):
    """Milliseconds a turn in batch norms, activations and additions, forward and backward; medians.

    And "calls": microseconds of a batch norm alone, the mean of a turn; more where more is fused with it.
    """
    with named_calls(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(turns):
            with torch.profiler.record_function("turn"):
                contestant.turn()
    events = profile.events()
    ranges = [event.time_range for event in events if event.name == "turn"]
    sums = {part: [0.0] * turns for part in ("forward", "backward")}
    calls = {part: [[] for _ in ranges] for part in sums}
    for event in events:
        part = part_of(event.name)
        if part and not is_inside_another(event):
            for i, turn in enumerate(ranges):
                if turn.start <= event.time_range.start <= turn.end:
                    sums[part][i] += event.cpu_time_total / 1e3
                    if any(name in event.name for name in NORMS[part]):
                        calls[part][i].append(event.cpu_time_total)
    found = {part: median(values) for part, values in sums.items()}
    return found | {"calls": {part: median(map(mean, of)) for part, of in calls.items() if all(of)}}


def part_of(name):
    if name in FORWARD:
        return "forward"
    return "backward" if name.startswith(NODE) and any(node in name for node in BACKWARD) else ""


def is_inside_another(event):
    """Whether an event is a part of one that counts, or of what does not count at all."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if part_of(event.name) or event.name.startswith((NODE, "Optimizer")):
            return True
    return False


def peak(args, who, name, layout, precision):
    """Peak memory of a training step in a process of its own, in megabytes; None where it cannot be had."""
    command = [
        sys.executable, __file__, "--peak-of", who, "--networks", name, "--layouts", layout,
        "--precisions", precision, "--batch", str(args.batch), "--size", str(args.size),
        *(["--threads", str(args.threads)] if args.threads else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def print_peak(args):
    """What the process holds at most in its third step, as Linux has it."""
    (name,), (layout,), (precision,) = args.networks, args.layouts, args.precisions
    model = network(name, layout)
    if args.peak_of == "accelerated":
        fast.accelerate(model)
    contestant = Contestant(model, *inputs(args, layout), "training", precision)
    for _ in range(2):
        contestant.turn()
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        contestant.turn()
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    except OSError:
        print("null")
        return
    print(int(line.split()[1]) / 1e3)


def run(args, console):
    threads = torch.get_num_threads()
    rows = list(product(args.networks, args.layouts, args.precisions, args.modes))
    start = time.perf_counter()
    results = {
        "command": " ".join(["networks.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": machine()["Model name"],
        "threads": threads,
        "batch": args.batch,
        "size": args.size,
        "rounds": args.rounds,
        "versions": {"torch": torch.__version__, "torchvision": import_torchvision().__version__},
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("GLIBC_", "MALLOC_", "LD_PRELOAD", "OMP_", "FASTBN_", "KMP_", "THP_"))
        },
        "rows": [],
    }
    results["rows"] = [measure(args, *row) for row in track(rows, console=console, auto_refresh=False)]
    results["seconds"] = round(time.perf_counter() - start)
    return results


HEADINGS = (
    "network", "layout", "precision", "mode", "PyTorch ms", "fastbn ms", "ratio",
    "inside: forward", "backward", "a call: forward us", "backward", "peak MB",
)  # fmt: skip


def cells(row):
    def pair(values, digits=".1f"):
        before, after = (values[who] for who in CONTESTANTS)
        return "" if before is None or after is None else f"{before:{digits}} -> {after:{digits}}"

    parts = ("forward", "backward") if row["mode"] == "training" else ("forward",)
    inside = [pair({who: row["inside"][who][part] for who in CONTESTANTS}) for part in parts]
    calls = [pair({who: row["inside"][who]["calls"][part] for who in CONTESTANTS}, ".0f") for part in parts]
    return [
        row["network"],
        row["layout"],
        row["precision"],
        row["mode"],
        *(f"{row['milliseconds'][who]:.1f}" for who in CONTESTANTS),
        f"{row['ratio']:.3f}",
        *(cell for cells in (inside, calls) for cell in [*cells, ""][:2]),
        pair(row["peak_megabytes"], ".0f") if "peak_megabytes" in row else "",
    ]


def conclusion(results):
    """Geometric means, and the rows that are slower."""
    rows = results["rows"]
    for precision, mode in product(PRECISIONS, MODES):
        found = [row["ratio"] for row in rows if (row["precision"], row["mode"]) == (precision, mode)]
        if found:
            ratio = geometric_mean(found)
            yield f"{precision} {mode}: {ratio:.3f} in the geometric mean of {len(found)} rows"
    for row in sorted(rows, key=lambda row: row["ratio"]):
        if row["ratio"] < SLOWER:
            place = " ".join(row[key] for key in ("network", "layout", "precision", "mode"))
            yield f"below {SLOWER}: {place}: {row['ratio']:.3f}"


def write_csv(path, results):
    """A line for each row: where, and milliseconds of both."""
    settings = [results["cpu"], *(results[name] for name in ("threads", "batch", "size"))]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["cpu", "threads", "batch", "size", "network", "layout", "precision", "mode"]
        writer.writerow([*columns, *CONTESTANTS, "ratio"])
        for row in results["rows"]:
            place = [row[name] for name in ("network", "layout", "precision", "mode")]
            times = [f"{row['milliseconds'][who]:.1f}" for who in CONTESTANTS]
            writer.writerow([*settings, *place, *times, f"{row['ratio']:.3f}"])


def header(results):
    yield f"batch {results['batch']}, {results['size']} pixels a side, {results['threads']} threads"
    yield ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"{results['date']}, {results['rounds']} rounds, {results['seconds']} s: {results['command']}"
    for name, value in results["environment"].items():
        yield f"{name}={value}"


def main():
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(args)
        return
    console = Console(width=None if sys.stdout.isatty() else 170)
    results = json.loads(args.results.read_text()) if args.results else run(args, console)
    table = Table(
        *HEADINGS, title="Networks of torchvision, plain and accelerated", caption="\n".join(header(results))
    )
    for row in results["rows"]:
        table.add_row(*cells(row), style="red" if row["ratio"] < SLOWER else None)
    console.print(table)
    lines = list(conclusion(results))
    console.print("\n".join(lines), highlight=False, markup=False)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.markdown:
        text = ["# Networks, plain and accelerated", "", *(f"{line}\n" for line in header(results))]
        text += [*(f"- {line}" for line in lines), "", *markdown_table(HEADINGS, map(cells, results["rows"]))]
        args.markdown.write_text("\n".join(text) + "\n")
    if args.csv:
        write_csv(args.csv, results)
    if args.plot:
        pages.draw_networks(pages.lines_of(args.csv), args.plot)


if __name__ == "__main__":
    main()
