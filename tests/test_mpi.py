"""fastbn.distributed on processes, under mpiexec: 1 to 4 ranks, their threads, and what ends them."""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mpi4py", reason="needs the extra [mpi]")
MPIEXEC = shutil.which(
    "mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
)
if MPIEXEC is None:
    pytest.skip("there is no mpiexec: pip install mpich", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests" / "mpi" / "programs.py"
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def mpiexec(size, program, *arguments, timeout=240, cwd=None, **environment):
    """Run a program on so many ranks, as the documentation says to."""
    variables = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    variables |= {"MPIR_CVAR_POLLS_BEFORE_YIELD": "1", "MPIR_CVAR_POSIX_POLL_FREQUENCY": "1"}  # few CPUs
    variables |= environment
    return subprocess.run(
        [MPIEXEC, "-n", str(size), sys.executable, "-m", "mpi4py", str(program), *arguments],
        env=variables, cwd=cwd, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_programs(size):
    done = mpiexec(size, PROGRAMS, "merge", "layers", "groups", "out_of_step", "one_evaluates")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_example():
    """Four ranks train to the weights that one process gets from whole batches."""
    for library in "matplotlib", "sklearn":
        pytest.importorskip(library, reason="the examples need the extra [demo]")
    program = ROOT / "examples" / "mpi_train.py"
    if not program.exists():
        pytest.skip("the tests were copied without examples/")
    done = mpiexec(4, program, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"[0-9.]+% of the test digits", done.stdout)[0].partition("%")[0]) > 90
    assert float(re.search(r"the same to (\S+)", done.stdout)[1]) < 1e-5


@pytest.mark.parametrize(("program", "sign"), [("raises", "RuntimeError: done for"), ("killed", "signal 9")])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_ends_ends_all(size, program, sign):
    done = mpiexec(size, PROGRAMS, program)
    seconds = time.time() - float(re.search(r"the end comes at ([0-9.]+)", done.stdout)[1])
    assert done.returncode != 0
    assert sign in done.stdout + done.stderr
    assert seconds < 10


def told_by(done):
    """What the ranks have printed, whose lines mpiexec may join."""
    return sorted(re.findall(r"rank \d: \d", done.stdout))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells of CPUs")
@pytest.mark.parametrize(
    ("size", "environment", "expected"),
    [
        (1, {}, CPUS),
        (2, {}, max(1, CPUS // 2)),
        (3, {}, max(1, CPUS // 3)),
        (2, {"OMP_NUM_THREADS": "2"}, min(2, CPUS)),
        (2, {"FASTBN_NUM_THREADS": "2"}, min(2, CPUS)),
    ],
)
def test_threads_per_rank(size, environment, expected):
    done = mpiexec(size, PROGRAMS, "threads", **environment)
    assert done.returncode == 0, done.stderr
    assert told_by(done) == [f"rank {rank}: {expected}" for rank in range(size)]


@pytest.mark.skipif(CPUS < 2, reason="needs two CPUs")
def test_threads_of_ranks_on_cpus_of_their_own():
    done = mpiexec(2, PROGRAMS, "threads_bound")
    assert done.returncode == 0, done.stderr
    assert told_by(done) == ["rank 0: 1", "rank 1: 2"]


PAGE = ROOT / "docs" / "many_machines.md"
CHECKS = [
    "assert stats.count == 3 * 2400\n",
    """
everything = np.concatenate(comm.allgather(np.concatenate(list(slices()))))
alone = list(network)
alone[1::2] = [fastbn.BatchNorm1d(16, activation="relu") for _ in range(2)]
fastbn.recalibrate(alone, [everything], method="sequential")
for ours, theirs in zip(network[1::2], alone[1::2], strict=True):
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours.running_var, theirs.running_var, rtol=1e-6)
""",
    "assert np.isfinite(y).all()\n",
]


@pytest.mark.skipif(not PAGE.exists(), reason="the tests were copied without docs/")
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_guide(size, tmp_path):
    """Every program of docs/many_machines.md that is for MPI."""
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    x = np.random.default_rng(0).random((2400, 16, 3), np.float32) + 100
    (tmp_path / "data").mkdir()
    for number, part in enumerate(np.split(x, [1001, 1005, 2300])):
        np.save(tmp_path / "data" / f"{number}.npy", part)
    for program, check in zip([p for p in programs if "mpi4py" in p], CHECKS, strict=True):
        (tmp_path / "program.py").write_text(program + check, encoding="utf-8")
        done = mpiexec(size, "program.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    state = np.load(tmp_path / "bn.npz")
    np.testing.assert_allclose(state["running_mean"], x.mean((0, 2), np.float64), rtol=1e-6)
    np.testing.assert_allclose(state["running_var"], x.var((0, 2), np.float64, ddof=1), rtol=2e-6)


@pytest.mark.skipif(not PAGE.exists(), reason="the tests were copied without docs/")
def test_first_try():
    """The command of the page by which one sees that all ranks are there."""
    command = re.search(r'python -m mpi4py -c "(.*)"', PAGE.read_text(encoding="utf-8"))[1]
    done = mpiexec(2, "-c", command)
    assert done.returncode == 0, done.stderr
    line = f"2 {platform.node()} {CPUS}\n"
    assert sorted(done.stdout) == sorted(2 * line)  # ranks may write into each other's lines
