"""Statistics of arrays that are nowhere as a whole, by the program that shows it on Dask."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference

import fastbn

SOURCE = str(Path(fastbn.__file__).resolve().parents[1])
PROGRAM = Path(__file__).resolve().parents[1] / "examples" / "dask_statistics.py"


@pytest.fixture(scope="module")
def program():
    if not PROGRAM.exists():
        pytest.skip("the tests were copied without examples/")
    for library in "dask.array", "distributed":
        pytest.importorskip(library, reason="the extra [dask] is not installed")
    spec = importlib.util.spec_from_file_location("dask_statistics", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "chunks", [(20, 6, 4, 5), (7, 6, 4, 5), (7, 6, 2, 3), (1, 6, 4, 1)], ids=str
)  # from one chunk to a hundred, which are merged in two rounds
def test_chunks_are_pooled(rng, program, chunks):
    dask = pytest.importorskip("dask")
    x = (rng.standard_normal((20, 6, 4, 5)) + np.arange(20).reshape(20, 1, 1, 1)).astype(np.float32)
    array = dask.array.from_array(x, chunks=chunks)
    with dask.config.set(scheduler="synchronous"):
        stats = program.statistics(array).compute()
    mean, var, count = reference.batch_stats(x)
    assert stats.count == count
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(stats.var, var, rtol=2e-6)


def test_each_chunk_is_made_of_its_number(program):
    x = program.make_array(3)
    assert x.chunks == ((80,) * 3, (64,), (56,), (56,))
    assert np.array_equal(x.blocks[2].compute(scheduler="synchronous"), program.make_chunk(2))
    assert not np.array_equal(program.make_chunk(1), program.make_chunk(2))


# Computes statistics while a worker is killed, and again; prints whether both are the same to the bit.
KILLING = """
import os, signal, time
from distributed import Client, LocalCluster
import dask_statistics

def main():
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        stats = dask_statistics.statistics(dask_statistics.make_array(8))
        (first, _), _ = client.run(dask_statistics.peak_memory).values()
        future = client.compute(stats)
        while not any(client.processing().values()):
            time.sleep(0.01)
        os.kill(first, signal.SIGKILL)
        print("pending" if not future.done() else "done")
        print(future.result() == stats.compute())

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_a_worker_that_is_killed(program, tmp_path):
    (tmp_path / "killing.py").write_text(KILLING)
    done = subprocess.run(
        [sys.executable, "killing.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([SOURCE, str(PROGRAM.parent)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "pending\nTrue\n", done.stderr


@pytest.mark.slow
def test_an_array_that_workers_cannot_hold(program, tmp_path):
    """8 GB by two processes that may take 1 GB each; the program compares with one process itself."""
    done = subprocess.run(
        [sys.executable, "-W", "error", PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "8.0 GB in 125 chunks" in done.stdout
    peaks = [int(peak) for peak in re.findall(r"worker \d+: at most (\d+) MB of 1000 MB", done.stdout)]
    assert len(peaks) == 2
    assert max(peaks) < 1000
    found = re.search(r"means differ by (\S+) deviations, variances by (\S+) of theirs", done.stdout)
    assert max(map(float, found.groups())) < 1e-12
