"""Which calls are shared out, which go alone (case 51); what keeps threads from starting; what they get."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from operations import not_sanitized

import fastbn
from fastbn import _kernels, threads

pytestmark = pytest.mark.skipif(_kernels.openmp is None, reason="built without OpenMP")
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SHAPE = (8, 64, 28, 28)
ELEMENTS = 8 * 64 * 28 * 28
MICROSECOND = 1000
WON = (10 * MICROSECOND, 12 * MICROSECOND)  # the caller's share and the whole call
LOST = (10 * MICROSECOND, 60 * MICROSECOND)


@pytest.fixture(autouse=True)
def two_threads():
    fastbn.set_num_threads(2)
    _kernels.forget_sharing()
    fastbn.batch_stats(np.ones(SHAPE, np.float32))  # starts the threads: a call that must is not judged
    _kernels.forget_sharing()
    yield
    fastbn.set_num_threads(None)
    _kernels.forget_sharing()


def judge(outcome, elements=ELEMENTS):
    _kernels.judge(elements, 2, *outcome)


def ask(calls=1, elements=ELEMENTS):
    """How many of so many calls go alone, without making them."""
    before = _kernels.sharing()[1]
    for _ in range(calls):
        _kernels.would_share(elements)
    return _kernels.sharing()[1] - before


def test_calls_are_shared_out_until_sharing_loses():
    assert ask(100) == 0
    for _ in range(100):
        judge(WON)
    assert ask(100) == 0


def test_after_a_loss_calls_go_alone_and_come_back():
    judge(LOST)
    time.sleep(0.01)  # the pause is at least twenty times as long as what was lost
    assert ask(1000) == 8
    judge(WON)
    assert ask(1000) == 0


def test_a_pause_lasts_for_a_time_too():
    judge((10 * MICROSECOND, 20_000 * MICROSECOND))
    assert ask(1000) == 1000
    time.sleep(0.5)
    assert ask(1000) == 0


def test_pauses_grow_until_tries_are_rare():
    alone = []
    for _ in range(8):
        judge(LOST)  # the first one after a pause wakes the threads and is not held against them
        judge(LOST)
        time.sleep(0.002)
        alone.append(ask(10_000))
    assert alone == [8, 32, 128, 512, 2048, 8192, 8192, 8192]
    assert 2 / alone[-1] < 0.01


def test_wins_pay_for_small_losses():
    slightly_late = (10 * MICROSECOND, 25 * MICROSECOND)
    for _ in range(50):
        judge(slightly_late)
        judge(WON)
    assert ask(100) == 0
    for _ in range(50):
        judge(slightly_late)
    assert ask(1) == 1


def test_other_sizes_learn_by_themselves():
    judge(LOST)
    assert ask(1) == 1
    assert ask(1, elements=4 * ELEMENTS) == 0


def digests(x, **keywords):
    y, stats = fastbn.batch_norm_forward(x, **keywords)
    grads = fastbn.batch_norm_backward(y, x, stats, **keywords)
    return [a.tobytes() for a in (y, stats.mean, stats.var, *grads[:3])]


def test_a_call_that_goes_alone_gives_the_same_bits():
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    shared_before = _kernels.sharing()[0]
    shared = digests(x, num_threads=2)
    assert _kernels.sharing()[0] == shared_before + 2
    judge((10 * MICROSECOND, 20_000 * MICROSECOND))
    counts = _kernels.sharing()
    alone = digests(x)
    assert _kernels.sharing() == (counts[0], counts[1] + 2, counts[2])
    assert alone == shared


def test_a_given_number_is_obeyed():
    judge((10 * MICROSECOND, 20_000 * MICROSECOND))
    x = np.ones(SHAPE, np.float32)
    counts = _kernels.sharing()
    digests(x, num_threads=2)
    assert _kernels.sharing()[:2] == (counts[0] + 2, counts[1])


def test_show_config_tells(capsys):
    judge(LOST)
    ask(3)
    found = fastbn.show_config("dicts")["sharing"]
    assert (found["shared"], found["alone"], found["lost"]) == (1, 3, 1)
    fastbn.show_config()
    assert "3 went alone" in capsys.readouterr().out


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout.split(), done.stderr


@linux_only
def test_callers_do_not_multiply_threads():
    """Case 48: while one caller has the CPUs, others do their work alone."""
    code = """
import threading, numpy as np, fastbn
from fastbn import _kernels
fastbn.set_num_threads(_kernels.openmp_threads() * 2)
x = np.ones((16, 64, 56, 56), np.float32)
def caller():
    for _ in range(10): fastbn.batch_stats(x)
callers = [threading.Thread(target=caller) for _ in range(12)]
[c.start() for c in callers], [c.join() for c in callers]
print(_kernels.most_at_work() - 12 - _kernels.openmp_threads() * 2)
"""
    [[beyond], _] = run_python(code)
    assert int(beyond) <= 0


@linux_only
def test_a_dead_thread_gives_its_pool_back():
    code = """
