"""Time what ranks cost: all_merge by gathers and by the tree, and a training step of SyncBatchNorm.

    python bench/ranks.py [--ranks 1 2 3 4] [--channels 64 256 2048] [--repeat 200]
    python bench/ranks.py --paper [--ranks 4 16 ... 10000] [--channels 256]

Starts mpiexec once for each number of ranks (pip install mpi4py mpich). Figures are medians of the slowest
rank, in microseconds. Ranks of MPICH spin while they wait; here they give way to each other, or with more
ranks than CPUs the figures would tell of nothing but spinning.

With --paper, what a merge takes of networks that are not at hand: messages are counted, bytes and latencies
assumed, and the merging itself is timed here, in one process.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from math import ceil, log2
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace

import numpy as np

import fastbn
from fastbn import distributed

SHAPE = (8, 0, 28, 28)  # of each rank's shard, with the channels in place of 0
GATHER, TREE = {sys.maxsize: sys.maxsize}, {}  # up to where distributed gathers: always, never
GIVE_WAY = {"MPIR_CVAR_POLLS_BEFORE_YIELD": "1", "MPIR_CVAR_POSIX_POLL_FREQUENCY": "1"}
NETWORKS = {
    "Ethernet": (50e-6, 1e9),
    "InfiniBand": (2e-6, 1e10),
}  # assumed: seconds a message, bytes a second


def medians(comm, repeat, function):
    """Seconds of a call, each begun by all ranks together; of the slowest rank."""
    from mpi4py import MPI

    times = []
    for _ in range(repeat):
        comm.Barrier()
        begun = perf_counter()
        function()
        times.append(comm.allreduce(perf_counter() - begun, MPI.MAX))
    return median(times)


def work(channels, repeat):
    """On each rank; rank 0 prints what it found."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    chosen = distributed._GATHERED
    rows = []
    for C in channels:
        rng = np.random.default_rng(comm.rank)
        stats = fastbn.BatchStats(rng.standard_normal(C), rng.random(C), 100)
        row = {"channels": C}
        for name, gathered in ("gather", GATHER), ("tree", TREE):
            distributed._GATHERED = gathered
            row[name] = medians(comm, repeat, lambda stats=stats: distributed.all_merge(stats, comm))
        distributed._GATHERED = chosen
        x = rng.standard_normal((SHAPE[0], C, *SHAPE[2:]), np.float32)
        for name, layer in ("synchronized", distributed.SyncBatchNorm(C)), ("apart", fastbn.BatchNorm(C)):

            def step(layer=layer, x=x):
                layer(x)
                layer.backward(x)

            row[name] = medians(comm, max(5, repeat // 10), step)
        rows.append(row)
    if comm.rank == 0:
        print(json.dumps(rows))


def messages(ranks, total):
    """That MPICH sends one after the other to gather so many bytes from all ranks on all ranks."""
    few = total < 81920 or (total < 524288 and ranks & (ranks - 1) == 0)
    return ceil(log2(ranks)) if few else ranks - 1


def seconds(function, repeat):
    times = []
    for _ in range(repeat):
        begun = perf_counter()
        function()
        times.append(perf_counter() - begun)
    return median(times)


def merging(ranks, channels):
    """Seconds that it takes to merge what was gathered from so many ranks."""
    rng = np.random.default_rng(0)
    part = distributed._packed(fastbn.BatchStats(rng.standard_normal(channels), rng.random(channels), 100))
    rows = np.tile(part, (ranks, 1))

    def merge():
        first, *others = [distributed._unpacked(row, fastbn.BatchStats) for row in rows]
        distributed._packed(first.merge(*others))

    return seconds(merge, max(3, 2000 // ranks))


def paper(ranks, channels):
    """(way, whether all_merge takes it, bytes that a rank receives, messages in a row, seconds of merging)"""
    comm = distributed._Ranks(SimpleNamespace(size=ranks, all_gather=None))
    levels, vector = ceil(log2(ranks)), 16 * channels + 16
    header, along = 8 * distributed._HEADER, 8 * comm._along()
    few = ranks * vector <= comm._most_gathered()
    first, rest = ranks * (header + along), ranks * max(0, vector - along)
    gathered = messages(ranks, first) + (messages(ranks, rest) if rest else 0)
    yield "gather", few, first + rest, gathered, merging(ranks, channels)
    told = messages(ranks, first), first
    if ranks > max(distributed._GATHERED):
        told = levels, levels * 2 * header  # whether all headers are the same
    yield (
        "tree",
        not few,
        told[1] + (levels + 1) * vector,
        told[0] + 2 * levels,
        levels * merging(2, channels),
    )


def print_paper(all_ranks, all_channels):
    names = [f"over {name}" for name in NETWORKS]
    print(f"| ranks | channels | way | received | messages in a row | merging here | {' | '.join(names)} |")
    print("|---|---|---|---|---|---|" + "---|" * len(names))
    for ranks, channels in product(all_ranks, all_channels):
        for way, taken, received, count, merge in paper(ranks, channels):
            totals = [count * each + received / rate + merge for each, rate in NETWORKS.values()]
            times = " | ".join(f"{t * 1e3:,.2f} ms" for t in (merge, *totals))
            way = f"**{way}**" if taken else way
            print(f"| {ranks:,} | {channels} | {way} | {received / 1e3:,.0f} KB | {count:,} | {times} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N")
    parser.add_argument("--channels", type=int, nargs="+", metavar="C")
    parser.add_argument("--repeat", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--paper", action="store_true", help="what networks and ranks would take")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.paper:
        print_paper(options.ranks or [4, 16, 50, 64, 200, 1000, 10000], options.channels or [256])
        return
    channels = options.channels or [64, 256, 2048]
    if options.work:
        work(channels, options.repeat)
        return
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if mpiexec is None:
        sys.exit("there is no mpiexec: pip install mpi4py mpich")
    print("| ranks | channels | all_merge, gather | all_merge, tree | step, synchronized | step, apart |")
    print("|---|---|---|---|---|---|")
    for ranks in options.ranks or [1, 2, 3, 4]:
        command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", __file__, "--work"]
        command += ["--repeat", str(options.repeat), "--channels", *map(str, channels)]
        done = subprocess.run(command, env=os.environ | GIVE_WAY, capture_output=True, text=True, check=True)
        for row in json.loads(done.stdout):
            times = [row[name] * 1e6 for name in ("gather", "tree", "synchronized", "apart")]
            print(f"| {ranks} | {row['channels']} | {' | '.join(f'{t:.0f}' for t in times)} |")


if __name__ == "__main__":
    main()
