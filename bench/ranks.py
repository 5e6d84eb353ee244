"""Time what ranks cost: all_merge by gathers and by the tree, and a training step of SyncBatchNorm.

    python bench/ranks.py [--ranks 1 2 3 4] [--channels 64 256 2048] [--repeat 200]

Starts mpiexec once for each number of ranks (pip install mpi4py mpich). Figures are medians of the slowest
rank, in microseconds. Ranks of MPICH spin while they wait: more of them than CPUs tell nothing but that.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

import fastbn
from fastbn import distributed

SHAPE = (8, 0, 28, 28)  # of each rank's shard, with the channels in place of 0


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
    rows = []
    for C in channels:
        rng = np.random.default_rng(comm.rank)
        stats = fastbn.BatchStats(rng.standard_normal(C), rng.random(C), 100)
        row = {"channels": C}
        for name, few, gathered in ("gather", 64, 1 << 20), ("tree", 0, 0):
            distributed._FEW, distributed._GATHERED = few, gathered
            row[name] = medians(comm, repeat, lambda stats=stats: distributed.all_merge(stats, comm))
        distributed._FEW, distributed._GATHERED = 64, 1 << 20
        x = rng.standard_normal((SHAPE[0], C, *SHAPE[2:]), np.float32)
        for name, layer in ("synchronized", distributed.SyncBatchNorm(C)), ("apart", fastbn.BatchNorm(C)):

            def step(layer=layer, x=x):
                layer(x)
                layer.backward(x)

            row[name] = medians(comm, max(5, repeat // 10), step)
        rows.append(row)
    if comm.rank == 0:
        print(json.dumps(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4], metavar="N")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 256, 2048], metavar="C")
    parser.add_argument("--repeat", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.channels, options.repeat)
        return
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if mpiexec is None:
        sys.exit("there is no mpiexec: pip install mpi4py mpich")
    print("| ranks | channels | all_merge, gather | all_merge, tree | step, synchronized | step, apart |")
    print("|---|---|---|---|---|---|")
    for ranks in options.ranks:
        command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", __file__, "--work"]
        command += ["--repeat", str(options.repeat), "--channels", *map(str, options.channels)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for row in json.loads(done.stdout):
            times = [row[name] * 1e6 for name in ("gather", "tree", "synchronized", "apart")]
            print(f"| {ranks} | {row['channels']} | {' | '.join(f'{t:.0f}' for t in times)} |")


if __name__ == "__main__":
    main()
