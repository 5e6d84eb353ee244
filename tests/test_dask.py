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


@pytest.mark.slow
def test_an_array_that_workers_cannot_hold(program, tmp_path):
    """1 GB by two processes that may take 0.4 GB each; the program compares with one process itself."""
    source = str(Path(fastbn.__file__).resolve().parents[1])
    command = [sys.executable, "-W", "error", PROGRAM, "--gigabytes", "1", "--worker-gigabytes", "0.4"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "1.0 GB in 16 chunks" in done.stdout
    peaks = [int(peak) for peak in re.findall(r"worker \d+: at most (\d+) MB of 400 MB", done.stdout)]
    assert len(peaks) == 2
    assert max(peaks) < 400
    assert "one process alone: means differ by" in done.stdout  # or it would have failed