import os, threading, time, numpy as np, fastbn
x = np.ones((8, 64, 56, 56), np.float32)
def tasks(): return len(os.listdir("/proc/self/task"))
before = tasks()
for _ in range(20):
    thread = threading.Thread(target=fastbn.batch_stats, args=(x,), kwargs={"num_threads": 4})
    thread.start(), thread.join()
for _ in range(200):
    if tasks() == before: break
    time.sleep(0.01)
print(tasks() - before)
"""
    assert run_python(code)[0] == ["0"]


# Case 30. What can be had before the limit lets fewer threads start.
FEW = """
import resource, sys, numpy as np, fastbn
x = np.random.default_rng(0).standard_normal((8, 64, 56, 56), dtype=np.float32)
def bits(n):
    return fastbn.batch_norm_forward(x, num_threads=n)[0].tobytes()
alone = bits(1)
def used():
    return [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize")][0]
"""


@linux_only
@not_sanitized
@pytest.mark.parametrize("left", [0, 1, 4, 9, 16, 17, 24])
def test_no_memory_for_threads(left):
    code = f"""
out = np.empty_like(x)
def into(n):
    y, stats = fastbn.batch_norm_forward(x, out=out, num_threads=n)
into(1)
limit = used() + ({left} << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    into(8)
    print(out.tobytes() == alone)
except MemoryError:
    print("MemoryError")
"""
    found, told = run_python(FEW + code)
    assert found[0] in ("True", "MemoryError")
    assert found[0] == "MemoryError" or told.count("threads can be had") == (left < 60)


@linux_only
def test_no_thread_can_be_started():
    """A limit of processes: root has none, so a user without rights is taken."""
    code = """
import os
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))
print(bits(8) == alone, bits(8) == alone)
"""
    found, told = run_python(FEW + code)
    assert found == ["True", "True"]
    assert told.count("threads can be had") == 1


@linux_only
def test_very_many_threads():
    code = """
print(bits(1024) == alone)
"""
    assert run_python(FEW + code)[0] == ["True"]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the module has another name")
def test_after_a_subinterpreter():
    """Case 53."""
    interpreters = "_xxsubinterpreters" if sys.version_info < (3, 13) else "_interpreters"
    code = f"""
import numpy as np, fastbn, {interpreters} as interpreters
x = np.ones((8, 64, 56, 56), np.float32)
interpreters.destroy(interpreters.create())
fastbn.batch_norm_forward(x, num_threads=4)
interpreters.create()
print(fastbn.batch_norm_forward(x, num_threads=4)[0].shape[0])
"""
    assert run_python(code)[0] == ["8"]


def test_flush_to_zero_and_rounding_are_the_callers_in_all_threads():
    code = """
import ctypes, ctypes.util, hashlib, numpy as np, fastbn
libm = ctypes.CDLL(ctypes.util.find_library("m"))
rng = np.random.default_rng(0)
x = rng.standard_normal((8, 64, 56, 56), dtype=np.float32)
tiny = x * np.float32(1e-38)
def bits(n):
    found = []
    for a in x, tiny:
        y, stats = fastbn.batch_norm_forward(a, eps=0.0, num_threads=n)
        z = fastbn.batch_norm(a, np.zeros(64, "f"), np.full(64, 2.0, "f"), num_threads=n)
        found += [y.tobytes(), z.tobytes(), stats.mean.tobytes(), stats.var.tobytes()]
    return hashlib.sha256(b"".join(found)).hexdigest()
nearest = bits(4)  # starts the threads, before the caller's mode changes
UPWARD = 0x800 if __import__("platform").machine() == "x86_64" else 0x400000
assert libm.fesetround(UPWARD) == 0
print(bits(1) == bits(4), bits(1) != nearest)
libm.fesetround(0)
print(bits(4) == nearest)
"""
    assert run_python(code)[0] == ["True", "True", "True"]


def test_flush_denormal_of_pytorch():
    pytest.importorskip("torch")
    code = """
import numpy as np, fastbn, torch
x = np.random.default_rng(0).standard_normal((8, 64, 56, 56), dtype=np.float32) * np.float32(1e-38)
mean, var = np.zeros(64, "f"), np.full(64, 2.0, "f")
def bits(n):
    return fastbn.batch_norm(x, mean, var, num_threads=n).tobytes()
ordinary = bits(4)
assert torch.set_flush_denormal(True)
print(bits(1) == bits(4), bits(1) != ordinary)
"""
    assert run_python(code)[0] == ["True", "True"]


def test_threads_that_call_at_once_leave_nothing_at_work():
    x = np.ones((8, 64, 56, 56), np.float32)
    callers = [threading.Thread(target=fastbn.batch_stats, args=(x,)) for _ in range(8)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    _kernels.forget_sharing()
    before = _kernels.sharing()[0]
    fastbn.batch_stats(x)
    assert _kernels.sharing()[0] == before + 1


def test_stack_size_of_the_environment(monkeypatch):
    for text, expected in ("", 0), ("64", 65536), ("2m", 2 << 20), (" 512 K ", 512 << 10), ("x", 0):
        monkeypatch.setenv("OMP_STACKSIZE", text)
        assert threads.stack_bytes() == expected
