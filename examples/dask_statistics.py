"""Batch norm's statistics of an array that no worker has memory for, by Dask.

The array, 8 GB of float32 images in chunks of 64 MB, is made where it is needed by a random generator that is
seeded for each chunk, in place of files that are read. Each worker is a process that may hold 1 GB. What
travels between them is a BatchStats for each chunk, some kilobytes; they are merged sixteen at a time. The
same chunks, one after the other in this process, give the same statistics, which is checked.

    python examples/dask_statistics.py [--gigabytes 8] [--workers 2] [--worker-gigabytes 1]
"""

import argparse
import os
import resource
from time import perf_counter
from typing import Any

import dask
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster

import fastbn
from fastbn.typing import Array

CHANNELS, SIDE, IMAGES = 64, 56, 80  # of a chunk: 64 MB


def make_chunk(number: int) -> Array:
    """Images whose mean and deviation drift from chunk to chunk, and differ between channels."""
    x = np.random.default_rng([0, number]).random((IMAGES, CHANNELS, SIDE, SIDE), np.float32)
    x *= np.linspace(0.5, 2, CHANNELS, dtype=np.float32)[:, None, None] * np.float32(1 + number % 3)
    x += np.float32(100 + number % 7)
    return x


def make_array(chunks: int) -> da.Array:
    """A Dask array of that many chunks along the first axis."""

    def make(block_info: Any = None) -> Array:
        return make_chunk(block_info[None]["chunk-location"][0])

    sizes = ((IMAGES,) * chunks, (CHANNELS,), (SIDE,), (SIDE,))
    return da.map_blocks(make, chunks=sizes, dtype=np.float32, meta=np.empty((0,) * 4, np.float32))


@dask.delayed
def merge(first: fastbn.BatchStats, *others: fastbn.BatchStats) -> fastbn.BatchStats:
    return first.merge(*others)


def statistics(array: da.Array) -> Any:
    """The BatchStats of a Dask array (N, C, ...), to be computed; each chunk must have all channels."""
    parts = [dask.delayed(fastbn.batch_stats)(block) for block in array.to_delayed().ravel()]
    while len(parts) > 1:
        parts = [merge(*parts[start : start + 16]) for start in range(0, len(parts), 16)]
    return parts[0]


def peak_memory() -> tuple[int, int]:
    """Process id and largest resident memory, in bytes, of the process that this runs in."""
    return os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8, help="size of the array")
    parser.add_argument("--workers", type=int, default=2, help="how many processes")
    parser.add_argument("--worker-gigabytes", type=float, default=1, help="memory that each of them may take")
    options = parser.parse_args()
    chunks = max(1, round(options.gigabytes * 1e9 / (4 * IMAGES * CHANNELS * SIDE * SIDE)))
    limit = round(options.worker_gigabytes * 1e9)
    array = make_array(chunks)
    print(f"{array.shape} of {array.dtype}: {array.nbytes / 1e9:.1f} GB in {chunks} chunks")

    with (
        LocalCluster(
            n_workers=options.workers,
            threads_per_worker=1,
            memory_limit=limit,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        before = dict(client.run(peak_memory).values())
        start = perf_counter()
        stats = statistics(array).compute()
        seconds = perf_counter() - start
        after = dict(client.run(peak_memory).values())
    print(f"statistics of {stats.count} values a channel in {seconds:.1f} s by {options.workers} workers")
    for process, peak in after.items():
        print(f"worker {process}: at most {peak / 1e6:.0f} MB of {limit / 1e6:.0f} MB")
    assert before.keys() == after.keys(), "a worker was killed for its memory"
    assert max(after.values()) < limit

    bn = fastbn.BatchNorm2d(CHANNELS)
    fastbn.update_running(bn.running_mean, bn.running_var, stats, momentum=1)  # now it evaluates by them

    alone = fastbn.recalibrate(fastbn.BatchNorm2d(CHANNELS), map(make_chunk, range(chunks)))
    assert stats.count == alone.count
    mean = np.abs((stats.mean - alone.mean) / np.sqrt(alone.var)).max()
    var = np.abs(stats.var / alone.var - 1).max()
    print(f"one process alone: means differ by {mean:.0e} deviations, variances by {var:.0e} of theirs")
    assert max(mean, var) < 1e-12


if __name__ == "__main__":
    main()
